"""Likelihood of text: under a compressed cache (read, compress, score what comes next), or window by window in one pass.

The second is the plain definition behind published numbers: a text is cut into windows, each is read once, and every token but a
window's first is scored. Nothing is ever kept from one window to the next, so there is no cache to compress: it is for comparing
models (variants) under `full`. Scores are mean negative log-likelihoods in nats; perplexity is their exponential.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from benchmarks import data, manual
from benchmarks.base import NLL, CountTokens, Example
from benchmarks.data import Data
from benchmarks.prose import sentences


@dataclass(frozen=True)
class PerplexityOwn:
    """Prose of our own making. A third of what is scored tells the context's sentences again, so that the cache matters."""

    length: int = 1024  # tokens read, at most
    scored: int = 128  # tokens scored, at most
    name = "perplexity_own@1"
    metrics = (NLL,)
    embedded_can = True
    size = None
    forced = True
    data = ""
    chat = True

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        made = sentences(f"{self.name}/{seed}/{index}/prose")
        read = _up_to(self.length, made, count_tokens)
        scored = _up_to(self.scored, _partly_again(read, made, rng), count_tokens)
        context, rest = ("".join(f" {line}" for line in lines) for lines in (read, scored))
        return Example(index, context + rest, len(context), (), 0, None, {"length": self.length}, cut="never")

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {}


def _partly_again(read: list[str], made: Iterator[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choice(read) if rng.random() < 1 / 3 else next(made)


def _up_to(tokens: int, lines: Iterator[str], count_tokens: CountTokens) -> list[str]:
    found: list[str] = []
    for line in lines:
        tokens -= count_tokens(f" {line}")
        if tokens < 0:
            break
        found.append(line)
    return found


@dataclass(frozen=True)
class OfText:
    """Pieces of one text, in order. Each starts with the token that the tokenizer puts before a text, if it does."""

    text: str = "wikitext2"  # or python, its manual; or a file or folder of .txt, by itself or in --data-dir
    data_dir: Path | None = field(default=None, repr=False, compare=False)
    metrics = (NLL,)
    size = None  # how many pieces there are depends on the tokenizer: examples end where the text does
    forced: ClassVar[bool]
    chat = False

    def records(self) -> Data:
        if self.text == manual.NAME:
            text = manual.manual()
            digest = hashlib.sha256(text.encode()).hexdigest()
            return Data(({"text": text},), digest, "Python's manual (pydoc_data.topics)", manual.LICENCE)
        return data.text(self.text, self.data_dir)

    @property
    def data(self) -> str:
        return self.records().sha256

    def piece(self, index: int, tokens: int, read: int) -> Example:
        """The `index`-th `tokens` of the text, of which `read` come first."""
        where = (index * tokens, (index + 1) * tokens)
        text = str(self.records().rows[0]["text"])
        return Example(index, text, read, (), 0, piece=where, one_pass=not self.forced, cut="never")


@dataclass(frozen=True)
class Perplexity(OfText):
    """Read `read` tokens, compress, score the next `scored`."""

    read: int = 1024
    scored: int = 256
    name = "perplexity@1"
    forced = True

    def __post_init__(self) -> None:
        if self.read < 2 or self.scored < 1:
            raise ValueError("read must be at least 2 tokens, scored at least 1")

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        return self.piece(index, self.read + self.scored, self.read)

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Streaming(OfText):
    """A long text under a cap (Xiao et al., 2023, section 4.1): read `read` tokens, then score one token after the other.

    It may be longer than the model has positions for: methods whose positions are those inside the cache go on,
    others are skipped.
    """

    text: str = "python"
    read: int = 256
    scored: int = 16000
    name = "streaming@1"
    forced = True

    def __post_init__(self) -> None:
        if self.read < 2 or self.scored < 2:
            raise ValueError("read and scored must be at least 2 tokens")

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        return replace(self.piece(index, self.read + self.scored, self.read), streamed=True)

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class PerplexityWindows(OfText):
    """Windows of `window` tokens, each read and scored in one pass."""

    window: int = 1024
    name = "perplexity_windows@1"
    forced = False
    likelihoods = True
    sees_ahead = True

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError("a window must have at least 2 tokens")

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        return self.piece(index, self.window, 1)

    def score(self, answer: str, example: Example) -> dict[str, float]:
        ((logprob, _, tokens),) = data.likelihoods(answer)
        return {"nll": -logprob / tokens}
