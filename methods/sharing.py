"""How a number of entries is shared between rows: all allocators share here."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np


def share_out(
    total: int, weights: np.ndarray, floors: np.ndarray, caps: np.ndarray, base: np.ndarray | float = 0.0
) -> np.ndarray:
    """Whole numbers that sum to `total`: clip(base + x * weight, floor, cap), with x such that the sum comes out.

    What a capped row cannot hold goes to the others by their weights, and once all weighted rows are full, evenly. What
    rounding leaves over goes out one each, to the largest fractions first and in flat order among equals: so a row that
    weighs more never gets less.

    Raises:
        ValueError: `total` is below the sum of the floors or above that of the caps.
    """
    if not floors.sum() <= total <= caps.sum():
        raise ValueError(f"{total} entries cannot be shared out between {floors.sum()} and {caps.sum()}")
    base = np.broadcast_to(np.asarray(base, dtype=np.float64), weights.shape)
    exact = _water(float(total), weights.astype(np.float64), floors, caps, base)
    counts = np.clip(np.floor(exact + 1e-6).astype(np.int64), floors, caps)
    fractions = np.round(exact - counts, 6)  # what differs by less is equal
    while (left := total - int(counts.sum())) > 0:
        order = np.argsort(-fractions, kind="stable")
        open_rows = order[(counts < caps)[order]][:left]
        counts[open_rows] += 1
    while (over := int(counts.sum()) - total) > 0:
        counts[np.flatnonzero(counts > floors)[::-1][:over]] -= 1
    return counts


def _water(total: float, weights: np.ndarray, floors: np.ndarray, caps: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Real-valued shares. The sum is piecewise linear and rises with x: find the piece, then solve it exactly."""

    def filled(x: float) -> np.ndarray:
        return np.clip(base + x * weights, floors, caps)

    growing = weights > 0
    if float(filled(0.0).sum()) >= total:  # the base alone is too much: scale what lies above the floors
        above = filled(0.0) - floors
        return floors + above * ((total - floors.sum()) / max(above.sum(), 1.0))
    most = np.where(growing, caps, filled(0.0))
    if float(most.sum()) <= total:  # weighted rows are full: the rest goes evenly to the others
        rest = np.where(growing, 0.0, 1.0)
        return _water(total, rest, floors, caps, most) if float(most.sum()) < total else most
    edges = np.concatenate([(floors - base)[growing] / weights[growing], (caps - base)[growing] / weights[growing]])
    edges = np.unique(np.maximum(edges, 0.0))
    at = bisect_left(edges, total, key=lambda x: float(filled(x).sum()))
    start, stop = float(edges[at - 1]) if at else 0.0, float(edges[at])
    bottom, top = float(filled(start).sum()), float(filled(stop).sum())
    return filled(start + (stop - start) * ((total - bottom) / (top - bottom) if top > bottom else 0.0))
