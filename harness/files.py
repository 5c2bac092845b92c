"""Files that are written whole: a reader, and whoever comes after a crash, sees the old text or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import BadRequest


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside `path`, which takes its place when the block ends. If the block fails, the draft is removed.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Makes the folder, and tries to write there: before work begins that would be lost.

    Raises:
        BadRequest: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".try.{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise BadRequest(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None
