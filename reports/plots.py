"""Score and fidelity against the measured share of bytes: a panel a benchmark, a line a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from reports.statistics import Estimate
from reports.tables import Line

# Okabe and Ito's colours, safe for colour-blind readers; with a marker and a dash each, so that print in grey reads too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
KNOWN: tuple[str, ...] = ("random", "streaming_llm", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "ada_snapkv")
KNOWN += ("headkv_r", "headkv_er", "headkv_r2", "headkv_paper", "full")
LEAST_KL = 1e-6  # below this two caches predict the same in float32
SHOWN = (("score", "score", True), ("kl", "KL to the full cache, nats", False), ("top1", "same top token as full", True))


def plot(found: Sequence[Line], folder: Path) -> list[Path]:
    """One figure, as PNG and SVG."""
    panels = list(dict.fromkeys(_panel(line) for line in found))
    shown = [what for what in SHOWN if any(getattr(line, what[0]) for line in found)]
    if not panels or not shown:
        return []
    several = len({panel[0] for panel in panels}) > 1  # models and protocols are named where they differ
    mixed = len({panel[:3] for panel in panels}) < len(panels)
    size = (4.6 * len(shown), 3.4 * len(panels) + 0.6)
    figure, axes = plt.subplots(len(panels), len(shown), figsize=size, squeeze=False, layout="constrained")
    for row, panel in zip(axes, panels, strict=True):
        for axis, (field, label, _) in zip(row, shown, strict=True):
            _draw(axis, [line for line in found if _panel(line) == panel], field)
            axis.set_title(", ".join([panel[1], panel[2], *panel[: 1 * several], *panel[3 : 3 + mixed]]), fontsize=9)
            axis.set_xlabel("bytes kept, share of the full cache (measured)", fontsize=8)
            metric = next((line.metric for line in found if _panel(line) == panel and line.metric), label)
            axis.set_ylabel(metric if field == "score" else label, fontsize=8)
    labelled: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    paths = [folder / f"byte_share.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _panel(line: Line) -> tuple[str, str, str, str]:
    """A model and its variants share one: they are counted in the same bytes."""
    return (line.model.split("+")[0], line.benchmark, line.prompt, line.protocol.split(", prefill routed")[0])


def _label(line: Line) -> str:
    method, (_, plus, variant) = line.method.split("@")[0], line.model.partition("+")
    causal = " (argmax)" if line.protocol.endswith("argmax") else ""
    return f"{method} on {variant}{causal}" if plus else method


def _draw(axis: Axes, found: Sequence[Line], field: str) -> None:
    if field == "kl":
        axis.set_yscale("log")
    for label in sorted({_label(line) for line in found}, key=_order):
        points = [
            (line.byte_share, value)
            for line in found
            if _label(line) == label and line.byte_share is not None and (value := getattr(line, field))
        ]
        if label.startswith("full") and field != "score":
            continue  # compared with itself
        if label == "full":
            for _, value in points:
                axis.axhline(value.mean, color="black", linewidth=1, label="full")
        elif points:
            _line(axis, sorted(points, key=lambda point: point[0]), label)
    axis.set_xscale("log")
    axis.set_xticks(*_ticks(found))
    axis.minorticks_off()
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.tick_params(labelsize=8)


def _ticks(found: Sequence[Line]) -> tuple[list[float], list[str]]:
    """A tick at every share that was measured, but for those too close to another to be read."""
    shares: list[float] = []
    for share in sorted({line.byte_share for line in found if line.byte_share}):
        if not shares or share > 1.2 * shares[-1]:
            shares.append(share)
    return shares, [f"{share:.1%}" if share < 0.1 else f"{share:.0%}" for share in shares]


def _order(method: str) -> tuple[int, str]:
    name = method.split(" on ")[0].split("(")[0]
    return (len(KNOWN) * (" on " in method) + (KNOWN.index(name) if name in KNOWN else len(KNOWN)), method)


def _line(axis: Axes, points: Sequence[tuple[float, Estimate]], method: str) -> None:
    plain, _, variant = method.partition(" on ")
    name, *setting = plain.split("(")  # another setting of a method, or the same on a variant: its colour, not filled
    number = KNOWN.index(name) if name in KNOWN else len(KNOWN) + sum(map(ord, name))
    style, turn = number % len(COLOURS), number // len(COLOURS)
    dash = (style + turn + sum(map(ord, variant))) % len(DASHES)
    shares = [share for share, _ in points]
    least = LEAST_KL if axis.get_yscale() == "log" else -np.inf
    means = [max(value.mean, least) for _, value in points]
    spread = [[max(0.0, v.mean - max(v.low, least)) for _, v in points], [max(0.0, v.high - v.mean) for _, v in points]]
    axis.errorbar(
        shares,
        means,
        yerr=spread,
        label=method,
        color=COLOURS[style],
        marker=MARKERS[(style + 3 * turn) % len(MARKERS)],
        fillstyle="none" if setting or variant else "full",
        linestyle=DASHES[dash],
        linewidth=1.2,
        markersize=4,
        capsize=2,
        elinewidth=0.7,
    )
