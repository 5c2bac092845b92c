"""Workers as actors of Ray. The only file that imports Ray; it is imported where `--ray` is given."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.cluster import seat
from harness.cluster.drive import Call, Event
from harness.cluster.job import Job
from harness.cluster.nodes import ROOT, Node, check_same, describe
from harness.cluster.options import RayOptions
from harness.cluster.places import Machine, Places
from harness.errors import BadRequest, first_line

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
os.environ.setdefault("RAY_worker_niceness", "0")  # workers started here do what this process would do, with its priority
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without a GPU of its own is told so by its device

try:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise BadRequest("--ray needs Ray, which is not installed: pip install '.[cluster]'") from None

cloudpickle.register_pickle_by_value(seat)

ANSWER_S = 10.0  # within which a cluster must answer
STORE_BYTES = 100_000_000  # of shared memory on this machine: answers and counts are small
PROBE_S = 120.0  # for a node to start a process and describe itself


@contextmanager
def connected(options: RayOptions) -> Iterator[None]:
    """Ray is there: the one that this process has already, else one of this machine for this block alone, or a cluster.

    Raises:
        BadRequest: nobody answers there.
    """
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if options.here:
        settings |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        _check_answer(options.address)
    try:
        ray.init(address=options.address, **settings)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise BadRequest(f"--ray {options.address}: {first_line(error, 300)}") from None
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # ours stop the run and keep what is finished; Ray's would end the process
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answer(address: str) -> None:
    """Ray itself waits for over a minute.

    Raises:
        BadRequest: no head node answers there within ten seconds.
    """
    host, _, port = address.rpartition(":")
    if address == "auto":
        return  # refused at once, if none runs here
    if not (host and port.isdecimal()):
        raise BadRequest(f"--ray {address} is neither local, auto, nor the host:port of a cluster's head node")
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
        _ask_head(address)
    except (OSError, OverflowError, TimeoutError) as error:
        raise BadRequest(f"--ray {address}: no cluster answers there ({first_line(error)}); see `ray start`") from None


ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


def _ask_head(address: str) -> None:
    """In a process of its own: Ray cannot be told how long to wait, and writes what it tries to the error stream.

    Raises:
        TimeoutError: whoever listens there does not answer as a head node does.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK, address], capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"silent for {ANSWER_S:.0f} s") from None
    if "InvalidAuthToken" in asked.stderr:
        raise BadRequest(f"--ray {address} wants its token: export RAY_AUTH_MODE=token, with its ~/.ray/auth_token on every node")
    if asked.returncode:
        raise TimeoutError(asked.stderr.strip().splitlines()[-1][:300])


def machines() -> list[Machine]:
    """The nodes of the cluster that are alive."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            found.append(Machine(node["NodeID"], node["NodeManagerAddress"], int(has.get("CPU", 0)), int(has.get("GPU", 0))))
    return found


def check_nodes(where: Places, paths: Sequence[str]) -> None:
    """Asks every node that gets workers to describe itself.

    Args:
        paths: files and folders that a worker must find there; those that are missing here too are somebody else's refusal.

    Raises:
        BadRequest: a node differs from this one, lacks something, or does not answer.
    """
    paths = [path for path in paths if Path(path).exists()]
    ours = describe(paths)
    ask = ray.remote(num_cpus=0, max_retries=0)(seat.probe)
    asked = {}
    for machine in where.machines:
        there = NodeAffinitySchedulingStrategy(machine.id, soft=False)
        asked[ask.options(scheduling_strategy=there).remote(str(ROOT), str(Path.cwd()), paths)] = machine.name
    for answer, name in asked.items():
        try:
            node = ray.get(answer, timeout=PROBE_S)
        except ray.exceptions.RayError as error:
            raise BadRequest(f"node {name} cannot be asked what it has: {_how(error)}") from None
        if not isinstance(node, Node):
            raise BadRequest(f"node {name} has no suite ({node}): install it there, or share this folder: {ROOT}")
        check_same(name, node, ours)


class RayCrew:
    """A crew of actors, each with its cores and GPUs.

    Ray restarts and retries nothing by itself: the driver does, since it knows which unit a worker died of.
    """

    def __init__(self, job: Job, where: Places) -> None:
        self.size, self.where = where.workers, where
        self._job = ray.put(cloudpickle.dumps(job))
        self._seat = ray.remote(seat.Seat)
        self._actors: dict[int, Any] = {}
        self._starts: dict[int, int] = {}
        self._events: queue.SimpleQueue[tuple[int, int, Call, Future[Any]]] = queue.SimpleQueue()

    def start(self, worker: int, start: int) -> None:
        options = self._seat.options(
            num_cpus=self.where.cores, num_gpus=self.where.gpus, max_restarts=0, max_task_retries=0, name=None
        )
        self._actors[worker] = options.remote(str(ROOT), str(Path.cwd()), self._job)
        self._starts[worker] = start

    def ask(self, worker: int, call: Call) -> None:
        start = self._starts[worker]
        answer = self._actors[worker].answer.remote(call.what, call.part, call.unit)
        answer.future().add_done_callback(lambda future: self._events.put((worker, start, call, future)))

    def next(self, timeout: float) -> Event | None:
        try:
            worker, start, call, future = self._events.get(timeout=timeout) if timeout else self._events.get_nowait()
        except queue.Empty:
            return None
        error = future.exception()
        if error is None:
            return Event(worker, start, call, future.result())
        return Event(worker, start, died=_how(error))

    def stop(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()


def _how(error: BaseException) -> str:
    """In a few words, what became of a worker."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its node ran out of memory, and Ray ended it"
    lines = [line.strip() for line in str(error).splitlines()]
    why = next((line for line in lines if line.startswith("The actor is dead because")), "")
    why = why.removeprefix("The actor is dead because ").split(". ")[0].rstrip(".")
    if "worker process has died" in why:
        return "its worker's process ended (killed, or too little memory)"
    if "node has died" in why or "node_dead" in why or "node was terminated" in why:
        return "its worker's node is gone"
    return f"its worker ended: {why or first_line(error, 300)}"
