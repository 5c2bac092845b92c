"""Quality over the bytes of an answer: at equal mean on the left, at equal peak on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from reports.drawing import LETTERS_AN_INCH, SOFT, shortened
from reports.formats import literal
from reports.keys import Label, LineKey, PanelKey
from reports.over_answer import full_caches, grouped, shares
from reports.pictures import place
from reports.style import Palette, Style
from results.record import Record

ABOUT = (
    "Quality against the bytes held over an answer, as shares of the full cache's over its answers to the same prompts: the mean "
    "over its tokens on the left, the peak on the right. Dashed lines are methods that evict while decoding. At equal budgets a "
    "method that evicts once holds more by the end, so compare what stands above the same share, not at one budget. "
    "Means, without intervals."
)
Points = dict[Label, list[tuple[float, float, float]]]  # by method: mean share, peak share, score


def over_answer_plots(records: Sequence[Record], folder: Path, palette: Palette) -> list[Path]:
    """One picture for each panel in which a method evicts while decoding."""
    groups = grouped(records)
    full = full_caches(groups)
    panels: dict[PanelKey, dict[LineKey, list[Record]]] = {}
    for at, found in groups.items():
        if at.panel in full and any(record.metrics for record in found):
            panels.setdefault(at.panel, {})[at] = found
    return [_picture(panel, found, full[panel], folder, palette) for panel, found in panels.items()]


def _picture(
    panel: PanelKey, groups: Mapping[LineKey, list[Record]], full: Sequence[Record], folder: Path, palette: Palette
) -> Path:
    points: Points = {}
    again: set[Label] = set()
    for at in sorted(groups, key=lambda at: at.order):
        mean, peak = shares(groups[at], full)
        score = float(np.mean([next(iter(record.metrics.values())) for record in groups[at] if record.metrics]))
        points.setdefault(at.label, []).append((mean, peak, score))
        if any(record.bytes_kept_peak is not None for record in groups[at]):
            again.add(at.label)
    metric = next((name for found in groups.values() for record in found for name in record.metrics), "score")
    figure, axes = plt.subplots(1, 2, figsize=(11.6, 4.2), sharey=True, layout="constrained")
    for which, (axis, what) in enumerate(zip(axes, ("mean", "peak"), strict=True)):
        for label, found in points.items():
            _draw(axis, [(point[which], point[2]) for point in found], label, palette.of_label(label), label in again)
        axis.set(xlabel=f"{what} bytes over the answer, share of the full cache's", xscale="log")
        least = min(point[which] for found in points.values() for point in found)
        ticks = [tick for tick in (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0) if tick >= least / 1.3]
        axis.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.5)
    lower = any(metric in record.lower_is_better for found in groups.values() for record in found)
    axes[0].set_ylabel(literal(f"{metric}, lower is better" if lower else metric))
    told = [label.is_full or not palette.of_label(label).grey for label in points]  # greys cannot be told apart: one line for all
    lines = [line for line, mine in zip(axes[0].lines, told, strict=True) if mine]
    texts = [str(line.get_label()) for line in lines]
    if not all(told):
        lines.append(axes[0].lines[told.index(False)])
        texts.append("others, named in the table")
    figure.legend(lines, texts, loc="outside right center", fontsize=7, frameon=False)
    figure.suptitle(literal(shortened(panel.title, int(LETTERS_AN_INCH * 0.8 * figure.get_figwidth()))), fontsize=8)
    name = f"over_answer_{panel.model}_{panel.task}_{panel.protocol.prompt}"
    path = place(folder, name, mark=f"_{panel.protocol.short}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _draw(axis: Any, points: Sequence[tuple[float, float]], label: Label, style: Style, dashed: bool) -> None:
    marker = style.marker or "o"  # a line of one point, as the full cache's, is its mark alone
    manner = {"color": SOFT if style.grey else style.colour, "marker": marker, "markersize": 5, "linewidth": 1.2}
    held, scores = zip(*sorted(points), strict=True)
    axis.plot(held, scores, linestyle="--" if dashed else "-", label=literal(label.name), **manner)
