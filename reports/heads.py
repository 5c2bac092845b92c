"""A picture of head scores: which heads matter, and how few of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from reports.formats import literal


def head_map(shares: np.ndarray, title: str, path: Path) -> None:
    """Layer x head as a heat map, and the heads in descending order with their running total.

    Args:
        shares: [L, Hq], of 1.
    """
    layers, heads = shares.shape
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    image = left.imshow(shares, aspect="auto", cmap="cividis", vmin=0.0, interpolation="nearest")
    figure.colorbar(image, ax=left, label="share of all scores")
    left.set(xlabel="query head", ylabel="layer", title=literal(title))
    left.set_xticks(range(0, heads, max(1, heads // 8)))
    left.set_yticks(range(0, layers, max(1, layers // 8)))
    descending = np.sort(shares.ravel())[::-1]
    rank = np.arange(1, len(descending) + 1)
    right.step(rank, descending, where="mid", color="#0072B2", label="share of a head")
    right.set(xlabel="heads in descending order", ylabel="share of all scores", xlim=(1, len(descending)), ylim=(0, None))
    total = right.twinx()
    total.plot(rank, descending.cumsum(), color="#D55E00", linestyle="--", label="running total")
    total.set(ylabel="running total", ylim=(0, 1.02))
    right.legend([*right.lines, *total.lines], ["share of a head", "running total"], loc="center right", frameon=False)
    right.grid(alpha=0.25, linewidth=0.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)
