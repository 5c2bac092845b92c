"""Names on the command line: `snapkv`, or `snapkv(kernel=5)` for another setting of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UnknownChoice(ValueError):
    """A name, or a setting of one, that is not there: the message lists what is."""


def split(text: str) -> list[str]:
    """Cuts at commas outside brackets: `"a,b(c=1,d=2)"` -> `["a", "b(c=1,d=2)"]`."""
    parts = re.split(r",(?![^(]*\))", text)
    return [part.strip() for part in parts if part.strip()]


def expand(names: Sequence[str], known: Container[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
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


def choose(kind: str, text: str, table: Mapping[str, T]) -> tuple[str, T]:
    """The entry that `text` names, with its settings changed as asked, and its name with those settings in order.

    `name:value` sets the first setting of an entry: `perplexity:wikitext2`.

    Raises:
        UnknownChoice: `kind` (method, benchmark) has no such entry or setting, or the setting cannot have that value.
    """
    match = re.fullmatch(r"\s*([^()]+?)\s*(?:\((.*)\))?\s*", text)
    name = match.group(1) if match else text
    name, colon, first = name.partition(":")
    if match is None or name not in table:
        raise UnknownChoice(f"no {kind} {name!r}; known: {', '.join(table)}")
    settings = _settings(kind, text, match.group(2) or "")
    if colon:
        settings = {fields(table[name])[0].name: first} | settings  # type: ignore[arg-type]
    if not settings:
        return name, table[name]
    try:
        changed = _with(table[name], dict(settings))
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


def _with(entry: Any, settings: dict[str, Any]) -> Any:
    """A frozen dataclass with settings changed, its own or those of the dataclasses it is made of."""
    mine = {field.name for field in fields(entry)} - {
        "version",
        "scores",
    }  # what the code is, and what a model brings: no settings
    parts = {name: getattr(entry, name) for name in mine if is_dataclass(getattr(entry, name))}
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        owner = next((name for name, part in parts.items() if key in {f.name for f in fields(part)}), None)
        if owner is not None:
            changes[owner] = _with(changes.get(owner, parts[owner]), {key: value})
        elif key in mine - set(parts):
            kind = type(getattr(entry, key))
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                raise TypeError(f"{key} is of type {kind.__name__}, {value!r} is not")
            changes[key] = value
        else:
            known = sorted((mine - set(parts)) | {f.name for part in parts.values() for f in fields(part)})
            raise TypeError(f"no setting {key!r}; it has: {', '.join(known)}")
    return replace(entry, **changes)
