"""Methods in order, each with the ends of the prompt that it protects by itself, and all with the same ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from reports.formats import Table, words
from reports.keys import LineKey
from reports.names import named
from results.record import Record

ENDS = re.compile(r"(?:,|(?<=\())protect=([^,)]+)")
ABOUT = (
    "Means of the first metric, over the examples that all methods of a line answered in both ways, best first; = where two are "
    "equal. What stands in one order and not in the other comes from the ends of the prompt, not from the score of an entry."
)
Means = Mapping[tuple[str, str], Mapping[int, float]]  # of a method and its ends, by example


def protection_tables(records: Sequence[Record]) -> list[Table]:
    """One line for each model, benchmark, budget and pair of ends, where at least two methods were run both ways."""
    found: dict[tuple[str, ...], dict[tuple[str, str], dict[int, float]]] = {}
    lower: dict[tuple[str, ...], bool] = {}
    for record, at in zip(records, named(records), strict=True):
        if record.status != "ok" or not record.metrics or at.label.is_full:
            continue
        metric = next(iter(record.metrics))
        where = _where(at)
        lower[where] = metric in record.lower_is_better
        example = record.key.example * 1000 + record.key.seed
        found.setdefault(where, {}).setdefault(apart(at.label.name), {})[example] = record.metrics[metric]
    rows = []
    for where in sorted(found):
        for ends in sorted({ends for _, ends in found[where]} - {""}):
            both = sorted({name for name, mine in found[where] if mine == ends and (name, "") in found[where]})
            if len(both) < 2:
                continue
            asked = [found[where][name, mine] for name in both for mine in ("", ends)]
            shared = set.intersection(*(set(scores) for scores in asked))
            if shared:
                orders = (_order(found[where], both, mine, shared, lower[where]) for mine in ("", ends))
                rows.append(words(*where, str(len(shared)), ends.replace(":", ", "), *orders))
    header = ("model", "benchmark", "protocol", "budget", "n", "first, last", "each at its own ends", "all at these ends")
    return [Table("At equal protection", header, tuple(map(tuple, rows)), (ABOUT,))] if rows else []


def apart(name: str) -> tuple[str, str]:
    """`"snapkv(kernel=5,protect=4:8)"` -> `"snapkv(kernel=5)"` and `"4:8"`."""
    match = ENDS.search(name)
    return (ENDS.sub("", name).replace("()", ""), match[1]) if match else (name, "")


def _where(at: LineKey) -> tuple[str, ...]:
    return (at.model, str(at.task), ", ".join(filter(None, (at.protocol.prompt, str(at.protocol)))), at.asked.budget or "-")


def _order(found: Means, names: Sequence[str], ends: str, examples: set[int], lower: bool) -> str:
    means = {name: sum(found[name, ends][example] for example in examples) / len(examples) for name in names}
    ordered = sorted(names, key=lambda name: (means[name] if lower else -means[name], name))
    text = ""
    for before, name in zip([None, *ordered], ordered, strict=False):
        text += "" if before is None else " = " if means[before] == means[name] else " > "
        text += f"{name} {means[name]:.4g}"
    return text
