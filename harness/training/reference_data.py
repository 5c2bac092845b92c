"""What the embedded model is trained on: facts in filler with many questions a document, and repeated spans.

The wording is that of `benchmarks.facts`; the streams are other ones ("train/..."), so no example of a benchmark is seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.facts import NAMES, World
from benchmarks.prose import sentences

VOCABULARY = 1024
WORDS = (" code", " codes", " of", " friend", " is", " are", " and", " the", " The", " Question")
HELD_OUT = ("lewis_carroll_through_the_looking_glass.txt", "h_g_wells_the_time_machine.txt", "jack_london_white_fang.txt")
UNSCORED, ANSWER, FILLER, TEMPLATE, REPEAT, ANSWER_OF_MANY = range(6)  # kinds of tokens, weighed apart in the loss


@dataclass
class Document:
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], kind: int) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)


@dataclass(frozen=True)
class Plan:
    """How much a document states and asks."""

    facts: int
    links: int
    many: int  # questions for four codes at once, at most


def book_sentences(folder: Path, held_out: bool) -> list[str]:
    """Sentences of the books there, in order; the held-out books, or all others.

    Raises:
        FileNotFoundError: no such books.
    """
    paths = [path for path in sorted(folder.glob("*.txt")) if (path.name in HELD_OUT) == held_out]
    if not paths:
        raise FileNotFoundError(f"no books (*.txt) in {folder}")
    text = (re.sub(r"\s+", " ", path.read_text(encoding="utf-8", errors="replace")).strip() for path in paths)
    return [line for book in text for line in re.split(r"(?<=[.?!]) (?=\S)", book) if line]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with a token of its own for every name, two-digit number and word of the facts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    whole = [f" {name}" for name in NAMES] + [f" {number:02d}" for number in range(100)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special) - len(whole),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *("".join(word * 50 for word in WORDS) for _ in range(400))], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


class Documents:
    """Training documents from a seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, books: Sequence[str], seed: int) -> None:
        self.rng = random.Random(f"train/{seed}")
        self._encode = tokenizer
        self._known: dict[str, list[int]] = {}
        made = sentences(f"train/{seed}/prose")
        self.filler = [self._all(books), self._all([next(made) for _ in range(20_000)])]
        self.facts_tokens = [token for name in NAMES for token in self.ids(f" {name}")]
        self.facts_tokens += [token for number in range(100) for token in self.ids(f" {number:02d}")]

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._encode(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def _all(self, lines: Sequence[str]) -> list[list[int]]:
        return self._encode([f" {line}" for line in lines], add_special_tokens=False)["input_ids"] if lines else []

    def repeats(self, length: int) -> Document:
        """A span of random tokens, again and again: what teaches a model to look back."""
        size = self.rng.randrange(8, length // 2)
        known = self.rng.random() < 0.5
        span = [self.rng.choice(self.facts_tokens) if known else self.rng.randrange(2, VOCABULARY) for _ in range(size)]
        document = Document()
        document.add((span * (length // size + 2))[: length + 1], REPEAT)
        document.kinds[: size + 1] = [UNSCORED] * (size + 1)
        return document

    def facts(self, length: int, plan: Plan) -> Document:
        """`length` + 1 tokens: statements in filler, then questions in filler. A fact is asked once, alone or among four."""
        world = World.draw(self.rng, plan.facts, plan.links)
        said = list(world.statements().values())
        self.rng.shuffle(said)
        told = [[(self.ids(f" {text}"), TEMPLATE)] for text in said]
        room = length + 1 - sum(len(ids) for item in told for ids, _ in item)
        asked, short = [], length <= 64
        questions = self._questions(world, plan)
        for item in questions if short else self.rng.sample(questions, len(questions)):
            size = sum(len(ids) for ids, _ in item)
            if size <= room:
                asked.append(item)
                room -= size
        before = int(room * (self.rng.random() if short else 0.5 + 0.5 * self.rng.random()))
        document = Document()
        self._weave(document, told, before)
        self._weave(document, asked, room - before)
        return document

    def _questions(self, world: World, plan: Plan) -> list[list[tuple[list[int], int]]]:
        names = self.rng.sample(list(world.codes), len(world.codes))
        asked, many = [], min(plan.many, len(names) // 4)
        for group in (names[4 * n : 4 * n + 4] for n in range(many)):
            text = f" Question: the codes of {group[0]}, {group[1]}, {group[2]} and {group[3]} are"
            asked.append((text, " ".join(world.codes[name] for name in group), ANSWER_OF_MANY))
        for name, friend in world.friends.items():
            asked.append((f" Question: the code of the friend of {name} is", f"{friend} {world.codes[friend]}", ANSWER))
        asked += [(f" Question: the code of {name} is", world.codes[name], ANSWER) for name in names[4 * many :]]
        return [
            [
                (self.ids(text), TEMPLATE),
                ([t for word in answer.split() for t in self.ids(f" {word}")], kind),
                (self.ids("."), TEMPLATE),
            ]
            for text, answer, kind in asked
        ]

    def _weave(self, document: Document, items: Sequence[list[tuple[list[int], int]]], tokens: int) -> None:
        """The items at random sentence ends of `tokens` tokens of filler, or anywhere in it where there is little."""
        lines = self._filler(tokens)
        if tokens <= 60:
            lines = [[token] for line in lines for token in line]
        places = sorted(self.rng.randint(0, len(lines)) for _ in items)
        for number in range(len(lines) + 1):
            for item in (item for place, item in zip(places, items, strict=True) if place == number):
                for ids, kind in item:
                    document.add(ids, kind)
            if number < len(lines):
                document.add(lines[number], FILLER)

    def _filler(self, tokens: int) -> list[list[int]]:
        source = self.rng.choice([lines for lines in self.filler if lines])
        at, found = self.rng.randrange(len(source)), []
        while tokens > 0:
            line = source[at % len(source)][:tokens]
            found.append(line)
            tokens -= len(line)
            at += 1
        return found
