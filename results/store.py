"""Append-only rows. One JSON line a cell; one file a model, benchmark and method.

A row is written by one call under a file lock. A torn last line (a crash, a full disk) is cut off from the next row by a
newline and never read as one. Of equal keys the first `ok` row counts, so two processes may share a folder. Where the file system
has no locks, each process adds to files of its own, `rows/<writer>/`; readers take all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.errors import UserError
from harness.files import whole
from results.lines import (
    Check,
    dict_of,
    is_count,
    is_number,
    is_square,
    is_text,
    json_file,
    json_lines,
    list_of,
    objects,
    or_none,
    tell,
    wrong_field,
)
from results.locks import add_line, can_lock, locked, opened
from results.published import PARQUET, parquet_rows
from results.record import Key, OtherSchema, Record

CLAIMS = ".claims"  # what processes work on just now


class StoreError(UserError, OSError):
    """The folder cannot be read or written. What was finished is still there."""


class DiskFull(StoreError):
    """There is no space left: no fault of the request, so the exit code is 1."""


def cannot(do: str, error: OSError, then: str) -> StoreError:
    """The refusal of what the system would not do: `do`, why, and what the user may do or still has."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
    return kind(f"cannot {do}: {error.strerror or error}; {then}")


@dataclass(frozen=True)
class Row:
    """A record as it is stored: what is sent from a worker, and added as it is."""

    id: str  # of the key
    file: str
    status: str
    line: str
    reason: str | None = None

    @classmethod
    def of(cls, record: Record) -> Row:
        return cls(record.key.id, file_of(record.key), record.status, record.to_json(), record.reason)


def file_of(key: Key) -> str:
    """Name of the file that a cell's row is in."""
    return "__".join(slug(part) for part in (key.model, key.benchmark, key.method)) + ".jsonl"


class Store:
    """The rows of one output folder, for a process that adds to them, or only asks what is finished.

    Args:
        own_rows: adds to files of this process alone, without locks: for file systems whose locks cannot be relied on. Where there
            are none, this is done without being asked.

    Raises:
        StoreError: the folder cannot be made or written to.
    """

    def __init__(self, out: Path, reading: bool = False, own_rows: bool = False) -> None:
        self.out, self.rows = out, out / "rows"
        self._read_to: dict[Path, int] = {}
        self._lines: dict[Path, int] = {}
        self._status: dict[str, str] = {}
        self.own: Path | None = None
        try:
            if not reading:
                self.rows.mkdir(parents=True, exist_ok=True)
                if not os.access(self.rows, os.W_OK):
                    raise StoreError(f"cannot write to {self.rows}; choose another folder with --out")
                if own_rows or not can_lock(self.rows):
                    self.own = self.rows / f"w{secrets.token_hex(4)}"
            self._folders = [self.rows, *sorted(path for path in self.rows.glob("*") if path.is_dir())]
        except StoreError:
            raise
        except OSError as error:
            raise cannot(f"make {self.rows}", error, "choose another folder with --out") from None

    def finished(self, key: Key) -> bool:
        """Is there an `ok` or `skipped` row? Failed ones are tried again."""
        return self.has(file_of(key), key.id)

    def has(self, file: str, row: str) -> bool:
        """The same, of a row in a file."""
        self._catch_up(file)
        return self._status.get(row) in ("ok", "skipped")

    def which(self, files: Sequence[str], rows: Sequence[str]) -> frozenset[str]:
        """Those of the rows that are finished, each with the file that it is in."""
        for file in dict.fromkeys(files):
            self._catch_up(file)
        return frozenset(row for row in rows if self._status.get(row) in ("ok", "skipped"))

    def write(self, record: Record) -> bool:
        """Adds a row, unless another process has finished the same cell meanwhile. True if it was added."""
        return self.add([Row.of(record)]) == 1

    def add(self, rows: Sequence[Row]) -> int:
        """Adds rows, but those whose cells another process has finished meanwhile. Gives how many were added.

        Raises:
            StoreError: they cannot be written.
        """
        files: dict[str, list[Row]] = {}
        for row in rows:
            files.setdefault(row.file, []).append(row)
        where, added = self.own or self.rows, 0
        try:
            if self.own is not None:
                self.own.mkdir(exist_ok=True)
            with locked(self.rows):
                for file, mine in files.items():
                    added += self._add(where / file, mine)
        except StoreError:
            raise
        except OSError as error:
            raise cannot(f"write to {where}", error, "rows written before are safe") from None
        return added

    def _add(self, path: Path, rows: list[Row]) -> int:
        with opened(path) as handle:
            self._catch_up(path.name)
            new = [row for row in rows if self._status.get(row.id) != "ok"]
            if new:
                self._read_to[path] = add_line(handle, "\n".join(row.line for row in new))
        self._status |= {row.id: row.status for row in new}
        return len(new)

    @contextmanager
    def claim(self, what: str, wait: bool = True) -> Iterator[bool]:
        """Holds `what` against other processes of this folder; one that is killed lets go of it.

        Returns:
            False: another process holds it, which does not happen where this one waits, nor where there are no locks.
        """
        if self.own is not None:
            yield True
            return
        path = self.out / CLAIMS / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock"
        lock = FileLock(path)
        try:
            path.parent.mkdir(exist_ok=True)
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise cannot(f"write to {path.parent}", error, "rows written before are safe") from None
        try:
            yield True
        finally:
            with suppress(OSError):  # who waits for it holds a file without a name then; at worst a cell is worked on twice
                path.unlink()
            lock.release()

    def _catch_up(self, file: str) -> None:
        """Reads what was added to the files of this name since they were last looked at."""
        for folder in self._folders:
            self._read_on(folder / file)

    def _read_on(self, path: Path) -> None:
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
        before = self._lines.get(path, 0)
        self._lines[path] = before + whole.count(b"\n")
        for where, row in objects(whole, path, before):
            record = _record(where, row)
            if record is not None and self._status.get(record.key.id) != "ok":
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


