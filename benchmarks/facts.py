"""Facts scattered in filler, and questions about them: one fact, a fact found through another, several, a lone needle.

Every name, number and place is drawn from the seed and the example's number; nothing but the context tells the answer. What is
not asked about distracts. Scored on the exact words of the answer.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from benchmarks.base import CountTokens, Example, Metric, Turn
from benchmarks.haystack import Haystack, weave

NAMES = tuple(
    """Mira Oslo Tavi Ruben Lena Odin Zara Kofi Yuki Ivo Priya Noor Enzo Dalia Anouk Bodhi
    Cleo Dario Elif Farid Gwen Hana Idris Jorge Keiko Luca Malik Nadia Omar Petra Quinn Rosa
    Sven Talia Uma Viktor Wanda Xavi Yara Zeno Amara Boris Chidi Daphne Emeka Freya Goran Hilda
    Ines Jonas Karim Leila Milo Nils Olga Pavel Rania Stefan Tariq Ursula Vera Wim Ximena Yusuf
    Zelda Aiko Bilal Carmen Dmitri Esme Felipe Greta Hugo Ingrid Jamal Katya Lars Mateo Nina Otto
    Paloma Rafael Silvia Teo Umberto Vanya Willa Yosef Zaki Astrid Bruno Chloe Dunja Elsa Fiona Sorin""".split()
)


@dataclass(frozen=True)
class World:
    """Codes of some names, and friends of some."""

    codes: dict[str, str]  # "37 82"
    friends: dict[str, str]  # of anyone: a name with a code

    @classmethod
    def draw(cls, rng: random.Random, facts: int, links: int) -> World:
        """All numbers differ; about half of those who have a friend have a code of their own."""
        names = rng.sample(NAMES, 2 * facts)
        numbers = [f"{number:02d}" for number in rng.sample(range(100), 2 * facts)]
        coded = names[:facts]
        codes = {name: f"{numbers[2 * i]} {numbers[2 * i + 1]}" for i, name in enumerate(coded)}
        friends = {name: rng.choice([other for other in coded if other != name]) for name in rng.sample(names, links)}
        return cls(codes, friends)

    def statements(self) -> dict[tuple[str, str], str]:
        """By (kind, name)."""
        facts = {("code", name): f"The code of {name} is {code}." for name, code in self.codes.items()}
        return facts | {("friend", name): f"The friend of {name} is {friend}." for name, friend in self.friends.items()}


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    about: tuple[tuple[str, str], ...]  # the statements that it needs


@dataclass(frozen=True)
class Facts(ABC):
    """What the tasks share: a world in filler. A task says what is asked of it."""

    length: int = 1024  # tokens of the prompt, at most; a sentence less at least
    facts: int = 8
    links: int = 4
    metrics = (Metric("exact", unit="share", right_or_wrong=True),)
    embedded_can = True
    size = None
    forced = False
    data = ""
    chat = True

    least_facts = 2
    least_links = 0

    def __post_init__(self) -> None:
        most = len(NAMES) // 2
        if not self.least_facts <= self.facts <= most:
            raise ValueError(f"facts {self.facts} must lie between {self.least_facts} and {most}")
        if not self.least_links <= self.links <= (2 * self.facts if self.facts > 1 else 0):
            raise ValueError(f"links {self.links} must lie between {self.least_links} and twice the facts")

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def ask(self, rng: random.Random, world: World) -> Question: ...

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        name = self.name
        rng = random.Random(f"{name}/{seed}/{index}")
        world = World.draw(rng, self.facts, self.links)
        question = self.ask(rng, world)
        said = list(world.statements().items())
        rng.shuffle(said)
        asked = f" Question: {question.text}"
        room = self.length - count_tokens(asked) - sum(count_tokens(" " + text) for _, text in said)
        if room < 0:
            raise ValueError(f"its facts and question alone do not fit into {self.length} tokens")
        filler = Haystack().fill(room, f"{name}/{seed}/{index}/filler", count_tokens)
        context, depths = weave(rng, filler, [text for _, text in said])
        found = [depths[number] for number, (what, _) in enumerate(said) if what in question.about]
        most = count_tokens(" " + question.answer)
        columns: dict[str, str | int | float] = {"length": self.length, "depth": round(sum(found) / len(found), 3)}
        return Example(index, context + asked, len(context), (question.answer,), most, None, columns, cut="never")

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """1 if the answer begins with exactly the right words, whatever the punctuation."""
        wanted = words(example.answers[0])
        return {"exact": float(words(answer)[: len(wanted)] == wanted)}


@dataclass(frozen=True)
class Recall(Facts):
    """One fact of many: the code of a name."""

    name = "recall@1"

    def ask(self, rng: random.Random, world: World) -> Question:
        who = rng.choice(list(world.codes))
        return Question(f"the code of {who} is", world.codes[who], (("code", who),))


@dataclass(frozen=True)
class TwoHop(Facts):
    """A fact found through another: the code of a name's friend. The answer names the friend first."""

    name = "two_hop@1"
    least_links = 1

    def ask(self, rng: random.Random, world: World) -> Question:
        who = rng.choice(list(world.friends))
        friend = world.friends[who]
        answer = f"{friend} {world.codes[friend]}"
        return Question(f"the code of the friend of {who} is", answer, (("friend", who), ("code", friend)))


