"""Bits against entries: at equal bytes, does a cache do better with many entries of few bits, or few of many?

A picture a task: the share of the entries that are kept to the right, the score and the KL to the full cache above, and a line a
budget, from the fewest entries in 16 bits to the most in few. What stands at one budget takes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from reports.drawing import LETTERS_AN_INCH, shortened
from reports.formats import literal
from reports.keys import LineKey, PanelKey
from reports.pictures import place
from reports.statistics import Estimate
from reports.style import COLOURS, MARKERS
from reports.tables import Line

LEAST_KL = 1e-7
TICKS = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
ABOUT = (
    "Bits against entries at equal bytes: each line is a budget, each point a storage behind one method, from few entries in 16 "
    "bits on the left to many in few bits. Storages alone keep every entry and stand where their bytes are."
)
DASHES = ("-", "--", "-.", ":")
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
    figure, axes = plt.subplots(1, len(shown), figsize=(5.0 * len(shown) + 1.6, 4.2), squeeze=False, layout="constrained")
    every = full.entries or 1.0
    budgets = sorted({line.budget for line in lines}, key=lambda text: -_largest(lines, text))
    colours = {budget: COLOURS[number % len(COLOURS)] for number, budget in enumerate(budgets)}
    marks = {
        name: MARKERS[number % len(MARKERS)] for number, name in enumerate(sorted({_storage(one) for one in [*lines, *alone]}))
    }
    for axis, (name, what) in zip(axes[0], shown, strict=True):
        for number, budget in enumerate(budgets):
            points = _points([line for line in lines if line.budget == budget], name, every)
            _draw(axis, points, colours[budget], DASHES[number % len(DASHES)], marks)
        _draw(axis, _points(alone, name, every), "black", "", marks)
        least = min(line.entries or every for line in lines) / every / 1.3
        ticks = [tick for tick in TICKS if tick >= least]
        axis.set(xlabel="entries kept, share of all", ylabel=literal(what), xscale="log", xlim=(least, 1.15))
        if name == "kl":
            axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.5)
    _legend(figure, colours, marks, bool(alone))
    figure.suptitle(
        literal(shortened(f"{panel.title}: {method}", int(LETTERS_AN_INCH * 0.8 * figure.get_figwidth()))), fontsize=8
    )
    path = place(folder, f"bits_{panel.model}_{panel.task}_{panel.protocol.prompt}_{method}", mark=f"_{panel.protocol.short}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _storage(line: Line) -> str:
    """How its rows are held, in short: without settings."""
    name = line.label.method.partition("+")[2] if line.budget else line.label.method
    return name.partition("(")[0] or "16 bits"


def _largest(lines: Sequence[Line], budget: str) -> float:
    return max(line.byte_share or 0.0 for line in lines if line.budget == budget)


def _points(lines: Sequence[Line], name: str, every: float) -> list[Point]:
    found = []
    for line in lines:
        value: Estimate | None = getattr(line, name)
        if value is not None and line.entries:
            found.append((line.entries / every, value, _storage(line)))
    return sorted(found, key=lambda point: point[0])


def _draw(axis: Any, points: Sequence[Point], colour: str, dash: str, marks: Mapping[str, str]) -> None:
    means = [max(value.mean, LEAST_KL) for _, value, _ in points]
    axis.plot([share for share, _, _ in points], means, color=colour, linestyle=dash or "none", linewidth=1.2)
    for mean, (share, value, storage) in zip(means, points, strict=True):
        spread = [[max(0.0, mean - max(value.low, LEAST_KL))], [max(0.0, value.high - mean)]]
        style: dict[str, Any] = {"color": colour, "marker": marks[storage], "markersize": 5, "elinewidth": 0.6, "capsize": 1.5}
        axis.errorbar([share], [mean], yerr=spread, fillstyle="full" if dash else "none", **style)


def _legend(figure: Any, colours: Mapping[str, str], marks: Mapping[str, str], alone: bool) -> None:
    """Colours are budgets, marks are storages."""
    handles = [Line2D([], [], color=colour, label=f"{budget} of the bytes") for budget, colour in colours.items()]
    handles += [Line2D([], [], color="grey", marker=mark, linestyle="none", label=literal(name)) for name, mark in marks.items()]
    if alone:
        hollow: dict[str, Any] = {"marker": "o", "fillstyle": "none", "linestyle": "none"}
        handles.append(Line2D([], [], color="black", label="hollow: every entry", **hollow))
    figure.legend(handles=handles, loc="outside right center", fontsize=7, frameon=False)
