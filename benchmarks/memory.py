"""How much memory an answer takes: peaks of prefill and decoding apart, above what was resident before.

The meter is given. A cell must have a process of its own: what an allocator keeps from a cell before is no cost of this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from benchmarks.latency import Subject


class Meter(Protocol):
    def held(self) -> int:
        """Bytes in use now."""
        ...

    def forget_peak(self) -> None:
        """From here on `peak` counts anew."""
        ...

    def peak(self) -> int:
        """Most bytes in use since `forget_peak`."""
        ...


@dataclass(frozen=True)
class Memory:
    """Bytes. Peaks are above `resident`: the model and the process before it read anything."""

    resident: int
    prefill_peak: int  # of everything before the first token
    decode_peak: int
    held: int  # between the two: the cache, and what else has stayed


def measure(subject: Subject, meter: Meter, new_tokens: int) -> Memory:
    """Of one pass without a warm-up."""
    resident = meter.held()
    meter.forget_peak()
    for _, work in subject.phases:
        work()
    prefill_peak = meter.peak()
    held = meter.held()
    meter.forget_peak()
    for _ in range(new_tokens):
        subject.step()
    return Memory(resident, max(0, prefill_peak - resident), max(0, meter.peak() - resident), held - resident)
