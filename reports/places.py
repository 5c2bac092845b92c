"""Methods ranked over all tasks of a model and protocol, whatever their metrics: mean ranks, and the places each may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.figure import Figure

from reports.answers import AS_MANY, percent, values_of
from reports.drawing import INK, SOFT, shortened
from reports.formats import Table, TableCell, literal
from reports.keys import Label, TaskKey
from reports.ranking import Place, places
from reports.style import Palette, order_of
from reports.summary import Family, FamilyKey, Overall
from results.record import budget_size

HEADER = ("method", "mean rank", "may stand at", "shown to be worse than the first", "bytes kept")
ABOUT = (
    "A mean rank is the place on an example, averaged over examples and then over tasks: one more than the methods that are "
    "expected to do better, equals counted half. It needs no common unit, so that all tasks take part. Behind it stand places "
    "that a method may have: between those shown to be better and those shown to be worse, of all pairs at once (level: 5%)."
)
ROW = 0.17  # inches a method
RANDOM = Label("random")  # a baseline that knows nothing


@dataclass(frozen=True)
class Ranking:
    """The methods at one budget, first to last."""

    at: FamilyKey  # with the metrics of all
    tasks: int
    budget: str
    labels: tuple[Label, ...]
    shares: tuple[float, ...]
    places: tuple[Place, ...]
    worse: tuple[bool, ...]  # is it shown to be worse than the first?
    left_out: tuple[str, ...] = ()  # tasks on which the full cache does no better than `random`

    @property
    def title(self) -> str:
        several = f"{self.tasks} task{'s' * (self.tasks > 1)}"
        told = f" ({self.at.told})" if self.at.told else ""
        where = f"{self.budget} of the bytes" if budget_size(self.budget).is_share else f"{self.budget} entries a head"
        return f"{self.at.model}, {several}{told}, {self.at.protocol.prompt}, {where}"


def rankings(families: Sequence[Family]) -> list[Ranking]:
    """Budget by budget, of those families together that differ in nothing but the metric."""
    grouped: dict[FamilyKey, list[Family]] = {}
    for family in families:
        if not family.path_only:
            grouped.setdefault(replace(family.at, metric=""), []).append(family)
    found = []
    for at, mine in grouped.items():
        metrics = replace(at, metric=", ".join(sorted({family.at.metric for family in mine})))
        for budget in sorted({cell.budget for family in mine for cell in family.cells if cell.budget}, key=budget_size):
            ranking = _ranking(metrics, budget, mine)
            found += [ranking] if ranking else []
    return found


def _ranking(at: FamilyKey, budget: str, families: Sequence[Family]) -> Ranking | None:
    """Of the methods that every one of the families has at this budget, none with more bytes than the others.

    A task that the model cannot do has no order to show: one on which the full cache does no better than entries kept at random.
    """
    cells = [{cell.label: cell for cell in family.cells if cell.budget == budget and cell.compressed} for family in families]
    shared = [label for label in cells[0] if all(label in mine for mine in cells)]
    kept = {label: float(np.mean([mine[label].byte_share for mine in cells])) for label in shared}
    most = float(np.median(list(kept.values()) or [0.0])) * (1 + AS_MANY)
    labels = [label for label in shared if kept[label] <= most]
    if len(labels) < 2:
        return None
    tasks, left_out = [], []
    for family, mine in zip(families, cells, strict=True):
        unable = [task for task in family.tasks if _is_unable(family, task, mine.get(RANDOM))]
        left_out += [str(task) for task in unable]
        able = replace(family, tasks=tuple(task for task in family.tasks if task not in unable))
        tasks += values_of([mine[label] for label in labels], able)
    if not tasks:
        return None
    found = places(tasks, looks=max(family.looks for family in families))
    order = sorted(range(len(labels)), key=lambda number: (round(found[number].rank.mean, 9), order_of(labels[number])))
    first = order[0]
    return Ranking(
        at,
        len(tasks),
        budget,
        tuple(labels[number] for number in order),
        tuple(kept[labels[number]] for number in order),
        tuple(found[number] for number in order),
        tuple(first in found[number].better for number in order),
        tuple(sorted(left_out)),
    )


def _is_unable(family: Family, task: TaskKey, drawn: Overall | None) -> bool:
    """Does the full cache do no better than `random` on this task? False where either was not run."""
    full = next((cell for cell in family.cells if cell.is_full), None)
    if full is None or drawn is None:
        return False
    shared = full.values[task].keys() & drawn.values[task].keys()
    return sum(full.values[task][example] - drawn.values[task][example] for example in shared) <= 0


def ranking_tables(found: Sequence[Ranking]) -> list[Table]:
    return [_table(ranking) for ranking in found]


def _table(ranking: Ranking) -> Table:
    rows = []
    for number, (label, place, share) in enumerate(zip(ranking.labels, ranking.places, ranking.shares, strict=True)):
        rank = place.rank
        stands = str(place.first) if place.first == place.last else f"{place.first} to {place.last}"
        rows.append(
            (
                TableCell(str(label), best=number == 0),
                TableCell(f"{rank.mean:.2f} [{rank.low:.2f}, {rank.high:.2f}]", rank.mean, best=number == 0),
                TableCell(stands, place.first + place.last / 1000),
                TableCell("yes" if ranking.worse[number] else "no" if number else "-"),
                TableCell(percent(share), share),
            )
        )
    said = f"Left out, since the full cache does no better there than entries kept at random: {', '.join(ranking.left_out)}."
    return Table(f"Ranks: {ranking.title}", HEADER, tuple(rows), (said,) if ranking.left_out else ())


def ranking_figure(ranking: Ranking, palette: Palette) -> Figure:
    """Mean ranks with intervals, first to last; behind the names the places that each may have."""
    count = len(ranking.labels)
    wide, high = 4.3, ROW * count + 0.75
    figure = Figure(figsize=(wide, high))
    axis = figure.add_axes((1.7 / wide, 0.45 / high, 1.8 / wide, ROW * count / high))
    for number, (label, place) in enumerate(zip(ranking.labels, ranking.places, strict=True)):
        style, behind = palette.of_label(label), ranking.worse[number]
        colour = style.colour if not style.grey else SOFT
        axis.plot(
            [place.rank.low, place.rank.high], [number, number], color=colour, linewidth=2.5, alpha=0.35, solid_capstyle="butt"
        )
        face = "white" if behind else colour
        axis.plot([place.rank.mean], [number], marker=style.marker or "o", markersize=4.5, color=colour, markerfacecolor=face)
        stands = str(place.first) if place.first == place.last else f"{place.first} to {place.last}"
        axis.text(1.04, number, stands, fontsize=7.5, va="center_baseline", color=INK, transform=axis.get_yaxis_transform())
    axis.set_yticks(range(count), [literal(shortened(str(label), 26)) for label in ranking.labels], fontsize=7.5)
    axis.set_ylim(count - 0.4, -0.6)
    lows, highs = [place.rank.low for place in ranking.places], [place.rank.high for place in ranking.places]
    axis.set_xlim(min(lows) - 0.3, max(highs) + 0.3)
    axis.text(1.04, 1 + 0.06 / (ROW * count), "places", fontsize=7.5, color=SOFT, transform=axis.transAxes)
    axis.set_xlabel("mean rank, 1 is best; hollow: shown to be worse than the first", fontsize=7.5)
    axis.tick_params(labelsize=7, width=0.6, length=2.5)
    axis.grid(axis="x", alpha=0.22, linewidth=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.suptitle(literal(shortened(ranking.title, 62)), fontsize=8, y=1 - 0.05 / high)
    return figure
