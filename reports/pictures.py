"""Where pictures are saved: file names that can be read, and are never equal where what is drawn is not."""

from __future__ import annotations

import hashlib
from pathlib import Path

from results.store import LONGEST, plain

LETTERS = 12  # of the hash


def place(folder: Path, name: str, ending: str = ".png", mark: str = "") -> Path:
    """A file that is not there yet: named in plain letters, and by the hash of the whole name where those were cut or are taken.

    Args:
        mark: comes behind the name in any case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown, digest = plain(name), hashlib.sha256(f"{name}{mark}".encode()).hexdigest()[:LETTERS]
    cut = f"{shown[: LONGEST - LETTERS]}_{digest}"
    names = [*([f"{shown}{mark}"] if len(shown) <= LONGEST else []), cut]
    free = (path for name in names if not (path := folder / f"{name}{ending}").exists())
    return next(free, folder / f"{cut}_{len(list(folder.iterdir()))}{ending}")
