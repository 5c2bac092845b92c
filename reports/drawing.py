"""One axis of curves against the bytes: at most eight lines in colour, named at their ends, the rest thin and grey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import NullLocator

from reports.formats import literal
from reports.keys import Label
from reports.statistics import Estimate
from reports.style import GREY, KINDS, Palette, Style, kind_of

INK, SOFT, FRONTIER = "#1b1f24", "#59636e", "#F7E27C"
LEAST = 1e-6  # on a log axis: below this two caches predict the same in float32
LETTERS = 21  # of a name at its line
LETTERS_AN_INCH = 15  # of a title
LINE = 0.0193  # inches from one name to the next, a point of the letters
TICK = 0.05  # from one share to the next
WHOLE = 0.995  # of the full cache's bytes: from here on nothing is saved
SHADED = 2  # curves with their intervals


@dataclass(frozen=True)
class Point:
    share: float  # of the full cache's bytes, measured
    value: Estimate
    tip: str = ""  # what it says when it is pointed at


@dataclass(frozen=True)
class Curve:
    """A method's line, or one point of a variant's whole cache."""

    label: Label
    points: tuple[Point, ...]  # by share

    @property
    def end(self) -> Point:
        return self.points[-1]


@dataclass(frozen=True)
class Picture:
    """One idea: what is measured, of whom."""

    what: str
    curves: tuple[Curve, ...]
    full: Estimate | None = None  # the unconverted model's, a line across
    log: bool = False
    lower_is_better: bool = False
    marked: float = 0.0  # a share that is spoken of

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if any(kind_of(curve.label) == kind for curve in self.curves)]

    def height(self, value: float) -> float:
        return max(value, LEAST) if self.log else value

    @property
    def frontier(self) -> list[tuple[float, float]]:
        """The best that is reached with as many bytes or fewer: where it rises, from share to share.

        A point with the full cache's bytes, such as a control's, is no part of it: with those the full cache itself is to be had.
        """
        sign = -1.0 if self.lower_is_better else 1.0
        reached, best = [], -np.inf
        points = (point for curve in self.curves for point in curve.points if point.share < WHOLE or self.full is None)
        for share, value in sorted((point.share, -sign * point.value.mean) for point in points):
            if -value > best + 1e-12:
                best = -value
                reached.append((share, sign * best))
        return reached

    def leading(self, frontier: Sequence[tuple[float, float]]) -> list[Label]:
        """Of the curves that have points on the frontier, those that have most."""
        best = set(frontier)
        counts = {curve.label: sum((point.share, point.value.mean) in best for point in curve.points) for curve in self.curves}
        return sorted((label for label in counts if counts[label]), key=lambda label: -counts[label])[:SHADED]


@dataclass(frozen=True)
class Room:
    """Of the axes, in inches, and of the letters, in points."""

    wide: float
    high: float
    size: float = 7.0


def draw(axis: Axes, picture: Picture, kinds: Sequence[str], palette: Palette, room: Room) -> dict[str, list[str]]:
    """Draws the curves of some kinds, and gives what each group of marks says, by the group's identifier."""
    shown = [curve for curve in picture.curves if kind_of(curve.label) in kinds]
    _axes(axis, picture, room)
    reached = picture.frontier
    leading = picture.leading(reached)
    if frontier := [(share, picture.height(value)) for share, value in reached]:
        axis.plot(*zip(*frontier, strict=True), color=FRONTIER, linewidth=room.size, solid_capstyle="round", zorder=5)
    if picture.marked:
        axis.axvline(picture.marked, color=SOFT, linewidth=0.8, linestyle=":", zorder=2)
    if picture.full:
        axis.axhline(picture.height(picture.full.mean), color=INK, linewidth=0.9, linestyle=(0, (5, 3)), zorder=2)
    tips: dict[str, list[str]] = {}
    for curve in sorted(shown, key=lambda curve: not palette.of_label(curve.label).grey):  # grey ones lie below
        _curve(axis, picture, curve, palette.of_label(curve.label), shaded=curve.label in leading)
        group = f"tips{len(tips)}"
        at = ([point.share for point in curve.points], [picture.height(point.value.mean) for point in curve.points])
        axis.scatter(*at, s=60, alpha=0.0, gid=group, zorder=9)
        tips[group] = [point.tip for point in curve.points]
    _names(axis, picture, [curve for curve in shown if not palette.of_label(curve.label).grey], palette, room)
    return tips


