"""Over several tasks: means of task means, and in plain words which method is best at which share of the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reports.statistics import Estimate, holm, mean_of_means, sign_flip_p
from reports.style import order_of
from reports.tables import SIGNIFICANT, Line, label_of

MANY = 6  # equals that are still named one by one
FEW = 3  # methods that are named, where all of them are meant
AS_MANY = 0.03  # by how much the bytes of equal caches may differ

Example = tuple[str, tuple[int, int]]  # task, and its example


@dataclass(frozen=True)
class Family:
    """Tasks of one protocol and metric, for a model and its variants: what may be averaged, and compared at equal bytes."""

    model: str
    prompt: str
    protocol: str  # without the truncation, which follows from each task's answers
    metric: str
    tasks: tuple[str, ...]
    cells: tuple[Overall, ...]

    @property
    def lower_is_better(self) -> bool:
        return any(cell.lower_is_better for cell in self.cells)

    @property
    def title(self) -> str:
        tasks = self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
        return f"{self.model}, {tasks}, {self.prompt}"


@dataclass(frozen=True)
class Overall:
    """One method at one budget over all tasks of a family."""

    label: str  # snapkv, or "snapkv on gqa-2"
    budget: str
    byte_share: float
    score: Estimate
    own: bool
    values: Mapping[Example, float]  # better is larger
    compressed: bool
    lower_is_better: bool = False

    @property
    def is_full(self) -> bool:
        """The unconverted model, nothing evicted."""
        return self.label == "full"


def families(found: Sequence[Line]) -> list[Family]:
    """A cell takes part in a mean only if it has every example of every task that `full` has, or else that anything has."""
    grouped: dict[tuple[str, str, str, str], list[Line]] = {}
    for line in found:
        if line.metric and line.score:
            where = (line.model.split("+")[0], line.prompt, _shared(line.protocol), line.metric)
            grouped.setdefault(where, []).append(line)
    made = []
    for where, lines in sorted(grouped.items(), key=lambda item: (item[0][0], item[1][0].lower_is_better, item[0])):
        every = [line for line in lines if line.is_full] or lines
        tasks = tuple(dict.fromkeys(line.benchmark for line in every))
        cells: dict[tuple[str, str], list[Line]] = {}
        for line in lines:
            cells.setdefault((label_of(line), line.budget), []).append(line)
        wanted = max((_examples(line) for line in every), key=len) if len(tasks) == 1 else None
        measured = [mine for mine in cells.values() if {line.benchmark for line in mine} >= set(tasks)]
        needed = wanted or set().union(*(_examples(line) for line in every))
        whole = [_overall(mine) for mine in measured if set().union(*map(_examples, mine)) >= needed]
        if whole:
            made.append(Family(*where, tasks, tuple(sorted(whole, key=_order))))
    return made


def _examples(line: Line) -> set[Example]:
    return {(line.benchmark, example) for example in line.values}


def _order(cell: Overall) -> tuple[object, ...]:
    return (not cell.is_full, order_of(cell.label), cell.budget)


def _shared(protocol: str) -> str:
    """Without what differs from task to task, or is part of a variant's label."""
    return ", ".join(part for part in protocol.split(", ") if not part.startswith(("at most", "prefill routed")))


def _overall(lines: Sequence[Line]) -> Overall:
    sign = -1.0 if lines[0].lower_is_better else 1.0
    values = {(line.benchmark, example): sign * value for line in lines for example, value in line.values.items()}
    share = float(np.mean([line.byte_share for line in lines if line.byte_share is not None]))
    means = mean_of_means([np.array(list(line.values.values())) for line in lines])
    score = means if len(lines) > 1 else lines[0].score or means
    compressed = any(line.compressed for line in lines)
    own, lower = all(line.own for line in lines), lines[0].lower_is_better
    return Overall(label_of(lines[0]), lines[0].budget, share, score, own, values, compressed, lower)


@dataclass(frozen=True)
class Verdict:
    """The best of the compressing methods at one budget, and whom it is not shown to differ from."""

    budget: str
    byte_share: float
    best: tuple[Overall, ...]  # several where their means are equal
    beaten: tuple[Overall, ...]
    level: tuple[Overall, ...]  # no difference shown
    to_full: str  # in words


