"""What is made of rows is written beside its place and moved there when it is whole: a reader never sees half a report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from results.locks import locked
from results.store import cannot

DRAFT = ".draft."
LEFT_S = 24 * 3600.0  # after so long a draft is one of a process that was killed


@contextmanager
def report_draft(out: Path, instead_of: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files are in `<out>/report` when the block ends. If it fails, what was there stays.

    Args:
        instead_of: what the draft takes the place of as a whole, with whatever is no longer made. Empty: its files, one by one.

    Raises:
        StoreError: the folder cannot be written to.
    """
    draft = out / f"{DRAFT}{os.getpid()}.{time.time_ns()}"
    try:
        draft.mkdir(parents=True)
        yield draft
        with locked(out):
            _moved(draft, out / "report", instead_of)
            for left in out.glob(f"{DRAFT}*"):
                if time.time() - left.stat().st_mtime > LEFT_S:
                    shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise cannot(f"write the report to {out / 'report'}", error, "rows and an earlier report are as they were") from None
    finally:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)


def _moved(draft: Path, place: Path, instead_of: Collection[str]) -> None:
    if not instead_of:
        place.mkdir(exist_ok=True)
        for path in draft.iterdir():
            path.replace(place / path.name)
        return
    for other in place.iterdir() if place.exists() else ():
        if other.name not in instead_of:  # of another command: side by side, or a paper's table
            if other.is_dir():
                shutil.copytree(other, draft / other.name)
            else:
                shutil.copy2(other, draft / other.name)
    if not place.exists():
        draft.replace(place)
        return
    old = draft.with_name(f"{draft.name}.old")
    place.replace(old)
    try:
        draft.replace(place)
    except OSError:
        old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
