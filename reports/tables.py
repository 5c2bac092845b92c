"""From rows to one table: a line a model, benchmark, protocol, method and budget."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pandas as pd

from reports.statistics import Estimate, estimate, holm, paired_difference, proportion
from results.record import Key, Record

Where = tuple[str, ...]
Example = tuple[int, int]  # seed and number
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Line:
    """What one method at one budget did on one benchmark. Scores are absent where nothing ran, never 0."""

    model: str
    benchmark: str
    prompt: str
    protocol: str
    method: str
    budget: str
    n: int
    skipped: int
    failed: int
    compressed: int  # of n, how many prompts lost entries
    byte_share: float | None  # measured: kept over the full cache of the unconverted model
    allocated_share: float | None
    entries: float | None  # mean, right after compaction
    metric: str | None  # the benchmark's main one: what `score` is
    score: Estimate | None
    score_difference: Estimate | None  # to full, paired
    kl: Estimate | None
    top1: Estimate | None
    loss: Estimate | None
    asked: float | None = None  # entries, mean
    judge: Estimate | None = None  # 1 to 10
    own: bool = True  # a task that the embedded model can do
    p: float | None = None  # of the difference to full, by Holm over the panel's methods at this budget
    values: Mapping[Example, float] = field(default_factory=dict)  # the main metric by example
    asked_for: str = ""  # what else was asked: parameters, data, lengths; not the weights
    lower_is_better: bool = False

    @property
    def is_full(self) -> bool:
        return self.method.startswith("full@")

    @property
    def differs(self) -> bool:
        """Is a difference to full shown?"""
        return self.p is not None and self.p < SIGNIFICANT

    @property
    def panel(self) -> tuple[str, str, str, str]:
        return (self.model, self.benchmark, self.prompt, self.protocol)


def lines(records: Iterable[Record], ratings: Mapping[str, float] | None = None) -> list[Line]:
    """One line a cell of the suite, in the order: model, benchmark, protocol, method, budget.

    What would bear the same name but is not the same (another version, other head scores, another text of a plugin) is told apart
    by a mark behind the name, `mine#1a2b`.

    Args:
        ratings: a judge's, by row id.
    """
    groups: dict[Where, list[Record]] = {}
    for record in records:
        key = record.key
        asked = f"{key.revision} {key.benchmark_params} {key.data} {key.max_new_tokens} {key.fidelity}"  # not shown
        method = (key.method, key.params, key.budget)  # `asked` and the parameters tell apart, but are not shown
        where = (key.model, benchmark_of(record), key.prompt, protocol_of(key), asked, *method)
        groups.setdefault(where, []).append(record)
    found = [_line(where, groups[where], _full(where, groups), ratings or {}) for where in sorted(groups, key=_order)]
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, line in enumerate(found):
        alike.setdefault((line.panel, line.method.split("@")[0], line.budget), []).append(number)
    names = {(found[n].panel[0], found[n].method.split("@")[0]) for same in alike.values() if len(same) > 1 for n in same}
    found = [_told_apart(line, where) if (line.model, line.method.split("@")[0]) in names else line
             for line, where in zip(found, sorted(groups, key=_order), strict=True)]  # fmt: skip
    return _corrected(found)


def _told_apart(line: Line, where: Where) -> Line:
    asked, method, params = where[4], where[5], where[6]
    name, _, version = method.partition("@")
    mark = hashlib.sha256(f"{asked.split(' ', 1)[0]} {method} {params}".encode()).hexdigest()[:4]
    return replace(line, method=f"{name}#{mark}@{version}")


def _corrected(found: Sequence[Line]) -> list[Line]:
    """With the tests against full of all methods at one budget of a panel corrected together."""
    tests: dict[tuple[object, ...], dict[int, float]] = {}
    for number, line in enumerate(found):
        if line.score_difference and line.score_difference.p is not None and not line.is_full:
            tests.setdefault((line.panel, line.budget), {})[number] = line.score_difference.p
    corrected: dict[int, float] = {}
    for family in tests.values():
        corrected |= dict(zip(family, holm(list(family.values())), strict=True))
    return [replace(line, p=corrected.get(number)) for number, line in enumerate(found)]


def protocol_of(key: Key) -> str:
    """What of the protocol is no column of its own, in words."""
    routing = f"prefill routed by {key.routing.replace('_', ' ')}" if key.routing else ""
    sampled = f"sampled at temperature {key.temperature:g}" if key.temperature else "greedy"
    stops = "up to an end token" if key.stop == "eos" else "end tokens ignored"
    chat = "raw prompt" if key.chat == "raw" else "chat template"
    rows = f"a row a {'KV' if key.granularity == 'kv' else 'query'} head"
    parts = (chat, f"at most {key.truncation} tokens", rows, sampled, stops, key.dtype, routing)
    return ", ".join(part for part in parts if part)


def label_of(line: Line) -> str:
    """The method; on a variant, with its name: `snapkv on gqa-2`."""
    method, (_, plus, variant) = line.method.split("@")[0], line.model.partition("+")
    causal = " (argmax)" if line.protocol.endswith("argmax") else ""
    return f"{method} on {variant}{causal}" if plus else method


def benchmark_of(record: Record) -> str:
    """The benchmark with the length that its rows carry: lengths are columns, and are not averaged together."""
    length = record.columns.get("length")
    return record.key.benchmark if length is None or "length=" in record.key.benchmark else f"{record.key.benchmark} {length}"


def _full(where: Where, groups: dict[Where, list[Record]]) -> list[Record]:
    return next((rows for other, rows in groups.items() if other[:5] == where[:5] and other[5].startswith("full@")), [])


def _order(where: Where) -> tuple[object, ...]:
    *rest, method, params, budget = where
    size = float(budget.removesuffix("%")) if budget else 0.0
    return (*rest, not method.startswith("full@"), method, params, budget.endswith("%"), size)


def _line(where: Where, records: Sequence[Record], full: Sequence[Record], ratings: Mapping[str, float]) -> Line:
    done = [record for record in records if record.status == "ok"]
    scores, baseline = _by_example(done), _by_example(record for record in full if record.status == "ok")
    metric = next((next(iter(record.metrics)) for record in done if record.metrics), None)
    model, benchmark, prompt, protocol, _, method, _, budget = where
    return Line(
        model,
        benchmark,
        prompt,
        protocol,
        method,
        budget,
        n=len(done),
        skipped=sum(record.status == "skipped" for record in records),
        failed=sum(record.status == "failed" for record in records),
        compressed=sum(bool(record.compressed) for record in done),
        byte_share=_share(done, "bytes_kept"),
        allocated_share=_share(done, "bytes_allocated"),
        entries=float(np.mean([record.entries for record in done])) if done else None,
        metric=metric,
        score=_score(scores.values(), any(metric in record.right_or_wrong for record in done)),
        score_difference=paired_difference(scores, baseline),
        kl=_estimate(record.fidelity["kl"] for record in done if record.fidelity),
        top1=_estimate(record.fidelity["top1"] for record in done if record.fidelity),
        loss=_estimate(record.fidelity["loss"] for record in done if record.fidelity),
        judge=_estimate(ratings[record.key.id] for record in done if record.key.id in ratings),
        asked=float(np.mean([record.entries_asked for record in done])) if done else None,
        values=scores,
        asked_for=" ".join(where[4].split(" ")[1:]),
        own=any(record.embedded_can for record in records),
        lower_is_better=any(metric in record.lower_is_better for record in done),
    )


def _by_example(records: Iterable[Record]) -> dict[Example, float]:
    """The main metric (a benchmark's first) of each example, by seed and number.

    Records of a data set are the same under every seed: there a seed is a draw of the answer, and the draws are averaged.
    """
    found: dict[Example, list[float]] = {}
    for record in records:
        if record.metrics and np.isfinite(next(iter(record.metrics.values()))):
            where = (0 if record.key.data else record.key.seed, record.key.example)
            found.setdefault(where, []).append(next(iter(record.metrics.values())))
    return {where: float(np.mean(values)) for where, values in found.items()}


def _estimate(values: Iterable[float]) -> Estimate | None:
    found = np.array(list(values), dtype=np.float64)
    found = found[np.isfinite(found)]
    return estimate(found) if len(found) else None


def _score(values: Iterable[float], right_or_wrong: bool) -> Estimate | None:
    """As `_estimate`; of answers that are right or wrong, a proportion. A mean over draws of one answer may be neither."""
    found = np.array(list(values), dtype=np.float64)
    whole = right_or_wrong and len(found) and bool(np.isin(found, (0.0, 1.0)).all())
    return proportion(found) if whole else _estimate(found)


def _share(records: Sequence[Record], count: str) -> float | None:
    return float(np.mean([getattr(r, count) / r.bytes_full for r in records])) if records else None


ESTIMATES = ("score", "score_difference", "kl", "top1", "loss", "judge")
NOT_A_COLUMN = ("values", "asked_for", "lower_is_better")


def frame(found: Sequence[Line]) -> pd.DataFrame:
    """The lines as a table, estimates in columns of their own: the CSV."""
    rows = []
    for line in found:
        row: dict[str, object] = {}
        for name in (f.name for f in fields(line) if f.name not in NOT_A_COLUMN):
            value = getattr(line, name)
            if name in ESTIMATES:
                row |= {f"{name}_{part}": None if value is None else getattr(value, part) for part in ("mean", "low", "high")}
            else:
                row[name] = value
        rows.append(row)
    return pd.DataFrame(rows)
