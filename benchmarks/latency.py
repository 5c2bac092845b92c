"""How long each phase of an answer takes: prefill, observation, scores, selection, compaction, first token, later tokens.

The clock is given, so that the measuring can be tested without a real one. A subject is anything that goes through the
phases in order; it is warmed up once with the same shapes, then measured once. Rounds and processes are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Clock(Protocol):
    def now(self) -> float:
        """Seconds, after all work that was handed to the device is done."""
        ...


class Subject(Protocol):
    """One cell of the cost suite, ready to go."""

    @property
    def phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        """Name and work of what comes before the first token, in order."""
        ...

    @property
    def within(self) -> dict[str, float]:
        """Seconds of `prefill` that belong to another phase (observation, column sums), since the last `reset`."""
        ...

    def step(self) -> None:
        """Decodes one token for every sequence."""
        ...

    def reset(self) -> None:
        """Forgets everything but the model."""
        ...


@dataclass(frozen=True)
class Latency:
    """Seconds. `phases`: by name, observation taken out of the prefill. `tokens`: of each token, the first apart."""

    phases: dict[str, float]
    first_token: float
    tokens: list[float] = field(repr=False)

    @property
    def median(self) -> float:
        return float(np.median(self.tokens))

    @property
    def p10(self) -> float:
        return float(np.quantile(self.tokens, 0.1))

    @property
    def p90(self) -> float:
        return float(np.quantile(self.tokens, 0.9))


def measure(subject: Subject, clock: Clock, new_tokens: int) -> Latency:
    """Of one pass through the phases and `new_tokens` >= 2 tokens, end tokens ignored, after a warm-up of the same shapes."""
    _pass(subject, clock, min(new_tokens, 3))
    subject.reset()
    found = _pass(subject, clock, new_tokens)
    subject.reset()
    return found


def _pass(subject: Subject, clock: Clock, new_tokens: int) -> Latency:
    phases = {}
    for name, work in subject.phases:
        phases[name] = _seconds(work, clock)
    for name, seconds in subject.within.items():
        phases[name] = seconds
        phases["prefill"] -= seconds
    laps = [_seconds(subject.step, clock) for _ in range(new_tokens)]
    return Latency(phases, laps[0], laps[1:])


def _seconds(work: Callable[[], None], clock: Clock) -> float:
    start = clock.now()
    work()
    return clock.now() - start
