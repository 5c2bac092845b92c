"""Intervals against scipy's bootstrap; paired differences by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reports.statistics import Estimate, estimate, paired_difference, proportion


@pytest.mark.parametrize("size", [5, 40, 3000])
def test_intervals_equal_scipys(size: int) -> None:
    values = np.random.default_rng(size).exponential(size=size)
    ours = estimate(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1, batch=200).confidence_interval
    spread = theirs.high - theirs.low
    assert ours.mean == pytest.approx(values.mean())
    assert abs(ours.low - theirs.low) < 0.05 * spread
    assert abs(ours.high - theirs.high) < 0.05 * spread


def test_an_interval_is_the_same_every_time() -> None:
    values = np.random.default_rng(0).random(30)
    assert estimate(values) == estimate(values)


def test_one_example_proves_nothing() -> None:
    assert estimate(np.array([0.7])) == Estimate(0.7, 0.7, 0.7, 1)
    assert not estimate(np.array([0.7])).excludes_zero


def test_differences_are_paired() -> None:
    full = {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 9.0, 5: 3.0, 6: 2.0}
    ours = {0: 0.9, 1: -0.1, 2: 0.9, 3: -0.1, 7: 5.0, 5: 2.9, 6: 1.9}
    found = paired_difference(ours, full)
    assert found is not None
    assert found.mean == pytest.approx(-0.1)
    assert (found.n, found.excludes_zero) == (6, True)
    few = paired_difference({0: 0.0, 1: 0.0}, {0: 1.0, 1: 1.0})
    assert few is not None
    assert not few.excludes_zero, "two examples prove nothing, however alike"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("right", "of"), [(0, 10), (10, 10), (3, 7), (199, 200)])
def test_proportions_equal_scipys_wilson(right: int, of: int) -> None:
    ours = proportion(np.array([1.0] * right + [0.0] * (of - right)))
    theirs = stats.binomtest(right, of).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours.high > ours.low and ours.mean == right / of
