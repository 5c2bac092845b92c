"""Cost cells on a processor without waiting for imports: forks of one process, in which all is imported and nothing has run.

What a cell allocates, starts or leaves behind is its own, as in a process started from nothing, which takes five seconds longer.
Not for a GPU: a process that has looked for one cannot be forked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

ENDED = "ended"  # key of the line behind a cell's own, with its exit code


def serve(main: Callable[[list[str]], int]) -> int:
    """Measures the cells that come as lines of JSON by `main`, until there are no more."""
    for line in sys.stdin:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _run_and_leave(main, line)
        _, status = os.waitpid(child, 0)
        print(json.dumps({ENDED: os.waitstatus_to_exitcode(status)}), flush=True)
    return 0


def _run_and_leave(main: Callable[[list[str]], int], line: str) -> None:
    """In the fork: what an interpreter does at its end, but for what belongs to the process that it was forked from."""
    code = 1
    try:
        code = main([line])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forks:
    """The process, as the one that asks sees it. Started with the first cell, and again after it was killed."""

    def __init__(self, command: list[str], environment: dict[str, str], patience: float) -> None:
        """`patience`: seconds that a cell may take."""
        self._command, self._environment, self._patience = command, environment, patience
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the rest)

    def measure(self, cell: str) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` would give for a process of the cell alone.

        Raises:
            subprocess.TimeoutExpired: it took longer than it may.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        self._said.seek(0)
        self._said.truncate()
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(self._patience, stop)
        timer.start()
        lines: list[str] = []
        try:
            process.stdin.write(cell + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("{") and ENDED in (found := json.loads(line)):
                    return self._completed(found[ENDED], lines)
                lines.append(line)
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        code = process.wait()
        self._process = None
        if late.is_set():
            raise subprocess.TimeoutExpired(self._command, self._patience)
        return self._completed(code, lines)

    def _completed(self, code: int, lines: list[str]) -> subprocess.CompletedProcess[str]:
        self._said.seek(0)
        return subprocess.CompletedProcess(self._command, code, "".join(lines), self._said.read())

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(  # a session of its own, so that a fork can be ended with it
            self._command, stdin=pipe, stdout=pipe, stderr=self._said, text=True, env=self._environment, start_new_session=True
        )
        return self._process

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._kill()
        if self._process is not None:
            self._process.wait()
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
        self._said.close()


@contextmanager
def forks(command: list[str], environment: dict[str, str], patience: float) -> Iterator[Forks]:
    """The process for this block."""
    found = Forks(command, environment, patience)
    try:
        yield found
    finally:
        found.close()
