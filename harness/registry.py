"""What can be named: methods, allocators, benchmarks and conversions, ours and those of plugins, as one value that is passed on.

A plugin is a Python file that holds any of the tables `METHODS`, `ALLOCATORS`, `STORAGES`, `BENCHMARKS` and `CONVERSIONS`, each
from names to what our own tables hold, or an installed package with entry points of the same kinds (`ENTRY_POINTS`). A row of
theirs carries the hash of the file, so another version of it is another method. Nothing is added to our own tables: a registry
with a plugin is another registry.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import BENCHMARKS, GROUPS
from benchmarks.base import Task
from harness.errors import UserError
from harness.storage import Storage, wrong_with
from methods import ALLOCATORS, CONVERSIONS, METHODS
from methods.base import Allocator, Conversion, Converter, Eviction, LooksAtPrefill, Method
from methods.packed import Packed
from methods.protect import ends_of, protecting
from storages import STORAGES

T = TypeVar("T")

TABLES = ("METHODS", "ALLOCATORS", "STORAGES", "BENCHMARKS", "CONVERSIONS")  # as a plugin's file names them
ENTRY_POINTS = {f"kv_cache_scale.{table.lower()}": table for table in TABLES}  # group of entry points -> table
MEMBERS = {  # what an entry of a table must have
    "METHODS": (
        *("version", "takes_budget", "is_reference", "needs", "scorer", "head_scores"),
        *("cannot_run", "compress", "while_decoding"),
    ),
    "ALLOCATORS": ("counts",),
    "STORAGES": ("version", "keys", "values", "residual", "spared"),
    "BENCHMARKS": ("name", "metrics", "size", "forced", "chat", "data", "example", "score"),
    "CONVERSIONS": ("about", "make", "numbers"),
}
SCORER = ("needs", "protected", "score")
CODEC = ("tokens", "kernel", "fields", "pack", "unpack", "dot", "mix", "turn")
DEFINED_IN = {"METHODS": "methods/base.py", "ALLOCATORS": "methods/base.py", "BENCHMARKS": "benchmarks/base.py"}
DEFINED_IN |= {"CONVERSIONS": "methods/base.py", "STORAGES": "harness/storage.py"}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
OVER = "over"  # the field of a scorer that stands over another one
PLUS = re.compile(r"\+(?![^(]*\))")  # between a method and the storage of its rows, outside of settings
NOT_SETTINGS = ("version", "scores")  # fields of an entry that say what the code is, and what a model brings


class BadPlugin(UserError):
    """A file or package that is no plugin, in one line."""


class UnknownChoice(UserError):
    """A name, or a setting of one, that is not there: the message lists what is."""


@dataclass(frozen=True)
class Plugin:
    """What a file or a package brings."""

    path: Path  # of the file; of a package: the name of its distribution
    sha256: str
    tables: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Registry:
    """Everything that can be named in a request."""

    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    allocators: Mapping[str, Allocator | LooksAtPrefill] = field(default_factory=lambda: ALLOCATORS)
    storages: Mapping[str, Storage] = field(default_factory=lambda: STORAGES)
    benchmarks: Mapping[str, Task] = field(default_factory=lambda: BENCHMARKS)
    conversions: Mapping[str, Conversion] = field(default_factory=lambda: CONVERSIONS)
    plugins: tuple[Plugin, ...] = ()

    def table(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = getattr(self, name.lower())
        return found

    def method(self, text: str) -> tuple[str, Method]:
        """A method by name, with other settings (`snapkv(kernel=5)`) or another allocator (`snapkv:pyramid`), and its label.

        Scorers that stand over another one are told which (`criticalkv(over=h2o)`), and any method which ends of the prompt it
        protects instead of its own (`snapkv(protect=4:8)`). Behind a plus is the storage that packs what it keeps: `snapkv+int4`;
        a storage alone packs the full cache.

        Raises:
            UnknownChoice: no such method, allocator, storage or setting.
        """
        kept, *stored = PLUS.split(text)
        if not stored and kept.partition("(")[0].strip() in self.storages:
            kept, stored = "full", [kept]
        if len(stored) > 1:
            raise UnknownChoice(f"method {text!r} names {len(stored)} storages: one packs its rows")
        label, method = self._unpacked(kept)
        if not stored:
            return label, method
        name, storage = choose("storage", stored[0], self.storages, colon_sets_first=False)
        return name if method.is_reference else f"{label}+{name}", Packed(method, storage)

    def _unpacked(self, text: str) -> tuple[str, Method]:
        """As `method`, without a storage."""
        text, ends = _without_protect(text)
        name, bracket, settings = text.partition("(")
        name, colon, allocator = (part.strip() for part in name.partition(":"))
        scorers = {known: method.scorer for known, method in self.methods.items() if isinstance(method, Eviction)}
        if not colon:
            return _protecting(*choose("method", text, self.methods, named=scorers), ends)
        method = choose("method", name, self.methods)[1]
        if not isinstance(method, Eviction):
            raise UnknownChoice(f"method {name!r} has no allocator that could be changed for {allocator!r}")
        composed = replace(method, allocator=choose("allocator", allocator, self.allocators)[1])
        label = f"{name}:{allocator}"
        found = choose("method", f"{label}{bracket}{settings}", {label: composed}, colon_sets_first=False, named=scorers)
        return _protecting(*found, ends)

    def protected(self, label: str, ends: str) -> tuple[str, Method]:
        """The same method with first and last positions protected instead of its own; as it is where it already says which.

        Raises:
            UnknownChoice: ends that are none.
        """
        name, bracket, inside = label.partition("(")
        if _without_protect(label)[1]:
            return self.method(label)
        return self.method(f"{name}({inside[:-1]},protect={ends})" if bracket else f"{name}(protect={ends})")

    def benchmark(self, text: str) -> tuple[str, Task]:
        """A benchmark by name, with other settings: `recall(length=512)`, `perplexity:wikitext2`; and its label."""
        return choose("benchmark", text, self.benchmarks)

    def benchmark_names(self, names: Sequence[str]) -> list[str]:
        """Group names become their members; behind `lm_eval:x` a name that is not known here is lm-eval's, too."""
        return expand(names, self.benchmarks, GROUPS)

    def conversion(self, text: str) -> Converter:
        """What is done to a model, from how it is written: none, gqa-2, mqa, mixsga-3:1:6, with an ablation behind it.

        Raises:
            UnknownChoice: no such conversion, or numbers that it cannot have.
        """
        kind, *parts = text.split("-")
        if kind not in self.conversions:
            raise UnknownChoice(f"no conversion {text!r}; known: {', '.join(self.conversions)}")
        known = self.conversions[kind]
        try:
            if known.numbers and not parts:
                raise ValueError(f"it needs {known.numbers} behind it")
            numbers = tuple(_number(number, known.pairs) for number in parts.pop(0).split(":")) if known.numbers else ()
            return known.make(numbers, "-".join(parts))
        except ValueError as error:
            raise UnknownChoice(f"conversion {text!r}: {error} ({known.about})") from None

    def mark(self, table: str, label: str) -> str:
        """The hash of the file that an entry comes from, "" for ours. `label` may carry settings, or an allocator's name."""
        label, *stored = PLUS.split(label) if table == "METHODS" else (label,)
        name, _, rest = re.split(r"\(", label, maxsplit=1)[0].partition(":")
        names = [(table, re.split(r"-", name)[0])] + ([("ALLOCATORS", rest)] if table == "METHODS" and rest else [])
        if table == "METHODS":
            names += [("STORAGES", one.partition("(")[0]) for one in (name, *stored)]
        found = (plugin.sha256[:8] for plugin in self.plugins for where, n in names if n in plugin.tables.get(where, {}))
        return "".join(f"+{sha}" for sha in found)

    def adding(self, plugin: Plugin) -> Registry:
        """This registry and what a plugin brings.

        Raises:
            BadPlugin: a name that is taken, or an entry that is not what its table holds.
        """
        tables = {}
        for table, entries in plugin.tables.items():
            beside = {"BENCHMARKS": GROUPS, "METHODS": self.storages, "STORAGES": self.methods}.get(table, ())
            _check(plugin.path, table, entries, {*self.table(table), *beside})
            tables[table.lower()] = {**self.table(table), **entries}
        return replace(self, **tables, plugins=(*self.plugins, plugin))


