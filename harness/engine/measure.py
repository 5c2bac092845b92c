"""Clocks and bytes."""

from __future__ import annotations

import ctypes
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Lap:
    seconds: float = 0.0


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def stopwatch(device: torch.device, lap: Lap) -> Iterator[None]:
    """Adds the block's seconds to `lap`: device work that it started, and none that was still running before."""
    wait_for(device)
    start = time.perf_counter()
    try:
        yield
    finally:
        wait_for(device)
        lap.seconds += time.perf_counter() - start


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Of the work, what it started on the device included."""
    lap = Lap()
    with stopwatch(device, lap):
        work()
    return lap.seconds


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class OutOfMemory(Exception):
    """A device or the machine had too little memory: says how much was wanted, in one line."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns every way in which torch says that memory has run out into `OutOfMemory`."""
    try:
        yield
    except MemoryError:
        raise OutOfMemory("out of memory") from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemory(f"out of memory: {str(error).splitlines()[0]}") from None
        if "DefaultCPUAllocator" in str(error):
            wanted = re.search(r"allocate (\d+) bytes", str(error))
            how_much = f": {int(wanted[1]) / 2**30:,.1f} GiB more were wanted" if wanted else ""
            raise OutOfMemory(f"out of memory{how_much}") from None
        raise


def give_back_freed_memory() -> None:
    """Has glibc return to the system what was freed: resident memory is then memory in use. Nothing where there is no glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next prompt: pages fresh from the system cost more than what is done with them.

    Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**25)  # the largest that glibc takes
