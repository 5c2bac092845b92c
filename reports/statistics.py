"""Means with intervals, and paired differences: seeded bootstraps over examples."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
LEAST = 6  # examples: with fewer, even a difference that all of them share may be chance (two-sided sign test)

Example = TypeVar("Example", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; `n` examples."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.n >= LEAST and (self.low > 0 or self.high < 0)


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of `values` [n], n >= 1, with a percentile bootstrap interval. One example has no interval: low = high = mean."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) == 1 or bool((values == values[0]).all()):
        return Estimate(mean, mean, mean, len(values))
    rng = np.random.default_rng(seed)
    resampled = np.concatenate(
        [values[rng.integers(0, len(values), (chunk, len(values)))].mean(1) for chunk in _chunks(len(values))]
    )
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), len(values))


def proportion(values: np.ndarray) -> Estimate:
    """Share of right answers with Wilson's interval: unlike a bootstrap's it has a width where all answers are alike.

    Args:
        values: [n], each 0 or 1, n >= 1.
    """
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(mean, mean, mean, 1)
    z = 1.959963984540054  # of 95 %
    middle = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    low, high = round(float(middle - half), 12), round(float(middle + half), 12)
    return Estimate(mean, max(0.0, low), min(1.0, high), count)


def _chunks(size: int) -> list[int]:
    """Resamples in pieces of bounded memory."""
    piece = max(1, min(RESAMPLES, 2_000_000 // size))
    whole, rest = divmod(RESAMPLES, piece)
    return [piece] * whole + ([rest] if rest else [])


def paired_difference(ours: Mapping[Example, float], baseline: Mapping[Example, float], seed: int = 0) -> Estimate | None:
    """Of the examples that both answered; None if there are none."""
    shared = sorted(set(ours) & set(baseline), key=str)
    if not shared:
        return None
    return estimate(np.array([ours[i] - baseline[i] for i in shared]), seed)
