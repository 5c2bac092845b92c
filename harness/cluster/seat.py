"""What is sent to nodes as code, not by name: a process that does not yet know where the suite lies can look no name up in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any


def settle(root: str, here: str) -> None:
    """A worker's process looks for the suite, and for files, where the driver does.

    Args:
        root: folder of the suite's packages. here: the driver's current folder. On a node without them: what is installed there.
    """
    if os.path.isdir(root) and root not in sys.path:  # noqa: PTH112 (with pathlib as little as possible is sent)
        sys.path.insert(0, root)
    if os.path.isdir(here):  # noqa: PTH112
        os.chdir(here)


def probe(root: str, here: str, paths: Sequence[str]) -> Any:
    """The node as it describes itself, or in words why it cannot."""
    settle(root, here)
    try:
        from harness.cluster.nodes import describe
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return describe(paths)


class Seat:
    """The actor: a process with a worker in it."""

    def __init__(self, root: str, here: str, job: bytes) -> None:
        settle(root, here)
        from ray import cloudpickle

        from harness.cluster.job import Worker

        self.worker = Worker(cloudpickle.loads(job))

    def answer(self, what: str, part: str, unit: Any) -> Any:
        return self.worker.answer(what, part, unit)
