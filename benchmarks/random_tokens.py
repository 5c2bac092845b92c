"""Random tokens: prompts without meaning, for models without weights. Only fidelity and cost mean something."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.base import CountTokens, Example, Metric


@dataclass(frozen=True)
class RandomTokens:
    length: int = 512  # of the context
    question: int = 16  # tokens behind it
    max_new_tokens: int = 16
    vocabulary: int = 256  # ids below this
    name = "random_tokens@1"
    metrics: tuple[Metric, ...] = ()
    embedded_can = True
    size = None
    forced = False
    data = ""
    chat = True

    def __post_init__(self) -> None:
        if min(self.length, self.max_new_tokens, self.vocabulary) < 1 or self.question < 0:
            raise ValueError("length, max_new_tokens and vocabulary must be at least 1, question at least 0")

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        rng = random.Random(f"{self.name}/{seed}/{index}")
        ids = tuple(rng.randrange(self.vocabulary) for _ in range(self.length + self.question))
        return Example(index, "", self.length, (), self.max_new_tokens, ids, {"length": self.length})

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {}
