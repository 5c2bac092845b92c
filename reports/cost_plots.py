"""What a cell costs, as pictures: against the context, and over the time of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from reports.cost import Cost
from reports.drawing import INK, SOFT
from reports.formats import literal
from reports.keys import Label
from reports.pictures import place
from reports.style import Palette


def cost_pictures(found: Sequence[Cost], folder: Path, palette: Palette) -> list[Path]:
    """Milliseconds a token and peaks against the context, a line a method and budget, the floor beneath each.

    A picture a way of decoding, at the smallest batch.
    """
    paths: list[Path] = []
    drawn = [cost for cost in found if not cost.fell_back]  # those are eager times
    for panel, decode in dict.fromkeys((cost.panel, cost.decode) for cost in drawn):
        alike = [cost for cost in drawn if (cost.panel, cost.decode) == (panel, decode)]
        mine = [cost for cost in alike if cost.batch == min(cost.batch for cost in alike)]
        figure = Figure(figsize=(13.2, 4.4), layout="constrained")
        axes = figure.subplots(1, 3)
        if len({cost.context for cost in mine}) > 1:
            _against_context(axes, mine, palette)
        else:
            _bars(axes, mine, palette)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
        way = () if decode == "eager" else (f"decode {decode}",)
        figure.suptitle(literal(", ".join((str(panel), *way))), fontsize=10)
        paths.append(_saved(figure, folder, f"cost_{'_'.join((*panel.place, *way))}"))
    for panel in dict.fromkeys(cost.panel for cost in found):
        held = {_cell(cost): cost for cost in found if cost.panel == panel and cost.memory and "footprint" in cost.memory}
        if held:
            figure = _footprints(list(held.values()), str(panel), palette)
            paths.append(_saved(figure, folder, f"footprint_{'_'.join(panel.place)}"))
    return paths


def _saved(figure: Figure, folder: Path, name: str) -> Path:
    path = place(folder, name)
    figure.savefig(path, dpi=150)
    return path


def _cell(cost: Cost) -> tuple[object, ...]:
    return (cost.method, cost.budget, cost.context, cost.batch)


def _manner(cost: Cost, palette: Palette, number: int) -> dict[str, Any]:
    """How a cell's line looks: as its method does everywhere; those without a colour of their own are told apart by dashes."""
    if cost.method == "full":
        return {"color": INK, "linestyle": "-", "marker": "o"}
    style = palette.of_label(Label(cost.method, variant=cost.panel.variant))
    dash = DASHES[number % len(DASHES)] if style.grey else "-"
    return {"color": SOFT if style.grey else style.colour, "linestyle": dash, "marker": style.marker}


DASHES = ("--", "-.", ":")


def _mib(points: Sequence[Sequence[int]]) -> tuple[list[int], list[float]]:
    return [at for at, _ in points], [size / 2**20 for _, size in points]


def _footprints(held: Sequence[Cost], title: str, palette: Palette) -> Figure:
    """Bytes of keys and values over the time of an answer: read, compressed, then a token more each step."""
    context, batch = max(cost.context for cost in held), min(cost.batch for cost in held)
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    reading, answering = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for number, cost in enumerate(held):
        if (cost.context, cost.batch) != (context, batch):
            continue
        points = (cost.memory or {})["footprint"]
        read, after = points[:-2], points[-2:]  # the last two: compressed, and at the last token
        if not reading.lines:  # the same for all: nothing is dropped before the prompt is read
            reading.plot(*_mib(read), color="grey", linewidth=1.4, label="every method, while it reads")
        manner = _manner(cost, palette, number)
        answering.plot(*_mib([(at - context, size) for at, size in after]), label=literal(cost.label), linewidth=1.4, **manner)
    reading.set(xlabel="tokens read", ylabel="keys and values, MiB", ylim=(0, None))
    answering.set(xlabel="tokens answered")
    for axis in (reading, answering):
        axis.grid(alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(literal(f"{title}, {context:,} tokens" + (f", batch {batch}" if batch > 1 else "")), fontsize=10)
    return figure


SHOWN = ("ms a token", "peak while decoding, MiB", "peak until the first token, MiB")


def _bars(axes: Any, mine: Sequence[Cost], palette: Palette) -> None:
    """Of one context: a bar a method and budget, the floor marked on it."""
    labels = [literal(cost.label) for cost in mine]
    places = range(len(mine))
    colours = [_manner(cost, palette, 0)["color"] for cost in mine]
    values = (
        [cost.token_ms or 0.0 for cost in mine],
        *([(cost.memory or {}).get(peak, 0) / 2**20 for cost in mine] for peak in ("decode_peak", "prefill_peak")),
    )
    for axis, what, value in zip(axes, SHOWN, values, strict=True):
        axis.barh(places, value, color=colours, height=0.6)
        axis.set_yticks(places, labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(f"{what}, at {mine[0].context:,} tokens")
        axis.grid(axis="x", alpha=0.25, linewidth=0.5)
    floors = [cost.floor_ms if cost.laps else 0.0 for cost in mine]
    axes[0].plot(floors, list(places), linestyle="", marker="|", markersize=16, color="#D55E00", markeredgewidth=2, label=FLOOR)


def _against_context(axes: Any, mine: Sequence[Cost], palette: Palette) -> None:
    for number, label in enumerate(dict.fromkeys(cost.label for cost in mine)):
        line = sorted((cost for cost in mine if cost.label == label), key=lambda cost: cost.context)
        _lines(axes, line, label, _manner(line[0], palette, number))
    for axis, what in zip(axes, SHOWN, strict=True):
        axis.set(xlabel="tokens of the prompt", ylabel=what, ylim=(0, None))
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0].plot([], [], color="grey", linestyle=":", label=FLOOR)


FLOOR = "floor: bytes over bandwidth"


def _lines(axes: Any, line: Sequence[Cost], label: str, manner: Mapping[str, Any]) -> None:
    manner = {**manner, "markersize": 4, "linewidth": 1.2}
    timed, watched = [cost for cost in line if cost.laps], [cost for cost in line if cost.memory]
    contexts = [cost.context for cost in timed]
    rounds = [[1000 * lap["token"] for lap in cost.laps] for cost in timed]
    middle = [cost.token_ms or 0.0 for cost in timed]
    axes[0].plot(contexts, middle, label=literal(label), **manner)
    low, high = [min(lap) for lap in rounds], [max(lap) for lap in rounds]
    axes[0].fill_between(contexts, low, high, color=manner["color"], alpha=0.1, linewidth=0)
    axes[0].plot(contexts, [cost.floor_ms for cost in timed], color=manner["color"], linestyle=":", linewidth=1)
    for axis, peak in ((axes[1], "decode_peak"), (axes[2], "prefill_peak")):
        values = [(cost.memory or {})[peak] / 2**20 for cost in watched]
        axis.plot([cost.context for cost in watched], values, **manner)
