"""What models, tasks and methods are called in a report: their names, and what differs behind a name that several share.

Only what differs is told, so names stay short: of models their revision, of tasks their records, settings or lengths of
answers in words, of methods a mark (`mine#1a2b`). Rows with different keys stand in different lines, and no two lines bear the
same name.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from reports.keys import LineKey, Shown
from results.record import Record

MODEL, MARK, RECORDS = 6, 4, 6  # letters of a hash that are shown at least
FEW = 3  # settings that are told one by one
Where = TypeVar("Where", bound=Hashable)
What = TypeVar("What", bound=Hashable)
TOP = re.compile(r", (?=\w+=)")  # between the settings of a repr


_held: dict[str, tuple[tuple[Record, ...], list[LineKey]]] = {}  # the last tuple of records, and its names


def named(records: Sequence[Record]) -> list[LineKey]:
    """Of each record, what was asked of its line and how that is called among these records.

    Many parts of a report ask for the same ones: a tuple's names are found once.
    """
    asked, found = _held.get("last", ((), []))
    if records is asked:
        return found
    plain = [LineKey.of(record) for record in records]
    called = _called(set(plain))
    found = [called[at] for at in plain]
    if isinstance(records, tuple):
        _held["last"] = records, found
    return found


def _called(ats: Collection[LineKey]) -> dict[LineKey, LineKey]:
    parents = _parents(ats)
    variants = _variants(ats, parents)
    benchmarks = _told(ats, parents)
    found = {at: replace(at, shown=Shown(parents[at], variants[at], *benchmarks[at])) for at in ats}
    alike = Counter((at.panel, at.label, at.asked.budget) for at in found.values())
    shared = {(at.model, at.label.method) for at in found.values() if alike[at.panel, at.label, at.asked.budget] > 1}
    marks = _hashes({_method(at) for at in ats}, MARK)
    return {
        plain: replace(at, shown=replace(at.shown, mark=marks[_method(at)])) if (at.model, at.label.method) in shared else at
        for plain, at in found.items()
    }


def _method(at: LineKey) -> str:
    """Another version of a method or other settings: another text."""
    return f"{at.asked.method} {at.asked.params}"


def _parents(ats: Collection[LineKey]) -> dict[LineKey, str]:
    """The unconverted model. A variant that was converted on the spot says in its revision of which; of another none is known."""
    revisions = _grouped((at.asked.model, at.asked.revision) for at in ats if not at.asked.variant)
    names = {(model, text): name for model, texts in revisions.items() for text, name in _names(model, texts).items()}

    def parent(at: LineKey) -> str:
        model, own = at.asked.parent, at.asked.revision
        if not at.asked.variant:
            return names[model, own]
        return next((names[model, text] for text in revisions.get(model, ()) if own.startswith(f"{text}-")), model)

    return {at: parent(at) for at in ats}


def _variants(ats: Collection[LineKey], parents: Mapping[LineKey, str]) -> dict[LineKey, str]:
    revisions = _grouped(((parents[at], at.asked.variant), at.asked.revision) for at in ats if at.asked.variant)
    names = {where: _names(where[1], texts) for where, texts in revisions.items()}
    return {at: names[parents[at], at.asked.variant][at.asked.revision] if at.asked.variant else "" for at in ats}


def _names(name: str, revisions: Collection[str]) -> dict[str, str]:
    if len(revisions) == 1:
        return dict.fromkeys(revisions, name)
    return {text: f"{name}@{short}" for text, short in _prefixes(revisions, MODEL).items()}


def _told(ats: Collection[LineKey], parents: Mapping[LineKey, str]) -> dict[LineKey, tuple[str, str]]:
    """Of a task that was asked in several ways under one name: of which records and settings, and how it was answered."""
    records = _grouped((at.asked.benchmark, at.asked.data) for at in ats)
    settings = _grouped((at.asked.benchmark, at.asked.benchmark_params) for at in ats)
    lengths = _grouped(((parents[at], at.asked.benchmark), at.asked.max_new_tokens) for at in ats)
    measured = _grouped(((parents[at], at.asked.benchmark), at.asked.fidelity) for at in ats)
    data = {name: _data(texts) for name, texts in records.items()}
    params = {name: _settings(texts) for name, texts in settings.items()}

    def told(at: LineKey) -> tuple[str, str]:
        key = at.asked
        where = (parents[at], key.benchmark)
        which = [data[key.benchmark][key.data], params[key.benchmark][key.benchmark_params]]
        how = [f"answers of at most {key.max_new_tokens} tokens"] if len(lengths[where]) > 1 else []
        how += [f"{'with' if key.fidelity else 'without'} fidelity"] if len(measured[where]) > 1 else []
        return ", ".join(filter(None, which)), ", ".join(how)

    return {at: told(at) for at in ats}


def _data(hashes: Collection[str]) -> dict[str, str]:
    """Which records, where they differ: some tasks add the hash of their prompt behind a plus."""
    if len(hashes) == 1:
        return dict.fromkeys(hashes, "")
    files = {text: text.partition("+")[0] for text in hashes}
    if len(set(files.values())) == len(hashes):
        short = _prefixes(set(files.values()), RECORDS)
        return {text: f"records {short[files[text]] or 'of no file'}" for text in hashes}
    return {text: f"records and prompt {short}" for text, short in _hashes(hashes, RECORDS).items()}


def _settings(reprs: Collection[str]) -> dict[str, str]:
    """The settings that differ, or a hash where they cannot be told one by one."""
    if len(reprs) == 1:
        return dict.fromkeys(reprs, "")
    parsed = {text: TOP.split(text.partition("(")[2].removesuffix(")")) for text in reprs}
    shared = set.intersection(*map(set, parsed.values()))
    words = {text: ", ".join(part for part in parts if part not in shared) for text, parts in parsed.items()}
    short = all(0 < len(text) <= 60 for text in words.values()) and len(set(words.values())) == len(reprs)
    if short and all(len(set(parts) - shared) <= FEW for parts in parsed.values()):
        return words
    return {text: f"settings {mark}" for text, mark in _hashes(reprs, MARK).items()}


def _hashes(texts: Collection[str], least: int) -> dict[str, str]:
    hashes = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts}
    short = _prefixes(set(hashes.values()), least)
    return {text: short[found] for text, found in hashes.items()}


def _prefixes(texts: Collection[str], least: int) -> dict[str, str]:
    """Their first letters, as many as tell them apart."""
    longest = max(map(len, texts), default=0)
    size = next((n for n in range(least, longest) if len({text[:n] for text in texts}) == len(texts)), longest)
    return {text: text[:size] for text in texts}


def _grouped(pairs: Iterable[tuple[Where, What]]) -> dict[Where, set[What]]:
    found: dict[Where, set[What]] = {}
    for where, what in pairs:
        found.setdefault(where, set()).add(what)
    return found
