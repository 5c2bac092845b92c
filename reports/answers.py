"""At a budget, which method? The first of a family's methods, those not shown to be worse, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reports.ranking import LEVEL, Pairs, all_pairs
from reports.statistics import Estimate, combined, paired_difference
from reports.style import order_of
from reports.summary import Family, Overall
from results.record import budget_size

AS_MANY = 0.03  # by how much the bytes of equal caches may differ
FEW = 3  # methods that are named one by one
ALL_OTHERS = {1: "the other", 2: "both others"}
QUARTER = 0.25  # of the bytes: what the first screen answers


@dataclass(frozen=True)
class Verdict:
    """The methods that compress to one budget, best mean first; of equal means one that needs no conversion, closest to full."""

    budget: str
    byte_share: float  # measured, the median
    cells: tuple[Overall, ...]
    full: Overall | None
    pairs: Pairs  # all of them against each other
    to_full: Estimate | None  # the best less the full cache, paired

    @property
    def best(self) -> Overall:
        return self.cells[0]

    @property
    def beaten(self) -> list[Overall]:
        return [cell for number, cell in enumerate(self.cells) if self.pairs.better(0, number)]

    @property
    def level(self) -> list[Overall]:
        """Others that the best is not shown to be better than."""
        return [cell for number, cell in enumerate(self.cells) if number and not self.pairs.better(0, number)]

    def place(self, number: int) -> tuple[int, int]:
        """The first and the last place that a method may have: between those shown to be better and those shown to be worse."""
        others = range(len(self.cells))
        better = sum(self.pairs.better(other, number) for other in others)
        return 1 + better, len(self.cells) - sum(self.pairs.better(number, other) for other in others)

    @property
    def undecided(self) -> bool:
        """Is nothing shown at all?"""
        return len(self.cells) > 1 and not self.beaten

    @property
    def differs_from_full(self) -> bool:
        """That the best was chosen favours it: that it is worse is one test, that it is better one of as many as methods."""
        if self.to_full is None or self.to_full.p is None:
            return False
        worse = (self.to_full.mean < 0) != self.best.lower_is_better
        return self.to_full.p * (1 if worse else len(self.cells)) < LEVEL

    @property
    def visible(self) -> float:
        """A difference between the best and another about as large as one that would be shown, the median over the others."""
        return float(np.median(self.pairs.least[0, 1:])) if len(self.cells) > 1 else 0.0

    @property
    def is_share(self) -> bool:
        return budget_size(self.budget).is_share

    @property
    def budget_words(self) -> str:
        share = percent(self.byte_share)
        return f"{share} of the bytes" if self.is_share else f"{self.budget} entries a head ({share} of the bytes)"


def percent(share: float) -> str:
    """Of bytes, to three digits."""
    return f"{100 * share:.3g}%"


def verdicts(family: Family) -> list[Verdict]:
    """Budget by budget, the smallest first. A method that keeps more bytes than the others do is no rival of theirs."""
    full = next((cell for cell in family.cells if cell.is_full), None)
    found = []
    for budget in sorted({cell.budget for cell in family.cells if cell.budget}, key=budget_size):
        rivals = [cell for cell in family.cells if cell.budget == budget and cell.compressed]
        if not rivals:
            continue
        share = float(np.median([cell.byte_share for cell in rivals]))
        rivals = [cell for cell in rivals if cell.byte_share <= share * (1 + AS_MANY)]
        rivals += [cell for cell in family.cells if _whole_at(cell, share)]
        rivals.sort(key=lambda cell: _order(cell, family))
        pairs = all_pairs(values_of(rivals, family), looks=family.looks)
        found.append(Verdict(budget, share, tuple(rivals), full, pairs, difference(rivals[0], full, family) if full else None))
    return sorted(found, key=lambda one: one.byte_share)


def values_of(cells: Sequence[Overall], family: Family) -> list[np.ndarray]:
    """Of each task the cells' values on the examples that all of them answered, [k, n]."""
    tasks = []
    for task in sorted(family.tasks, key=str):
        shared = sorted(set.intersection(*(set(cell.values[task]) for cell in cells)))
        tasks.append(np.array([[cell.values[task][example] for example in shared] for cell in cells]))
    return tasks


