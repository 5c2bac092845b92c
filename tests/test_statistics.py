"""Intervals against scipy's bootstrap; paired differences by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reports.statistics import Estimate, estimate, holm, mean_of_means, paired_difference, proportion, sign_flip_p


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


@pytest.mark.parametrize("size", [4, 9, 12, 40])
def test_sign_flips_equal_scipys_permutation_test(size: int) -> None:
    differences = np.random.default_rng(size).normal(0.3, 1.0, size=size)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=10_000, rng=1)
    assert sign_flip_p(differences) == pytest.approx(theirs.pvalue, abs=1e-9 if size <= 12 else 0.02)


def test_what_few_examples_can_show() -> None:
    assert sign_flip_p(np.ones(5)) == pytest.approx(2 / 2**5) and sign_flip_p(np.ones(6)) < 0.05
    assert sign_flip_p(np.zeros(9)) == 1.0 and sign_flip_p(np.array([1.0])) == 1.0
    assert sign_flip_p(np.array([0.1] * 7 + [-0.1])) == pytest.approx(2 * 9 / 2**8), "equal sums count as equal"


def test_holm_is_the_step_down_of_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]
    ps = list(np.random.default_rng(2).random(30) ** 3)
    adjusted = holm(ps)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, number in enumerate(sorted(range(30), key=lambda n: ps[n])):
            if ps[number] > level / (30 - rank):
                break
            rejected.add(number)
        assert {number for number, p in enumerate(adjusted) if p <= level} == rejected


def test_a_mean_of_means_counts_every_task_alike() -> None:
    rng = np.random.default_rng(4)
    tasks = [rng.normal(mean, 1, size) for mean, size in ((0.0, 400), (6.0, 25), (3.0, 1))]
    found = mean_of_means(tasks)
    assert found.mean == pytest.approx(np.mean([task.mean() for task in tasks])) and found.n == 426
    spread = np.sqrt(sum(task.var() / len(task) for task in tasks)) / 3
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)
