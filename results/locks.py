"""Lines added to files that other processes add to, under locks where the file system has any: some mounts (Lustre without `flock`,
some of NFS) have none."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

try:
    import fcntl
except ImportError:  # not a Unix: its locks are part of the system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # one file a folder
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder against other processes. Where there are no locks it holds nothing: writers keep to files of their own there.

    Raises:
        OSError: nothing can be written there.
    """
    if not can_lock(folder):
        yield
        return
    with FileLock(folder / LOCK):
        yield


@lru_cache(maxsize=256)
def can_lock(folder: Path) -> bool:
    """Does the file system say that it locks? (One that only says so cannot be told from the others.) Leaves nothing behind.

    Raises:
        OSError: there is no such folder.
    """
    if fcntl is None:
        return True
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS  # held by another process: so there are locks
    finally:
        os.close(handle)
    return True


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The file, opened for adding to it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def add_line(handle: int, line: str) -> int:
    """Adds a line, or several, and gives the file's size. A write that fails half-way is taken back."""
    size = os.fstat(handle).st_size
    torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
    data = (b"\n" if torn else b"") + line.encode() + b"\n"
    try:
        written = os.write(handle, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, "no space left on device")
    except OSError:
        os.ftruncate(handle, size)
        raise
    return size + len(data)
