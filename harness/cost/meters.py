"""Clocks and memory meters of a device, as `benchmarks.latency` and `benchmarks.memory` ask for them."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from harness.engine.measure import give_back_freed_memory, peak_resident_bytes, wait_for
from harness.env import available_bytes
from methods.base import CannotRun

KEPT_FREE = 0.05  # of a device's memory, for what an allocator cannot use


class DeviceClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


class CpuMeter:
    """The process's resident memory, from Linux; elsewhere only its peak since the start is known, and peaks stay as they are."""

    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def held(self) -> int:
        give_back_freed_memory()
        return self._field("VmRSS") or peak_resident_bytes()

    def forget_peak(self) -> None:
        give_back_freed_memory()
        try:
            self.refs.write_text("5")
        except OSError:
            return

    def peak(self) -> int:
        return self._field("VmHWM") or peak_resident_bytes()

    def _field(self, name: str) -> int:
        try:
            lines = self.status.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class CudaMeter:
    """What torch's allocator has given out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def held(self) -> int:
        wait_for(self.device)
        return torch.cuda.memory_allocated(self.device)

    def forget_peak(self) -> None:
        wait_for(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        wait_for(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def free_bytes(device: torch.device) -> int:
    """What a cell may take: of a GPU nearly all that is free, of a machine's memory half."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return int(free - KEPT_FREE * whole)
    available = available_bytes()
    if available is None:
        raise CannotRun("how much memory is free is not known here: name --batches")
    return available // 2
