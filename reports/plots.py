"""Score and fidelity against the measured share of bytes: a panel a benchmark, a line a method."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.formats import literal
from reports.keys import Label, PanelKey
from reports.pictures import place
from reports.statistics import Estimate
from reports.style import order_of, style_of
from reports.tables import Line

LEGEND_COLUMNS = 6
FULL = Label("full")  # the unconverted model's: a line across
HIGH = 3.6  # inches of the axes with their labels
LEAST_KL = 1e-6  # below this two caches predict the same in float32
FIELDS = (("score", "score"), ("kl", "KL to the full cache, nats"), ("top1", "same top token as full"))
UNUSED_IDS = r'id="(figure_1|axes_1|matplotlib\.axis_\d+|(patch|text|[xy]tick|line2d|LineCollection)_\d+)"'


@dataclass(frozen=True)
class Panel:
    """The lines of a model and its variants on one benchmark: they are counted in the same bytes."""

    at: PanelKey
    lines: tuple[Line, ...]

    @property
    def labels(self) -> list[Label]:
        return sorted({line.label for line in self.lines if line.byte_share is not None}, key=order_of)

    @property
    def fields(self) -> list[tuple[str, str]]:
        """What can be drawn, with what the axis says."""
        metric = next((line.metric for line in self.lines if line.metric), "score")
        drawn = [line for line in self.lines if not line.is_full] or self.lines
        shown = [(field, metric if field == "score" else what) for field, what in FIELDS]
        return [(field, what) for field, what in shown if any(getattr(line, field) for line in drawn)]


def panels(found: Sequence[Line]) -> list[Panel]:
    grouped: dict[PanelKey, list[Line]] = {}
    for line in found:
        where = PanelKey(line.parent, line.at.task, replace(line.protocol, routing=""))  # both routings: their labels differ
        grouped.setdefault(where, []).append(line)
    made = [Panel(where, tuple(lines)) for where, lines in grouped.items()]
    return sorted(made, key=lambda panel: any(line.lower_is_better for line in panel.lines))  # what is answered comes first


def save(panel: Panel, folder: Path) -> list[Path]:
    """One figure of everything that can be drawn, with its legend; as PNG and SVG."""
    shown = panel.fields
    if not shown:
        return []
    legend = 0.2 * -(-len(panel.labels) // LEGEND_COLUMNS) + 0.1  # inches; laid out by hand, which is three times faster
    wide, high = 4.6 * len(shown), HIGH + legend + 0.3
    figure = Figure(figsize=(wide, high))
    labelled: dict[str, Any] = {}
    for number, (field, what) in enumerate(shown):
        box = ((4.6 * number + 0.7) / wide, (legend + 0.5) / high, 3.65 / wide, (HIGH - 0.6) / high)
        axis = figure.add_axes(box)
        _draw(axis, panel, field, what)
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.suptitle(literal(panel.at.title), fontsize=10, y=1 - 0.08 / high)
    entries = (list(labelled.values()), list(labelled))
    below: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.0)}
    figure.legend(*entries, ncols=LEGEND_COLUMNS, fontsize=8, frameon=False, **below)
    name, mark = f"{panel.at.model}_{panel.at.task}_{panel.at.protocol.prompt}", f"_{panel.at.protocol.short}"
    paths = [place(folder, name, ending, mark) for ending in (".png", ".svg")]
    with plt.rc_context({"svg.hashsalt": "bytes", "svg.fonttype": "none"}):  # the same bytes for the same figure
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def inline(panel: Panel, field: str, what: str, number: int) -> str:
    """One axis as SVG for a page: text stays text, and every point says what it is in `data-tip`."""
    figure = Figure(figsize=(4.6, 3.1))
    axis = figure.add_axes((0.15, 0.17, 0.79, 0.79))
    tips = _draw(axis, panel, field, what)
    held = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"page {number}"}):
        figure.savefig(held, format="svg", metadata={"Date": None})
    return _with_tips(held.getvalue(), tips, number)


def _with_tips(svg: str, tips: dict[str, list[str]], number: int) -> str:
    """Without what only a file of its own needs; the k-th mark of a group gets the k-th text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(UNUSED_IDS, "", svg)
    for group, texts in tips.items():
        at = svg.index(f'id="{group}"')
        end = svg.index("</g>", at)
        marks = iter(texts)
        body = re.sub("<use ", lambda _, marks=marks: f'<use data-tip="{_attribute(next(marks))}" ', svg[at:end])  # type: ignore[misc]
        svg = svg[:at] + body + svg[end:]
    return svg.replace('id="tips', f'id="p{number}tips')


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def swatch(label: Label) -> str:
    """A method's line and mark as SVG, for a legend outside of a figure."""
    figure = Figure(figsize=(0.42, 0.16))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    if label == FULL:
        axis.plot([0, 2], [0, 0], color="black", linewidth=1)
    else:
        style = style_of(label)
        fill = "full" if style.filled else "none"
        axis.plot([0, 1, 2], [0, 0, 0], color=style.colour, linestyle=style.dash, linewidth=1.2)
        axis.plot([1], [0], color=style.colour, marker=style.marker, markersize=4, fillstyle=fill)
    axis.set(xlim=(-0.1, 2.1), ylim=(-1, 1))
    held = io.StringIO()
    with plt.rc_context({"svg.hashsalt": str(label)}):
        figure.savefig(held, format="svg", metadata={"Date": None}, transparent=True)
    return _with_tips(held.getvalue(), {}, 0)


