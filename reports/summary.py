"""Over several tasks: means of task means, and in plain words which method is best at which share of the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reports.keys import Label, Protocol, TaskKey
from reports.statistics import Estimate, holm, mean_of_means, sign_flip_p
from reports.style import order_of
from reports.tables import SIGNIFICANT, Example, Line
from results.record import budget_size

MANY = 6  # equals that are still named one by one
FEW = 3  # methods that are named, where all of them are meant
AS_MANY = 0.03  # by how much the bytes of equal caches may differ


@dataclass(frozen=True)
class FamilyKey:
    """What the tasks of a family have in common."""

    model: str  # of variants, their parent
    protocol: Protocol  # without the routing, which is part of a variant's label
    metric: str
    told: str = ""  # what tells its tasks apart from others of their names


@dataclass(frozen=True)
class Family:
    """Tasks of one protocol and metric, for a model and its variants: what may be averaged, and compared at equal bytes."""

    at: FamilyKey
    tasks: tuple[TaskKey, ...]
    cells: tuple[Overall, ...]

    @property
    def lower_is_better(self) -> bool:
        return any(cell.lower_is_better for cell in self.cells)

    @property
    def path_only(self) -> bool:
        """Do the scores prove no more than that the path works?"""
        return any(cell.path_only for cell in self.cells)

    @property
    def title(self) -> str:
        several = f"{len(self.tasks)} tasks" + (f" ({self.at.told})" if self.at.told else "")
        tasks = str(self.tasks[0]) if len(self.tasks) == 1 else several
        return f"{self.at.model}, {tasks}, {self.at.protocol.prompt}"


@dataclass(frozen=True)
class Overall:
    """One method at one budget over all tasks of a family."""

    label: Label
    budget: str
    byte_share: float
    score: Estimate
    path_only: bool
    values: Mapping[TaskKey, Mapping[Example, float]]  # better is larger
    compressed: bool
    lower_is_better: bool = False

    @property
    def is_full(self) -> bool:
        """The unconverted model, nothing evicted."""
        return self.label == Label("full")


def families(found: Sequence[Line]) -> list[Family]:
    """A cell takes part in a mean only if it has every example of every task that `full` has, or else that anything has."""
    grouped = _grouped([line for line in found if line.metric and line.score and line.byte_share])
    made = [_family(where, lines) for where, lines in sorted(grouped.items(), key=lambda item: _shown_in(*item))]
    return [family for family in made if family.cells]


def _grouped(found: Sequence[Line]) -> dict[FamilyKey, list[Line]]:
    """Truncation and length of the answers follow from each task, so tasks may differ in them; one task may not.

    Of a task with several records, none is known to belong to those of another task: each stands alone.
    """
    cuts: dict[tuple[FamilyKey, TaskKey], set[int | None]] = {}
    answers: dict[tuple[FamilyKey, TaskKey], set[tuple[int, bool]]] = {}
    for line in found:
        cuts.setdefault((_where(line), line.at.plain_task), set()).add(line.protocol.truncation)
        answers.setdefault((_where(line), line.at.plain_task), set()).add(_answers(line))
    several = {where for (where, _), lengths in cuts.items() if len(lengths) > 1}
    in_several_ways = {where for (where, _), ways in answers.items() if len(ways) > 1}
    grouped: dict[FamilyKey, list[Line]] = {}
    for line in found:
        where = at = _where(line)
        if where in several:
            at = replace(at, protocol=replace(at.protocol, truncation=line.protocol.truncation))
        if where in in_several_ways:
            most, fidelity = _answers(line)
            told = f"answers of at most {most} tokens, {'with' if fidelity else 'without'} fidelity"
            at = replace(at, told=", ".join(filter(None, (at.told, told))))
        grouped.setdefault(at, []).append(line)
    return grouped


def _answers(line: Line) -> tuple[int, bool]:
    return line.at.asked.max_new_tokens, line.at.asked.fidelity


def _where(line: Line) -> FamilyKey:
    protocol = replace(line.protocol, truncation=None, routing="")
    return FamilyKey(line.parent, protocol, line.metric or "", line.at.shown.records)


def _shown_in(where: FamilyKey, lines: Sequence[Line]) -> tuple[object, ...]:
    """What is answered comes before likelihoods."""
    return (where.model, lines[0].lower_is_better, where.protocol.prompt, str(where.protocol), where.metric, where.told)


def _family(where: FamilyKey, lines: Sequence[Line]) -> Family:
    every = [line for line in lines if line.is_full] or lines
    tasks = tuple(dict.fromkeys(line.at.task for line in every))
    cells: dict[tuple[Label, str], list[Line]] = {}
    for line in lines:
        cells.setdefault((line.label, line.budget), []).append(line)
    needed = _examples(every)
    if len(tasks) == 1:
        needed = {tasks[0]: max((set(line.values) for line in every), key=len)}
    made = []
    for mine in cells.values():
        has = _examples(mine)
        if all(has.get(task, set()) >= needed[task] for task in tasks):
            made.append(_overall([line for line in mine if line.at.task in tasks]))
    return Family(where, tasks, tuple(sorted(made, key=_order)))


def _examples(lines: Sequence[Line]) -> dict[TaskKey, set[Example]]:
    found: dict[TaskKey, set[Example]] = {}
    for line in lines:
        found.setdefault(line.at.task, set()).update(line.values)
    return found


def _order(cell: Overall) -> tuple[object, ...]:
    return (not cell.is_full, order_of(cell.label), budget_size(cell.budget))


def _overall(lines: Sequence[Line]) -> Overall:
    sign = -1.0 if lines[0].lower_is_better else 1.0
    values: dict[TaskKey, dict[Example, float]] = {}
    for line in lines:
        values.setdefault(line.at.task, {}).update({example: sign * value for example, value in line.values.items()})
    share = float(np.mean([line.byte_share for line in lines if line.byte_share is not None]))
    means = mean_of_means([np.array(list(line.values.values())) for line in lines])
    score = means if len(lines) > 1 else lines[0].score or means
    compressed = any(line.compressed for line in lines)
    path_only, lower = any(line.path_only for line in lines), lines[0].lower_is_better
    return Overall(lines[0].label, lines[0].budget, share, score, path_only, values, compressed, lower)


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


def _whole_at(cell: Overall, share: float) -> bool:
    """A variant's whole cache that takes about as many bytes."""
    return not cell.is_full and not cell.budget and abs(cell.byte_share / share - 1) <= AS_MANY


