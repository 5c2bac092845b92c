"""How many workers there are, and what each has: arithmetic over the machines of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.cluster.options import RayOptions
from harness.errors import BadRequest


@dataclass(frozen=True)
class Machine:
    """A node, with what Ray has of it to give."""

    id: str
    name: str  # its address
    cores: int
    gpus: int

    def holds(self, cores: int, gpus: int) -> int:
        """Workers of so many cores and GPUs."""
        return min(self.cores // cores, self.gpus // gpus if gpus else self.cores)


@dataclass(frozen=True)
class Places:
    """So many workers, each with so many cores and GPUs, and the machines that they may be on."""

    workers: int
    cores: int
    gpus: int
    machines: tuple[Machine, ...]


def places_for(options: RayOptions, machines: Sequence[Machine], device: str | None) -> Places:
    """All cores and GPUs are shared out evenly.

    Args:
        device: as the request names it; a CPU's workers get no GPU.

    Raises:
        BadRequest: more is asked for than there is.
    """
    on_cpu = device == "cpu"
    if on_cpu and options.gpus_per_worker:
        raise BadRequest(f"--gpus-per-worker {options.gpus_per_worker} with --device cpu: leave one of them out")
    there = sum(machine.gpus for machine in machines)
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 0 if on_cpu or not there else 1
    most = sum(machine.holds(1, gpus) for machine in machines)
    workers = options.workers or most
    if workers > most or not workers:
        cores = sum(machine.cores for machine in machines)
        have = f"{_of(cores, 'core')} and {_of(there, 'GPU')} on {_of(len(machines), 'node')}"
        need = f"workers of {_of(gpus, 'GPU')}" if gpus else "workers of a core each"
        raise BadRequest(f"--workers {options.workers or 1} is more than {have} are enough for, which is {most} {need}")
    cores = max(machine.cores for machine in machines)
    while sum(machine.holds(cores, gpus) for machine in machines) < workers:
        cores -= 1
    return Places(workers, cores, gpus, tuple(machine for machine in machines if machine.holds(cores, gpus)))


def _of(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