@dataclass(frozen=True)
class RecallMany(Facts):
    """Several facts at once: the codes of four names, in the order in which they are asked."""

    name = "recall_many@1"
    least_facts = 4

    def ask(self, rng: random.Random, world: World) -> Question:
        who = rng.sample(list(world.codes), 4)
        listed = f"{who[0]}, {who[1]}, {who[2]} and {who[3]}"
        answer = " ".join(world.codes[name] for name in who)
        return Question(f"the codes of {listed} are", answer, tuple(("code", name) for name in who))


@dataclass(frozen=True)
class RecallEach(Facts):
    """Several questions on one context, the codes of different names: each is an example of its own."""

    questions: int = 4  # on each context
    name = "recall_each@1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.questions <= self.facts:
            raise ValueError(f"questions {self.questions} must lie between 2 and the {self.facts} facts")

    def context_of(self, index: int) -> int:
        return index - index % self.questions

    def ask(self, rng: random.Random, world: World) -> Question:
        """All of them, as one conversation with its answers: what the context must leave room for."""
        asked = rng.sample(list(world.codes), self.questions)
        turns = [_turn(name, world) for name in asked]
        text = "".join(turn.question + turn.answer for turn in turns).removeprefix(" Question: ")
        answer = max((world.codes[name] for name in asked), key=len)
        return Question(text, answer, tuple(("code", name) for name in asked))

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        """Question `index % questions` of context `index // questions`."""
        made = super().example(self.context_of(index), seed, count_tokens)
        context, world, order = made.prompt[: made.context_end], *self._asked(index, seed)
        turns = tuple(_turn(name, world) for name in order)
        number = index % self.questions
        code = world.codes[order[number]]
        stated = context.index(world.statements()["code", order[number]])
        columns = made.columns | {"depth": round(stated / len(context), 3)}
        return Example(
            index, context + turns[number].question, len(context), (code,), count_tokens(" " + code),
            columns=columns, cut="never", turns=turns, turn=number,
        )  # fmt: skip

    def _asked(self, index: int, seed: int) -> tuple[World, list[str]]:
        """The context's world, and the names that are asked about, in order: drawn as `Facts.example` does."""
        rng = random.Random(f"{self.name}/{seed}/{self.context_of(index)}")
        world = World.draw(rng, self.facts, self.links)
        return world, rng.sample(list(world.codes), self.questions)


def _turn(name: str, world: World) -> Turn:
    return Turn(f" Question: the code of {name} is", f" {world.codes[name]}.")


@dataclass(frozen=True)
class NeedleText(Facts):
    """A lone fact in prose, nothing else to mistake it for."""

    facts: int = 1
    links: int = 0
    name = "needle_text@1"
    least_facts = 1

    def __post_init__(self) -> None:
        if (self.facts, self.links) != (1, 0):
            raise ValueError("a lone needle has one fact and no links")

    def ask(self, rng: random.Random, world: World) -> Question:
        (who,) = world.codes
        return Question(f"the code of {who} is", world.codes[who], (("code", who),))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)