def append_line(path: Path, line: str) -> None:
    """Adds one line, under a lock where there are locks; a torn line before it stays torn.

    Raises:
        StoreError: the file cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent), opened(path) as handle:
            add_line(handle, line)
    except OSError as error:
        raise cannot(f"write to {path}", error, "what was written before is safe") from None


JUDGED: dict[str, Check] = {"row": is_text, "content": is_text, "status": is_text, "rating": or_none(is_number), "text": is_text}


def judge_lines(path: Path) -> list[dict[str, Any]]:
    """A judge's verdicts that are whole."""

    def wrong(line: dict[str, Any]) -> str | None:
        unrated = line.get("status") == "ok" and not (is_number(line.get("rating")) and isfinite(line["rating"]))
        return wrong_field(line, JUDGED, list(JUDGED)) or ("no rating" if unrated else None)

    return _checked(json_lines(path), wrong)


def _checked(found: Iterable[tuple[str, dict[str, Any]]], wrong: Callable[[dict[str, Any]], str | None]) -> list[dict[str, Any]]:
    """Without those with which something is wrong, which are told."""
    kept = []
    for where, row in found:
        if what := wrong(row):
            tell(f"{where}: {what}")
        else:
            kept.append(row)
    return kept


def _verdicts(out: Path) -> dict[str, list[dict[str, Any]]]:
    """By judge: its file's name, or its own where several share a file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / "judge").glob("*.jsonl")):
        lines = judge_lines(path)
        judges = {str(line.get("model", path.stem)) for line in lines}
        for line in lines:
            name = path.stem if len(judges) == 1 else str(line.get("model", path.stem))
            found.setdefault(name, []).append(line)
    return found


def read_ratings(out: Path) -> dict[str, dict[str, float]]:
    """By judge and row id. Answers that were refused or not rated are absent."""
    found = {}
    for name, lines in _verdicts(out).items():
        ratings = {line["row"]: float(line["rating"]) for line in lines if line["status"] == "ok"}
        if ratings:
            found[name] = ratings
    return found


def read_verdicts(out: Path) -> dict[str, Counter[str]]:
    """How often each judge gave a rating, refused, or said something else."""
    return {name: Counter(str(line["status"]) for line in lines) for name, lines in _verdicts(out).items()}


def read_folder(out: Path, name: str) -> list[dict[str, Any]]:
    """The JSON files of one of its folders (lm_eval, heads, routing, env, data); what cannot be read is told and left out."""
    found = ((path, json_file(path)) for path in sorted((out / name).glob("*.json")))
    return [{"id": path.stem, **one} for path, one in found if one is not None]


def read_commands(out: Path) -> list[dict[str, Any]]:
    """When what was run, in order; a torn line is none."""
    checks: dict[str, Check] = {"when": is_text, "command": is_text}
    return _checked(json_lines(out / "commands.jsonl"), lambda line: wrong_field(line, checks, list(checks)))


CELL: dict[str, Check] = {name: is_text for name in ("model", "method", "budget", "dtype", "device", "what", "decode")}
CELL |= {name: is_count for name in ("context", "batch", "new_tokens", "threads", "round")}
NUMBERS: tuple[str, ...] = ("first_token", "token", "p10", "p90", "token_floor", "prefill_floor", "bandwidth", "flops", "bytes_kept", "bytes_end")
NUMBERS += ("bytes_allocated", "prefill_peak", "decode_peak")
COST: dict[str, Check] = {
    "id": is_text,
    "env": is_text,
    "status": is_text,
    "cell": lambda cell: isinstance(cell, dict) and wrong_field(cell, CELL) is None,
    "sources": list_of(is_text),
    "reason": or_none(is_text),
    "fell_back": or_none(is_text),
    "batch": is_count,
    "phases": dict_of(is_number),
    "footprint": lambda points: is_square(points) and len(points) > 2 and len(points[0]) == 2,
    **dict.fromkeys(NUMBERS, lambda value: is_number(value) and isfinite(value)),
}


def read_costs(out: Path) -> list[dict[str, Any]]:
    """Every cost cell's row: of equal ids the first `ok` one, else the newest. Torn lines are none."""
    found: dict[str, dict[str, Any]] = {}
    for row in _checked(json_lines(out / "cost" / "rows.jsonl"), lambda row: wrong_field(row, COST, ("id", "status", "cell"))):
        if found.get(row["id"], {}).get("status") != "ok":
            found[row["id"]] = row
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


