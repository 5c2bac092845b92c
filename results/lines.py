"""Lines and files of JSON that others may have touched: what is wrong with one is told with its file and line, the others are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

LARGE = 2**63  # of whole numbers: what is larger was never measured
Check = Callable[[Any], bool]


@lru_cache(maxsize=4096)
def tell(what: str) -> None:
    """On the error stream, once a process: a run reads the same rows several times."""
    print(f"{what}; left out", file=sys.stderr)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of lines, each with where it stands. No file is none; a torn line (a crash, a full disk) is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            tell(f"{path}: a link to nothing")
        return
    except OSError as error:
        tell(f"{path} cannot be read: {error.strerror}")
        return
    yield from objects(data, path)


def objects(data: bytes, path: Path, before: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a part of a file, behind its first `before` lines."""
    for number, line in enumerate(data.split(b"\n"), before + 1):
        line = line.strip()
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if isinstance(error, RecursionError) or not line.startswith(b"{") or line.endswith(b"}"):
                tell(f"{where}: {'too deep' if isinstance(error, RecursionError) else 'no JSON'}")
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            tell(f"{where}: no JSON object")


def json_file(path: Path) -> dict[str, Any] | None:
    """The object of a whole file; None, and told, if it holds none."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        tell(f"{path} cannot be read: {error.strerror}")
    except (ValueError, RecursionError):
        tell(f"{path}: no JSON that can be read")
    else:
        if isinstance(found, dict):
            return found
        tell(f"{path}: no JSON object")
    return None


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGE


def is_size(value: Any) -> bool:
    return is_count(value) and value >= 0


def is_number(value: Any) -> bool:
    """NaN and infinities too: what they mean is decided where they are read."""
    return isinstance(value, float) or is_count(value)  # bool is none


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value) and all(map(check, value.values()))


def is_square(value: Any) -> bool:
    """A list of lists of counts, all as long: a matrix that is not empty."""
    return list_of(list_of(is_count))(value) and len({len(line) for line in value}) == 1 and bool(value[0])


def wrong_field(row: Mapping[str, Any], checks: Mapping[str, Check], needed: Sequence[str] = ()) -> str | None:
    """In words, which field is missing or holds what it cannot; None if all is well."""
    missing = next((name for name in needed if name not in row), None)
    if missing is not None:
        return f"no field {missing!r}"
    wrong = next((name for name, check in checks.items() if name in row and not check(row[name])), None)
    return None if wrong is None else f"field {wrong!r} cannot be {json.dumps(row[wrong], default=str)[:60]}"
