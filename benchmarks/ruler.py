"""RULER-style tasks at any length: one needle, one of many needles, and variables that take each other's value.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", 2024. arxiv.org/abs/2404.06654
Tasks and scoring (the share of the expected strings that the answer holds) are theirs, the wording is ours.
"""

from __future__ import annotations

import random
import string
from abc import ABC, abstractmethod
from dataclasses import dataclass

from benchmarks.base import CountTokens, Example, Metric
from benchmarks.data import BadData
from benchmarks.haystack import InHaystack, weave

COLOURS = (
    "amber azure black bronze brown coral crimson cyan golden green grey indigo ivory jade lilac orange pink purple red white"
).split()
THINGS = (
    "anchor barrel basket button candle carpet compass feather goblet hammer kettle ladder lantern mirror needle pillow pocket "
    "saddle spoon thimble"
).split()


@dataclass(frozen=True)
class Riddle:
    """What is said, what is asked, and the strings that a full answer holds."""

    statements: list[str]
    question: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Ruler(InHaystack, ABC):
    """What the tasks share: statements scattered in a haystack, and a question behind it."""

    length: int = 1024  # tokens of the prompt, at most
    new_tokens: int = 32
    metrics = (Metric("found", unit="percent"),)
    size = None
    forced = False
    chat = True

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def riddle(self, rng: random.Random) -> Riddle: ...

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        where = f"{self.name}/{seed}/{index}"
        rng = random.Random(where)
        riddle = self.riddle(rng)
        room = self.length - count_tokens(INTRODUCTION) - count_tokens(riddle.question)
        room -= sum(count_tokens(f" {statement}") for statement in riddle.statements)
        if room < 0:
            raise BadData(f"its statements and question alone do not fit into {self.length} tokens: ask for a longer length")
        hidden, _ = weave(rng, self.texts.fill(room, where, count_tokens), riddle.statements)
        context = INTRODUCTION + hidden
        columns: dict[str, str | int | float] = {"length": self.length}
        return Example(
            index, context + riddle.question, len(context), riddle.expected, self.new_tokens, None, columns, cut="never"
        )

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """Each expected string counts where the answer holds it, in whatever case."""
        said = answer.lower()
        return {"found": 100 * sum(text.lower() in said for text in example.answers) / len(example.answers)}


INTRODUCTION = "Remember the notes that are hidden in the following text; a question about them comes at its end.\n"


@dataclass(frozen=True)
class RulerSingle(Ruler):
    """One note in a haystack."""

    name = "ruler_single@1"

    def riddle(self, rng: random.Random) -> Riddle:
        return _numbers(rng, 1)


@dataclass(frozen=True)
class RulerMultiKey(Ruler):
    """One of many notes of the same form."""

    keys: int = 8
    name = "ruler_multi_key@1"

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= len(COLOURS) * len(THINGS):
            raise ValueError(f"keys {self.keys} must lie between 2 and {len(COLOURS) * len(THINGS)}")

    def riddle(self, rng: random.Random) -> Riddle:
        return _numbers(rng, self.keys)


@dataclass(frozen=True)
class RulerVariables(Ruler):
    """Variable tracking: chains of assignments, and the question which variables hold a value."""

    chains: int = 2
    hops: int = 3
    new_tokens: int = 64
    name = "ruler_variables@1"

    def __post_init__(self) -> None:
        if min(self.chains, self.hops) < 1 or self.chains * (self.hops + 1) > 100:
            raise ValueError("chains and hops must be at least 1, and all variables together at most 100")

    def riddle(self, rng: random.Random) -> Riddle:
        count = self.chains * (self.hops + 1)
        names: list[str] = []
        while len(names) < count:
            name = "".join(rng.choices(string.ascii_uppercase, k=5))
            names += [name] * (name not in names)
        values = rng.sample(range(10000, 100000), self.chains)
        chains = [names[n :: self.chains] for n in range(self.chains)]
        places = [(rng.random(), number, hop) for number in range(self.chains) for hop in range(self.hops + 1)]
        turns = iter(sorted(places))  # whose turn it is: every chain in its own order
        done = [0] * self.chains
        statements = []
        for _, number, _ in turns:
            chain, hop = chains[number], done[number]
            source = f"the value of {chain[hop - 1]}" if hop else str(values[number])
            statements.append(f"Note: {chain[hop]} is set to {source}.")
            done[number] += 1
        question = f"\nQuestion: Which variables hold the value {values[0]}? Name all {self.hops + 1}.\nAnswer:"
        return Riddle(statements, question, tuple(chains[0]))


def _numbers(rng: random.Random, keys: int) -> Riddle:
    pairs = rng.sample([(colour, thing) for colour in COLOURS for thing in THINGS], keys)
    values = rng.sample(range(1_000_000, 10_000_000), keys)
    statements = [f"Note: the number on the {a} {b} is {value}." for (a, b), value in zip(pairs, values, strict=True)]
    asked = rng.randrange(keys)
    question = f"\nQuestion: What is the number on the {' '.join(pairs[asked])}?\nAnswer: The number is"
    return Riddle(statements, question, (str(values[asked]),))
