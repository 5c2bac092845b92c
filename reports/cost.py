"""What a cell costs: its rounds of latency and its memory, out of stored rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.keys import Label
from reports.style import order_of
from results.record import DECODES, split_variant

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CostPanel:
    """What stands in one table or picture. Other threads, environments and texts of plugins are not pooled."""

    model: str
    dtype: str
    device: str
    threads: int
    env: str  # id of <out>/env/<id>.json
    sources: tuple[str, ...] = ()  # sha256 of the plugins

    @classmethod
    def of(cls, row: Row) -> CostPanel:
        cell = row["cell"]
        where = (cell["model"], cell["dtype"], cell["device"], cell["threads"])
        return cls(*where, row["env"], tuple(row.get("sources", ())))

    @property
    def parent(self) -> str:
        return split_variant(self.model)[0]

    @property
    def variant(self) -> str:
        return split_variant(self.model)[1]

    @property
    def place(self) -> tuple[str, str, str]:
        return (self.model, self.dtype, self.device)

    @property
    def run(self) -> str:
        sources = "".join(f", {sha[:8]}" for sha in self.sources)
        return f"{self.threads} threads, environment {self.env[:6]}{sources}"

    def __str__(self) -> str:
        return ", ".join((*self.place, self.run))


@dataclass(frozen=True)
class CostKey:
    """A method at a budget, with so many tokens and sequences."""

    panel: CostPanel
    method: str
    budget: str
    context: int
    batch: int  # 0: as many as fit

    @classmethod
    def of(cls, row: Row) -> CostKey:
        return cls(CostPanel.of(row), *(row["cell"][name] for name in ("method", "budget", "context", "batch")))


@dataclass(frozen=True)
class Way:
    """How a round was decoded. Those of another length, or decoded in another way, are no rounds of the same."""

    new_tokens: int = 0
    decode: str = "eager"  # what was asked for
    fell_back: str = ""  # why it was eager all the same

    @classmethod
    def of(cls, row: Row) -> Way:
        return cls(row["cell"]["new_tokens"], row["cell"].get("decode", "eager"), row.get("fell_back") or "")

    @property
    def order(self) -> tuple[int, int, str]:
        return self.new_tokens, DECODES.index(self.decode), self.fell_back


@dataclass(frozen=True)
class Cost:
    """The rows of one cell: its rounds of latency, decoded in one way, and its memory."""

    panel: CostPanel
    method: str
    budget: str
    context: int
    batch: int
    way: Way
    laps: tuple[Row, ...]
    memory: Row | None
    largest: bool = False  # `batch` is as many as fitted

    @property
    def label(self) -> str:
        return f"{self.method} {self.budget}".strip()

    @property
    def decode(self) -> str:
        return self.way.decode

    @property
    def fell_back(self) -> str:
        return self.way.fell_back

    @property
    def token_ms(self) -> float | None:
        """Median of a token, the median over the rounds."""
        return None if not self.laps else 1000 * float(np.median([lap["token"] for lap in self.laps]))

    @property
    def floor_ms(self) -> float:
        return 1000 * float(np.median([lap["token_floor"] for lap in self.laps]))


def costs(rows: Sequence[Row]) -> list[Cost]:
    grouped: dict[CostKey, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            grouped.setdefault(CostKey.of(row), []).append(row)
    return sorted((cost for at, mine in grouped.items() for cost in _costs(at, mine)), key=_order)


def _costs(at: CostKey, rows: Sequence[Row]) -> list[Cost]:
    """One for each way in which its rounds were decoded."""
    memory = next((row for row in rows if row["cell"]["what"] == "memory"), None)
    timed = [row for row in rows if row["cell"]["what"] == "latency"]
    found = []
    for way in sorted({Way.of(row) for row in timed}, key=lambda way: way.order) or [Way()]:
        laps = tuple(row for row in timed if Way.of(row) == way)
        fitted = at.batch or min(row["batch"] for row in [*laps, *([memory] if memory else [])])
        found.append(Cost(at.panel, at.method, at.budget, at.context, fitted, way, laps, memory, at.batch == 0))
    return found


def _order(cost: Cost) -> tuple[object, ...]:
    method = (cost.method != "full", order_of(Label(cost.method)), cost.budget)
    return (*cost.panel.place, cost.panel.run, cost.context, cost.batch, *method, DECODES.index(cost.decode))
