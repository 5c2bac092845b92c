"""LooGLE: questions on long documents, short dependency and long dependency by its four kinds, by F1 as in HeadKV's tables.

Li et al., "LooGLE: Can Long-Context Language Models Understand Long Contexts?", 2023. arxiv.org/abs/2311.04939
A document carries several questions: an example is one of them. The prompt is read from the data folder's copy of LooGLE's own;
where that is missing, a line of ours stands in, and the data's hash says so.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.base import CountTokens, Example, Metric
from benchmarks.data import BadData, Data, Source
from benchmarks.longbench_metrics import qa_f1

KINDS: dict[str, tuple[str, str | None, int]] = {  # file, type of its questions, tokens of an answer (HeadKV, table 7)
    "short_qa": ("shortdep_qa", None, 300),
    "comprehension": ("longdep_qa", "comprehension_and_reasoning", 64),
    "retrieval": ("longdep_qa", "multiple_information_retrieval", 64),
    "timeline": ("longdep_qa", "timeline_reorder", 32),
    "computation": ("longdep_qa", "computation", 32),
}
OWN_PROMPT = "Read the document, then answer the question about it.\n\n{input}\n\nQuestion: {Q}\nAnswer: "


@dataclass(frozen=True)
class LooGLE:
    """One kind of question."""

    kind: str = "short_qa"
    new_tokens: int = 0  # of an answer; 0: the kind's own
    data_dir: Path | None = field(default=None, repr=False, compare=False)
    metrics = (Metric("f1", unit="percent"),)
    forced = False
    chat = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no kind {self.kind!r}; known: {', '.join(KINDS)}")

    @property
    def name(self) -> str:
        return f"loogle_{self.kind}@1"

    def records(self) -> Data:
        return _records(self.kind, self.data_dir)

    @property
    def size(self) -> int:
        return len(_questions(self.kind, self.data_dir))

    @property
    def data(self) -> str:
        prompt = _prompt(self.kind, self.data_dir)
        return f"{self.records().sha256}+{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        document, question, answer = _questions(self.kind, self.data_dir)[index]
        before, after = _prompt(self.kind, self.data_dir).split("{input}")
        context = before + str(self.records().rows[document]["input"])
        text = context + after.replace("{Q}", question)
        return Example(index, text, len(context), (answer,), self.new_tokens or KINDS[self.kind][2])

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {"f1": 100 * qa_f1(answer, example.answers[0])}


def _pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: no list of questions and answers, neither as such nor as a Python literal.
    """
    try:
        found = ast.literal_eval(row["qa_pairs"]) if isinstance(row["qa_pairs"], str) else row["qa_pairs"]
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("no Python literal") from None
    if not isinstance(found, list) or not all(isinstance(pair, dict) and {"Q", "A"} <= set(pair) for pair in found):
        raise ValueError("no list of questions with answers")
    return found


def _fault(row: dict[str, Any]) -> str | None:
    try:
        _pairs(row)
    except ValueError as error:
        return f"qa_pairs: {str(error)[:60]}"
    return None


def _records(kind: str, data_dir: Path | None) -> Data:
    file = KINDS[kind][0]
    return data.load(
        Source(
            local=(f"loogle/{file}", file),
            fields=("input", "qa_pairs"),
            filled=("input",),
            fault=_fault,
            licence="MIT (LooGLE); its documents keep their own",
            repository="bigai-nlco/LooGLE",
            file=f"data/{file}.json",
        ),
        data_dir,
    )


@lru_cache(maxsize=8)
def _questions(kind: str, data_dir: Path | None) -> tuple[tuple[int, str, str], ...]:
    """Document, question and answer, in the file's order."""
    wanted = KINDS[kind][1]
    rows = _records(kind, data_dir).rows
    pairs = [(number, pair) for number, row in enumerate(rows) for pair in _pairs(row)]
    found = tuple((n, str(pair["Q"]), str(pair["A"])) for n, pair in pairs if wanted is None or pair.get("type") == wanted)
    if not found:
        raise BadData(f"{_records(kind, data_dir).source} holds no question of type {wanted!r}")
    return found


@lru_cache(maxsize=8)
def _prompt(kind: str, data_dir: Path | None) -> str:
    path = (data_dir or Path()) / "loogle" / "config" / "task2prompt.json"
    if data_dir is None or not path.is_file():
        return OWN_PROMPT
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[KINDS[kind][0]])
    except (OSError, ValueError, KeyError) as error:
        raise BadData(f"{path} has no prompt of {KINDS[kind][0]}: {error}") from None
