"""What a report shows as tables: scores cell by cell, means over tasks, bytes, lm-eval's own results, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reports.formats import Table, TableCell, words
from reports.statistics import Estimate
from reports.summary import Family, Overall
from reports.tables import Line, benchmark_of, protocol_of
from results.record import Record

PATH_ONLY = "The embedded model cannot do this task: these scores prove the path, not the methods, and are not to be ranked on."
LM_EVAL = "Compressed: the share of requests whose context lost entries; a short context that fits says nothing about a method."
HEADER = ("method", "budget", "bytes kept", "allocated", "n", "score", "against full", "KL to full", "same top token")
BYTES = ("method", "budget", "entries asked", "entries kept", "bytes kept", "allocated", "prompts that lost entries")


def score_tables(found: Sequence[Line]) -> list[Table]:
    """One table a model, benchmark and protocol."""
    made = []
    for panel in dict.fromkeys(line.panel for line in found):
        mine = [line for line in found if line.panel == panel]
        metric = next((line.metric for line in mine if line.metric), None)
        notes = [f"Score: {metric}. Protocol: {panel[3]}" if metric else f"Protocol: {panel[3]}"]
        notes += [PATH_ONLY] if is_path_only(mine[0]) else []
        judged = any(line.judge for line in mine)  # without a judge there is no column
        rows = tuple((*_scores(line), *([estimated(line.judge)] if judged else [])) for line in mine)
        header = (*HEADER, "judge") if judged else HEADER
        made.append(Table(f"{panel[1]}, {panel[2]}, {panel[0]}", header, rows, tuple(notes)))
    return made


def is_path_only(line: Line) -> bool:
    return line.model.split("+")[0] == "reference" and not line.own


def _scores(line: Line) -> tuple[TableCell, ...]:
    count = f"{line.n}" + f" ({line.skipped} skipped)" * bool(line.skipped) + f" ({line.failed} failed)" * bool(line.failed)
    return (
        TableCell(line.method.split("@")[0]),
        TableCell(line.budget or "-", _size(line.budget)),
        _share(line.byte_share),
        _share(line.allocated_share),
        TableCell(count, line.n),
        estimated(line.score),
        estimated(line.score_difference, line.differs),
        estimated(line.kl),
        estimated(line.top1),
    )


def estimated(value: Estimate | None, mark: bool = False) -> TableCell:
    if value is None:
        return TableCell("-", float("-inf"))
    return TableCell(f"{value.mean:.3g}{'*' * mark} [{value.low:.3g}, {value.high:.3g}]", value.mean)


def _share(value: float | None) -> TableCell:
    return TableCell("-", -1.0) if value is None else TableCell(f"{value:.1%}", value)


def _size(budget: str) -> float:
    return float(budget.removesuffix("%") or 0) + 1e9 * budget.endswith("%")


def mean_tables(found: Sequence[Family]) -> list[Table]:
    """Methods x budgets: the mean of the tasks' means, the best of a budget marked."""
    made = []
    for family in found:
        budgets = sorted({cell.budget for cell in family.cells if cell.budget}, key=_size)
        by_place = {(cell.label, cell.budget): cell for cell in family.cells}
        best = {budget: _best(family, budget) for budget in budgets}
        header = ("method", *budgets, "whole cache", "its bytes", "n")
        rows = []
        for label in dict.fromkeys(cell.label for cell in family.cells):
            at = [by_place.get((label, budget)) for budget in budgets]
            whole = by_place.get((label, ""))
            marked = (_mean(cell, cell is not None and abs(cell.score.mean - best[cell.budget]) < 1e-12) for cell in at)
            counts = [cell.score.n for cell in (*at, whole) if cell is not None]
            shown = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])
            share = _share(whole.byte_share if whole else None)
            rows.append((TableCell(label), *marked, _mean(whole, False), share, TableCell(shown, counts[0])))
        notes = [f"Mean {family.metric} of: {', '.join(family.tasks)}. Protocol: {family.protocol}."]
        notes += [PATH_ONLY] if family.model == "reference" and not family.cells[0].own else []
        made.append(Table(family.title, header, tuple(rows), tuple(notes)))
    return made


def _best(family: Family, budget: str) -> float:
    means = [cell.score.mean for cell in family.cells if cell.budget == budget]
    return min(means) if family.lower_is_better else max(means)


def _mean(cell: Overall | None, best: bool) -> TableCell:
    if cell is None:
        return TableCell("-", float("-inf"))
    return TableCell(f"{cell.score.mean:.3g} [{cell.score.low:.3g}, {cell.score.high:.3g}]", cell.score.mean, best)


