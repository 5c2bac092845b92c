"""A paper's table or figure as data: what stands in a row, which numbers are the paper's, and which are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.statistics import Estimate
from results.record import budget_size


@dataclass(frozen=True)
class Setting:
    """What a row of the paper was measured at. Empty where the paper names none."""

    size: str = ""  # of a variant's cache: "50%"
    budget: str = ""  # of an evicting method: "128"
    ratios: str = ""  # of experts: "3:1:6"
    task: str = ""  # where tasks are rows: "qa1"
    h2o_keeps: str = ""  # of a variant's cache: "80%"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Setting:
        """Of a row as `papers/<paper>.json` has it."""
        named = {name: str(row.get(name, "")) for name in ("size", "budget", "ratios", "task")}
        return cls(**named, h2o_keeps=str(row.get("h2o keeps", "")))

    @property
    def place(self) -> str:
        """On an axis."""
        return self.size or self.budget or self.ratios or "-"

    @property
    def amount(self) -> float | None:
        """Where on an axis of numbers; ratios are none."""
        found = self.size or self.budget
        return budget_size(found).amount if found else None

    def __str__(self) -> str:
        size = f"{self.size} ({self.ratios})" if self.size and self.ratios else self.size
        keeps = f"H2O keeps {self.h2o_keeps}" if self.h2o_keeps else ""
        return ", ".join(part for part in (size or self.budget or self.ratios, self.task, keeps) if part) or "-"


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table, and what stands for it here."""

    method: str
    setting: Setting
    values: Mapping[str, float | None]  # by column; None: the paper draws it and prints no number
    benchmarks: Mapping[str, Sequence[str]]  # by column, whose mean is ours; empty: nothing of ours fills it
    measured_with: str  # our method's name
    command: str  # that makes what is missing; "" if nothing is
    numbers: Mapping[str, float] | None = None  # where they are no scores


@dataclass(frozen=True)
class PaperPoint:
    """One number of the paper, and ours beside it."""

    method: str
    setting: Setting
    column: str
    paper: float | None  # None: the paper draws it and prints no number
    ours: Estimate | None  # None: not measured
    note: str = ""  # why it was not measured

    @property
    def exact(self) -> bool:
        """Counted or timed, not a mean over examples."""
        return self.ours is not None and self.ours.low == self.ours.high == self.ours.mean and self.ours.n == 1


@dataclass(frozen=True)
class Drawing:
    """How a figure of the paper is drawn."""

    measured: str  # what its numbers are
    counted: str = ""  # what its columns count, if they are numbers of something
    columns: Mapping[str, float] = field(default_factory=dict)  # where they lie along the axis
    apart: Sequence[str] = ()  # columns in another unit: each has a panel of its own


@dataclass(frozen=True)
class Side:
    """A whole table: whose numbers stand beside whose, and under which settings."""

    name: str
    title: str
    settings: Sequence[str]
    averages: Mapping[str, Sequence[str] | str]  # the columns that are means of others, or of "all"
    scale: Mapping[str, float]
    exponent: Sequence[str]  # columns that show the exponential of our mean
    drawing: Drawing | None = None  # of a figure
