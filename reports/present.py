"""What a report shows as tables: scores cell by cell, means over tasks, and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from reports.formats import Table, TableCell
from reports.keys import Label, PanelKey
from reports.statistics import Estimate
from reports.summary import Family, Overall
from reports.tables import Line
from results.record import budget_size

PATH_ONLY = "The embedded model cannot do this task: these scores prove the path, not the methods, and are not to be ranked on."
HEADER = ("method", "budget", "bytes kept", "allocated", "n", "score", "against full", "KL to full", "same top token")
AGNOSTIC = "question_after"
QUERY_AGNOSTIC = (
    "Query-agnostic: the score of the same method and budget where the cache was compressed before the question was known."
)
BYTES = ("method", "budget", "entries asked", "entries kept", "bytes kept", "allocated", "prompts that lost entries")


def score_tables(found: Sequence[Line], among: Sequence[Line] = ()) -> list[Table]:
    """One table a model, benchmark and protocol.

    Args:
        among: more lines, for what stands beside a score: that of a cache compressed before the question was known.
    """
    grouped: dict[PanelKey, list[Line]] = {}
    for line in found:
        grouped.setdefault(line.panel, []).append(line)
    made = []
    agnostic = {_but_prompt(line): line for line in (*found, *among) if line.protocol.prompt == AGNOSTIC}
    for panel, mine in grouped.items():
        others = [agnostic.get(_but_prompt(line)) for line in mine] if panel.protocol.prompt != AGNOSTIC else []
        known = any(others)  # asked both ways
        metric = next((line.metric for line in mine if line.metric), None)
        notes = [f"Score: {metric}. Protocol: {panel.protocol}" if metric else f"Protocol: {panel.protocol}"]
        notes += [PATH_ONLY] if mine[0].path_only else []
        judged = any(line.judge for line in mine)  # without a judge there is no column
        rows = tuple((*_scores(line), *([estimated(line.judge)] if judged else [])) for line in mine)
        if known:
            rows = tuple((*row, estimated(other.score if other else None)) for row, other in zip(rows, others, strict=True))
        header = (*HEADER, *(["judge"] if judged else []), *(["query-agnostic"] if known else []))
        notes += [QUERY_AGNOSTIC] if known else []
        made.append(Table(panel.title, header, rows, tuple(notes)))
    return made


def _but_prompt(line: Line) -> tuple[object, ...]:
    """The same for a cell whether or not its question was known when the cache was compressed."""
    return (line.model, line.at.task, replace(line.protocol, prompt=""), line.label, line.budget)


def _scores(line: Line) -> tuple[TableCell, ...]:
    count = f"{line.n}" + f" ({line.skipped} skipped)" * bool(line.skipped) + f" ({line.failed} failed)" * bool(line.failed)
    return (
        TableCell(line.label.name),
        TableCell(line.budget or "-", size_of(line.budget)),
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


def size_of(budget: str) -> float:
    """What a column of budgets is sorted by."""
    is_share, amount = budget_size(budget)
    return amount + 1e9 * is_share


def mean_tables(found: Sequence[Family]) -> list[Table]:
    """Methods x budgets: the mean of the tasks' means, the best of a budget marked."""
    made = []
    agnostic = {_asked_before(family): _by_place(family) for family in found if family.at.protocol.prompt == AGNOSTIC}
    for family in found:
        after: Mapping[tuple[Label, str], Overall] = {}
        if family.at.protocol.prompt != AGNOSTIC:
            after = agnostic.get(_asked_before(family), {})
        budgets = sorted({cell.budget for cell in family.cells if cell.budget}, key=size_of)
        by_place = _by_place(family)
        best = {budget: _best(family, budget) for budget in budgets}
        header = (
            "method",
            *budgets,
            "whole cache",
            "its bytes",
            "n",
            *(f"query-agnostic {budget}" for budget in budgets if after),
        )
        rows = []
        for label in dict.fromkeys(cell.label for cell in family.cells):
            at = [by_place.get((label, budget)) for budget in budgets]
            whole = by_place.get((label, ""))
            marked = (_mean(cell, cell is not None and abs(cell.score.mean - best[cell.budget]) < 1e-12) for cell in at)
            counts = [cell.score.n for cell in (*at, whole) if cell is not None]
            shown = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])
            share = _share(whole.byte_share if whole else None)
            unseen = (_mean(after.get((label, budget)), False) for budget in budgets if after)
            rows.append((TableCell(str(label)), *marked, _mean(whole, False), share, TableCell(shown, counts[0]), *unseen))
        notes = [f"Mean {family.at.metric} of: {', '.join(map(str, family.tasks))}. Protocol: {family.at.protocol}."]
        notes += [PATH_ONLY] if family.path_only else []
        notes += [QUERY_AGNOSTIC] if after else []
        made.append(Table(family.title, header, tuple(rows), tuple(notes)))
    return made


def _by_place(family: Family) -> dict[tuple[Label, str], Overall]:
    return {(cell.label, cell.budget): cell for cell in family.cells}


def _asked_before(family: Family) -> tuple[object, ...]:
    """The same for a family whether or not its questions were known when caches were compressed."""
    return (replace(family.at, protocol=replace(family.at.protocol, prompt="")), family.tasks)


def _best(family: Family, budget: str) -> float:
    means = [cell.score.mean for cell in family.cells if cell.budget == budget]
    return min(means) if family.lower_is_better else max(means)


def _mean(cell: Overall | None, best: bool) -> TableCell:
    if cell is None:
        return TableCell("-", float("-inf"))
    return TableCell(f"{cell.score.mean:.3g} [{cell.score.low:.3g}, {cell.score.high:.3g}]", cell.score.mean, best)


def byte_table(found: Sequence[Line]) -> Table:
    """What was asked for, what was kept, what was allocated."""
    rows = tuple(
        (
            TableCell(line.label.name),
            TableCell(line.budget or "-", size_of(line.budget)),
            TableCell("-" if line.asked is None else f"{line.asked:,.0f}", line.asked),
            TableCell("-" if line.entries is None else f"{line.entries:,.0f}", line.entries),
            _share(line.byte_share),
            _share(line.allocated_share),
            TableCell(f"{line.compressed} of {line.n}", line.compressed),
        )
        for line in found
    )
    return Table("Asked, kept and allocated", BYTES, rows)
