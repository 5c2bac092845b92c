"""How long a grid would take on many workers: the driver itself, on a clock that is not the wall's, with recorded seconds.

The times are those of `<out>/units.jsonl`, which every run on workers adds to: seconds of units, and of models' loading,
and what the driver spent on a unit. Units are drawn from the recorded ones until there are as many as are asked for.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from harness.cluster.drive import Call, Driver, Event
from harness.cluster.job import Answer, Listed
from harness.errors import BadRequest


@dataclass(frozen=True)
class Timed:
    """A unit that took so many seconds."""

    part: str
    number: int
    size: float
    seconds: float

    @property
    def group(self) -> str:
        return str(self.number)


@dataclass(frozen=True)
class Times:
    """What was recorded."""

    units: Sequence[tuple[str, float, float]]  # part, size, seconds
    loads: Mapping[str, float]  # seconds, by part
    driver_s: float  # a unit

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Times:
        """
        Raises:
            BadRequest: nothing was recorded.
        """
        units: list[tuple[str, float, float]] = []
        loads: dict[str, list[float]] = {}
        driver, counted = 0.0, 0
        for line in lines:
            if "seconds" in line:
                units.append((line["model"], line["size"], line["seconds"]))
            elif "load_s" in line:
                loads.setdefault(line["model"], []).append(line["load_s"])
            elif "driver_s" in line:
                driver, counted = driver + line["driver_s"], counted + line["units"]
        if not units:
            raise BadRequest("no times of units are there: run something with --ray first, or name its folder with --out")
        return cls(units, {part: fmean(seconds) for part, seconds in loads.items()}, driver / max(1, counted))

    def drawn(self, count: int) -> list[Timed]:
        rng = random.Random(0)
        return [Timed(part, number, *rest) for number, (part, *rest) in enumerate(rng.choices(self.units, k=count))]

    def scaled(self, by: float) -> Times:
        """As if units and loading took so many times as long; the driver does not."""
        units = [(part, size, seconds * by) for part, size, seconds in self.units]
        return Times(units, {part: seconds * by for part, seconds in self.loads.items()}, self.driver_s)


@dataclass
class SimulatedCrew:
    """Workers on a clock of their own. What the driver does takes time too, and only one thing at a time."""

    times: Times
    units: Sequence[Timed]
    size: int
    now: float = 0.0
    opened: int = 0
    _free: dict[int, float] = field(default_factory=dict)
    _part: dict[int, str] = field(default_factory=dict)
    _starts: dict[int, int] = field(default_factory=dict)
    _events: list[tuple[float, int, Event]] = field(default_factory=list)
    _count: int = 0

    def start(self, worker: int, start: int) -> None:
        self._free[worker], self._starts[worker] = self.now, start

    def ask(self, worker: int, call: Call) -> None:
        begin = max(self.now, self._free[worker])
        if self._part.get(worker) != call.part:
            self._part[worker] = call.part
            begin += self.times.loads.get(call.part, 0.0)
            self.opened += 1
        value: Any = None
        if call.what == "list":
            value = Listed([unit for unit in self.units if unit.part == call.part])
        elif call.what == "run":
            begin += call.unit.seconds
        self._free[worker] = begin
        self._count += 1
        heapq.heappush(self._events, (begin, self._count, Event(worker, self._starts[worker], call, Answer(value))))

    def next(self, timeout: float) -> Event | None:
        if not self._events:
            return None
        at, _, event = heapq.heappop(self._events)
        spent = self.times.driver_s if event.call is not None and event.call.what == "run" else 0.0
        self.now = max(self.now, at) + spent
        return event

    def stop(self) -> None:
        """Nothing runs."""


class Counted:
    """A ledger that only counts."""

    def __init__(self) -> None:
        self.count = 0

    def listed(self, part: str, found: Listed) -> Sequence[Any]:
        return found.units

    def claim(self, unit: Any) -> bool:
        return True

    def left(self, unit: Any) -> Any:
        return unit

    def back(self, unit: Any) -> None:
        """Nothing was claimed."""

    def done(self, unit: Any, found: Any, seconds: float) -> None:
        self.count += 1

    def lost(self, unit: Any, reason: str) -> None:
        raise AssertionError(reason)

    def opened(self, part: str, seconds: float) -> None:
        """The crew counts it."""

    def refused(self, part: str, refusal: Exception) -> None:
        raise refusal


def simulate(times: Times, workers: int, count: int) -> dict[str, float]:
    """Seconds that so many units take on so many workers, and the share that a perfect division of the work would take of them.

    `of_perfect`: against all work over all workers; `of_perfect_with_loading`: against that and one model loaded by each.
    """
    units = times.drawn(count)
    crew, ledger = SimulatedCrew(times, units, workers), Counted()
    Driver(list(dict.fromkeys(unit.part for unit in units)), ledger, crew).run()
    assert ledger.count == count
    work = sum(unit.seconds for unit in units)
    load = fmean(times.loads.values()) if times.loads else 0.0
    found = {
        "workers": workers,
        "units": count,
        "work_s": work,
        "makespan_s": crew.now,
        "of_perfect": work / workers / crew.now,
        "of_perfect_with_loading": (work / workers + load) / crew.now,
        "models_opened": crew.opened,
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}
