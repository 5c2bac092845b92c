"""What a cell costs: its rounds of latency and its memory, out of stored rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.keys import Label
from reports.style import order_of
from results.lines import tell, wrong_field
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
    revision: str = ""  # of the model, where rows of one name have several

    @classmethod
    def of(cls, row: Row, several: Collection[str] = ()) -> CostPanel:
        """several: models of which there are rows of more than one revision."""
        cell = row["cell"]
        where = (cell["model"], cell["dtype"], cell["device"], cell["threads"])
        revision = str(row.get("revision", "")) if cell["model"] in several else ""
        return cls(*where, row["env"], tuple(row.get("sources", ())), revision)

    @property
    def parent(self) -> str:
        return split_variant(self.model)[0]

    @property
    def variant(self) -> str:
        return split_variant(self.model)[1]

    @property
    def place(self) -> tuple[str, str, str]:
        return (f"{self.model}@{self.revision[:8]}" if self.revision else self.model, self.dtype, self.device)

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
    def of(cls, row: Row, several: Collection[str]) -> CostKey:
        return cls(CostPanel.of(row, several), *(row["cell"][name] for name in ("method", "budget", "context", "batch")))


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


CELL = ("model", "method", "budget", "context", "batch", "new_tokens", "dtype", "device", "threads", "what")
TIMED = (
    "env",
    "phases",
    "first_token",
    "token",
    "p10",
    "p90",
    "token_floor",
    "prefill_floor",
    "bandwidth",
    "flops",
    "bytes_kept",
)
WATCHED = ("env", "bytes_kept", "bytes_allocated", "bytes_end", "prefill_peak", "decode_peak")


def _broken(row: Row) -> bool:
    """Does a row lack what a measurement says? It is told."""
    wrong = wrong_field(row["cell"], {}, CELL) or wrong_field(row, {}, TIMED if row["cell"]["what"] == "latency" else WATCHED)
    wrong = wrong or ("no new tokens" if row["cell"]["new_tokens"] < 1 else None)
    wrong = wrong or (f"decode {row['cell']['decode']!r}" if row["cell"].get("decode", "eager") not in DECODES else None)
    wrong = wrong or ("no phase prefill" if "prefill" not in row.get("phases", {"prefill": 0}) else None)
    if wrong:
        tell(f"cost/rows.jsonl, row {row['id']}: {wrong}")
    return wrong is not None


def costs(rows: Sequence[Row]) -> list[Cost]:
    grouped: dict[CostKey, list[Row]] = {}
    done = [row for row in rows if row["status"] == "ok" and not _broken(row)]
    revisions = {(row["cell"]["model"], row.get("revision", "")) for row in done}
    several = {model for model, count in Counter(model for model, _ in revisions).items() if count > 1}
    for row in done:
        grouped.setdefault(CostKey.of(row, several), []).append(row)
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