def _axes(axis: Axes, picture: Picture, room: Room) -> None:
    """Limits and ticks, over all curves: panels side by side share them."""
    shares = [point.share for curve in picture.curves for point in curve.points] or [1.0]
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(shares) / 1.18, max(shares) * 1.18)
    low, high = axis.get_xlim()
    octaves = range(ceil(-log2(high)), floor(-log2(low)) + 1)
    every = -(-len(octaves) // max(2, int(room.wide / (room.size * TICK))))
    ticks = [0.5**octave for octave in octaves if (octave - 2) % every == 0]  # a quarter is among them
    ticks = ticks if len(ticks) > 1 else _apart(shares)
    axis.set_xticks(ticks, [f"{100 * tick:.3g}%" for tick in ticks], minor=False)
    axis.set_xticks([], minor=True)
    heights = [picture.height(point.value.mean) for curve in picture.curves for point in curve.points]
    heights += [picture.height(picture.full.mean)] if picture.full else []
    low, high = min(heights, default=0.0), max(heights, default=1.0)
    if picture.log:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.5, max(high, 2 * low) * 1.5)
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        axis.set_ylim(low - margin, high + margin)
    axis.grid(alpha=0.22, linewidth=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=room.size, width=0.6, length=2.5)
    axis.set_xlabel("bytes kept, of the full cache's (measured)", fontsize=room.size + 0.5)
    axis.set_ylabel(literal(picture.what), fontsize=room.size + 0.5)


def _apart(shares: Sequence[float]) -> list[float]:
    """What was measured, but for shares too close to another to be read."""
    found: list[float] = []
    for share in sorted(shares):
        if not found or share > 1.3 * found[-1]:
            found.append(share)
    return found


def _curve(axis: Axes, picture: Picture, curve: Curve, style: Style, shaded: bool) -> None:
    shares = [point.share for point in curve.points]
    means = [picture.height(point.value.mean) for point in curve.points]
    alone = len(shares) == 1
    if style.grey:
        axis.plot(shares, means, color=GREY, linewidth=0.7, marker="o" if alone else "", markersize=2.5, zorder=3)
        return
    low, high = ([picture.height(getattr(point.value, side)) for point in curve.points] for side in ("low", "high"))
    if alone:
        axis.vlines(shares, low, high, color=to_rgba(style.colour, 0.35), linewidth=3, zorder=4)
    elif shaded:
        axis.fill_between(shares, low, high, color=style.colour, alpha=0.1, linewidth=0, zorder=4)
    axis.plot(shares, means, color=style.colour, linewidth=1.4, marker=style.marker, markersize=4.2, markeredgewidth=0, zorder=6)


def _names(axis: Axes, picture: Picture, curves: Sequence[Curve], palette: Palette, room: Room) -> None:
    """Names beside the axes, each as near to its line's end as the others let it, joined to it by a thin line."""
    wanted = [(_height(axis, picture.height(curve.end.value.mean)), curve) for curve in curves]
    full = _height(axis, picture.height(picture.full.mean)) if picture.full else None
    entries = sorted([*wanted, *([(full, None)] if full is not None else [])], key=lambda entry: entry[0])
    places = spread([entry[0] for entry in entries], room.size * LINE / room.high)
    for (height, curve), place in zip(entries, places, strict=True):
        style = palette.of_label(curve.label) if curve else None
        x = 1 + 0.14 / room.wide
        start = _across(axis, curve.end.share) if curve else 1.0
        colour = style.colour if style else INK
        beside: dict[str, Any] = {"transform": axis.transAxes, "clip_on": False}
        axis.plot([start, x - 0.04 / room.wide], [height, place], color=colour, linewidth=0.5, alpha=0.6, zorder=2, **beside)
        if style:
            axis.plot([x], [place], color=colour, marker=style.marker, markersize=4.2, markeredgewidth=0, **beside)
        name = shortened(str(curve.label)) if curve else "full cache"
        axis.text(x + 0.07 / room.wide, place, literal(name), fontsize=room.size, va="center_baseline", color=INK, **beside)


def _height(axis: Axes, value: float) -> float:
    """Of the axes' height."""
    low, high = axis.get_ylim()
    return float(np.log(value / low) / np.log(high / low) if axis.get_yscale() == "log" else (value - low) / (high - low))


def _across(axis: Axes, share: float) -> float:
    low, high = axis.get_xlim()
    return float(np.log(share / low) / np.log(high / low))


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places, moved as little as may be (least squares) so that each lies `gap` above the one before, from 0 to 1."""
    blocks: list[list[float]] = []  # of places that touch: the mean of what they want less their offsets, and how many
    for number, place in enumerate(wanted):
        blocks.append([place - number * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            before = blocks[-1]
            before[0] = (before[0] * before[1] + mean * count) / (before[1] + count)
            before[1] += count
    free = [mean for mean, count in blocks for _ in range(int(count))]
    most = 1 - (len(free) - 1) * gap
    return [number * gap + max(0.0, min(place, most)) for number, place in enumerate(free)]


def shortened(name: str, letters: int = LETTERS) -> str:
    """Its beginning and its end."""
    return name if len(name) <= letters else f"{name[: letters - letters // 3 - 1]}…{name[-(letters // 3) :]}"
