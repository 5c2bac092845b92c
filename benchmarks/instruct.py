"""Instruction sets in MiniLLM's form: Dolly, Self-Instruct, Vicuna, Super-Natural and Unnatural Instructions, by ROUGE-L.

Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024. arxiv.org/abs/2306.08543
ROUGE-L is Google's `rouge_score` with its stemmer, the best over the references, in percent. Prompts are read from the records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import data
from benchmarks.base import CountTokens, Example, Metric
from benchmarks.data import BadData, Data, OfRecords, Source
from benchmarks.wording import rouge


def _source(local: str, repository: str, file: str, licence: str) -> Source:
    fields = ("instruction", "prompt", "output")
    return Source((f"instruct/{local}", local), fields, licence, repository, file, filled=("prompt", "output"), fault=_fault)


def _fault(row: dict[str, Any]) -> str | None:
    if row["instruction"] is None:
        return "field 'instruction' is null"
    try:
        data.texts_of(row["output"])
    except ValueError as error:
        return f"field 'output' is {error}"
    return data.no_text(row, "instruction", "prompt", "input")


SETS: dict[str, Source] = {
    "dolly": _source("dolly_eval", "MiniLLM/dolly", "valid.jsonl", "CC BY-SA 3.0 (Dolly-15k)"),
    "self_instruct": _source("self_inst", "MiniLLM/self-inst", "valid.jsonl", "Apache-2.0 (Self-Instruct)"),
    "vicuna": _source("vicuna", "MiniLLM/Vicuna", "valid.jsonl", "Apache-2.0 (FastChat); references written by a model"),
    "super_natural": _source("s_ni", "MiniLLM/sinst", "11_/valid.jsonl", "Apache-2.0 (Super-NaturalInstructions)"),
    "unnatural": _source("uinst", "MiniLLM/uinst", "11_/valid.jsonl", "MIT (Unnatural Instructions); written by a model"),
}


@dataclass(frozen=True)
class Instruct(OfRecords):
    """One set."""

    dataset: str = "dolly"
    template: Literal["record", "plain"] = "record"  # the record's own prompt, or instruction and input alone (for chat models)
    new_tokens: int = 256  # of an answer, at most
    data_dir: Path | None = field(default=None, repr=False, compare=False)
    metrics = (Metric("rougeL", unit="percent"),)
    forced = False
    chat = True
    judged = True

    def __post_init__(self) -> None:
        if self.dataset not in SETS:
            raise ValueError(f"no instruction set {self.dataset!r}; known: {', '.join(SETS)}")
        if self.template not in ("record", "plain"):
            raise ValueError(f"template {self.template!r} is neither record nor plain")
        if self.new_tokens < 1:
            raise ValueError(f"new_tokens {self.new_tokens} must be at least 1")

    @property
    def name(self) -> str:
        return f"{self.dataset}@1"

    def records(self) -> Data:
        return data.load(SETS[self.dataset], self.data_dir)

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        row = self.records().rows[index]
        answers = data.texts_of(row["output"])
        prompt = data.text_of(row["prompt"]) if self.template == "record" else self.question(index)
        named = row.get("topic") or row.get("category")
        topic = "" if isinstance(named, list | dict) else str(named or "")
        return Example(index, prompt, len(prompt), answers, self.new_tokens, None, {"topic": topic} if topic else {})

    def question(self, index: int) -> str:
        """Instruction and input, without a template around them."""
        row = self.records().rows[index]
        given = data.text_of(row.get("input")).strip()
        return data.text_of(row["instruction"]) + (f"\n\n{given}" if given else "")

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {"rougeL": 100 * max(rouge("rougeL", answer, wanted)[2] for wanted in example.answers)}


__all__ = ["SETS", "BadData", "Instruct"]
