"""Methods, benchmarks and conversions from files of the user's own.

A plugin is a Python file that holds any of the tables `METHODS`, `BENCHMARKS` and `CONVERSIONS`, each from names to what our
own tables hold. While it is plugged in, its entries stand in ours; a row of theirs carries the hash of the file, so another
version of it is another method.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS, GROUPS
from methods import CONVERSIONS, METHODS
from methods.base import Conversion, Eviction, Full

TABLES: dict[str, dict[str, Any]] = {"METHODS": METHODS, "BENCHMARKS": BENCHMARKS, "CONVERSIONS": CONVERSIONS}
TASK = ("name", "metrics", "size", "forced", "chat", "data", "example", "score")  # what a benchmark must have
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_MARKS: dict[tuple[str, str], str] = {}  # of what is plugged in now


class BadPlugin(ValueError):
    """A file that is no plugin, in one line."""


@dataclass(frozen=True)
class Plugin:
    path: Path
    sha256: str
    tables: dict[str, dict[str, Any]]


def load_plugin(path: Path) -> Plugin:
    """
    Raises:
        BadPlugin: no such file, an error in it, no table, or an entry that is not what its table holds.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise BadPlugin(f"plugin {path}: {error.strerror}") from None
    sha256 = hashlib.sha256(source).hexdigest()
    name = f"plugin_{path.stem}_{sha256[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadPlugin(f"plugin {path}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise BadPlugin(f"plugin {path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # whatever the user's code raises while it is read
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), None)
        raise BadPlugin(f"plugin {path}, line {line}: {type(error).__name__}: {error}") from None
    tables = {table: getattr(module, table) for table in TABLES if hasattr(module, table)}
    if not any(tables.values()):
        raise BadPlugin(f"plugin {path} holds none of the tables {', '.join(TABLES)}, or only empty ones")
    for table, entries in tables.items():
        _check(path, table, entries)
    return Plugin(path, sha256, tables)


def _check(path: Path, table: str, entries: Any) -> None:
    if not isinstance(entries, dict):
        raise BadPlugin(f"plugin {path}: {table} must be a dict from names to entries")
    for name, entry in entries.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise BadPlugin(f"plugin {path}: {name!r} in {table} is no name of letters, digits and underscores")
        if name in TABLES[table] or name in GROUPS:
            raise BadPlugin(f"plugin {path}: {name!r} in {table} is a name of ours: choose another")
        reason = _wrong(table, entry)
        if reason:
            raise BadPlugin(f"plugin {path}: {table}[{name!r}] {reason}")


def _wrong(table: str, entry: Any) -> str | None:
    if table == "CONVERSIONS":
        return None if isinstance(entry, Conversion) else f"is {type(entry).__name__}, not methods.base.Conversion"
    if table == "METHODS":
        if not isinstance(entry, Eviction | Full):
            return f"is {type(entry).__name__}, not methods.base.Eviction"
        scorer = getattr(entry, "scorer", None)
        missing = [part for part in ("needs", "protected", "score") if scorer is not None and not hasattr(scorer, part)]
        return f"has a scorer without {missing[0]!r}" if missing else None
    missing = [part for part in TASK if not hasattr(entry, part)]
    if missing:
        return f"lacks {missing[0]!r}: see benchmarks/base.py"
    return None if "@" in entry.name else f"has the name {entry.name!r}, without a version such as {entry.name}@1"


@contextmanager
def plugged(paths: Sequence[str | Path]) -> Iterator[list[Plugin]]:
    """While this lasts the plugins' entries stand in our tables.

    Raises:
        BadPlugin: see `load_plugin`; or two plugins share a name.
    """
    added: list[tuple[str, str]] = []
    found = []
    try:
        for path in paths:
            plugin = load_plugin(Path(path))
            for table, entries in plugin.tables.items():
                for name, entry in entries.items():
                    TABLES[table][name] = entry
                    _MARKS[table, name] = f"+{plugin.sha256[:8]}"
                    added.append((table, name))
            found.append(plugin)
        yield found
    finally:
        for table, name in added:
            TABLES[table].pop(name, None)
            _MARKS.pop((table, name), None)


def mark(table: str, name: str) -> str:
    """The hash of the file that an entry comes from, "" for ours. `name` may carry settings."""
    return _MARKS.get((table, re.split(r"[(:-]", name)[0]), "")