BUILTIN = Registry()


def registry_of(plugins: Iterable[str | Path] = ()) -> Registry:
    """Ours, what installed packages bring as entry points, and these files.

    Raises:
        BadPlugin: see `load_plugin`; or two plugins share a name.
    """
    found = BUILTIN
    for plugin in [*installed_plugins(), *(load_plugin(Path(path)) for path in plugins)]:
        found = found.adding(plugin)
    return found


def load_plugin(path: Path) -> Plugin:
    """
    Raises:
        BadPlugin: no such file, an error in it, or no table.
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
    except (Exception, SystemExit) as error:  # whatever the user's code raises while it is read
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), None)
        raise BadPlugin(f"plugin {path}, line {line}: {type(error).__name__}: {error}") from None
    tables = {table: getattr(module, table) for table in TABLES if hasattr(module, table)}
    if not any(tables.values()):
        raise BadPlugin(f"plugin {path} holds none of the tables {', '.join(TABLES)}, or only empty ones")
    return Plugin(path, sha256, tables)


def installed_plugins() -> list[Plugin]:
    """What installed packages bring: one plugin a package, marked by the hash of its files that define the entries.

    Raises:
        BadPlugin: an entry point that cannot be loaded.
    """
    packages: dict[str, dict[str, dict[str, Any]]] = {}
    for group, table in ENTRY_POINTS.items():
        for point in entry_points(group=group):
            name = point.dist.name if point.dist else point.value
            try:
                packages.setdefault(name, {}).setdefault(table, {})[point.name] = point.load()
            except (Exception, SystemExit) as error:  # whatever the package raises while it is imported
                raise BadPlugin(f"plugin {name}: entry point {point.name!r} ({point.value}): {error}") from None
    return [Plugin(Path(name), _sources_of(tables), tables) for name, tables in sorted(packages.items())]


def _sources_of(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The hash of the files in which entries, their scorers and their allocators are defined."""
    parts = [entry for entries in tables.values() for entry in entries.values()]
    parts += [
        getattr(entry, part)
        for entry in list(parts)
        for part in ("scorer", "allocator", "keys", "values", "make")
        if hasattr(entry, part)
    ]
    files = {inspect.getsourcefile(part if inspect.isroutine(part) else type(part)) for part in parts if part is not None}
    digest = hashlib.sha256()
    for file in sorted(filter(None, files)):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _check(path: Path, table: str, entries: Any, taken: set[str]) -> None:
    if not isinstance(entries, dict):
        raise BadPlugin(f"plugin {path}: {table} must be a dict from names to entries")
    for name, entry in entries.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise BadPlugin(f"plugin {path}: {name!r} in {table} is no name of letters, digits and underscores")
        if name in taken:
            raise BadPlugin(f"plugin {path}: {name!r} in {table} is a name that is taken: choose another")
        if reason := _wrong(table, entry):
            raise BadPlugin(f"plugin {path}: {table}[{name!r}] {reason}")


