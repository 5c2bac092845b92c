"""What another process does of a report meanwhile: pictures, which take most of its time and on which nothing depends."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def beside(pays: bool, work: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Does the work while the block runs, and has done it at the block's end. What it raises is raised there.

    Args:
        pays: is it more than the two seconds that a process takes to start? Else, or on a single core, it is done here, first.
        work: by its name in a module of ours.
    """
    if not pays or (os.cpu_count() or 1) < 2:
        work(*arguments)
        yield
        return
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen([sys.executable, "-m", "reports.beside"], stdin=pipe, stdout=pipe, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((work, arguments), process.stdin)
            process.stdin.close()
            yield
            said = process.stdout.read()
            process.wait()
        finally:
            process.kill()
    if not said:
        raise RuntimeError(f"the process that draws pictures ended with code {process.returncode}")
    if (error := pickle.loads(said)) is not None:
        raise error


def main() -> None:
    work, arguments = pickle.load(sys.stdin.buffer)
    error: BaseException | None = None
    try:
        work(*arguments)
    except Exception as raised:
        error = raised
    pickle.dump(error, sys.stdout.buffer)


if __name__ == "__main__":
    main()
