"""Which methods are told apart, and which place each has: all pairs at once, on the examples that all of them answered.

Two methods are compared by their differences on the same examples, every task counting alike. The chance of such differences is
found by flipping the sign of whole examples, for all pairs together, so that what pairs share stays shared; the largest
standardised difference over all pairs corrects for their number (Westfall and Young 1993, step-down max T). Whoever is looked at
afterwards, the best one too, is covered: with a chance of 95 % no two equal methods are told apart.

Ranks are means over examples, ties halved: one more than the methods that are expected to do better (Friedman's ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from reports.statistics import EXACT, RESAMPLES, Estimate, mean_of_means

LEVEL = 0.05
CHUNK = 512  # sign patterns at a time


@dataclass(frozen=True)
class Place:
    """Where a method stands among k, and where it may stand: between those shown to be better and those shown to be worse."""

    rank: Estimate  # mean rank over examples; 1 is best
    first: int
    last: int
    better: frozenset[int]  # who is shown to be better


@dataclass(frozen=True)
class Pairs:
    """All pairs of k methods. p: [k, k], adjusted, 1 on the diagonal. least: a difference that would about be shown."""

    differences: np.ndarray  # [k, k], of means: row less column
    p: np.ndarray
    least: np.ndarray  # [k, k]

    def better(self, one: int, other: int) -> bool:
        """Is `one` shown to be better than `other`?"""
        return bool(self.p[one, other] < LEVEL and self.differences[one, other] > 0)


def all_pairs(tasks: Sequence[np.ndarray], seed: int = 0, looks: int = 1) -> Pairs:
    """Compares every method with every other.

    Args:
        tasks: [k, n] each: of k methods the values of a task's n examples, better is larger.
        looks: how often somebody may have looked whether that is enough, see `statistics.level_of`.
    """
    weighted = np.concatenate([np.asarray(task, np.float64) / task.shape[1] for task in tasks], axis=1) / len(tasks)  # [k, n]
    k, n = weighted.shape
    one, other = np.triu_indices(k, 1)
    apart = weighted[one] - weighted[other]  # [pairs, n]
    spread = np.sqrt((apart**2).sum(1))
    far = spread > 1e-12
    scale = np.where(far, spread, 1.0)
    t = np.where(far, np.abs(apart.sum(1)) / scale, 0.0)
    order = np.argsort(t, kind="stable")  # ascending: a running maximum is that of all pairs that are no farther apart
    reached, largest = np.zeros(len(t)), []
    patterns = _patterns(n, seed)
    for signs in patterns:
        sums = signs @ weighted.T  # [chunk, k]
        flipped = np.abs(sums[:, one[order]] - sums[:, other[order]]) / scale[order] * far[order]
        running = np.maximum.accumulate(flipped, axis=1)
        reached += (running >= t[order] - 1e-6).sum(0)
        largest.append(running[:, -1] if len(t) else np.zeros(len(signs)))
    drawn = sum(map(len, patterns))
    extra = 0 if n <= EXACT else 1  # the pattern that was seen is one of those that were drawn from
    adjusted = np.maximum.accumulate(((reached + extra) / (drawn + extra))[::-1])[::-1]  # the farther apart, the smaller
    adjusted = np.minimum(1.0, looks * adjusted)
    p, least = np.ones((k, k)), np.zeros((k, k))
    critical = float(np.quantile(np.concatenate(largest), 1 - LEVEL / looks))
    for values, found in ((p, adjusted), (least, critical * spread[order])):
        values[one[order], other[order]] = values[other[order], one[order]] = found
    means = weighted.sum(1)
    return Pairs(means[:, None] - means[None, :], p, least)


def _patterns(count: int, seed: int) -> list[np.ndarray]:
    """Signs of examples, [m, count]: all patterns of few examples, else drawn ones."""
    if count <= EXACT:
        return [np.array(list(product((-1.0, 1.0), repeat=count)))]
    drawn = np.random.default_rng(seed).integers(0, 2, (RESAMPLES, count), dtype=np.int8).astype(np.float64) * 2 - 1
    return [drawn[start : start + CHUNK] for start in range(0, RESAMPLES, CHUNK)]


def ranks(values: np.ndarray) -> np.ndarray:
    """Of k methods on n examples, [k, n], better is larger: the rank on each example, ties sharing the mean of theirs."""
    ahead = np.stack([(values > mine).sum(0) for mine in values])
    level = np.stack([(values == mine).sum(0) for mine in values])
    return ahead + (level + 1) / 2


def places(tasks: Sequence[np.ndarray], looks: int = 1) -> list[Place]:
    """Of each method its mean rank, every task counting alike, and the places it may have. tasks: as in `all_pairs`."""
    ranked = [ranks(task) for task in tasks]
    pairs = all_pairs([-one for one in ranked], looks=looks)
    found = []
    for mine in range(len(ranked[0])):
        better = frozenset(other for other in range(len(ranked[0])) if pairs.better(other, mine))
        worse = sum(pairs.better(mine, other) for other in range(len(ranked[0])))
        rank = mean_of_means([one[mine] for one in ranked])
        found.append(Place(rank, 1 + len(better), len(ranked[0]) - worse, better))
    return found
