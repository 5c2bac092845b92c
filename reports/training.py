"""The picture of a training: its losses over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from reports.formats import literal


def loss_picture(losses: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """A line a part of the loss."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name, dash in zip([name for name in losses[0] if name != "step"], ("-", "--", ":"), strict=False):
        axis.plot([entry["step"] for entry in losses], [entry[name] for entry in losses], dash, label=literal(name))
    axis.set(xlabel="step", ylabel="loss", yscale="log", title=literal(title))
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
