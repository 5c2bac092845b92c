"""Needle in a haystack as heat maps: how deep the needle lay, how long the text was, and how much of it was found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from reports.tables import protocol_of
from results.record import Key, Record
from results.store import slug

ACROSS = 4  # maps side by side
Spot = tuple[int, int]  # tokens of the prompt, depth in percent


def needle_maps(records: Iterable[Record], folder: Path) -> list[Path]:
    """One figure a model, benchmark and protocol, a map for each method and budget; as PNG and SVG."""
    found: dict[tuple[str, ...], dict[str, dict[Spot, list[float]]]] = {}
    for record in records:
        if record.metrics and {"context", "depth"} <= set(record.columns):
            where = (record.key.model, record.key.benchmark.split("@")[0], record.key.prompt, protocol_of(record.key))
            cell = (int(record.columns["context"]), int(record.columns["depth"]))
            maps = found.setdefault(where, {})
            maps.setdefault(_label(record.key), {}).setdefault(cell, []).append(next(iter(record.metrics.values())))
    return [path for where, maps in sorted(found.items()) for path in _figure(where, maps, folder)]


def _label(key: Key) -> str:
    return f"{key.method.split('@')[0]} {key.budget}".strip()


def _figure(where: Sequence[str], maps: Mapping[str, Mapping[Spot, Sequence[float]]], folder: Path) -> list[Path]:
    cells = {cell for one in maps.values() for cell in one}
    lengths, depths = sorted({cell[0] for cell in cells}), sorted({cell[1] for cell in cells})
    labels = sorted(maps, key=lambda label: (not label.startswith("full"), label.split()[0], _size(label)))
    across = min(ACROSS, len(labels))
    down = -(-len(labels) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.0 * across + 0.8, 2.7 * down + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for axis, label in zip(axes.flat, labels, strict=False):
        shown = _map(axis, maps[label], lengths, depths)
        values = [value for one in maps[label].values() for value in one]
        axis.set_title(f"{label}: {np.mean(values):.0f} % of {len(values)}", fontsize=9)
    figure.supxlabel("tokens of the prompt", fontsize=9)
    figure.supylabel("depth of the needle, %", fontsize=9)
    figure.suptitle(f"{', '.join(where[:3])}\n{where[3]}", fontsize=9)
    figure.colorbar(shown, ax=axes, label="words of the answer found, %", shrink=0.8)
    protocol = hashlib.sha256(where[3].encode()).hexdigest()[:6]
    paths = [folder / f"needle_{slug('_'.join(where[:3]))}_{protocol}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _size(label: str) -> tuple[bool, float]:
    budget = label.partition(" ")[2]
    return (budget.endswith("%"), float(budget.rstrip("%")) if budget else 0.0)


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
