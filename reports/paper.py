"""Paper and measured, cell by cell: the paper's number, ours with its interval, the difference. Unmeasured cells are empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reports.formats import Cell, Table, latex, markdown
from reports.page import simple_page
from reports.statistics import Estimate, mean_of_means
from reports.tables import Line, lines
from results.store import StoreError, read_rows


@dataclass(frozen=True)
class Side:
    """Whose numbers stand beside whose, and under which settings."""

    table: str
    paper_model: str
    model: str
    limit: int
    fair: bool
    settings: tuple[str, ...]
    asked: Sequence[Any]  # what stands for each row: model, method, budget, train
    keys: Mapping[tuple[str, str], set[str]]  # of the rows that were asked for, by model and budget: no others are read


def write_side_by_side(out: Path, table: Any, rows: Sequence[Mapping[str, Any]], side: Side) -> list[Path]:
    """Writes `<out>/report/paper_<table>.{html,md,tex}`.

    Raises:
        StoreError: the folder cannot be read or written to.
    """
    records = read_rows(out)
    measured = {where: lines(record for record in records if record.key.id in ids) for where, ids in side.keys.items()}
    found = side_by_side(measured, table, rows, side)
    title = f"{side.table}, {side.paper_model} in the paper, {side.model} here"
    folder = out / "report"
    paths = [folder / f"paper_{side.table.replace(':', '_')}.{ending}" for ending in ("html", "md", "tex")]
    about = " ".join(side.settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        texts = (simple_page(title, about, [found]), f"# {title}\n\n{about}\n\n{markdown([found])}", latex([found]))
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}") from None
    return paths


def side_by_side(
    measured: Mapping[tuple[str, str], Sequence[Line]], table: Any, rows: Sequence[Mapping[str, Any]], side: Side
) -> Table:
    """A line for every cell of the paper's table that names a task, and for every mean of tasks that were all measured."""
    made = []
    for row, asked in zip(rows, side.asked, strict=True):
        mine = measured.get((asked.model, asked.budget), ())
        ours = {column: _measured(mine, table, asked, column) for column in row["values"]}
        for column, theirs in row["values"].items():
            value = ours[column]
            if value is None and column.endswith("mean"):
                value = _mean([ours.get(task) for task in _averaged(table, row, column)])
            made.append(_cells(row, column, theirs, value, asked, column in ours and _known(table, column)))
    header = ("method", "budget or ratios", "column", "paper", "measured", "difference", "n", "note")
    return Table(side.table, header, tuple(made))


def _known(table: Any, column: str) -> bool:
    return column in table.columns or table.columns_are_lengths or column.endswith("mean")


Found = tuple[Estimate, list[np.ndarray]]


def _measured(measured: Sequence[Line], table: Any, asked: Any, column: str) -> Found | None:
    """Ours, with the scores of each task that it is the mean of."""
    if table.columns_are_lengths:
        wanted = [f"{task}(length={column})" for task in table.columns.values()]
    elif column in table.columns:
        wanted = [table.columns[column]]
    else:
        return None
    mine = [line for line in measured if line.method.split("@")[0] == asked.method and line.benchmark.split("@")[0] in wanted]
    if len({line.benchmark.split("@")[0] for line in mine}) < len(wanted) or not all(line.values for line in mine):
        return None
    scale = table.scale.get(column, 1.0)
    values = [scale * np.array(list(line.values.values())) for line in mine]
    return mean_of_means(values), values


def _averaged(table: Any, row: Mapping[str, Any], column: str) -> list[str]:
    tasks = [name for name in row["values"] if name in table.columns or (table.columns_are_lengths and not name.endswith("mean"))]
    if column in ("LongBench mean", "LooGLE mean"):
        long = column == "LongBench mean"
        return [name for name in tasks if table.columns[name].startswith("longbench") == long]
    return tasks


def _mean(found: Sequence[Found | None]) -> Found | None:
    if not found or any(one is None for one in found):
        return None
    values = [part for one in found if one is not None for part in one[1]]
    return mean_of_means(values), values


def _cells(row: Mapping[str, Any], column: str, theirs: float, ours: Found | None, asked: Any, can: bool) -> tuple[Cell, ...]:
    setting = str(row.get("budget") or row.get("ratios") or "-")
    if "h2o keeps" in row:
        setting += f", H2O keeps {row['h2o keeps']}"
    if ours is None:
        note = asked.train if not asked.model else "" if can else "needs another run: see docs/reproducing.md"
        empty = Cell("-", float("-inf"))
        return (Cell(str(row["method"])), Cell(setting), Cell(column), _number(theirs), empty, empty, Cell("0", 0), Cell(note))
    value = ours[0]
    shown = Cell(f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]", value.mean)
    count = Cell(str(value.n), value.n)
    difference = Cell(f"{value.mean - theirs:+.2f}", value.mean - theirs)
    return (Cell(str(row["method"])), Cell(setting), Cell(column), _number(theirs), shown, difference, count, Cell(""))


def _number(value: float) -> Cell:
    return Cell(f"{value:g}", value)
