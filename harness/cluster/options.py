"""Where the units of a request are worked on, as a value. Imports nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.errors import BadRequest


@dataclass(frozen=True)
class RayOptions:
    """Workers of Ray: on this machine, or in a cluster that runs already.

    Raises:
        BadRequest: a field that makes no sense by itself.
    """

    address: str = "local"  # local, auto, or host:port of a cluster's head node
    workers: int | None = None  # None: as many as there are GPUs for; without GPUs, one a core
    gpus_per_worker: int | None = None  # None: one, where there are any

    def __post_init__(self) -> None:
        if not self.address:
            raise BadRequest("--ray is empty: local, or the address of a cluster's head node")
        if self.address.startswith("ray://"):
            raise BadRequest(
                f"--ray {self.address}: Ray's client is not used: start the command on a node of the cluster, with the address "
                "of its head node, such as 10.0.0.1:6379"
            )
        if self.workers is not None and self.workers < 1:
            raise BadRequest(f"--workers {self.workers} must be at least 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise BadRequest(f"--gpus-per-worker {self.gpus_per_worker} must not be negative")

    @property
    def here(self) -> bool:
        """On this machine alone?"""
        return self.address == "local"


@dataclass(frozen=True)
class ProcessOptions:
    """Workers as processes of this machine: of its processor, and without Ray.

    Raises:
        BadRequest: a field that makes no sense by itself.
    """

    workers: int

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise BadRequest(f"--workers {self.workers} must be at least 1")

    here: ClassVar[bool] = True


WorkerOptions = RayOptions | ProcessOptions
