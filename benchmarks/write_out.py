"""A long answer that can be checked to the letter: a register stands in a text, and is to be written out, line by line, in order.

Ours. What a cache must hold of the register it must hold over the whole answer, so methods that evict while decoding, whose caps
hold to the last token, can be told from those that evict once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.base import CountTokens, Example, Metric
from benchmarks.data import BadData
from benchmarks.haystack import InHaystack
from benchmarks.ruler import COLOURS, THINGS

HEADING = "\n\nRegister\n"
ENDING = "\nEnd of the register.\n\n"
QUESTION = "\nWrite out the whole register from the text above, line by line, in the same order.\nRegister\n"


@dataclass(frozen=True)
class WriteOut(InHaystack):
    """Lines of a thing and its number, in one piece somewhere in a haystack. Scored by the share of lines that come, in order."""

    length: int = 512  # tokens of the prompt, at most
    lines: int = 12
    line_tokens: int = 16  # of an answer, for each line: more than one takes
    metrics = (Metric("lines", unit="percent"),)
    size = None
    forced = False
    chat = True
    name = "write_out@1"

    def __post_init__(self) -> None:
        if not 2 <= self.lines <= len(COLOURS) * len(THINGS):
            raise ValueError(f"lines {self.lines} must lie between 2 and {len(COLOURS) * len(THINGS)}")

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        where = f"{self.name}/{seed}/{index}"
        rng = random.Random(where)
        names = rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], self.lines)
        numbers = rng.sample(range(1000, 10_000), self.lines)
        lines = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
        register = HEADING + "\n".join(lines) + ENDING
        room = self.length - count_tokens(register) - count_tokens(QUESTION)
        if room < 0:
            raise BadData(f"its register and question alone do not fit into {self.length} tokens: ask for a longer length")
        text = self.texts.fill(room, where, count_tokens)
        before = rng.randint(0, len(text))
        context = " ".join(text[:before]) + register + " ".join(text[before:])
        if (most := self.line_tokens * self.lines) <= (taken := count_tokens("\n".join(lines))):
            raise BadData(f"the register takes {taken} tokens, an answer has {most}: ask for more line_tokens")
        columns: dict[str, str | int | float] = {"length": self.length, "depth": round(before / max(len(text), 1), 3)}
        return Example(
            index, context + QUESTION, len(context), tuple(lines), most, columns=columns, until=("\n\n", "End of"), cut="never"
        )

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """The most lines of the register that the answer has whole and in their order, of all of them: a longest common
        subsequence, so that a line left out costs that line alone.
        """
        said = [" ".join(line.split()).lower() for line in answer.splitlines()]
        best = [0] * (len(said) + 1)
        for wanted in example.answers:
            before = 0
            for place, line in enumerate(said, 1):
                here = max(best[place], best[place - 1], before + (line == wanted))
                before, best[place] = best[place], here
        return {"lines": 100 * best[-1] / len(example.answers)}
