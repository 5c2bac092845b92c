"""Long texts to hide things in: prose of our own, or the text files of a folder."""

from __future__ import annotations

import hashlib
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from benchmarks import manual
from benchmarks.base import CountTokens
from benchmarks.data import BadData, Data, words
from benchmarks.prose import sentences

SPARE = 64  # tokens that may stay empty behind the last sentence, in a short haystack
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Haystack:
    """Sentences: generated without end, or those of the user's texts, in their order."""

    lines: tuple[str, ...] = ()
    sha256: str = ""
    source: str = ""
    cut: bool = False  # at a word, where a sentence is longer than the room that is left

    @classmethod
    def of(cls, folder: Path | None) -> Haystack:
        """
        Raises:
            BadData: no such folder, or no text in it.
        """
        if folder is not None and str(folder) == manual.NAME and not folder.is_dir():
            return _of_manual()
        return cls() if folder is None else _read(folder)

    def sentences(self, seed: str) -> Iterator[str]:
        """Endless; of the user's texts from a random sentence on, and round again behind the last."""
        if not self.lines:
            yield from sentences(seed)
            return
        start = random.Random(seed).randrange(len(self.lines))
        while True:
            yield self.lines[start % len(self.lines)]
            start += 1

    def fill(self, tokens: int, seed: str, count_tokens: CountTokens) -> list[str]:
        """As many sentences as fit into `tokens`, each with a space before it.

        Raises:
            BadData: the user's texts are shorter than that, or one of their sentences is so long that much room stays empty.
        """
        found: list[str] = []
        left = tokens
        for text in self.sentences(seed):
            if self.lines and len(found) == len(self.lines):
                whole = sum(_size(line, count_tokens) for line in self.lines)
                raise BadData(f"haystack {self.source} holds {whole} tokens; {tokens} are asked for")
            size = _size(text, count_tokens)
            if size > left:
                much = left > max(SPARE, tokens // 10)
                if self.cut and much:
                    found.append(_beginning(text, left, count_tokens))
                elif self.lines and much:
                    where = f"haystack {self.source}: a sentence of {size} tokens does not fit into the {left} that are left"
                    raise BadData(f"{where} of {tokens}, so that the prompt would be shorter than it says: break its sentences")
                break
            left -= size
            found.append(text)
        return found


def _beginning(text: str, tokens: int, count_tokens: CountTokens) -> str:
    """As many whole words as fit."""
    words = text.split()
    count = bisect_right(range(1, len(words) + 1), tokens, key=lambda count: _size(" ".join(words[:count]), count_tokens))
    return " ".join(words[:count])


@lru_cache(maxsize=4)
def _read(folder: Path) -> Haystack:
    paths = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    text = "\n".join(words(path) for path in paths)
    lines = tuple(" ".join(line.split()) for line in SENTENCE_END.split(text) if line.strip())
    if not lines:
        raise BadData(f"haystack {folder}: {'no text in its .txt files' if folder.is_dir() else 'no such folder'}")
    return Haystack(lines, hashlib.sha256(text.encode()).hexdigest()[:16], folder.name)


@lru_cache(maxsize=1)
def _of_manual() -> Haystack:
    text = manual.manual()
    lines = tuple(" ".join(line.split()) for line in SENTENCE_END.split(text) if line.strip())
    return Haystack(lines, hashlib.sha256(text.encode()).hexdigest()[:16], "Python's manual", cut=True)


@dataclass(frozen=True)
class InHaystack:
    """What tasks that hide something share: where their haystack comes from."""

    haystack: str = ""  # folder of .txt, by itself or in --data-dir; python: its manual; "": prose of our own
    data_dir: Path | None = field(default=None, repr=False, compare=False)

    @property
    def texts(self) -> Haystack:
        if not self.haystack:
            return Haystack()
        there = (self.data_dir or Path()) / self.haystack
        return Haystack.of(there if there.is_dir() else Path(self.haystack))

    def records(self) -> Data:
        found = self.texts
        return Data(tuple({"sentence": line} for line in found.lines), found.sha256, found.source, "the user's own texts")

    @property
    def data(self) -> str:
        return self.texts.sha256


@cache
def _size(text: str, count_tokens: CountTokens) -> int:
    return count_tokens(" " + text)


def weave(rng: random.Random, filler: Sequence[str], statements: Sequence[str]) -> tuple[str, list[float]]:
    """The statements at random places between the sentences, in their order; and how deep each one lies, 0 to 1."""
    return place(filler, statements, sorted(rng.randint(0, len(filler)) for _ in statements))


def place(filler: Sequence[str], statements: Sequence[str], places: Sequence[int]) -> tuple[str, list[float]]:
    """Statement i behind the first places[i] sentences, places in ascending order; and how deep each one lies, 0 to 1."""
    text, starts, done = "", [], 0
    for where, statement in zip(places, statements, strict=True):
        text += "".join(f" {line}" for line in filler[done:where])
        starts.append(len(text))
        text += f" {statement}"
        done = where
    text += "".join(f" {line}" for line in filler[done:])
    return text, [start / len(text) for start in starts]