def verdicts(family: Family) -> list[Verdict]:
    """Budget by budget. The best was chosen on the examples on which it is compared: a favour to it that the words admit."""
    full = next((cell for cell in family.cells if cell.is_full), None)
    found = []
    for budget in sorted({cell.budget for cell in family.cells if cell.budget}, key=budget_size):
        rivals = [cell for cell in family.cells if cell.budget == budget and cell.compressed]
        if len(rivals) < 2:
            continue
        share = float(np.median([cell.byte_share for cell in rivals]))
        rivals += [cell for cell in family.cells if _whole_at(cell, share)]
        highest = max(_mean(cell, family) for cell in rivals)
        best = tuple(cell for cell in rivals if _mean(cell, family) >= highest - 1e-12)
        others = [cell for cell in rivals if cell not in best]
        ps = holm([max(_p(one, other, family) for one in best) for other in others])  # beaten by each of the best
        beaten = tuple(other for other, p in zip(others, ps, strict=True) if p < SIGNIFICANT)
        level = tuple(other for other in others if other not in beaten)
        found.append(Verdict(budget, share, best, beaten, level, _to_full(best[0], full, family)))
    return found


def budget_size(budget: str) -> tuple[bool, float]:
    """For sorting: KV sizes, then shares."""
    return (budget.endswith("%"), float(budget.removesuffix("%") or 0))


def _whole_at(cell: Overall, share: float) -> bool:
    """A variant's whole cache that takes about as many bytes."""
    return not cell.is_full and not cell.budget and abs(cell.byte_share / share - 1) <= AS_MANY


def _mean(cell: Overall, family: Family) -> float:
    return float(np.mean([np.mean([v for (task, _), v in cell.values.items() if task == name]) for name in family.tasks]))


def _p(ours: Overall, theirs: Overall, family: Family) -> float:
    """Of the mean of task means: an example of a task with few examples weighs more."""
    shared = sorted(set(ours.values) & set(theirs.values))
    if not shared:
        return 1.0
    counts = {task: sum(name == task for name, _ in shared) for task in family.tasks}
    return sign_flip_p(np.array([(ours.values[key] - theirs.values[key]) / max(1, counts[key[0]]) for key in shared]))


def _to_full(best: Overall, full: Overall | None, family: Family) -> str:
    if full is None:
        return ""
    if _p(best, full, family) >= SIGNIFICANT:
        return f"no difference to the full cache's {full.score.mean:.3g} is shown"
    return f"{'worse' if _mean(best, family) < _mean(full, family) else 'better'} than the full cache's {full.score.mean:.3g}"


def sentence(verdict: Verdict) -> str:
    """A verdict in plain words."""
    best, parts = verdict.best, []
    if verdict.beaten and verdict.level:
        few = len(verdict.level) <= len(verdict.beaten)
        all_but = f"better than all others but {_listed(verdict.level)}, to which no difference is shown"
        only = f"better than {_listed(verdict.beaten)}; no difference is shown to the others"
        parts.append(all_but if few else only)
    elif verdict.beaten:
        parts.append(f"better than {_listed(verdict.beaten) if len(verdict.beaten) <= FEW else 'all others'}")
    elif verdict.level:
        parts.append(f"no difference is shown to {_listed(verdict.level) if len(verdict.level) <= FEW else 'any other'}")
    if verdict.to_full:
        parts.append(verdict.to_full)
    budget = f"{verdict.budget} of the bytes" if verdict.budget.endswith("%") else f"{verdict.budget} entries a head"
    share = "" if verdict.budget.endswith("%") else f" ({verdict.byte_share:.1%} of the bytes)"
    has = "has the best mean" if len(best) == 1 else "share the best mean"
    who = _listed(best) if len(best) <= MANY else f"{len(best)} methods, {_listed(best[:FEW])} among them,"
    return f"At {budget}{share}, {who} {has}, {best[0].score.mean:.3g}: {'; '.join(parts)}."


def _listed(cells: Sequence[Overall]) -> str:
    names = [cell.label for cell in sorted(cells, key=lambda cell: order_of(cell.label))]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
