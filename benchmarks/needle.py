"""Needle in a haystack: something said once, hidden at every depth of texts of every length, and asked for.

Kamradt's test (2023) as HeadKV's section 4.3 has it, with needles of our own (`benchmarks.needles`): greedy, up to the end of the
first line, scored by the share of the answer's distinct words that the response says, and by ROUGE-1.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from benchmarks.base import CountTokens, Example, Metric
from benchmarks.data import BadData
from benchmarks.haystack import InHaystack, place
from benchmarks.needles import REASONING_NEEDLES, RETRIEVAL_NEEDLES
from benchmarks.wording import normalised, rouge


@dataclass(frozen=True)
class NeedleInHaystack(InHaystack):
    """One needle a prompt. Every turn through lengths x depths is in another random order: few examples spread over both."""

    needles: Literal["text", "facts"] = "text"  # English, or the sentences that the embedded model knows
    kind: Literal["retrieval", "reasoning"] = "retrieval"
    shortest: int = 512  # tokens of a whole prompt
    longest: int = 1536
    lengths: int = 5  # evenly spaced
    depths: int = 10
    new_tokens: int = 30
    metrics = (Metric("words", unit="percent"), Metric("rouge1", unit="percent"))
    size = None
    forced = False
    chat = True

    def __post_init__(self) -> None:
        if self.needles not in RETRIEVAL_NEEDLES:
            raise ValueError(f"needles {self.needles!r}: {' or '.join(RETRIEVAL_NEEDLES)} is expected")
        if self.kind not in ("retrieval", "reasoning"):
            raise ValueError(f"kind {self.kind!r}: retrieval or reasoning is expected")
        if not 1 <= self.shortest <= self.longest or min(self.lengths, self.depths, self.new_tokens) < 1:
            raise ValueError("lengths, depths and new_tokens must be at least 1, and shortest at most longest")

    @property
    def name(self) -> str:
        return "needle@1"

    @property
    def embedded_can(self) -> bool:
        return self.needles == "facts"

    def cell(self, index: int, seed: int) -> tuple[int, float]:
        """Length and depth of an example."""
        cells = self.lengths * self.depths
        turn, number = divmod(index, cells)
        which, deep = divmod(random.Random(f"{self.name}/{seed}/{turn}").sample(range(cells), cells)[number], self.depths)
        step = (self.longest - self.shortest) / max(1, self.lengths - 1)
        return round(self.shortest + which * step), deep / (self.depths - 1) if self.depths > 1 else 0.5

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        length, depth = self.cell(index, seed)
        where = f"{self.name}/{self.needles}/{self.kind}/{seed}/{index}"
        draws = RETRIEVAL_NEEDLES if self.kind == "retrieval" else REASONING_NEEDLES
        needle = draws[self.needles](index, random.Random(where))
        room = length - count_tokens(" " + needle.text) - count_tokens(needle.question)
        if room < 0:
            raise BadData(f"needle and question alone do not fit into {length} tokens: ask for a longer shortest")
        filler = self.texts.fill(room, where, count_tokens)
        context, _ = place(filler, [needle.text], [round(depth * len(filler))])
        columns: dict[str, str | int | float] = {"context": length, "depth": round(100 * depth)}
        text = context + needle.question
        return Example(index, text, len(context), (needle.answer,), self.new_tokens, None, columns, until=("\n",), cut="never")

    def score(self, answer: str, example: Example) -> dict[str, float]:
        wanted, said = set(normalised(example.answers[0]).split()), set(normalised(answer).split())
        return {"words": 100 * len(wanted & said) / len(wanted), "rouge1": 100 * rouge("rouge1", answer, example.answers[0])[2]}
