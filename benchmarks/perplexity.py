"""Likelihood under a compressed cache: read a text, compress, score what comes next."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.base import CountTokens, Example, Metric
from benchmarks.prose import sentences


@dataclass(frozen=True)
class PerplexityOwn:
    """Prose of our own making. A third of what is scored tells the context's sentences again, so that the cache matters."""

    length: int = 1024  # tokens read, at most
    scored: int = 128  # tokens scored, at most
    name = "perplexity_own@1"
    metrics = (Metric("nll", unit="nats", higher_is_better=False),)
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
        return Example(index, context + rest, len(context), (), 0, None, {"length": self.length})

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
