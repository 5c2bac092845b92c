"""Workers without Ray: a crew in this process, whose deaths are written down beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.cluster.drive import Call, Event
from harness.cluster.job import Job, Listed, Worker
from harness.errors import BadRequest


@dataclass
class InlineCrew:
    """Answers calls one at a time, the workers in turn. `dies(worker, start, call)`: how a worker dies of a call, or nothing."""

    job: Job
    size: int = 2
    dies: Callable[[int, int, Call], str] = lambda _worker, _start, _call: ""
    workers: dict[int, tuple[int, Worker]] = field(default_factory=dict)
    calls: dict[int, deque[Call]] = field(default_factory=dict)
    asked: list[Call] = field(default_factory=list)
    log: list[tuple[int, Call]] = field(default_factory=list)  # answered, or died of
    stopped: bool = False
    turn: int = 0

    def start(self, worker: int, start: int) -> None:
        self.workers[worker] = (start, Worker(self.job))
        self.calls[worker] = deque()

    def ask(self, worker: int, call: Call) -> None:
        self.calls[worker].append(call)
        self.asked.append(call)

    def next(self, timeout: float) -> Event | None:
        for step in range(self.size):
            worker = (self.turn + step) % self.size
            if self.calls[worker]:
                self.turn = worker + 1
                return self._answer(worker)
        return None

    def _answer(self, worker: int) -> Event:
        start, mine = self.workers[worker]
        call = self.calls[worker].popleft()
        self.log.append((worker, call))
        if how := self.dies(worker, start, call):
            self.calls[worker].clear()
            return Event(worker, start, died=how)
        return Event(worker, start, call, mine.answer(call.what, call.part, call.unit))

    def stop(self) -> None:
        self.stopped = True


@dataclass(frozen=True)
class Number:
    """A unit: a number of a part."""

    part: str
    number: int
    size: float = 1.0
    together: str = ""

    @property
    def group(self) -> str:
        return self.together or str(self.number)


@dataclass
class Squares:
    """A job of numbers, which `open` refuses or breaks on as it is told."""

    units: Sequence[Number]
    refused: Callable[[str], Exception | None] = lambda _part: None
    opened: list[str] = field(default_factory=list)

    def open(self, part: str) -> str:
        self.opened.append(part)
        if (error := self.refused(part)) is not None:
            raise error
        return part

    def list(self, opened: str) -> Listed:
        return Listed([unit for unit in self.units if unit.part == opened], about=opened)

    def run(self, opened: str, unit: Number) -> int:
        assert opened == unit.part
        if unit.number < 0:
            raise ZeroDivisionError("numbers below 0")
        return unit.number**2


@dataclass
class Book:
    """A ledger that only remembers."""

    found: dict[Number, int] = field(default_factory=dict)
    reasons: dict[Number, str] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    held: set[Number] = field(default_factory=set)
    elsewhere: dict[Number, int] = field(default_factory=dict)  # how often a claim of it fails
    stops_at: int = 10**9

    def listed(self, part: str, found: Listed) -> Sequence[Any]:
        return found.units

    def claim(self, unit: Number) -> bool:
        assert unit not in self.held, "claimed twice"
        if self.elsewhere.get(unit, 0) > 0:
            self.elsewhere[unit] -= 1
            return False
        self.held.add(unit)
        return True

    def left(self, unit: Number) -> Number | None:
        return None if unit in self.found else unit

    def back(self, unit: Number) -> None:
        self.held.discard(unit)

    def done(self, unit: Number, found: int, seconds: float) -> None:
        assert unit not in self.found, "done twice"
        self.found[unit] = found
        self.back(unit)
        if len(self.found) == self.stops_at:
            raise KeyboardInterrupt

    def lost(self, unit: Number, reason: str) -> None:
        assert unit not in self.reasons
        self.reasons[unit] = reason
        self.back(unit)

    def opened(self, part: str, seconds: float) -> None:
        assert seconds >= 0

    def refused(self, part: str, refusal: Exception) -> None:
        assert isinstance(refusal, BadRequest)
        self.closed[part] = str(refusal)


def ray_workers(driver: int) -> list[int]:
    """Ids of the processes that hold a worker of Ray, below the process `driver`."""
    return _below(driver, b"ray::Seat")


def process_workers(driver: int) -> list[int]:
    """The same of those without Ray."""
    return _below(driver, b"harness.cluster.processes")


def _below(driver: int, named: bytes) -> list[int]:
    parents, seats = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if named in (folder / "cmdline").read_bytes():
                seats.append(int(folder.name))
        except (OSError, ValueError):
            continue  # it has just ended

    def below(process: int) -> bool:
        while process not in (0, driver):
            process = parents.get(process, 0)
        return process == driver

    return sorted(filter(below, seats))
