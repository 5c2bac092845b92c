"""A paper's figure, drawn anew: a line a method, measured and, where the paper prints numbers, the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.formats import literal
from reports.paper_points import Drawing, PaperPoint
from reports.style import COLOURS


@dataclass(frozen=True)
class Place:
    """Where a point lies along the axis."""

    name: str
    amount: float | None = None  # None: no number
    number: int = 0  # in the order of the paper

    @property
    def order(self) -> tuple[float, int, str]:
        return (inf if self.amount is None else self.amount, self.number, self.name)


def paper_figure(points: Sequence[PaperPoint], drawing: Drawing, title: str, path: Path) -> bool:
    """Draws it, and says whether there was anything to draw. A panel a task, and one for each column in another unit."""
    panels: dict[str, list[PaperPoint]] = {}
    for point in points:
        if point.paper is not None or point.ours is not None:
            panels.setdefault(point.column if point.column in drawing.apart else point.setting.task, []).append(point)
    if not panels:
        return False
    figure = Figure(figsize=(max(6.4, 3.4 * len(panels)), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, mine) in zip(axes, panels.items(), strict=True):
        _panel(axis, mine, drawing)
        axis.set(title=literal(name), xlabel=drawing.counted if _has_columns(mine) else "")
    first = next(iter(panels))
    axes[0].set_ylabel(first if first in drawing.apart else drawing.measured)
    axes[-1].legend(fontsize=7)
    figure.suptitle(literal(title), fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def _panel(axis: Axes, points: Sequence[PaperPoint], drawing: Drawing) -> None:
    places = _places(points, drawing)
    ordered = sorted(set(places), key=lambda place: place.order)
    amounts = [place.amount for place in ordered if place.amount is not None]
    ticks = dict(zip(ordered, amounts if len(amounts) == len(ordered) else range(len(ordered)), strict=True))
    for number, method in enumerate(dict.fromkeys(point.method for point in points)):
        mine = [(ticks[place], point) for place, point in zip(places, points, strict=True) if point.method == method]
        measured = [(at, point.ours.mean) for at, point in mine if point.ours is not None]
        printed = [(at, point.paper) for at, point in mine if point.paper is not None]
        manner: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "markersize": 4}
        for drawn, style, label in ((measured, "-o", method), (printed, ":x", f"{method}, paper")):
            if drawn:
                axis.plot(*zip(*sorted(drawn), strict=True), style, label=literal(label), **manner)
    axis.set_xticks(list(ticks.values()), [place.name for place in ticks], fontsize=8)
    axis.grid(alpha=0.3)


def _places(points: Sequence[PaperPoint], drawing: Drawing) -> list[Place]:
    """Of each point: by columns; by settings if there is only one column; by methods if each has only one point."""
    methods = list(dict.fromkeys(point.method for point in points))
    if _has_columns(points):
        return [_column(point.column, drawing) for point in points]
    if len(points) > len(methods):
        return [Place(point.setting.place, point.setting.amount) for point in points]
    return [Place(point.method, number=methods.index(point.method)) for point in points]


def _has_columns(points: Sequence[PaperPoint]) -> bool:
    return len({point.column for point in points}) > 1


def _column(name: str, drawing: Drawing) -> Place:
    amount = drawing.columns.get(name)
    return Place(name if amount is None or not drawing.counted else f"{amount:g}", amount)
