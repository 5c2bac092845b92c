"""A leaderboard at equal bytes: every method at every budget with its place, and what stands behind the number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.answers import Verdict, difference, percent, verdicts
from reports.cost import Cost
from reports.formats import Table, TableCell, words
from reports.front import Times
from reports.keys import Label
from reports.names import named
from reports.present import PATH_ONLY, estimated
from reports.summary import Family
from results.record import Record

HEADER = (
    "bytes kept",
    "place",
    "method",
    "score",
    "against full",
    "allocated",
    "ms a token",
    "n",
    "timed on",
    "made with",
    "run",
)
ABOUT = (
    "Only methods at one budget are placed against each other, on the examples that all of them answered. A place is a range: "
    "between the methods that are shown to be better and those that are shown to be worse, over all pairs, at a level of 5%. "
    "Scores and differences to the full cache have 95% intervals. Bytes are measured right after compaction, as a share of the "
    "unconverted model's full cache; allocated counts whole storages."
)
Where = tuple[str, Label, str, str]  # model, method, budget, prompt protocol


@dataclass
class Behind:
    """What the rows of a cell tell besides its score."""

    runs: set[str] = field(default_factory=set)
    environments: set[str] = field(default_factory=set)
    allocated: list[float] = field(default_factory=list)


def behind(runs: Mapping[str, Sequence[Record]]) -> dict[Where, Behind]:
    """By cell; runs: their rows by name."""
    found: dict[Where, Behind] = {}
    every = [(name, record) for name, records in runs.items() for record in records]
    for (run, record), at in zip(every, named([record for _, record in every]), strict=True):
        if record.status == "ok":
            mine = found.setdefault((at.parent, at.label, at.asked.budget, at.asked.prompt), Behind())
            mine.runs.add(run)
            mine.environments.add(record.env)
            if record.bytes_full and record.bytes_allocated is not None:
                mine.allocated.append(record.bytes_allocated / record.bytes_full)
    return found


@dataclass(frozen=True)
class Board:
    """What a leaderboard is made of."""

    families: Sequence[Family]
    measured: Sequence[Cost]
    behind: Mapping[Where, Behind]
    environments: Mapping[str, Mapping[str, Any]]  # by id

    def tables(self) -> list[Table]:
        """One a family, the most bytes first; places within a budget."""
        return [table for family in self.families if (table := self._table(family)).rows]

    def _table(self, family: Family) -> Table:
        rows = [self._row(family, one, number) for one in self._verdicts(family) for number in _all(one)]
        better = "less is better" if family.lower_is_better else "more is better"
        notes = (f"Score: {family.at.metric}, {better}. {family.at.protocol}.", *([PATH_ONLY] if family.path_only else []))
        return Table(f"{family.title}: {family.at.metric}", HEADER, tuple(rows), notes)

    def _verdicts(self, family: Family) -> list[Verdict]:
        return sorted(verdicts(family), key=lambda one: -one.byte_share)

    def _row(self, family: Family, verdict: Verdict, number: int) -> tuple[TableCell, ...]:
        cell = verdict.cells[number]
        first, last = verdict.place(number)
        about = self.behind.get((family.at.model, cell.label, cell.budget, family.at.protocol.prompt), Behind())
        allocated = sum(about.allocated) / len(about.allocated) if about.allocated else None
        time = Times(self.measured, family.at.model).of(cell.label, cell.byte_share)
        apart = difference(cell, verdict.full, family) if verdict.full else None
        made = "; ".join(sorted({self._made(one) for one in about.environments}))
        return (
            TableCell(percent(cell.byte_share), cell.byte_share),
            TableCell(str(first) if first == last else f"{first} to {last}", first + last / 1000),
            TableCell(str(cell.label), best=not number),
            estimated(cell.score),
            estimated(apart),
            TableCell("-", -1.0) if allocated is None else TableCell(f"{allocated:.1%}", allocated),
            TableCell(f"{time.ms:.3g}", time.ms) if time else TableCell("-", float("-inf")),
            TableCell(str(cell.score.n), cell.score.n),
            *words(time.where if time else "-", made or "-", ", ".join(sorted(about.runs)) or "-"),
        )

    def _made(self, env: str) -> str:
        """Device and versions, in short."""
        one = self.environments.get(env, {})
        packages = one.get("packages") if isinstance(one.get("packages"), dict) else {}
        named = [f"{name} {packages[name]}" for name in ("torch", "transformers") if packages and name in packages]
        device = one.get("device") or one.get("gpu") or one.get("cpu")
        return ", ".join([*([str(device)] if device else []), *named]) or f"environment {env[:6]}"


def _all(verdict: Verdict) -> range:
    return range(len(verdict.cells))
