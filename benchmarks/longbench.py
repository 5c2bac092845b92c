"""LongBench: 21 tasks on long English and Chinese texts, and the 13 of LongBench-E, prompted and scored as officially.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", 2023. arxiv.org/abs/2308.14508
Prompts and answer lengths are read from the task files of the installed lm-eval; six of its prompts differ from the official
ones in white space and are put right (a test compares all with the official file).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import data, longbench_metrics
from benchmarks.base import CountTokens, Example, Metric, Turn
from benchmarks.data import BadData, Data, Source


@dataclass(frozen=True)
class Kind:
    """What the official code says about one task."""

    category: str
    metric: longbench_metrics.Metric
    first_line: bool = False  # only the first line of an answer counts
    chat: bool = True  # a chat template may be put around the prompt
    extended: bool = False  # LongBench-E has it too


KINDS: dict[str, Kind] = {
    "narrativeqa": Kind("single-doc", longbench_metrics.qa_f1),
    "qasper": Kind("single-doc", longbench_metrics.qa_f1, extended=True),
    "multifieldqa_en": Kind("single-doc", longbench_metrics.qa_f1, extended=True),
    "multifieldqa_zh": Kind("single-doc", longbench_metrics.qa_f1_zh),
    "hotpotqa": Kind("multi-doc", longbench_metrics.qa_f1, extended=True),
    "2wikimqa": Kind("multi-doc", longbench_metrics.qa_f1, extended=True),
    "musique": Kind("multi-doc", longbench_metrics.qa_f1),
    "dureader": Kind("multi-doc", longbench_metrics.rouge_l_zh),
    "gov_report": Kind("summarization", longbench_metrics.rouge_l, extended=True),
    "qmsum": Kind("summarization", longbench_metrics.rouge_l),
    "multi_news": Kind("summarization", longbench_metrics.rouge_l, extended=True),
    "vcsum": Kind("summarization", longbench_metrics.rouge_l_zh),
    "trec": Kind("few-shot", longbench_metrics.classification, first_line=True, chat=False, extended=True),
    "triviaqa": Kind("few-shot", longbench_metrics.qa_f1, first_line=True, chat=False, extended=True),
    "samsum": Kind("few-shot", longbench_metrics.rouge_l, first_line=True, chat=False, extended=True),
    "lsht": Kind("few-shot", longbench_metrics.classification, first_line=True, chat=False),
    "passage_count": Kind("synthetic", longbench_metrics.count, extended=True),
    "passage_retrieval_en": Kind("synthetic", longbench_metrics.retrieval, extended=True),
    "passage_retrieval_zh": Kind("synthetic", longbench_metrics.retrieval_zh),
    "lcc": Kind("code", longbench_metrics.code_similarity, chat=False, extended=True),
    "repobench-p": Kind("code", longbench_metrics.code_similarity, chat=False, extended=True),
}
CATEGORIES = tuple(dict.fromkeys(kind.category for kind in KINDS.values()))
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
ENGLISH = tuple(task for task in KINDS if task not in CHINESE)
HEADKV = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")  # of that paper's main tables

# What lm-eval's prompts lack of the official ones: task -> (its text, the official one).
WHITE_SPACE = {
    "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
    "passage_count": (":", ": "),
    "passage_retrieval_en": (":", ": "),
    "lcc": ("code:", "code:\n"),
    "repobench-p": ("code:", "code:\n"),
}
BUCKETS = (("0-4k", 4000), ("4-8k", 8000), ("8k+", None))  # LongBench-E reports by length in words


@dataclass(frozen=True)
class PromptTemplate:
    template: str  # with {context} and {input}
    max_new_tokens: int

    @property
    def digest(self) -> str:
        """Part of the data's identity. Made of the words that it was made of when the class was called Prompt."""
        text = f"Prompt(template={self.template!r}, max_new_tokens={self.max_new_tokens!r})"
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@lru_cache(maxsize=32)
def official_prompt(task: str) -> PromptTemplate:
    """
    Raises:
        BadData: lm-eval is not installed, or has another form of this task.
    """
    settings = data.lm_eval_task("longbench", task)
    try:
        template = re.sub(r"\{\{\s*(?:input|question)\s*\}\}", "{input}", settings["doc_to_text"])
        template = re.sub(r"\{\{\s*context\s*\}\}", "{context}", template)
        length = int(settings["generation_kwargs"]["max_gen_toks"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadData(f"lm-eval's file of longbench_{task} is not as expected: {error}") from None
    if task in WHITE_SPACE:
        short, official = WHITE_SPACE[task]
        template = _mended(template, short, official)
    return PromptTemplate(template, length)


def _mended(template: str, short: str, official: str) -> str:
    """The official white space, unless it is there already (a later lm-eval may have it)."""
    if official in template if "{context}" in official else template.endswith(official):
        return template
    head, found, tail = template.rpartition(short)
    return head + official + tail if found else template


def _fault(task: str, answers: Any, classes: Any, words: Any) -> str | None:
    """What is wrong with a record's answers, class names or length, in a few words."""
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "answers is not a list of texts"
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return "all_classes is neither null nor a list of texts"
    if not isinstance(words, int):
        return "length is not a whole number"
    form = {"passage_retrieval_en": r"Paragraph (\d+)", "passage_retrieval_zh": r"段落(\d+)"}.get(task)
    if form and not all(re.search(form, answer) for answer in answers):
        return f"an answer is not of the form {form}"
    return None


def _fault_of(task: str) -> Callable[[dict[str, Any]], str | None]:
    def fault(row: dict[str, Any]) -> str | None:
        empty = "field 'context' is null" if row["context"] is None else None
        return empty or data.no_text(row, "input", "context") or _fault(task, row["answers"], row["all_classes"], row["length"])

    return fault


_FAULTS = {task: _fault_of(task) for task in KINDS}  # one function a task, so that equal sources are equal


def source(task: str, extended: bool) -> Source:
    name = f"{task}_e" if extended else task
    return Source(
        local=(f"longbench/{name}", name),
        fields=("input", "context", "answers", "length", "all_classes"),
        filled=("answers",),
        fault=_FAULTS[task],
        licence="MIT (LongBench); the underlying set keeps its own",
        repository="zai-org/LongBench",
        file=f"data.zip::data/{name}.jsonl",
    )


@dataclass(frozen=True)
class LongBench:
    """One task."""

    task: str = "qasper"
    extended: bool = False  # LongBench-E's records
    data_dir: Path | None = field(default=None, repr=False, compare=False)
    metrics = (Metric("longbench", unit="percent"),)
    forced = False

    def __post_init__(self) -> None:
        if self.task not in KINDS or (self.extended and not KINDS[self.task].extended):
            known = [name for name, kind in KINDS.items() if kind.extended or not self.extended]
            raise ValueError(f"no LongBench{'-E' * self.extended} task {self.task!r}; known: {', '.join(known)}")

    @property
    def name(self) -> str:
        return f"longbench_{self.task}{'_e' * self.extended}@1"

    @property
    def chat(self) -> bool:
        return KINDS[self.task].chat

    def records(self) -> Data:
        return data.load(source(self.task, self.extended), self.data_dir)

    @property
    def size(self) -> int:
        return len(self.records().rows)

    @property
    def data(self) -> str:
        """Of the records and of the prompt, which comes with lm-eval."""
        return f"{self.records().sha256}+{official_prompt(self.task).digest}"

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        row = self.records().rows[index]
        prompt = official_prompt(self.task)
        before, after = prompt.template.split("{context}")
        context = before + data.text_of(row["context"])
        text = context + after.replace("{input}", data.text_of(row["input"]))
        answers = tuple(str(answer) for answer in row["answers"])
        columns: dict[str, str | int | float] = {"words": int(row["length"])}
        same = self._sharing()[self.context_of(index)]
        turns = tuple(self._turn(after, number) for number in same) if len(same) > 1 else ()
        return Example(
            index, text, len(context), answers, prompt.max_new_tokens, None, columns, turns=turns, turn=same.index(index)
        )

    def context_of(self, index: int) -> int:
        """The first record with the same context."""
        return _contexts(self.task, self.extended, self.data_dir)[index]

    def _sharing(self) -> dict[int, list[int]]:
        """Records with the same context, by the first of them."""
        found: dict[int, list[int]] = {}
        for number, first in enumerate(_contexts(self.task, self.extended, self.data_dir)):
            found.setdefault(first, []).append(number)
        return found

    def _turn(self, after: str, index: int) -> Turn:
        row = self.records().rows[index]
        return Turn(after.replace("{input}", data.text_of(row["input"])), f" {next(iter(row['answers']), '')}\n\n")

    def score(self, answer: str, example: Example) -> dict[str, float]:
        classes = self.records().rows[example.index]["all_classes"] or ()
        return {"longbench": 100 * score(self.task, answer, example.answers, classes)}


@lru_cache(maxsize=8)
def _contexts(task: str, extended: bool, data_dir: Path | None) -> tuple[int, ...]:
    """Of each record, the first one with the same context."""
    firsts: dict[str, int] = {}
    rows = data.load(source(task, extended), data_dir).rows
    return tuple(firsts.setdefault(data.text_of(row["context"]), number) for number, row in enumerate(rows))


def score(task: str, answer: str, answers: Iterable[str], classes: Sequence[str]) -> float:
    """The official score of one answer, 0..1: the best over the right ones."""
    kind = KINDS[task]
    if kind.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return max((kind.metric(answer, wanted, classes) for wanted in answers), default=0.0)


@dataclass(frozen=True)
class Prediction:
    """A line of LongBench's own output."""

    answer: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    words: int

    @classmethod
    def of(cls, row: dict[str, Any], where: str, task: str) -> Prediction:
        """
        Raises:
            BadData: a field is missing or of another type.
        """
        try:
            said, answers, classes, words = row["pred"], row["answers"], row.get("all_classes"), row.get("length") or 0
        except KeyError as error:
            raise BadData(f"{where}: no field {error}") from None
        what = "pred is not a text" if not isinstance(said, str) else _fault(task, answers, classes, words)
        if what:
            raise BadData(f"{where}: {what}")
        return cls(said, tuple(answers), tuple(classes or ()), words)


def score_files(paths: Sequence[Path], extended: bool, workers: int) -> dict[str, Any]:
    """Official scores by task, in percent to two decimals; of LongBench-E by bucket of length.

    Args:
        paths: predictions, `<task>.jsonl`, also .gz or .xz.

    Raises:
        BadData: a file that is none of LongBench's, or a broken line.
    """
    found: dict[str, list[Prediction]] = {}
    for path in paths:
        if _task_of(path) in found:
            raise BadData(f"two files of predictions of {_task_of(path)}, the second {path}")
        found[_task_of(path)] = _predictions(path, _task_of(path))
    work = [(task, prediction) for task, predictions in found.items() for prediction in predictions]
    # the largest pieces of work are the summaries: small chunks keep the workers evenly busy
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            scores = list(pool.map(_score, work, chunksize=16))
    else:
        scores = list(map(_score, work))
    by_task: dict[str, list[tuple[int, float]]] = {task: [] for task in found}
    for (task, prediction), value in zip(work, scores, strict=True):
        by_task[task].append((prediction.words, value))
    if not extended:
        return {task: round(100 * mean(value for _, value in values), 2) for task, values in by_task.items()}
    return {task: _by_bucket(values) for task, values in by_task.items()}


def _score(work: tuple[str, Prediction]) -> float:
    task, prediction = work
    return score(task, prediction.answer, prediction.answers, prediction.classes)


def _task_of(path: Path) -> str:
    task = path.name.split(".jsonl")[0].removesuffix("_e")
    if task not in KINDS:
        raise BadData(f"{path.name} is no prediction of a LongBench task; named <task>.jsonl, tasks: {', '.join(KINDS)}")
    return task


def _predictions(path: Path, task: str) -> list[Prediction]:
    found = [Prediction.of(row, f"{path}, line {number}", task) for number, row in data.lines(data.read(path), path)]
    if not found:
        raise BadData(f"{path} holds no prediction")
    return found


def _by_bucket(values: Sequence[tuple[int, float]]) -> dict[str, float | None]:
    buckets: dict[str, list[float]] = {name: [] for name, _ in BUCKETS}
    for words, value in values:
        buckets[next(name for name, limit in BUCKETS if limit is None or words < limit)].append(value)
    return {name: round(100 * mean(scores), 2) if scores else None for name, scores in buckets.items()}
