"""Tables beside the scores: lm-eval's own aggregation, scores by the length of the text, and what was not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reports.formats import Table, TableCell, words
from reports.keys import LineKey, TaskKey, number
from reports.names import named
from reports.present import size_of
from reports.statistics import paired_difference
from reports.tables import Line
from results.lines import Check, is_count, is_number, is_text, or_none, tell, wrong_field
from results.record import Record, cell_id, is_budget, split_version

LM_EVAL = "Compressed: the share of requests whose context lost entries; a short context that fits says nothing about a method."


def lm_eval_table(found: Sequence[Mapping[str, Any]], records: Sequence[Record] = ()) -> list[Table]:
    """What lm-eval itself makes of the stored answers, cell by cell.

    Args:
        records: that the cells are of, for what tells cells of one name apart.
    """
    found = [cell for cell in found if not _broken(cell)]
    if not found:
        return []
    metrics = sorted({metric for cell in found for metric in cell["results"] if "_stderr" not in metric})
    header = ("model", "task", "method", "budget", "n", "compressed", *(metric.removesuffix(",none") for metric in metrics))
    rows = []
    ats = {cell_id(record.key): at for record, at in zip(records, named(records), strict=True)}
    for cell in sorted(found, key=_cell_order):
        at = ats.get(cell["id"])
        model, method = (at.model, at.label.name) if at else (cell["model"], split_version(cell["method"])[0])
        routing = f" ({cell['routing']})" if cell["routing"] else ""
        chat = ", chat template" if cell["chat"] == "template" else ""
        task = split_version(cell["benchmark"])[0].removeprefix("lm_eval:") + chat
        task += f" ({at.shown.told})" if at and at.shown.told else ""
        values = [cell["results"].get(metric) for metric in metrics]
        shown = [TableCell("-", float("-inf")) if value is None else TableCell(f"{value:.4g}", value) for value in values]
        asked = words(model + routing, task, method, cell["budget"] or "-")
        share = cell["compressed"]
        rows.append((*asked, TableCell(str(cell["examples"]), cell["examples"]), TableCell(f"{share:.0%}", share), *shown))
    return [Table("lm-eval's own aggregation", header, tuple(rows), (LM_EVAL,))]


CELL: dict[str, Check] = dict.fromkeys(("model", "routing", "benchmark", "chat", "method"), is_text)
CELL |= {"budget": is_budget, "examples": is_count, "compressed": is_number, "results": lambda found: isinstance(found, dict)}


def _broken(cell: Mapping[str, Any]) -> bool:
    numbers = or_none(is_number)
    wrong = wrong_field(cell, CELL, list(CELL))
    wrong = wrong or wrong_field(cell["results"], {name: numbers for name in cell["results"] if "_stderr" not in name})
    if wrong:
        tell(f"lm_eval/{cell['id']}.json: {wrong}")
    return wrong is not None


def _cell_order(cell: Mapping[str, Any]) -> tuple[object, ...]:
    where = tuple(cell[part] for part in ("model", "routing", "benchmark", "chat"))
    return (*where, split_version(cell["method"])[0] != "full", cell["method"], size_of(cell["budget"]))


@dataclass(frozen=True)
class Gap:
    """Why something is not in a table."""

    status: str
    model: str
    method: str
    budget: str
    task: TaskKey
    reason: str

    @classmethod
    def of(cls, record: Record, at: LineKey) -> Gap:
        return cls(record.status, at.model, at.label.name, at.asked.budget, at.task, record.reason or "")

    @property
    def shown(self) -> tuple[str, ...]:
        return (self.status, self.model, self.method, self.budget or "-", str(self.task), self.reason)


def missing_table(records: Sequence[Record]) -> list[Table]:
    """What was skipped or failed, and why, so that every gap in a table is explained."""
    every = zip(records, named(records), strict=True)
    counts = Counter(Gap.of(record, at) for record, at in every if record.status != "ok")
    if not counts:
        return []
    rows = []
    for gap in sorted(counts, key=lambda gap: gap.shown):
        *asked, reason = words(*gap.shown)
        rows.append((*asked, TableCell(str(counts[gap]), counts[gap]), reason))
    return [Table("Not measured", ("status", "model", "method", "budget", "benchmark", "examples", "reason"), tuple(rows))]


NLL = "nll"  # the metric, in nats
AHEAD = (
    "A mixSGA variant under both routings, nats a token. Expert choice knows how the text goes on: only argmax (causal) gives a "
    "likelihood. The paired difference, with its 95 % interval, is how much looking ahead flatters."
)


def ahead_table(found: Sequence[Line]) -> list[Table]:
    """Likelihoods of one pass under both routings, and their paired difference."""
    sides: dict[LineKey, dict[str, Line]] = {}
    for line in found:
        if line.protocol.routing and line.metric == NLL and line.values:
            sides.setdefault(replace(line.at, asked=replace(line.at.asked, routing="")), {})[line.protocol.routing] = line
    rows = []
    for at, by in sides.items():
        ahead, causal = by.get("expert_choice"), by.get("argmax")
        apart = paired_difference(causal.values, ahead.values) if ahead and causal else None
        if ahead is None or causal is None or apart is None:
            continue
        asked = words(at.model, str(at.task), at.protocol.prompt, at.label.name, at.asked.budget or "-")
        nats = (TableCell(f"{line.score.mean:.3f}", line.score.mean) for line in (causal, ahead) if line.score)
        flattered = TableCell(f"{apart.mean:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]", apart.mean)
        rows.append((*asked, *nats, flattered, TableCell(str(apart.n), apart.n)))
    header = ("model", "benchmark", "prompt", "method", "budget", "nll, causal", "nll, expert choice", "difference", "n")
    return [Table("What looking ahead flatters", header, tuple(rows), (AHEAD,))] if rows else []


BUCKETS = (("0-4k", 4000.0), ("4-8k", 8000.0), ("8k+", float("inf")))  # LongBench-E's, in words
EXTENDED = "_e"  # behind the names of LongBench-E's sets


def length_tables(records: Sequence[Record]) -> list[Table]:
    """LongBench-E as it is reported: the mean of the tasks' means by the length of the text."""
    found: dict[LineKey, dict[str, dict[str, list[float]]]] = {}
    for record, at in zip(records, named(records), strict=True):
        words_long = number(record.columns.get("words"))
        if words_long is None or record.status != "ok" or not record.metrics or not record.key.task.endswith(EXTENDED):
            continue
        bucket = next(label for label, end in BUCKETS if words_long < end)
        tasks = found.setdefault(at.cell, {}).setdefault(bucket, {})
        tasks.setdefault(record.key.benchmark, []).append(next(iter(record.metrics.values())))
    if not found:
        return []
    rows = []
    for at in sorted(found, key=lambda at: at.order):
        means = [_mean_of_tasks(found[at].get(label, {})) for label, _ in BUCKETS]
        model = ", ".join(filter(None, (at.model, at.shown.told, str(at.protocol))))
        asked = (model, at.protocol.prompt, at.label.name, at.asked.budget or "-")
        rows.append((*words(*asked), *(TableCell("-" if mean is None else f"{mean:.2f}", mean) for mean in means)))
    header = ("model", "prompt", "method", "budget", *(label for label, _ in BUCKETS))
    return [Table("LongBench-E by length", header, tuple(rows), ("Means of task means, by the words of the text.",))]


def _mean_of_tasks(tasks: Mapping[str, Sequence[float]]) -> float | None:
    return None if not tasks else sum(sum(scores) / len(scores) for scores in tasks.values()) / len(tasks)