def _wrong(table: str, entry: Any) -> str | None:
    missing = [part for part in MEMBERS[table] if not hasattr(entry, part)]
    if missing and not (table == "ALLOCATORS" and isinstance(entry, LooksAtPrefill)):
        return f"is {type(entry).__name__}, which lacks {missing[0]!r}: see {DEFINED_IN[table]}"
    if table == "BENCHMARKS" and "@" not in entry.name:
        return f"has the name {entry.name!r}, without a version such as {entry.name}@1"
    if table == "STORAGES":
        codecs = (entry.keys, entry.values)
        missing = [part for codec in codecs for part in CODEC if not hasattr(codec, part)]
        return f"has a codec without {missing[0]!r}: see harness/storage.py" if missing else wrong_with(entry)
    if table == "METHODS" and entry.scorer is not None:
        missing = [part for part in SCORER if not hasattr(entry.scorer, part)]
        return f"has a scorer without {missing[0]!r}" if missing else None
    return None


def _number(text: str, pairs: bool) -> int | tuple[int, int]:
    """
    Raises:
        ValueError: neither a whole number nor, where that is known, a pair of them.
    """
    first, times, second = text.partition("x")
    return (int(first), int(second)) if times and pairs else int(text)


def split(text: str) -> list[str]:
    """Cuts at commas outside brackets: `"a,b(c=1,d=2)"` -> `["a", "b(c=1,d=2)"]`."""
    parts = re.split(r",(?![^(]*\))", text)
    return [part.strip() for part in parts if part.strip()]


