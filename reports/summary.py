"""Over several tasks: means of task means, of tasks that may be averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reports.keys import Label, Protocol, TaskKey
from reports.statistics import Estimate, combined
from reports.style import order_of
from reports.tables import Example, Line
from results.record import budget_size


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
    def looks(self) -> int:
        return max(cell.looks for cell in self.cells)

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
    kl: float | None = None  # to the full cache, mean over the tasks; None where a task has none
    looks: int = 1  # see `Line`; the most of a task

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
    score = combined([line.score for line in lines if line.score])
    kls = [line.kl.mean for line in lines if line.kl]
    kl = float(np.mean(kls)) if len(kls) == len(lines) else None
    compressed = any(line.compressed for line in lines)
    path_only, lower = any(line.path_only for line in lines), lines[0].lower_is_better
    return Overall(
        lines[0].label, lines[0].budget, share, score, path_only, values, compressed, lower, kl, max(line.looks for line in lines)
    )
