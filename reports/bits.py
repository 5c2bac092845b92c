"""Bits against entries: at equal bytes, does a cache do better with many entries of few bits, or few of many?

A picture a task: the share of the entries that are kept to the right, the score and the KL to the full cache above, and a line a
budget, from the fewest entries in 16 bits to the most in few. What stands at one budget takes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from reports.formats import literal
from reports.keys import LineKey, PanelKey
from reports.pictures import place
from reports.statistics import Estimate
from reports.style import COLOURS, DASHES, MARKERS
from reports.tables import Line

LEAST_KL = 1e-7
ABOUT = (
    "Bits against entries at equal bytes: each line is a budget, each point a storage behind one method, from few entries in 16 "
    "bits on the left to many in few bits. Storages alone keep every entry and stand where their bytes are."
)
Point = tuple[float, Estimate, str]


def is_packed(at: LineKey) -> bool:
    """Are its rows held in fewer bits? The key's settings say so, whatever it is called."""
    return at.asked.params.startswith("Packed(")


def bits_maps(found: Sequence[Line], folder: Path) -> list[Path]:
    """One picture for each task and method that was asked with several storages at one budget."""
    panels: dict[tuple[PanelKey, str], list[Line]] = {}
    for line in found:
        if line.budget and line.entries:
            panels.setdefault((line.panel, line.label.method.partition("+")[0]), []).append(line)
    alone = [line for line in found if is_packed(line.at) and not line.budget and line.entries]
    full = {line.panel: line for line in found if line.is_full and line.entries}
    drawn = []
    for (panel, method), lines in panels.items():
        if panel in full and len({line.label.method for line in lines if is_packed(line.at)}) > 1:
            drawn.append(_picture(panel, method, lines, [one for one in alone if one.panel == panel], full[panel], folder))
    return drawn


def _picture(panel: PanelKey, method: str, lines: list[Line], alone: list[Line], full: Line, folder: Path) -> Path:
    metric = next((line.metric for line in lines if line.metric), None) or "score"
    shown = [(name, what) for name, what in (("score", metric), ("kl", "KL to the full cache, nats")) if getattr(lines[0], name)]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.4), squeeze=False, layout="constrained")
    every = full.entries or 1.0
    budgets = sorted({line.budget for line in lines}, key=lambda text: -_largest(lines, text))
    for axis, (name, what) in zip(axes[0], shown, strict=True):
        for number, budget in enumerate(budgets):
            mine = [line for line in lines if line.budget == budget]
            _draw(axis, _points(mine, name, every), number, budget)
        _draw(axis, _points(alone, name, every), len(budgets), "storages alone", joined=False)
        axis.set(xlabel="entries kept, share of all", ylabel=literal(what), xscale="log")
        if name == "kl":
            axis.set_yscale("log")
        ticks = [
            tick for tick in (0.03, 0.0625, 0.125, 0.25, 0.5, 1.0) if tick >= min(p.entries or 1 for p in lines) / every / 1.5
        ]
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0][0].legend(fontsize=7, frameon=False, title="bytes", title_fontsize=7)
    figure.suptitle(literal(f"{panel.title}: {method}"), fontsize=9)
    path = place(folder, f"bits_{panel.model}_{panel.task}_{panel.protocol.prompt}_{method}", mark=f"_{panel.protocol.short}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _largest(lines: Sequence[Line], budget: str) -> float:
    return max(line.byte_share or 0.0 for line in lines if line.budget == budget)


def _points(lines: Sequence[Line], name: str, every: float) -> list[Point]:
    found = []
    for line in lines:
        value: Estimate | None = getattr(line, name)
        if value is not None and line.entries:
            storage = line.label.name.partition("+")[2] if line.budget else line.label.name
            found.append((line.entries / every, value, storage or "16 bits"))
    return sorted(found, key=lambda point: point[0])


def _draw(axis: Any, points: Sequence[Point], number: int, label: str, joined: bool = True) -> None:
    if not points:
        return
    colour = COLOURS[number % len(COLOURS)]
    means = [max(value.mean, LEAST_KL) for _, value, _ in points]
    spread = [
        [max(0.0, mean - max(value.low, LEAST_KL)) for mean, (_, value, _) in zip(means, points, strict=True)],
        [max(0.0, value.high - mean) for mean, (_, value, _) in zip(means, points, strict=True)],
    ]
    dash = DASHES[number % len(DASHES)] if joined else ""
    marker = MARKERS[number % len(MARKERS)]
    style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4, "linewidth": 1.2}
    shares = [share for share, _, _ in points]
    axis.errorbar(shares, means, yerr=spread, label=literal(label), capsize=1.5, elinewidth=0.6, **style)
    for turn, (share, mean, (_, _, storage)) in enumerate(zip(shares, means, points, strict=True)):
        below = 7 if turn % 2 else -11
        axis.annotate(literal(storage), (share, mean), textcoords="offset points", xytext=(3, below), fontsize=5.5, color=colour)