def expand(names: Sequence[str], known: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Group names become their members, with the group's settings; behind `lm_eval:x` a name not known here is lm-eval's, too."""
    found: list[str] = []
    for text in names:
        name, bracket, settings = text.partition("(")
        if name in groups:
            found += [f"{member}{bracket}{settings}" for member in groups[name]]
        elif name not in known and ":" not in name and found and found[-1].startswith("lm_eval:"):
            found.append(f"lm_eval:{text}")
        else:
            found.append(text)
    return list(dict.fromkeys(found))


def _without_protect(text: str) -> tuple[str, str]:
    """`"snapkv(kernel=5,protect=4:8)"` -> `"snapkv(kernel=5)"` and `"4:8"`."""
    name, bracket, inside = text.partition("(")
    settings = [part.strip() for part in inside.rstrip().removesuffix(")").split(",")]
    ends = [part.partition("=")[2].strip() for part in settings if part.partition("=")[0].strip() == "protect"]
    if not bracket or not ends:
        return text, ""
    others = ",".join(part for part in settings if part.partition("=")[0].strip() != "protect")
    return f"{name}({others})" if others else name, ends[-1]


def _protecting(label: str, method: Method, ends: str) -> tuple[str, Method]:
    if not ends:
        return label, method
    if not isinstance(method, Eviction):
        raise UnknownChoice(f"method {label!r} evicts nothing that could be protected")
    try:
        changed = replace(method, scorer=protecting(method.scorer, ends_of(ends)))
    except ValueError as error:
        raise UnknownChoice(f"method {label!r}: protect={error}") from None
    return f"{label[:-1]},protect={ends})" if label.endswith(")") else f"{label}(protect={ends})", changed


def choose(
    kind: str, text: str, table: Mapping[str, T], colon_sets_first: bool = True, named: Mapping[str, Any] | None = None
) -> tuple[str, T]:
    """The entry that `text` names, with its settings changed as asked, and its label: the name with those settings in order.

    `name:value` sets the first setting of an entry (`perplexity:wikitext2`), unless colons are part of names.

    Args:
        named: what a part of an entry may be exchanged for, by name.

    Raises:
        UnknownChoice: `kind` (method, benchmark) has no such entry or setting, or the setting cannot have that value.
    """
    match = re.fullmatch(r"\s*([^()]+?)\s*(?:\((.*)\))?\s*", text)
    name = match.group(1) if match else text
    name, colon, first = name.partition(":") if colon_sets_first else (name, "", "")
    if match is None or name not in table:
        raise UnknownChoice(f"no {kind} {name!r}; known: {', '.join(table)}")
    settings = _settings(kind, text, match.group(2) or "")
    if colon:
        settings = {fields(table[name])[0].name: first} | settings  # type: ignore[arg-type]
    if not settings:
        return name, table[name]
    try:
        changed = _with(table[name], dict(settings), named or {})
    except (TypeError, ValueError) as error:
        raise UnknownChoice(f"{kind} {text!r}: {error}") from None
    if colon:
        name, settings = f"{name}:{Path(first).stem}", dict(list(settings.items())[1:])
    listed = ",".join(f"{key}={value}" for key, value in sorted(settings.items()))
    return f"{name}({listed})" if settings else name, changed


def _settings(kind: str, text: str, inside: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in inside.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise UnknownChoice(f"{kind} {text!r}: {part!r} is not of the form setting=value")
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            settings[key.strip()] = value.strip()
    return settings


def _with(entry: Any, settings: dict[str, Any], named: Mapping[str, Any]) -> Any:
    """A frozen dataclass with settings changed, its own or those of the dataclasses it is made of.

    The scorer that another one stands over is exchanged by name.
    """
    mine = {field.name for field in fields(entry)} - set(NOT_SETTINGS)
    parts = {one.name: part for one in fields(entry) if one.name in mine and is_dataclass(part := getattr(entry, one.name))}
    changes: dict[str, Any] = {}
    for key, value in sorted(settings.items(), key=lambda item: item[0] != OVER):  # what is exchanged before its settings
        owners = [name for name, part in parts.items() if key in _known(changes.get(name, part))]
        if key == OVER and OVER in parts:
            if value not in named:
                raise TypeError(f"{OVER} is a scorer by its method's name, one of {', '.join(named)}; {value!r} is not")
            changes[OVER] = named[value]
        elif owners:  # a setting that scorer and allocator share, such as a window, is set in both
            changes |= {name: _with(changes.get(name, parts[name]), {key: value}, named) for name in owners}
        elif key in mine - set(parts):
            kind = type(getattr(entry, key))
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                raise TypeError(f"{key} is of type {kind.__name__}, {value!r} is not")
            changes[key] = value
        else:
            raise TypeError(f"no setting {key!r}; it has: {', '.join(sorted(_known(entry)))}")
    return replace(entry, **changes)


def _known(entry: Any) -> set[str]:
    """The settings of an entry and of its parts."""
    found: set[str] = set()
    for name in {one.name for one in fields(entry)} - set(NOT_SETTINGS):
        part = getattr(entry, name)
        found |= (_known(part) | ({name} & {OVER})) if is_dataclass(part) else {name}
    return found
