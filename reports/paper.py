"""Paper and measured, cell by cell: the paper's number, ours with its interval, the difference. Unmeasured cells are empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp
from pathlib import Path

import numpy as np

from reports.formats import Table, TableCell, latex, markdown, words
from reports.page import simple_page
from reports.paper_figure import paper_figure
from reports.paper_points import PaperPoint, PaperRow, Side
from reports.statistics import Estimate, mean_of_means
from reports.tables import Line, lines
from results.drafts import report_draft
from results.store import read_rows


def write_side_by_side(
    out: Path, side: Side, rows: Sequence[PaperRow], where: Sequence[tuple[str, str]], keys: Mapping[tuple[str, str], set[str]]
) -> list[Path]:
    """Writes `<out>/report/paper_<name>.{html,md,tex}`, and of a figure .png.

    Args:
        where: of each row, model and budget; keys: by those, the ids of the stored rows that were asked for. No others are read.

    Raises:
        StoreError: the folder cannot be read or written to.
    """
    records = read_rows(out) if keys else []
    measured = {place: lines(record for record in records if record.key.id in ids) for place, ids in keys.items()}
    points = side_by_side(side, rows, [measured.get(place, ()) for place in where])
    found = paper_table(side.name, points)
    names = [f"paper_{side.name.replace(':', '_')}.{ending}" for ending in ("html", "md", "tex", "png")]
    about = " ".join(side.settings)
    with report_draft(out) as draft:
        if side.drawing is None or not paper_figure(points, side.drawing, side.title, draft / names[-1]):
            names.pop()
        texts = (simple_page(side.title, about, [found]), f"# {side.title}\n\n{about}\n\n{markdown([found])}", latex([found]))
        for name, text in zip(names, texts, strict=False):
            (draft / name).write_text(text, encoding="utf-8")
    return [out / "report" / name for name in names]


def side_by_side(side: Side, rows: Sequence[PaperRow], measured: Sequence[Sequence[Line]]) -> list[PaperPoint]:
    """A point for every number of the paper; ours is filled where a task, or every task of a mean, was measured."""
    made = []
    for row, mine in zip(rows, measured, strict=True):
        scores = {column: _measured(mine, row, column, side.scale.get(column, 1.0)) for column in row.values}
        for column, theirs in row.values.items():
            ours = _ours(side, row, column, scores)
            made.append(PaperPoint(row.method, row.setting, column, theirs, ours, "" if ours else _why_not(side, row, column)))
    return made


def _ours(side: Side, row: PaperRow, column: str, scores: Mapping[str, Found | None]) -> Estimate | None:
    if row.numbers is not None and column in row.numbers:
        number = row.numbers[column]
        return Estimate(number, number, number, 1)
    found = scores[column]
    if column in side.averages:
        of = side.averages[column]
        parts = [other for other in row.values if other not in side.averages] if of == "all" else of
        found = _mean([scores.get(part) for part in parts])
    if found is None:
        return None
    return _changed(found[0], exp) if column in side.exponent else found[0]


def _why_not(side: Side, row: PaperRow, column: str) -> str:
    can = bool(row.benchmarks.get(column)) or column in side.averages
    return row.command or ("" if can else "not filled here: see docs/reproducing.md")


Found = tuple[Estimate, list[np.ndarray]]


def _measured(measured: Sequence[Line], row: PaperRow, column: str, scale: float) -> Found | None:
    """Ours, with the scores of each task that it is the mean of."""
    wanted = row.benchmarks.get(column, ())
    asked = [line for line in measured if line.label.name == row.measured_with and not line.label.causal]
    mine = [line for line in asked if line.at.asked.benchmark_name in wanted]
    once = len(mine) == len({line.at.plain_task for line in mine})  # of a task asked in several ways, none is the paper's
    if not wanted or not once or len(mine) < len(wanted) or not all(line.values for line in mine):
        return None
    values = [scale * np.array(list(line.values.values())) for line in mine]
    return mean_of_means(values), values


def _mean(found: Sequence[Found | None]) -> Found | None:
    if not found or any(one is None for one in found):
        return None
    values = [part for one in found if one is not None for part in one[1]]
    return mean_of_means(values), values


def _changed(value: Estimate, change: Callable[[float], float]) -> Estimate:
    """Of a rising function: means over examples stay inside it, as a perplexity's do."""
    return Estimate(change(value.mean), change(value.low), change(value.high), value.n)


HEADER = ("method", "budget or ratios", "column", "paper", "measured", "difference", "n", "note")


def paper_table(name: str, points: Sequence[PaperPoint]) -> Table:
    return Table(name, HEADER, tuple(map(_cells, points)))


def _cells(point: PaperPoint) -> tuple[TableCell, ...]:
    ours, theirs = point.ours, point.paper
    head = (*words(point.method, str(point.setting), point.column), _number(theirs))
    empty = TableCell("-", float("-inf"))
    if ours is None:
        return (*head, empty, empty, TableCell("0", 0), TableCell(point.note))
    shown = _exact(ours.mean) if point.exact else f"{ours.mean:.2f} [{ours.low:.2f}, {ours.high:.2f}]"
    difference = empty
    if theirs is not None:
        away = ours.mean - theirs
        difference = TableCell(_exact(away, "+") if point.exact else f"{away:+.2f}", away)
    return (*head, TableCell(shown, ours.mean), difference, TableCell(str(ours.n), ours.n), TableCell(""))


def _number(value: float | None) -> TableCell:
    return TableCell("not printed", float("-inf")) if value is None else TableCell(_exact(value), value)


def _exact(value: float, sign: str = "") -> str:
    """Whole numbers whole, others to four digits."""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 or value == 0 else f"{value:{sign}.4g}"
