"""Problems whose answer is worked out in writing: GSM8K, MATH-500, AIME 2024 and 2025. Graded by math-verify or as integers.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021. arxiv.org/abs/2110.14168
Lightman et al., "Let's Verify Step by Step", 2023. arxiv.org/abs/2305.20050 (its 500 problems of MATH)
The answers grow the cache: methods that evict while decoding are for these, and methods that evict once are allowed beside them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.base import CountTokens, Example, Metric
from benchmarks.data import BadData, Data, OfRecords, Source

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}.\n"


@dataclass(frozen=True)
class ProblemSet:
    """Where problems are found, and how answers to them are compared."""

    repository: str
    file: str
    licence: str
    new_tokens: int
    problem: tuple[str, ...] = ("problem", "question", "Problem")  # names of the field, the first that is there
    integer: bool = True  # every answer is one


SETS = {
    "gsm8k": ProblemSet("openai/gsm8k", "main/test-00000-of-00001.parquet", "MIT", 1024),
    "math500": ProblemSet("HuggingFaceH4/MATH-500", "test.jsonl", "MIT (PRM800K)", 16384, integer=False),
    "aime24": ProblemSet(
        "HuggingFaceH4/aime_2024",
        "data/train-00000-of-00001.parquet",
        "the repository names its own; the problems are the MAA's",
        32768,
    ),
    "aime25": ProblemSet("math-ai/aime25", "test.jsonl", "the repository names its own; the problems are the MAA's", 32768),
}


@dataclass(frozen=True)
class Reasoning(OfRecords):
    """One set. An example is a problem; samples of it are rows of several seeds."""

    kind: str = "gsm8k"
    new_tokens: int = 0  # of an answer; 0: the set's own
    data_dir: Path | None = field(default=None, repr=False, compare=False)
    metrics = (Metric("correct", unit="share", right_or_wrong=True),)
    forced = False
    chat = True

    def __post_init__(self) -> None:
        if self.kind not in SETS:
            raise ValueError(f"no set {self.kind!r}; known: {', '.join(SETS)}")

    @property
    def name(self) -> str:
        return f"{self.kind}@1"

    def records(self) -> Data:
        its = SETS[self.kind]
        local = (f"reasoning/{self.kind}", self.kind)
        source = Source(local, ("answer",), its.licence, its.repository, its.file, fault=_fault)
        return data.load(source, self.data_dir)

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        row = self.records().rows[index]
        problem = data.text_of(row[_name_of(row)]).strip()
        most = self.new_tokens or SETS[self.kind].new_tokens
        level = row.get("level")
        columns: dict[str, str | int | float] = {"level": level} if isinstance(level, int | str) else {}
        return Example(index, problem + INSTRUCTION, len(problem), (_right(row),), most, columns=columns)

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """1 if the answer's last box, or what stands in its place, is the right one.

        Raises:
            BadData: math-verify is needed, and is not installed.
        """
        right = example.answers[0]
        return {"correct": float(same_integer(answer, right) if SETS[self.kind].integer else same_value(answer, right))}


def _name_of(row: dict[str, Any]) -> str:
    return next((name for name in ProblemSet.problem if name in row), "problem")


def _right(row: dict[str, Any]) -> str:
    """The right answer; GSM8K's stands behind its working, after four hashes."""
    return data.text_of(row["answer"]).rpartition("####")[2].strip()


def _fault(row: dict[str, Any]) -> str | None:
    name = _name_of(row)
    if name not in row:
        return f"no field {' or '.join(repr(one) for one in ProblemSet.problem)}"
    if wrong := data.no_text(row, name, "answer"):
        return wrong
    return None if data.text_of(row[name]).strip() and _right(row) else "a problem or its answer is empty"


def boxed(text: str) -> str | None:
    """What the last complete \\boxed{...} of a text holds, braces within it included."""
    found = None
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for at in range(start.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                found = text[start.end() : at]
                break
    return found


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def same_integer(answer: str, right: str) -> bool:
    """Is the number in the last box, or else the last number that was written, the right one?"""
    inside = boxed(answer)
    numbers = NUMBER.findall(answer if inside is None else inside)
    return bool(numbers) and _number(numbers[-1]) == _number(right)


def _number(text: str) -> float | str:
    plain = text.replace(",", "").replace("$", "").strip()
    try:
        return float(plain)
    except ValueError:
        return plain


def same_value(answer: str, right: str) -> bool:
    """Are they the same in mathematics, by math-verify? Without its time limits, which need the main thread.

    Raises:
        BadData: it is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise BadData(
            "answers of MATH-500 are compared by math-verify, which is not installed: pip install math-verify"
        ) from None
    gold = parse(f"\\boxed{{{right}}}", parsing_timeout=None)
    return bool(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))
