"""BABILong, qa1 to qa5: facts of bAbI scattered in books, and questions that need several of them.

Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack", 2024. arxiv.org/abs/2406.10149
Instructions, worked examples and answer forms are read from the task files of the installed lm-eval. Scored as officially:
exactly one label may be named that the question does not name, and it must be the right one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.base import CountTokens, Example, Metric
from benchmarks.data import BadData, Data, Source

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS: dict[int, tuple[str, ...]] = {
    1: PLACES,
    2: PLACES,
    3: PLACES,
    4: PLACES,
    5: ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
}
FORMS = ("\nAlways return", "\nYour answer")  # how the sentence begins that says in which form to answer


@dataclass(frozen=True)
class Instruction:
    before: str  # all that stands before the facts
    after: str  # all that stands behind them, with {question}


@lru_cache(maxsize=8)
def instruction(number: int) -> Instruction:
    """The prompt around the facts: instruction, worked examples, form of the answer.

    Raises:
        BadData: lm-eval is not installed, or has another form of this task.
    """
    settings = data.lm_eval_task("babilong", f"babilong_qa{number}")
    try:
        told = str(settings["description"]).strip()
        worked = [(str(one["input"]), str(one["question"]), str(one["target"])) for one in settings["fewshot_config"]["samples"]]
        cut = max(told.rfind(form) for form in FORMS)
    except (KeyError, TypeError) as error:
        raise BadData(f"lm-eval's file of babilong_qa{number} is not as expected: {error}") from None
    if cut < 0:
        raise BadData(f"lm-eval's file of babilong_qa{number} does not say in which form to answer")
    shown = "\n".join(f"<example>\n{text} {asked}\nAnswer: {answer}\n</example>" for text, asked, answer in worked)
    return Instruction(f"{told[:cut]}\n\n{shown}\n\n{told[cut:].strip()}\n\n<context>\n", "\n</context>\n\nQuestion: {question}")


@dataclass(frozen=True)
class BabiLong:
    """One task at one length; the middle of what is too long is cut out."""

    task: int = 1
    length: str = "1k"  # 0k: the facts alone
    new_tokens: int = 15
    data_dir: Path | None = field(default=None, repr=False, compare=False)
    metrics = (Metric("accuracy", unit="percent"),)
    forced = False
    chat = True

    def __post_init__(self) -> None:
        if self.task not in LABELS:
            raise ValueError(f"task {self.task} must be 1 to {len(LABELS)}")

    @property
    def name(self) -> str:
        return f"babilong_qa{self.task}@1"

    def records(self) -> Data:
        name = f"{self.length}/qa{self.task}"
        return data.load(
            Source(
                local=(f"babilong/{name}", name),
                fields=("input", "question", "target"),
                filled=("input", "question", "target"),
                fault=_fault,
                licence="Apache-2.0 (BABILong); facts CC BY 3.0 (bAbI), books public domain (PG-19)",
                repository="RMT-team/babilong",
                file=f"{name}-00000-of-00001.parquet",
            ),
            self.data_dir,
        )

    @property
    def size(self) -> int:
        return len(self.records().rows)

    @property
    def data(self) -> str:
        prompt = repr(instruction(self.task))
        return f"{self.records().sha256}+{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        row, told = self.records().rows[index], instruction(self.task)
        context = told.before + data.text_of(row["input"]).strip()
        text = context + told.after.replace("{question}", data.text_of(row["question"]).strip())
        columns: dict[str, str | int | float] = {"length": self.length}
        return Example(index, text, len(context), (data.text_of(row["target"]),), self.new_tokens, None, columns)

    def score(self, answer: str, example: Example) -> dict[str, float]:
        question = data.text_of(self.records().rows[example.index]["question"])
        return {"accuracy": 100.0 * right(self.task, answer, question, example.answers[0])}


def _fault(row: dict[str, Any]) -> str | None:
    return data.no_text(row, "input", "question", "target")


def right(task: int, answer: str, question: str, target: str) -> bool:
    """Of the first sentence, and of what a model makes up behind it nothing: are its labels, less the question's, the target?"""
    said = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    asked = question.lower()
    return {label for label in LABELS[task] if label in said and label not in asked} == {target.lower()}