def _record(where: str, row: dict[str, Any], lower: Collection[str] = ()) -> Record | None:
    """The row; None, and told, where something is wrong with it.

    Raises:
        StoreError: it is a row of another version of the suite.
    """
    try:
        return Record.from_json(row, lower)
    except OtherSchema as error:
        raise StoreError(f"{where}: {error}; choose another folder with --out") from None
    except ValueError as error:
        tell(f"{where}: {error}")
        return None


def _lower_is_better(out: Path) -> set[str]:
    """Metrics of which less is better, as runs before schema 4 stored it: in a folder of its own, by benchmark."""
    found = [one.get("metrics") for one in read_folder(out, "metrics")]
    return {name for metrics in found if isinstance(metrics, dict) for name, higher in metrics.items() if not higher}


def read_rows(out: Path) -> list[Record]:
    """Every cell's row, in the order of the files: the first `ok` one, else the newest. A row that is wrong is told and left out.
    Where there are no rows as lines, those of a published folder.

    Raises:
        StoreError: no rows there, none that can be read, or rows of another version.
    """
    files = sorted(chain((out / "rows").glob("*.jsonl"), (out / "rows").glob("*/*.jsonl")))
    if not files and (out / PARQUET).is_file():
        files = [out / PARQUET]
    if not files:
        raise StoreError(f"no rows in {out / 'rows'}: run something first, or name another folder with --out")
    records: dict[str, Record] = {}
    lower = _lower_is_better(out)
    for path in files:
        for where, row in parquet_rows(path) if path.name == PARQUET else json_lines(path):
            record = _record(where, row, lower)
            held = None if record is None else records.get(record.key.id)
            if record is not None and (held is None or held.status != "ok"):
                records[record.key.id] = record
    return list(records.values())