def byte_table(found: Sequence[Line], title: str) -> Table:
    """What was asked for, what was kept, what was allocated."""
    rows = tuple(
        (
            TableCell(line.method.split("@")[0]),
            TableCell(line.budget or "-", _size(line.budget)),
            TableCell("-" if line.asked is None else f"{line.asked:,.0f}", line.asked),
            TableCell("-" if line.entries is None else f"{line.entries:,.0f}", line.entries),
            _share(line.byte_share),
            _share(line.allocated_share),
            TableCell(f"{line.compressed} of {line.n}", line.compressed),
        )
        for line in found
    )
    return Table(title, BYTES, rows)


def lm_eval_table(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What lm-eval itself makes of the stored answers, cell by cell."""
    if not found:
        return []
    metrics = sorted({metric for cell in found for metric in cell["results"] if "_stderr" not in metric})
    header = ("model", "task", "method", "budget", "n", "compressed", *(metric.removesuffix(",none") for metric in metrics))
    rows = []
    for cell in sorted(found, key=_cell_order):
        routing = f" ({cell['routing']})" if cell["routing"] else ""
        chat = ", chat template" if cell["chat"] == "template" else ""
        task = cell["benchmark"].split("@")[0].removeprefix("lm_eval:") + chat
        values = [cell["results"].get(metric) for metric in metrics]
        shown = [TableCell("-", float("-inf")) if value is None else TableCell(f"{value:.4g}", value) for value in values]
        asked = words(cell["model"] + routing, task, cell["method"].split("@")[0], cell["budget"] or "-")
        share = cell["compressed"]
        rows.append((*asked, TableCell(str(cell["examples"]), cell["examples"]), TableCell(f"{share:.0%}", share), *shown))
    return [Table("lm-eval's own aggregation", header, tuple(rows), (LM_EVAL,))]


def _cell_order(cell: Mapping[str, Any]) -> tuple[object, ...]:
    where = tuple(cell[part] for part in ("model", "routing", "benchmark", "chat"))
    return (*where, cell["method"] != "full@1", cell["method"], _size(cell["budget"]))


def missing_table(records: Iterable[Record]) -> list[Table]:
    """What was skipped or failed, and why, so that every gap in a table is explained."""
    reasons: dict[tuple[str, ...], int] = {}
    for record in records:
        if record.status != "ok":
            key = record.key
            what = (
                record.status,
                key.model,
                key.method.split("@")[0],
                key.budget or "-",
                benchmark_of(record),
                record.reason or "",
            )
            reasons[what] = reasons.get(what, 0) + 1
    if not reasons:
        return []
    rows = tuple((*words(*what[:5]), TableCell(str(count), count), TableCell(what[5])) for what, count in sorted(reasons.items()))
    return [Table("Not measured", ("status", "model", "method", "budget", "benchmark", "examples", "reason"), rows)]


BUCKETS = (("0-4k", 4000.0), ("4-8k", 8000.0), ("8k+", float("inf")))  # LongBench-E's, in words


def length_tables(records: Iterable[Record]) -> list[Table]:
    """LongBench-E as it is reported: the mean of the tasks' means by the length of the text."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, list[float]]]] = {}
    for record in records:
        words_long = record.columns.get("words")
        if words_long is None or not record.metrics or not record.key.benchmark.split("@")[0].endswith("_e"):
            continue
        bucket = next(label for label, end in BUCKETS if float(words_long) < end)
        where = (f"{record.key.model}, {protocol_of(record.key)}", record.key.prompt, record.key.method, record.key.budget)
        tasks = found.setdefault(where, {}).setdefault(bucket, {})
        tasks.setdefault(record.key.benchmark, []).append(next(iter(record.metrics.values())))
    if not found:
        return []
    rows = []
    for at in sorted(found, key=lambda at: (at[:2], not at[2].startswith("full@"), at[2], _size(at[3]))):
        means = [_mean_of_tasks(found[at].get(label, {})) for label, _ in BUCKETS]
        asked = words(at[0], at[1], at[2].split("@")[0], at[3] or "-")
        rows.append((*asked, *(TableCell("-" if mean is None else f"{mean:.2f}", mean) for mean in means)))
    header = ("model", "prompt", "method", "budget", *(label for label, _ in BUCKETS))
    return [Table("LongBench-E by length", header, tuple(rows), ("Means of task means, by the words of the text.",))]


def _mean_of_tasks(tasks: Mapping[str, Sequence[float]]) -> float | None:
    return None if not tasks else sum(sum(scores) / len(scores) for scores in tasks.values()) / len(tasks)