def _whole_at(cell: Overall, share: float) -> bool:
    """A variant's whole cache that takes about as many bytes."""
    return not cell.is_full and not cell.budget and abs(cell.byte_share / share - 1) <= AS_MANY


def _order(cell: Overall, family: Family) -> tuple[object, ...]:
    mean = float(np.mean([np.mean(list(cell.values[task].values())) for task in family.tasks]))
    return (-round(mean, 12), bool(cell.label.variant), cell.kl is None, cell.kl or 0.0, order_of(cell.label))


def difference(best: Overall, full: Overall, family: Family) -> Estimate:
    """Of the cell less the full cache, paired, in the metric's own direction."""
    sign = -1.0 if family.lower_is_better else 1.0
    found = []
    for task in family.tasks:
        ours, theirs = ({example: sign * value for example, value in cell.values[task].items()} for cell in (best, full))
        found.append(paired_difference(ours, theirs, looks=family.looks))
    p = float(all_pairs(values_of([best, full], family), looks=family.looks).p[0, 1])
    return replace(combined([one for one in found if one is not None]), p=p)


def at_share(found: Sequence[Verdict], share: float = QUARTER) -> Verdict | None:
    """The budget whose bytes are nearest to a share, of those at which at least half as many methods ran as at any other."""
    most = max((len(one.cells) for one in found), default=0)
    asked = [one for one in found if 2 * len(one.cells) >= most]
    return min(asked, key=lambda one: abs(np.log(one.byte_share / share)), default=None)


def outdone(verdict: Verdict, found: Sequence[Verdict]) -> Verdict | None:
    """The budget of fewer bytes at which a method that was not run at this one scores best, and better than all that were."""
    here = {cell.label for cell in verdict.cells}
    sign = -1 if verdict.best.lower_is_better else 1
    better = [one for one in found if one.byte_share < verdict.byte_share and one.best.label not in here]
    better = [one for one in better if sign * one.best.score.mean > sign * verdict.best.score.mean]
    return max(better, key=lambda one: sign * one.best.score.mean, default=None)


def sentence(verdict: Verdict, found: Sequence[Verdict] = ()) -> str:
    """A verdict in one line. `found`: the other budgets, where it is to be said that one of fewer bytes does better."""
    best, less = verdict.best, outdone(verdict, found)
    parts = [f"At {verdict.budget_words}: {best.label}, {interval(best.score)}", against_full(verdict), how_sure(verdict)]
    parts += [f"not run here: {less.best.label}, {interval(less.best.score)} at {less.budget_words}"] if less else []
    return "; ".join(part for part in parts if part) + "."


def interval(value: Estimate) -> str:
    return f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"


def against_full(verdict: Verdict) -> str:
    if verdict.full is None or verdict.to_full is None:
        return ""
    whole, apart = f"the full cache's {verdict.full.score.mean:.3g}", verdict.to_full
    if not verdict.differs_from_full:
        return f"no difference to {whole} is shown"
    return f"{'less' if apart.mean < 0 else 'more'} than {whole} by {abs(apart.mean):.3g} [{_bounds(apart)}]"


def _bounds(apart: Estimate) -> str:
    low, high = sorted((abs(apart.low), abs(apart.high))) if apart.low * apart.high > 0 else (apart.low, apart.high)
    return f"{low:.3g}, {high:.3g}"


def how_sure(verdict: Verdict) -> str:
    others = len(verdict.cells) - 1
    if not others:
        return "nothing else was measured there"
    if not verdict.level:
        return f"shown to be better than {ALL_OTHERS.get(others, f'all {others} others')}"
    if not verdict.beaten:
        return f"shown to be better than none of the others; {listed(verdict.level)} may be as good"
    return f"shown to be better than {len(verdict.beaten)} of the {others} others; {listed(verdict.level)} may be as good"


def listed(cells: Sequence[Overall], few: int = FEW) -> str:
    """Names, the first few of many."""
    names = [str(cell.label) for cell in cells]
    if len(names) > few + 1:
        return f"{', '.join(names[:few])} and {len(names) - few} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
