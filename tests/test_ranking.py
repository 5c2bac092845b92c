"""All pairs at once: ranks and tests against scipy, on made-up data, and how often equal methods are told apart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reports.ranking import all_pairs, places, ranks
from reports.statistics import Estimate, combined, level_of, proportion


@pytest.mark.parametrize("kinds", [2, 5, 1000])
def test_ranks_equal_scipys(kinds: int) -> None:
    values = np.random.default_rng(kinds).integers(0, kinds, (7, 60)).astype(float)
    assert np.array_equal(ranks(values), stats.rankdata(-values, axis=0))


def test_a_mean_rank_counts_who_does_better_and_every_task_alike() -> None:
    rng = np.random.default_rng(1)
    tasks = [rng.normal(size=(4, 200)), rng.normal(size=(4, 9))]
    for mine, place in enumerate(places(tasks)):
        expected = [stats.rankdata(-task, axis=0)[mine].mean() for task in tasks]
        assert place.rank.mean == pytest.approx(np.mean(expected))
        better = np.mean([[(task[other] > task[mine]).mean() for task in tasks] for other in range(4)], axis=1)
        assert place.rank.mean == pytest.approx(1 + better.sum())
        assert place.rank.low < place.rank.mean < place.rank.high


@pytest.mark.parametrize("size", [9, 12, 40])
def test_of_two_methods_the_test_is_scipys_permutation_test(size: int) -> None:
    values = np.random.default_rng(size).normal([[0.4], [0.0]], 1.0, size=(2, size))
    theirs = stats.permutation_test((values[0] - values[1],), np.mean, permutation_type="samples", n_resamples=10_000, rng=1)
    assert all_pairs([values]).p[0, 1] == pytest.approx(theirs.pvalue, abs=1e-9 if size <= 12 else 0.02)


def test_the_critical_difference_is_that_of_the_studentized_range() -> None:
    values = np.random.default_rng(0).normal(size=(8, 400))
    least = all_pairs([values]).least[0, 1]
    spread = np.sqrt(((values[0] - values[1]) ** 2).sum()) / 400
    assert least / spread == pytest.approx(stats.studentized_range.ppf(0.95, 8, np.inf) / np.sqrt(2), rel=0.03)


def test_ps_are_the_step_down_of_its_definition() -> None:
    values = np.random.default_rng(3).normal([[0.0], [0.3], [1.0], [1.1]], 1.0, size=(4, 8))
    pairs = [(a, b) for a in range(4) for b in range(a)]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    t = {(a, b): abs((d := values[a] - values[b]).sum()) / np.sqrt((d**2).sum()) for a, b in pairs}
    flipped = {(a, b): np.abs(signs @ (d := values[a] - values[b])) / np.sqrt((d**2).sum()) for a, b in pairs}
    left, largest = sorted(pairs, key=lambda pair: -t[pair]), 0.0
    found = all_pairs([values]).p
    while left:
        here = float((np.max([flipped[pair] for pair in left], axis=0) >= t[left[0]] - 1e-9).mean())
        largest = max(largest, here)
        assert found[left[0]] == found[left[0][::-1]] == pytest.approx(largest)
        left.pop(0)


def test_equal_methods_are_seldom_told_apart_and_others_are() -> None:
    """Among methods that never find anything are two that find half: a critical difference of pooled ranks would part them."""
    wrong = shown = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        chance = np.array([0.5, 0.5, 0.95, *[0.0] * 9])
        pairs = all_pairs([(rng.random((12, 40)) < chance[:, None]).astype(float)])
        wrong += pairs.better(0, 1) or pairs.better(1, 0)
        shown += pairs.better(2, 5)
    assert wrong / 60 <= 0.1 and shown == 60


def test_what_is_always_equal_or_few_is_never_told_apart() -> None:
    assert (all_pairs([np.zeros((3, 9))]).p == 1).all() and (all_pairs([np.array([[1.0], [0.0]])]).p == 1).all()
    assert all_pairs([np.array([[1.0] * 5, [0.0] * 5])]).p[0, 1] == 2 / 2**5
    alone = places([np.ones((1, 4))])
    assert [(place.first, place.last, place.rank.mean) for place in alone] == [(1, 1, 1.0)]


def test_places_lie_between_those_shown_to_be_better_and_worse() -> None:
    values = np.array([[2.0] * 20, [1.0] * 20, [1.0, 0.0] * 10, [0.0] * 20])
    assert [(place.first, place.last) for place in places([values])] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    near = np.array([[1.0] * 20, [1.0] * 19 + [0.0], [0.0] * 20])
    assert [(place.first, place.last) for place in places([near])] == [(1, 2), (1, 2), (3, 3)]


def test_a_mean_over_tasks_has_the_width_of_their_intervals() -> None:
    rng = np.random.default_rng(5)
    covered, chances = 0, np.array([0.97, 0.8, 0.5])
    for _ in range(400):
        found = combined([proportion((rng.random(12) < chance).astype(float)) for chance in chances])
        covered += found.low <= chances.mean() <= found.high
    assert covered / 400 >= 0.93
    right = combined([proportion(np.ones(10))] * 3)
    assert right.low < 0.9 and right.mean == 1 and right.n == 30, "all right is not certainly right"
    one = Estimate(0.5, 0.2, 0.7, 9)
    assert combined([one]) == one


def _covers(looks: int, rng: np.random.Generator) -> bool:
    """Answers of chance 0.7, looked at after 10, 20, 40, 80 until half of the interval is at most 0.16."""
    answers = (rng.random(80) < 0.7).astype(float)
    for size in (10, 20, 40, 80):
        found = proportion(answers[:size], looks)
        if (found.high - found.low) / 2 <= 0.16:
            break
    return found.low <= 0.7 <= found.high


def test_intervals_hold_whichever_look_ended_it() -> None:
    rng = np.random.default_rng(7)
    corrected = np.mean([_covers(4, rng) for _ in range(3000)])
    plain = np.mean([_covers(1, rng) for _ in range(3000)])
    assert plain < 0.94 < 0.95 <= corrected, (plain, corrected)
    assert level_of(1) == pytest.approx(0.95) and level_of(4) == 0.9875
