"""Append-only rows. One JSON line a cell; one file a model, benchmark and method.

A row is written by one call under a file lock. A torn last line (a crash, a full disk) is cut off from the next row by a
newline and never read as one. Of equal keys the first `ok` row counts, so two processes may share a folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.errors import UserError
from harness.files import whole
from results.record import Key, Record


LOCK = ".lock"  # one file a folder


class StoreError(UserError, OSError):
    """The folder cannot be read or written. What was finished is still there."""


class DiskFull(StoreError):
    """There is no space left: no fault of the request, so the exit code is 1."""


def cannot(do: str, error: OSError, then: str) -> StoreError:
    """The refusal of what the system would not do: `do`, why, and what the user may do or still has."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
    return kind(f"cannot {do}: {error.strerror or error}; {then}")


class Store:
    """The rows of one output folder, for a process that adds to them, or only asks what is finished.

    Raises:
        StoreError: the folder cannot be made or written to.
    """

    def __init__(self, out: Path, reading: bool = False) -> None:
        self.out, self.rows = out, out / "rows"
        self._read_to: dict[Path, int] = {}
        self._status: dict[str, str] = {}
        if reading:
            return
        try:
            self.rows.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot(f"make {self.rows}", error, "choose another folder with --out") from None
        if not os.access(self.rows, os.W_OK):
            raise StoreError(f"cannot write to {self.rows}; choose another folder with --out")

    def finished(self, key: Key) -> bool:
        """Is there an `ok` or `skipped` row? Failed ones are tried again."""
        self._catch_up(self._file(key))
        return self._status.get(key.id) in ("ok", "skipped")

    def write(self, record: Record) -> bool:
        """Adds a row, unless another process has finished the same cell meanwhile. True if it was added."""
        path = self._file(record.key)
        try:
            with _locked(path) as handle:
                self._catch_up(path)
                if self._status.get(record.key.id) == "ok":
                    return False
                size = _append(handle, record.to_json())
        except StoreError:
            raise
        except OSError as error:
            raise cannot(f"write to {path}", error, "rows written before are safe") from None
        self._status[record.key.id] = record.status
        self._read_to[path] = size
        return True

    def _file(self, key: Key) -> Path:
        parts = (key.model, key.benchmark, key.method)
        return self.rows / ("__".join(slug(part) for part in parts) + ".jsonl")

    def _catch_up(self, path: Path) -> None:
        """Reads what was added to the file since it was last looked at."""
        start = self._read_to.get(path, 0)
        if not path.exists() or path.stat().st_size <= start:
            return
        try:
            with path.open("rb") as handle:
                handle.seek(start)
                new = handle.read()
        except OSError as error:
            raise cannot(f"read {path}", error, "choose another folder with --out") from None
        whole = new[: new.rfind(b"\n") + 1]
        self._read_to[path] = start + len(whole)
        for row in _parsed(whole):
            try:
                record = Record.from_json(row)
            except ValueError as error:
                raise StoreError(f"{path}: {error}; choose another folder with --out") from None
            if self._status.get(record.key.id) != "ok":
                self._status[record.key.id] = record.status


LONGEST = 80  # letters of a part of a file name


def plain(text: str) -> str:
    """What is no plain letter becomes a dash."""
    return re.sub(r"[^A-Za-z0-9.+@_-]+", "-", text).strip("-")


def slug(text: str) -> str:
    """Part of the name of a file that several may share: other texts may have the same."""
    return plain(text)[:LONGEST]


def own_name(text: str) -> str:
    """Name of a file that belongs to this text alone: where letters were lost, its hash stands behind the rest."""
    if plain(text) == text and len(text) <= LONGEST:
        return text
    return f"{plain(text)[: LONGEST - 13]}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, opened for adding to it, while no other process adds to a file of its folder."""
    with FileLock(path.with_name(LOCK)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            yield handle
        finally:
            os.close(handle)


def _append(handle: int, line: str) -> int:
    """Adds one line and gives the file's size. A write that fails half-way is taken back."""
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


def append_line(path: Path, line: str) -> None:
    """Adds one line under a lock; a torn line before it stays torn.

    Raises:
        StoreError: the file cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as handle:
            _append(handle, line)
    except OSError as error:
        raise cannot(f"write to {path}", error, "what was written before is safe") from None


def judge_lines(path: Path) -> list[dict[str, Any]]:
    """A judge's verdicts that are whole."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"row", "content", "status", "rating", "text"} <= set(row):
            found.append(row)
    return found


def read_ratings(out: Path) -> dict[str, dict[str, float]]:
    """By judge and row id. Answers that were refused or not rated are absent."""
    found = {}
    for path in sorted((out / "judge").glob("*.jsonl")):
        ratings = {line["row"]: float(line["rating"]) for line in judge_lines(path) if line["status"] == "ok"}
        if ratings:
            found[path.stem] = ratings
    return found


def read_verdicts(out: Path) -> dict[str, Counter[str]]:
    """How often each judge gave a rating, refused, or said something else."""
    return {path.stem: Counter(str(line["status"]) for line in judge_lines(path)) for path in sorted((out / "judge").glob("*.jsonl"))}


def read_folder(out: Path, name: str) -> list[dict[str, Any]]:
    """The JSON files of one of its folders (lm_eval, heads, routing, env, data); what cannot be read is left out."""
    found = []
    for path in sorted((out / name).glob("*.json")):
        try:
            found.append({"id": path.stem, **json.loads(path.read_text())})
        except (OSError, ValueError, TypeError):
            continue
    return found


def read_commands(out: Path) -> list[dict[str, Any]]:
    """When what was run, in order; a torn line is none."""
    path = out / "commands.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def read_costs(out: Path) -> list[dict[str, Any]]:
    """Every cost cell's row: of equal ids the first `ok` one, else the newest. Torn lines are none."""
    path = out / "cost" / "rows.jsonl"
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            name = str(row["id"])
        except (ValueError, TypeError, KeyError):
            continue
        if found.get(name, {}).get("status") != "ok":
            found[name] = row
    return list(found.values())


def write_json(path: Path, what: Any) -> None:
    """Whole or not at all.

    Raises:
        StoreError: the folder cannot be written to.
    """
    try:
        with whole(path) as draft:
            draft.write_text(json.dumps(what, indent=1) + "\n")
    except OSError as error:
        raise cannot(f"write to {path.parent}", error, "choose another folder with --out") from None


def _parsed(data: bytes) -> Iterator[dict[str, object]]:
    """The lines that are rows; a torn one is not."""
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "key" in row:
            yield row


def _lower_is_better(out: Path) -> set[str]:
    """Metrics of which less is better, as runs before schema 4 stored it: in a folder of its own, by benchmark."""
    return {name for one in read_folder(out, "metrics") for name, higher in one.get("metrics", {}).items() if not higher}


def read_rows(out: Path) -> list[Record]:
    """Every cell's row, in the order of the files: the first `ok` one, else the newest.

    Raises:
        StoreError: no rows there, or rows that this version does not read.
    """
    files = sorted((out / "rows").glob("*.jsonl"))
    if not files:
        raise StoreError(f"no rows in {out / 'rows'}: run something first, or name another folder with --out")
    records: dict[str, Record] = {}
    lower = _lower_is_better(out)
    for path in files:
        for number, row in enumerate(_parsed(path.read_bytes()), 1):
            try:
                record = Record.from_json(row, lower)
            except ValueError as error:
                raise StoreError(f"{path}, row {number}: {error}") from None
            held = records.get(record.key.id)
            if held is None or held.status != "ok":
                records[record.key.id] = record
    return list(records.values())