def _mean(cell: Overall, family: Family) -> float:
    return float(np.mean([np.mean(list(cell.values[task].values())) for task in family.tasks]))


def _p(ours: Overall, theirs: Overall, family: Family) -> float:
    """Of the mean of task means: an example of a task with few examples weighs more."""
    differences: list[float] = []
    for task in sorted(family.tasks, key=str):
        mine, other = ours.values[task], theirs.values[task]
        shared = sorted(set(mine) & set(other))
        differences += [(mine[example] - other[example]) / len(shared) for example in shared]
    return sign_flip_p(np.array(differences)) if differences else 1.0


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
    is_share = budget_size(verdict.budget).is_share
    budget = f"{verdict.budget} of the bytes" if is_share else f"{verdict.budget} entries a head"
    share = "" if is_share else f" ({verdict.byte_share:.1%} of the bytes)"
    has = "has the best mean" if len(best) == 1 else "share the best mean"
    who = _listed(best) if len(best) <= MANY else f"{len(best)} methods, {_listed(best[:FEW])} among them,"
    return f"At {budget}{share}, {who} {has}, {best[0].score.mean:.3g}: {'; '.join(parts)}."


def _listed(cells: Sequence[Overall]) -> str:
    names = [str(cell.label) for cell in sorted(cells, key=lambda cell: order_of(cell.label))]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
