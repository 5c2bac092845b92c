"""Needles of our own: statements that a haystack does not hold, a question about them, and the answer in their own words.

Two sets. `text`: English sentences, for models that read English. `facts`: the sentences of `benchmarks.facts`, for the embedded
model, which knows no others. Each gives retrieval needles (one statement) and reasoning needles (facts that decide which of two
statements answers the question, all of them in random order).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.facts import World


@dataclass(frozen=True)
class Needle:
    """What goes into the haystack, side by side, and what is asked about it."""

    statements: tuple[str, ...]  # one sentence each
    span: tuple[int, str]  # which statement answers, and the words of it that do
    question: str  # all that stands behind the context
    answer: str  # what a right response says

    @property
    def text(self) -> str:
        return " ".join(self.statements)

    @property
    def span_start(self) -> int:
        """Where the span begins in `text`, in characters."""
        number, words = self.span
        before = sum(len(statement) + 1 for statement in self.statements[:number])
        return before + self.statements[number].index(words)


TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

Draw = Callable[[int, random.Random], Needle]  # a needle by number; what is left open is drawn


def text_retrieval(number: int, rng: random.Random) -> Needle:
    found = TEXTS["retrieval"][number % len(TEXTS["retrieval"])]
    return Needle((f"{found['statement']} {found['answer']}.",), (0, found["answer"]), _asked(found["question"]), found["answer"])


def text_reasoning(number: int, rng: random.Random) -> Needle:
    found = TEXTS["reasoning"][number % len(TEXTS["reasoning"])]
    side = rng.randrange(2)
    right = found["about"][side]
    statements = [found["decides"], *found["about"]]
    rng.shuffle(statements)
    return Needle(tuple(statements), (statements.index(right), right), _asked(found["questions"][side]), right)


def facts_retrieval(number: int, rng: random.Random) -> Needle:
    world = World.draw(rng, facts=2, links=0)
    name, code = next(iter(world.codes.items()))
    return Needle((world.statements()["code", name],), (0, code), f" Question: the code of {name} is", code)


def facts_reasoning(number: int, rng: random.Random) -> Needle:
    """The code of one's friend, beside the code and the friend of others."""
    world = World.draw(rng, facts=2, links=2)
    said = world.statements()
    name, friend = next(iter(world.friends.items()))
    statements = list(said.values())
    rng.shuffle(statements)
    right = said["code", friend]
    question = f" Question: the code of the friend of {name} is"
    return Needle(tuple(statements), (statements.index(right), right), question, f"{friend} {world.codes[friend]}")


def _asked(question: str) -> str:
    return f"\n\nAnswer the question with the words of the text above.\nQuestion: {question}\nAnswer:"


RETRIEVAL_NEEDLES: dict[str, Draw] = {"text": text_retrieval, "facts": facts_retrieval}
REASONING_NEEDLES: dict[str, Draw] = {"text": text_reasoning, "facts": facts_reasoning}
