"""Means with intervals, paired differences and their tests: seeded, over examples.

Intervals are percentile bootstraps; a paired difference is tested by flipping signs (Fisher's randomisation test), and a family
of tests is corrected by Holm's step-down (1979).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from statistics import NormalDist
from typing import TypeVar

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
LEAST = 6  # examples: with fewer, even a difference that all of them share may be chance (two-sided sign test)
KEPT = 1000  # examples up to which resamples are drawn once and kept
EXACT = 12  # examples up to which every pattern of signs is tried

Example = TypeVar("Example", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; `n` examples. `p` of a paired difference: how likely one as large is by chance."""

    mean: float
    low: float
    high: float
    n: int
    p: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.n >= LEAST and (self.low > 0 or self.high < 0)


def level_of(looks: int) -> float:
    """Of one look's intervals, where examples are added until they are narrow and somebody looked so often: all of them hold
    together with 95 % (Bonferroni), so that the one at which it was stopped does."""
    return 1 - (1 - LEVEL) / looks


def estimate(values: np.ndarray, seed: int = 0, looks: int = 1) -> Estimate:
    """Mean of `values` [n], n >= 1, with a percentile bootstrap interval. One example has no interval: low = high = mean."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) == 1 or bool((values == values[0]).all()):
        return Estimate(mean, mean, mean, len(values))
    low, high = np.quantile(_resampled(values, seed), [(1 - level_of(looks)) / 2, (1 + level_of(looks)) / 2])
    return Estimate(mean, float(low), float(high), len(values))


def clustered(clusters: Sequence[np.ndarray], seed: int = 0) -> Estimate:
    """The mean over all values of clusters that were drawn together (questions on one context, samples of one problem), every
    value counting alike; its percentile bootstrap draws clusters, and within each drawn one its values (two stages: Davison and
    Hinkley 1997, section 3.8). So it counts how clusters differ, and how draws within them do. One cluster has no interval.
    """
    sizes = np.array([len(values) for values in clusters])
    sums = np.array([values.sum() for values in clusters])
    mean = float(sums.sum() / sizes.sum())
    every = np.concatenate(clusters)
    if len(clusters) == 1 or bool((every == every[0]).all()):
        return Estimate(mean, mean, mean, len(clusters))
    rng = np.random.default_rng(seed)
    starts, means = np.cumsum(sizes) - sizes, []
    for chunk in _chunks(len(every)):
        drawn = rng.integers(0, len(clusters), (chunk, len(clusters)))  # clusters
        total = np.zeros(chunk)
        for place in range(len(clusters)):
            mine = drawn[:, place]
            size = sizes[mine]
            within = rng.random((chunk, int(size.max())))  # values of the drawn cluster, as many as it has
            picked = starts[mine][:, None] + (within * size[:, None]).astype(np.int64)
            counted = np.arange(within.shape[1]) < size[:, None]
            total += np.where(counted, every[np.minimum(picked, len(every) - 1)], 0.0).sum(1)
        means.append(total / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, min(float(low), mean), max(float(high), mean), len(clusters))


def mean_of_means(tasks: Sequence[np.ndarray], seed: int = 0) -> Estimate:
    """The mean of the tasks' means, every task counting alike, its bootstrap drawn within each task. `n`: all examples."""
    mean = float(np.mean([np.mean(values) for values in tasks]))
    resampled = np.mean([_resampled(np.asarray(values, np.float64), seed + task) for task, values in enumerate(tasks)], axis=0)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, min(float(low), mean), max(float(high), mean), sum(map(len, tasks)))


def combined(tasks: Sequence[Estimate]) -> Estimate:
    """The mean of the tasks' means, every task counting alike, its interval recovered from theirs (Zou and Donner 2008, "MOVER").

    Unlike a bootstrap it has a width where all answers of each task are right.
    """
    if len(tasks) == 1:
        return tasks[0]
    mean = float(np.mean([task.mean for task in tasks]))
    below = float(np.sqrt(sum((task.mean - task.low) ** 2 for task in tasks))) / len(tasks)
    above = float(np.sqrt(sum((task.high - task.mean) ** 2 for task in tasks))) / len(tasks)
    return Estimate(mean, mean - below, mean + above, sum(task.n for task in tasks))


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of `RESAMPLES` samples drawn with replacement."""
    if len(values) <= KEPT:
        return np.asarray(_draws(len(values), seed) @ values)
    rng = np.random.default_rng(seed)
    return np.concatenate([values[rng.integers(0, len(values), (chunk, len(values)))].mean(1) for chunk in _chunks(len(values))])


@lru_cache(maxsize=8)
def _draws(size: int, seed: int) -> np.ndarray:
    """How often each of `size` examples is in each resample, as a share, [RESAMPLES, size]."""
    drawn = np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))
    flat = drawn + size * np.arange(RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=RESAMPLES * size).reshape(RESAMPLES, size) / size


def _chunks(size: int) -> list[int]:
    """Resamples in pieces of bounded memory."""
    piece = max(1, min(RESAMPLES, 2_000_000 // size))
    whole, rest = divmod(RESAMPLES, piece)
    return [piece] * whole + ([rest] if rest else [])


def proportion(values: np.ndarray, looks: int = 1) -> Estimate:
    """Share of right answers with Wilson's interval: unlike a bootstrap's it has a width where all answers are alike.

    Args:
        values: [n], each 0 or 1, n >= 1.
    """
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(mean, mean, mean, 1)
    z = NormalDist().inv_cdf((1 + level_of(looks)) / 2)
    middle = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    low, high = round(float(middle - half), 12), round(float(middle + half), 12)
    return Estimate(mean, max(0.0, low), min(1.0, high), count)


def paired_difference(
    ours: Mapping[Example, float], baseline: Mapping[Example, float], seed: int = 0, looks: int = 1
) -> Estimate | None:
    """Of the examples that both answered, with its `p`; None if there are none."""
    shared = sorted(set(ours) & set(baseline), key=str)
    if not shared:
        return None
    differences = np.array([ours[i] - baseline[i] for i in shared])
    found = estimate(differences, seed, looks)
    return Estimate(found.mean, found.low, found.high, found.n, min(1.0, looks * sign_flip_p(differences, seed)))


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided: the share of sign patterns whose mean is as far from 0; of few examples all patterns, else `RESAMPLES`."""
    count = len(differences)
    if not differences.any():
        return 1.0
    exact = count <= EXACT
    signs = _patterns(count) if exact else _signs(count, seed)
    scale = np.abs(differences).max()  # so that equal sums compare as equal
    reached = np.abs(signs @ (differences / scale)) >= abs((differences / scale).sum()) - 1e-9
    return float(reached.mean()) if exact else float((reached.sum() + 1) / (len(signs) + 1))


@lru_cache(maxsize=EXACT)
def _patterns(count: int) -> np.ndarray:
    return np.array(list(product((-1.0, 1.0), repeat=count)))


@lru_cache(maxsize=4)
def _signs(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (RESAMPLES, count)).astype(np.float32) * 2 - 1


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values of one family of tests: below a level, the family's chance of any false find is at most that level."""
    order = sorted(range(len(ps)), key=lambda number: ps[number])
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[number]))
        adjusted[number] = largest
    return adjusted
