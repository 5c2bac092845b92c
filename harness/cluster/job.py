"""What can be spread over workers: a job is cut into parts, of which a worker has one open at a time, and these into units.

A part is what is dear to open (a model). The driver knows of a unit its part, its size, and which units stay together; of what
comes of it, nothing: the job's ledger does, which lives beside the driver and alone writes to disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from harness.errors import UserError, first_line


class Unit(Protocol):
    """What is worked on together. Hashable; small, for it is sent."""

    @property
    def part(self) -> str: ...

    @property
    def size(self) -> float:
        """How long it takes, in any measure that all units of a job share: longer ones go first."""
        ...

    @property
    def group(self) -> str:
        """Units of one group go to one worker, one after the other."""
        ...


@dataclass(frozen=True)
class Listed:
    """The units of a part, and what else the driver is to know of it."""

    units: Sequence[Any]
    about: Any = None


class Job(Protocol):
    """What a worker does. It is sent to every worker once, so it holds settings and no models."""

    def open(self, part: str) -> Any:
        """Whatever `list` and `run` need of a part, such as a loaded model.

        Raises:
            UserError: the part cannot be had.
        """
        ...

    def list(self, opened: Any) -> Listed: ...

    def run(self, opened: Any, unit: Any) -> Any: ...


class Ledger(Protocol):
    """What becomes of a job's results. Called by the driver, one call at a time."""

    def listed(self, part: str, found: Listed) -> Sequence[Any]:
        """Those of the units that are still to be done."""
        ...

    def claim(self, unit: Any) -> bool:
        """Is the unit nobody else's? It is held until `done`, `lost` or `back`."""
        ...

    def left(self, unit: Any) -> Any | None:
        """The unit as it is to be sent, told what is finished of it by now; None if that is all."""
        ...

    def back(self, unit: Any) -> None:
        """The unit is not worked on any more; it will be claimed again."""
        ...

    def done(self, unit: Any, found: Any, seconds: float) -> None: ...

    def lost(self, unit: Any, reason: str) -> None:
        """It was tried as often as it may be."""
        ...

    def opened(self, part: str, seconds: float) -> None:
        """A worker has opened a part."""
        ...

    def refused(self, part: str, refusal: Exception) -> None:
        """The part cannot be had.

        Raises:
            that refusal, or another, where the job cannot go on without the part.
        """
        ...


@dataclass(frozen=True)
class Answer:
    """What a worker says of a call: a value, or why there is none."""

    value: Any = None
    refusal: Exception | None = None  # the request makes no sense
    failure: str | None = None  # anything else that was raised
    seconds: float = 0.0  # of the call, without opening
    opening: float | None = None  # seconds, if it opened a part
    unopened: bool = False  # it could not open the part

    @property
    def wrong(self) -> Exception | str | None:
        return self.refusal or self.failure


@dataclass
class Worker:
    """One process' side: holds the part that is open, and answers calls."""

    job: Job
    part: str | None = None
    _opened: Any = field(default=None, repr=False)

    def answer(self, what: str, part: str, unit: Any = None) -> Answer:
        """Never raises for what the job does.

        Args:
            what: open, list or run.
        """
        opening = None
        try:
            start = time.perf_counter()
            if self.part != part:
                self.part = self._opened = None  # the memory of the last one is free before the next is there
                self._opened = self.job.open(part)
                self.part, opening = part, time.perf_counter() - start
            start = time.perf_counter()
            value = None
            if what == "list":
                value = self.job.list(self._opened)
            elif what == "run":
                value = self.job.run(self._opened, unit)
        except UserError as refusal:
            return Answer(refusal=refusal, opening=opening, unopened=self.part != part)
        except Exception as error:
            failure = f"{type(error).__name__}: {first_line(error, 300)}"
            return Answer(failure=failure, opening=opening, unopened=self.part != part)
        return Answer(value, seconds=time.perf_counter() - start, opening=opening)
