"""LooGLE: questions on long documents, short dependency and long dependency by its four kinds, by F1 as in HeadKV's tables.

Li et al., "LooGLE: Can Long-Context Language Models Understand Long Contexts?", 2023. arxiv.org/abs/2311.04939
A document carries several questions: an example is one of them. Records are documents with their questions (`input`,
`qa_pairs`), or, as the hub shows them since 2025, one question each with its document (`context`, `question`, `answer`). The
prompt is read from the data folder's copy of LooGLE's own; where that is missing, a line of ours stands in, and the data's
hash says so.
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
from benchmarks.base import CountTokens, Example, Metric, Turn
from benchmarks.data import BadData, Data, Source
from benchmarks.longbench_metrics import qa_f1

KINDS: dict[str, tuple[str, str | None, int]] = {  # file, type of its questions, tokens of an answer (HeadKV, table 7)
    "short_qa": ("shortdep_qa", None, 300),
    "comprehension": ("longdep_qa", "comprehension_and_reasoning", 64),
    "retrieval": ("longdep_qa", "multiple_information_retrieval", 64),
    "timeline": ("longdep_qa", "timeline_reorder", 32),
    "computation": ("longdep_qa", "computation", 32),
}
SHARD = "test-00000-of-00001"  # the hub's files, in folders of their own
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
        row = self.records().rows[document]
        context = before + data.text_of(row["context"] if _is_flat(row) else row["input"])
        text = context + after.replace("{Q}", question)
        asked = _on(self.kind, self.data_dir)[document]
        turns = tuple(Turn(after.replace("{Q}", question), f"{answer}\n\n") for _, question, answer in asked)
        most = self.new_tokens or KINDS[self.kind][2]
        return Example(index, text, len(context), (answer,), most, turns=turns, turn=index - asked[0][0])

    def context_of(self, index: int) -> int:
        """The first question on the same document."""
        document = _questions(self.kind, self.data_dir)[index][0]
        return _on(self.kind, self.data_dir)[document][0][0]

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {"f1": 100 * qa_f1(answer, example.answers[0])}


def _is_flat(row: dict[str, Any]) -> bool:
    """One question with its document?"""
    return "qa_pairs" not in row and "question" in row


def _pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: no list of questions and answers, neither as such nor as a Python literal.
    """
    if _is_flat(row):
        return [{"Q": row["question"], "A": row["answer"], "type": row.get("type") or row.get("task")}]
    try:
        found = ast.literal_eval(row["qa_pairs"]) if isinstance(row["qa_pairs"], str) else row["qa_pairs"]
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("no Python literal") from None
    if not isinstance(found, list) or not all(isinstance(pair, dict) and {"Q", "A"} <= set(pair) for pair in found):
        raise ValueError("no list of questions with answers")
    for pair in found:
        if pair["Q"] is None or pair["A"] is None:
            raise ValueError("a question or answer is null")
        if wrong := data.no_text(pair, "Q", "A"):
            raise ValueError(wrong)
    return found


def _fault(row: dict[str, Any]) -> str | None:
    fields = ("context", "question", "answer") if _is_flat(row) else ("input", "qa_pairs")
    missing = next((name for name in fields if name not in row), None)
    if missing is not None:
        return f"no field {missing!r}"
    empty = next((name for name in fields if name != "qa_pairs" and row[name] in (None, "")), None)
    if empty is not None:
        return f"field {empty!r} is empty"
    if wrong := data.no_text(row, *(name for name in fields if name != "qa_pairs")):
        return wrong
    try:
        _pairs(row)
    except ValueError as error:
        return f"qa_pairs: {str(error)[:60]}"
    return None


def _records(kind: str, data_dir: Path | None) -> Data:
    file = KINDS[kind][0]
    return data.load(
        Source(
            local=(f"loogle/{file}", file, f"loogle/{file}/{SHARD}", f"{file}/{SHARD}"),
            fields=(),
            fault=_fault,
            licence="MIT (LooGLE); its documents keep their own",
            repository="bigai-nlco/LooGLE",
            file=f"data.zip::{file}.json",
        ),
        data_dir,
    )


@lru_cache(maxsize=8)
def _questions(kind: str, data_dir: Path | None) -> tuple[tuple[int, str, str], ...]:
    """Document, question and answer, in the file's order."""
    wanted = KINDS[kind][1]
    rows = _records(kind, data_dir).rows
    pairs = [(number, pair) for number, row in enumerate(rows) for pair in _pairs(row)]
    asked = [(number, pair) for number, pair in pairs if wanted is None or pair.get("type") == wanted]
    found = tuple((number, data.text_of(pair["Q"]), data.text_of(pair["A"])) for number, pair in asked)
    if not found:
        untold = any(map(_is_flat, rows)) and not any(row.get("type") for row in rows)
        hint = ": these records do not tell the types of their questions, the older ones with qa_pairs do" if untold else ""
        raise BadData(f"{_records(kind, data_dir).source} holds no question of type {wanted!r}{hint}")
    return found


@lru_cache(maxsize=8)
def _on(kind: str, data_dir: Path | None) -> dict[int, list[tuple[int, str, str]]]:
    """Number, question and answer of all questions on a document, by document."""
    found: dict[int, list[tuple[int, str, str]]] = {}
    for number, (document, question, answer) in enumerate(_questions(kind, data_dir)):
        found.setdefault(document, []).append((number, question, answer))
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
