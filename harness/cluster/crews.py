"""Workers as a request asks for them: of Ray, or processes of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from harness.cluster.drive import Crew
from harness.cluster.job import Job
from harness.cluster.options import ProcessOptions, WorkerOptions
from harness.cluster.processes import ProcessCrew, check_processes, cores_here, is_cpu
from harness.env import available_bytes


@contextmanager
def crew_of(options: WorkerOptions, job: Callable[[int], Job], device: str | None, paths: Sequence[str]) -> Iterator[Crew]:
    """The crew, for this block.

    Args:
        job: what its workers do, by how many GPUs each of them has.
        device: as the request names it.
        paths: files and folders that workers on other machines must find there.

    Raises:
        BadRequest: the workers that were asked for cannot be had, or a node differs from this one.
    """
    if isinstance(options, ProcessOptions):
        check_processes(options, device)
        yield ProcessCrew(job(0), options)
        return
    from harness.cluster.places import places_for
    from harness.cluster.ray_crew import RayCrew, check_nodes, connected, machines

    with connected(options):
        where = places_for(options, machines(), device)
        if not options.here:
            check_nodes(where, paths)
        yield RayCrew(job(where.gpus), where)


def usual_workers(worker_bytes: int, device: str | None) -> ProcessOptions | None:
    """A process a core, for models so small that a core is enough for one; None where that is not the way.

    Args:
        worker_bytes: what one of them takes of the machine's memory.
        device: as the request names it.
    """
    free = available_bytes()
    workers = cores_here() if free is None else min(cores_here(), free // worker_bytes)
    return ProcessOptions(workers) if workers > 1 and is_cpu(device) else None
