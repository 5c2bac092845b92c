"""Paper and measured, cell by cell: the paper's number, ours with its interval, the difference. Unmeasured cells are empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path

import numpy as np

from reports.formats import Table, TableCell, latex, markdown
from reports.page import simple_page
from reports.paper_figure import paper_figure
from reports.statistics import Estimate, mean_of_means
from reports.tables import Line, lines
from results.store import StoreError, read_rows


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table, and what stands for it here."""

    method: str
    setting: str
    values: Mapping[str, float | None]  # by column; None: the paper draws it and prints no number
    benchmarks: Mapping[str, Sequence[str]]  # by column, whose mean is ours; empty: nothing of ours fills it
    measured_with: str  # our method's name
    command: str  # that makes what is missing; "" if nothing is
    numbers: Mapping[str, float] | None = None  # where they are no scores


@dataclass(frozen=True)
class Side:
    """A whole table: whose numbers stand beside whose, and under which settings."""

    name: str
    title: str
    settings: Sequence[str]
    averages: Mapping[str, Sequence[str] | str]  # the columns that are means of others, or of "all"
    scale: Mapping[str, float]
    exponent: Sequence[str]  # columns that show the exponential of our mean


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
    found = side_by_side(side, rows, [measured.get(place, ()) for place in where])
    folder = out / "report"
    paths = [folder / f"paper_{side.name.replace(':', '_')}.{ending}" for ending in ("html", "md", "tex")]
    about = " ".join(side.settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / f"paper_{side.name.replace(':', '_')}.png"
        if "figure" in side.name and paper_figure(found, side.title, picture):
            paths.append(picture)
        texts = (simple_page(side.title, about, [found]), f"# {side.title}\n\n{about}\n\n{markdown([found])}", latex([found]))
        for path, text in zip(paths, texts, strict=False):
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}") from None
    return paths


def side_by_side(side: Side, rows: Sequence[PaperRow], measured: Sequence[Sequence[Line]]) -> Table:
    """A line for every cell of the paper's table that names a task, and for every mean of tasks that were all measured."""
    made = []
    for row, mine in zip(rows, measured, strict=True):
        ours = {column: _measured(mine, row, column, side.scale.get(column, 1.0)) for column in row.values}
        for column, theirs in row.values.items():
            if column in side.averages:
                of = side.averages[column]
                parts = [c for c in row.values if c not in side.averages] if of == "all" else of
                value = _mean([ours.get(part) for part in parts])
            else:
                value = ours[column]
            shown = None if value is None else value[0]
            if row.numbers is not None and column in row.numbers:
                number = row.numbers[column]
                shown = Estimate(number, number, number, 1)
            made.append(_cells(row, column, theirs, _changed(shown, exp) if column in side.exponent else shown, side))
    header = ("method", "budget or ratios", "column", "paper", "measured", "difference", "n", "note")
    return Table(side.name, header, tuple(made))


Found = tuple[Estimate, list[np.ndarray]]


def _measured(measured: Sequence[Line], row: PaperRow, column: str, scale: float) -> Found | None:
    """Ours, with the scores of each task that it is the mean of."""
    wanted = row.benchmarks.get(column, ())
    mine = [line for line in measured if line.label.name == row.measured_with and line.at.asked.benchmark_name in wanted]
    if not wanted or len({line.at.task for line in mine}) < len(wanted) or not all(line.values for line in mine):
        return None
    values = [scale * np.array(list(line.values.values())) for line in mine]
    return mean_of_means(values), values


def _mean(found: Sequence[Found | None]) -> Found | None:
    if not found or any(one is None for one in found):
        return None
    values = [part for one in found if one is not None for part in one[1]]
    return mean_of_means(values), values


def _changed(value: Estimate | None, change: Callable[[float], float]) -> Estimate | None:
    """Of a rising function: means over examples stay inside it, as a perplexity's do."""
    return None if value is None else Estimate(change(value.mean), change(value.low), change(value.high), value.n)


def _cells(row: PaperRow, column: str, theirs: float | None, ours: Estimate | None, side: Side) -> tuple[TableCell, ...]:
    head = (TableCell(row.method), TableCell(row.setting), TableCell(column), _number(theirs))
    if ours is None:
        can = bool(row.benchmarks.get(column)) or column in side.averages
        note = row.command or ("" if can else "not filled here: see docs/reproducing.md")
        empty = TableCell("-", float("-inf"))
        return (*head, empty, empty, TableCell("0", 0), TableCell(note))
    exact = ours.low == ours.high == ours.mean and ours.n == 1
    shown = _exact(ours.mean) if exact else f"{ours.mean:.2f} [{ours.low:.2f}, {ours.high:.2f}]"
    difference = TableCell("-", float("-inf"))
    if theirs is not None:
        away = ours.mean - theirs
        difference = TableCell(_exact(away, "+") if exact else f"{away:+.2f}", away)
    return (*head, TableCell(shown, ours.mean), difference, TableCell(str(ours.n), ours.n), TableCell(""))


def _number(value: float | None) -> TableCell:
    return TableCell("not printed", float("-inf")) if value is None else TableCell(_exact(value), value)


def _exact(value: float, sign: str = "") -> str:
    """Whole numbers whole, others to four digits."""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 or value == 0 else f"{value:{sign}.4g}"
