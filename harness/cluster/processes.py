"""Workers as processes of this machine, without Ray: calls and answers go through a pipe to each, and nothing is shared.

Made for a processor. A small model's passes do not fill many cores, so that a process a core, with a thread each, finishes more
prompts than one process with all of them.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from harness.cluster.drive import Call, Event
from harness.cluster.job import Job, Worker
from harness.cluster.nodes import ROOT
from harness.cluster.options import ProcessOptions
from harness.errors import BadRequest

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cores_here() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_cpu(device: str | None) -> bool:
    """Is the device of a request the processor?"""
    import torch

    return device == "cpu" or (device is None and not torch.cuda.is_available())


def check_processes(options: ProcessOptions, device: str | None) -> None:
    """
    Raises:
        BadRequest: more workers than cores, or a device that is not the processor.
    """
    if not is_cpu(device):
        raise BadRequest(f"--workers {options.workers} without --ray works on the CPU: add --ray local for GPUs, or --device cpu")
    if options.workers > cores_here():
        raise BadRequest(f"--workers {options.workers} is more than the {cores_here()} cores here")


@dataclass
class WorkerProcess:
    """A worker's process, as the driver's side sees it."""

    start: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    said: IO[bytes]  # its standard error
    calls: list[Call] = field(default_factory=list)  # not yet answered, in order

    def how_it_ended(self) -> str:
        """In a few words. The process is gone."""
        code = self.process.wait()
        if code < 0:
            return f"its worker's process was ended by signal {-code} (killed, or too little memory)"
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return f"its worker's process ended: {lines[-1][:300] if lines else f'code {code}'}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.said.close()


class ProcessCrew:
    """A crew of processes, each with its share of the cores."""

    def __init__(self, job: Job, options: ProcessOptions) -> None:
        self.size = options.workers
        self._job = pickle.dumps(job)
        threads = str(max(1, cores_here() // options.workers))
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._environment = dict.fromkeys(THREADS, threads) | os.environ | {"PYTHONPATH": paths}
        self._workers: dict[int, WorkerProcess] = {}

    def start(self, worker: int, start: int) -> None:
        if worker in self._workers:
            self._workers.pop(worker).close()
        ours, theirs = Pipe()
        said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with its worker)
        command = [sys.executable, "-m", "harness.cluster.processes", str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=self._environment,
            )
        self._workers[worker] = WorkerProcess(start, process, ours, said)
        self._send(worker, self._job)

    def ask(self, worker: int, call: Call) -> None:
        self._workers[worker].calls.append(call)
        self._send(worker, pickle.dumps((call.what, call.part, call.unit)))

    def _send(self, worker: int, message: bytes) -> None:
        try:
            self._workers[worker].pipe.send_bytes(message)
        except OSError:
            return  # it has died: `next` finds its pipe at an end

    def next(self, timeout: float) -> Event | None:
        pipes = {held.pipe: worker for worker, held in self._workers.items()}
        ready = wait(list(pipes), timeout)
        if not ready:
            return None
        worker = pipes[ready[0]]  # type: ignore[index]
        held = self._workers[worker]
        try:
            answer = pickle.loads(held.pipe.recv_bytes())
        except (EOFError, OSError):
            del self._workers[worker]
            how = held.how_it_ended()
            held.close()
            return Event(worker, held.start, died=how)
        return Event(worker, held.start, held.calls.pop(0), answer)

    def stop(self) -> None:
        for held in self._workers.values():
            held.close()
        self._workers.clear()


def serve(pipe: Connection) -> None:
    """A worker's side: answers calls until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the driver keeps what is finished, then ends its workers
    try:
        worker = Worker(pickle.loads(pipe.recv_bytes()))
        while True:
            call: tuple[str, str, Any] = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(pickle.dumps(worker.answer(*call)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
