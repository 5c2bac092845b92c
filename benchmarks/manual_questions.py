"""Instructions that every machine has: explain a section of Python's manual in one sentence, by ROUGE-L.

Ours. A section is read without its first sentence, which is the reference, as XSum takes an article's first sentence for its
summary (Narayan et al., "Don't Give Me the Details, Just the Summary!", EMNLP 2018). What comes out is low in absolute terms,
since a good answer may say it in other words; it tells caches apart, not models.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from benchmarks import manual
from benchmarks.base import CountTokens, Data, Example, Metric
from benchmarks.wording import rouge

TITLE = re.compile(r"^([^\n]+)\n([*=\-~^\"])\2{3,}$", re.MULTILINE)  # a line, and another that underlines it
NO_PROSE = re.compile(r"\s|[*\-\[]|\d+\.")  # how code, lists, notes and references begin
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
FIRST_WORDS = range(8, 41)  # of a first sentence that may be a reference
LEAST_WORDS = 120  # of what follows it
SHUFFLE = "manual_questions"


@dataclass(frozen=True)
class Section:
    title: str
    first: str  # sentence
    rest: tuple[str, ...]  # sentences


@lru_cache(maxsize=1)
def sections() -> tuple[Section, ...]:
    """Of prose, each once, in an order that mixes the topics.

    Raises:
        BadData: this Python came without its manual.
    """
    found = {section.first: section for section in _all(manual.manual())}
    mixed = sorted(found.values(), key=lambda section: section.first)
    random.Random(SHUFFLE).shuffle(mixed)
    return tuple(mixed)


def _all(text: str) -> Iterator[Section]:
    titles = list(TITLE.finditer(text))
    ends = [after.start() for _, after in pairwise(titles)]
    for title, end in zip(titles, [*ends, len(text)], strict=True):
        paragraphs = text[title.end() : end].strip("\n").split("\n\n")
        prose = [" ".join(part.split()) for part in paragraphs if part and not NO_PROSE.match(part) and "::=" not in part]
        lines = [line for part in prose for line in SENTENCE_END.split(part)]
        if not lines or not lines[0].endswith(".") or len(lines[0].split()) not in FIRST_WORDS:
            continue
        if sum(len(line.split()) for line in lines[1:]) >= LEAST_WORDS:
            yield Section(title[1].strip(), lines[0], tuple(lines[1:]))


@dataclass(frozen=True)
class ManualQuestions:
    """Each section once, as far as it fits."""

    length: int = 384  # tokens of a section, at most
    new_tokens: int = 48  # of an answer, at most
    metrics = (Metric("rougeL", unit="percent"),)
    forced = False
    chat = True
    judged = True
    name = "manual_questions@1"

    def __post_init__(self) -> None:
        if self.length < 1 or self.new_tokens < 1:
            raise ValueError("length and new_tokens must be at least 1 token")

    @property
    def size(self) -> int:
        return len(sections())

    @property
    def data(self) -> str:
        return self.records().sha256

    def records(self) -> Data:
        text = manual.manual()
        rows = tuple({"title": section.title, "first": section.first} for section in sections())
        return Data(rows, hashlib.sha256(text.encode()).hexdigest(), "Python's manual (pydoc_data.topics)", manual.LICENCE)

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        section = sections()[index]
        text, left = "", self.length
        for line in section.rest:
            left -= count_tokens(f" {line}")
            if left < 0:
                break
            text += f" {line}"
        context = f"From Python's manual:\n\n{text.strip()}\n\n"
        question = f"Explain in one sentence: {section.title}"
        return Example(
            index, context + question, len(context), (section.first,), self.new_tokens, columns={"topic": section.title}
        )

    def question(self, index: int) -> str:
        """As a judge reads it."""
        return f"Explain in one sentence, as Python's manual does: {sections()[index].title}"

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {"rougeL": 100 * rouge("rougeL", answer, example.answers[0])[2]}
