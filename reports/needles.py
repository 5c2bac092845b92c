"""Needle in a haystack as heat maps: how deep the needle lay, how long the text was, and how much of it was found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from reports.formats import literal
from reports.keys import LineKey, PanelKey, number
from reports.names import named
from reports.pictures import place
from results.record import Record, budget_size

ACROSS = 4  # maps side by side
Spot = tuple[int, int]  # tokens of the prompt, depth in percent


@dataclass(frozen=True)
class MapKey:
    """A method at a budget: one map."""

    method: str  # told apart
    budget: str

    @classmethod
    def of(cls, at: LineKey) -> MapKey:
        return cls(at.label.name, at.asked.budget)

    @property
    def order(self) -> tuple[object, ...]:
        return (self.method != "full", self.method, budget_size(self.budget))

    def __str__(self) -> str:
        return f"{self.method} {self.budget}".strip()


def needle_maps(records: Sequence[Record], folder: Path, formats: Collection[str] = ("png", "svg")) -> list[Path]:
    """One figure a model, benchmark and protocol, a map for each method and budget; as PNG in any case, for the page."""
    found: dict[PanelKey, dict[MapKey, dict[Spot, list[float]]]] = {}
    for record, at in zip(records, named(records), strict=True):
        length, depth = (number(record.columns.get(name)) for name in ("context", "depth"))
        if record.status == "ok" and record.metrics and length is not None and depth is not None:
            where = replace(at.panel, task=replace(at.task, length=None))
            spot = (int(length), int(depth))
            spots = found.setdefault(where, {}).setdefault(MapKey.of(at), {})
            spots.setdefault(spot, []).append(next(iter(record.metrics.values())))
    wanted = ("png", *(one for one in formats if one != "png"))
    ordered = sorted(found, key=lambda where: where.order)
    return [path for where in ordered for path in _figure(where, found[where], folder, wanted)]


def _figure(
    where: PanelKey, maps: Mapping[MapKey, Mapping[Spot, Sequence[float]]], folder: Path, formats: Sequence[str]
) -> list[Path]:
    spots = {spot for one in maps.values() for spot in one}
    lengths, depths = sorted({spot[0] for spot in spots}), sorted({spot[1] for spot in spots})
    ordered = sorted(maps, key=lambda key: key.order)
    across = min(ACROSS, len(ordered))
    down = -(-len(ordered) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.0 * across + 0.8, 2.7 * down + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat[len(ordered) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, ordered, strict=False):
        shown = _map(axis, maps[key], lengths, depths)
        values = [value for one in maps[key].values() for value in one]
        axis.set_title(literal(f"{key}: {np.mean(values):.0f} % of {len(values)}"), fontsize=9)
    figure.supxlabel("tokens of the prompt", fontsize=9)
    figure.supylabel("depth of the needle, %", fontsize=9)
    asked = (where.model, str(where.task), where.protocol.prompt)
    figure.suptitle(literal(f"{', '.join(asked)}\n{where.protocol}"), fontsize=9)
    figure.colorbar(shown, ax=axes, label="words of the answer found, %", shrink=0.8)
    name, mark = f"needle_{'_'.join(asked)}", f"_{where.protocol.short}"
    paths = [place(folder, name, f".{ending}", mark) for ending in formats]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _map(axis: Axes, found: Mapping[Spot, Sequence[float]], lengths: Sequence[int], depths: Sequence[int]) -> AxesImage:
    """Means; white where nothing was asked. Light is found, dark is lost: it reads in grey."""
    grid = np.full((len(depths), len(lengths)), np.nan)
    for (length, depth), values in found.items():
        grid[depths.index(depth), lengths.index(length)] = np.mean(values)
    shown = axis.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7, rotation=45)
    step = max(1, len(depths) // 6)
    axis.set_yticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]], fontsize=7)
    return shown
