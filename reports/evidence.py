"""Pictures of what a run left besides scores: which heads matter, what each kept, where a mixSGA variant sends its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from reports.formats import literal
from reports.heads import head_map
from reports.keys import LineKey
from reports.names import named
from reports.pictures import place
from results.record import Record, budget_size

ACROSS = 4  # maps side by side
EXPERTS = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")


def importance_maps(found: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Head scores that methods of this run were given."""
    paths = []
    for scores in found:
        values = np.array(scores["values"])
        path = place(folder, f"heads_{scores['variant']}", mark=f"_{scores['kind']}_{scores['id']}")
        title = f"{scores['variant']}, {scores['kind']}: {scores['successes']} of {scores['attempts']} attempts"
        head_map(values / values.sum(), title, path)
        paths.append(path)
    return paths


def kept_maps(records: Sequence[Record], folder: Path) -> list[Path]:
    """Entries that each query head reads on one prompt: a figure a model, a map a method, at a budget that most methods share."""
    by_model: dict[str, list[tuple[Record, LineKey]]] = {}
    for record, at in zip(records, named(records), strict=True):
        if record.kept and record.key.budget and record.status == "ok":
            by_model.setdefault(at.model, []).append((record, at))
    return [path for model, found in sorted(by_model.items()) for path in _kept(model, found, folder)]


def _kept(model: str, found: Sequence[tuple[Record, LineKey]], folder: Path) -> list[Path]:
    (record, first), *_ = found
    asked = (first.panel, record.key.seed)
    same = [(at, record) for record, at in found if (at.panel, record.key.seed) == asked]
    budgets = {at.asked.budget for at, _ in same}
    methods = {budget: len({at.label for at, _ in same if at.asked.budget == budget}) for budget in budgets}
    shared = [budget for budget, count in methods.items() if count == max(methods.values())]
    budget = sorted(shared, key=budget_size)[(len(shared) - 1) // 2]
    shown = {at.label.name: np.array(record.kept) for at, record in same if at.asked.budget == budget}
    if all(values.min() == values.max() for values in shown.values()):
        return []  # every head keeps as many: nothing to be seen
    across = min(ACROSS, len(shown))
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(down, across, figsize=(2.9 * across + 0.8, 1.9 * down + 0.6), squeeze=False, layout="constrained")
    largest = max(int(values.max()) for values in shown.values())
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (method, values) in zip(axes.flat, sorted(shown.items()), strict=False):
        image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=largest, interpolation="nearest")
        axis.set_title(literal(f"{method}: {values.min()} to {values.max()}"), fontsize=8)
        axis.tick_params(labelsize=7)
    figure.supxlabel("query head", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes, label="entries read", shrink=0.9)
    title = f"{model}, one prompt of {replace(first.task, length=None)}, {first.asked.prompt}, at {budget}"
    figure.suptitle(literal(title), fontsize=9)
    path = place(folder, f"kept_{model}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return [path]


def routing_pictures(found: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Share of each expert by layer, under both routings."""
    paths = []
    for one in found:
        count = len(one["shares"])
        figure, axes = plt.subplots(1, count, figsize=(4.2 * count, 2.6), squeeze=False, layout="constrained")
        for axis, (routing, shares) in zip(axes[0], one["shares"].items(), strict=True):
            values = np.array(shares)  # [L, E]
            left = np.zeros(len(values))
            for expert in range(values.shape[1]):
                hatch = ("", "///", "...", "xx", "++")[expert % 5]
                colour = EXPERTS[expert % len(EXPERTS)]
                axis.barh(range(len(values)), values[:, expert], left=left, color=colour, edgecolor="white", hatch=hatch)
                left += values[:, expert]
            axis.set(xlim=(0, 1), xlabel="share of the tokens", ylabel="layer", yticks=range(len(values)))
            axis.invert_yaxis()
            axis.set_title(literal(routing.replace("_", " ")), fontsize=9)
        experts = [plt.Rectangle((0, 0), 1, 1, facecolor=colour) for colour in EXPERTS[: values.shape[1]]]
        names = [f"expert {number + 1}" for number in range(values.shape[1])]
        figure.legend(experts, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
        figure.suptitle(literal(f"{one['model']}, {one['tokens']} tokens of {one['benchmark']}"), fontsize=9)
        path = place(folder, f"routing_{one['model']}")
        figure.savefig(path, dpi=150)
        plt.close(figure)
        paths.append(path)
    return paths