def _draw(axis: Axes, panel: Panel, field: str, what: str) -> dict[str, list[str]]:
    """Gives, by the identifier of each group of marks, what they say."""
    tips: dict[str, list[str]] = {}
    if field == "kl":
        axis.set_yscale("log")
    for label in panel.labels:
        points = [
            (line.byte_share, value, line)
            for line in panel.lines
            if line.label == label and line.byte_share is not None and (value := getattr(line, field))
        ]
        if label.is_full and field != "score":
            continue  # compared with itself
        if label == FULL:
            for _, value, _ in points:
                axis.axhline(value.mean, color="black", linewidth=1, label="full")
        elif points:
            points.sort(key=lambda point: point[0])
            _line(axis, [(share, value) for share, value, _ in points], label)
            group = f"tips{len(tips)}"
            heights = [max(value.mean, LEAST_KL) if field == "kl" else value.mean for _, value, _ in points]
            axis.scatter([share for share, _, _ in points], heights, s=90, alpha=0.0, gid=group, zorder=9)
            tips[group] = [_tip(label, share, value, line) for share, value, line in points]
    axis.set(xscale="log", xlabel="bytes kept, share of the full cache (measured)", ylabel=literal(what))
    for text in (axis.xaxis.label, axis.yaxis.label):
        text.set_fontsize(8)
    axis.set_xticks(*_ticks(panel.lines))
    axis.minorticks_off()
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.tick_params(labelsize=8)
    return tips


def _tip(label: Label, share: float, value: Estimate, line: Line) -> str:
    budget = f" at {line.budget}" if line.budget else ""
    return f"{label}{budget}: {value.mean:.3g} [{value.low:.3g}, {value.high:.3g}], {share:.1%} of the bytes, n = {value.n}"


def _ticks(found: Sequence[Line]) -> tuple[list[float], list[str]]:
    """A tick at every share that was measured, but for those too close to another to be read."""
    shares: list[float] = []
    for share in sorted({line.byte_share for line in found if line.byte_share}):
        if not shares or share > 1.35 * shares[-1]:
            shares.append(share)
    return shares, [f"{share:.1%}" if share < 0.1 else f"{share:.0%}" for share in shares]


def _line(axis: Axes, points: Sequence[tuple[float, Estimate]], label: Label) -> None:
    style = style_of(label)
    least = LEAST_KL if axis.get_yscale() == "log" else -np.inf
    means = [max(value.mean, least) for _, value in points]
    spread = [[max(0.0, v.mean - max(v.low, least)) for _, v in points], [max(0.0, v.high - v.mean) for _, v in points]]
    drawn = axis.errorbar(
        [share for share, _ in points],
        means,
        yerr=spread,
        label=literal(str(label)),
        color=style.colour,
        marker=style.marker,
        fillstyle="full" if style.filled else "none",
        linestyle=style.dash,
        linewidth=1.2,
        markersize=4,
        capsize=1.5,
        elinewidth=0.6,
    )
    for part in (*drawn.lines[1], *drawn.lines[2]):
        part.set_alpha(0.45)  # intervals stand behind what they are of
