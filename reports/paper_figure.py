"""A paper's figure from its side-by-side table: a line a method, measured and, where the paper prints numbers, the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from matplotlib.figure import Figure

from reports.formats import Table, TableCell
from reports.style import COLOURS

METHOD, SETTING, COLUMN, PAPER, MEASURED = range(5)
Row = Sequence[TableCell]


def paper_figure(table: Table, title: str, path: Path) -> bool:
    """Draws it, and says whether there was anything to draw.

    A panel a task; columns along the axis, or settings if there is only one column.
    """
    rows = [row for row in table.rows if any(isfinite(_value(row[place])) for place in (PAPER, MEASURED))]
    if not rows:
        return False
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    figure = Figure(figsize=(max(6.4, 3.4 * len(panels)), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        mine = [row for row in rows if _panel(row) == panel]
        methods = list(dict.fromkeys(row[METHOD].text for row in mine))
        along = COLUMN if len({row[COLUMN].text for row in mine}) > 1 else SETTING if len(mine) > len(methods) else METHOD
        names = sorted({_place(row[along]) for row in mine}, key=_size) if along != METHOD else methods
        sizes = [_size(name)[0] for name in names]
        places = dict(zip(names, sizes if isfinite(sum(sizes)) else range(len(names)), strict=True))
        for number, method in enumerate(methods):
            colour = COLOURS[number % len(COLOURS)]
            for what, style, label in ((MEASURED, "-o", method), (PAPER, ":x", f"{method}, paper")):
                points = [(places[_place(r[along])], _value(r[what])) for r in mine if r[METHOD].text == method]
                points = sorted(point for point in points if isfinite(point[1]))
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
        axis.set_xticks(list(places.values()), [name.split(" ")[0] if along == COLUMN else name for name in names], fontsize=8)
        axis.set_title(panel)
        axis.set_xlabel("tokens" if names[-1].endswith("tokens") else "")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(_unit(rows[0]))
    axes[-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def _value(cell: TableCell) -> float:
    return float("-inf") if cell.value is None else cell.value


def _place(cell: TableCell) -> str:
    """On the axis: what stands in brackets behind is left out."""
    return cell.text.split(" (")[0]


def _panel(row: Row) -> str:
    """The task of a row, if it has one; peaks of memory stand apart from times."""
    if row[COLUMN].text.startswith("peak"):
        return row[COLUMN].text
    last = row[SETTING].text.split(", ")[-1]
    return last if last.startswith("qa") else ""


def _unit(row: Row) -> str:
    column = row[COLUMN].text
    return "seconds" if column.endswith(("token", "tokens")) else "score" if column.endswith("k") else column


def _size(name: str) -> tuple[float, str]:
    """Numbers in order: 1k, 25%, 512 tokens; words behind them."""
    digits = name.split(" ")[0].rstrip("k%")
    return (float(digits), name) if digits.replace(".", "", 1).isdigit() else (float("inf"), name)
