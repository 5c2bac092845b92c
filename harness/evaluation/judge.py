"""A judge: any OpenAI-compatible endpoint that rates stored answers from 1 to 10.

Each rating is kept in `<out>/judge/<model>.jsonl` as it comes, by what was asked, so nothing is asked twice. Refusals and
answers without a rating are counted and kept apart; what could not be reached is tried again next time. The key comes from the
environment (JUDGE_API_KEY, else OPENAI_API_KEY) and is written nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.base import Judged, Task
from harness.evaluation.request import JudgeOptions
from results.store import StoreError, append_line, judge_lines, read_rows, slug

VERSION = 1  # raised when the prompt below changes
RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
Status = Literal["ok", "refused", "unparsable", "unreachable"]

PROMPT = """You judge how well an assistant has answered. Weigh whether the answer helps, keeps to the question, is right,
goes deep enough and shows thought of its own; give most weight to its clarity, its usefulness and the effort it shows.
Do not let length alone impress you. Say in one or two sentences what decides, then end with a line of exactly this form,
from 1 (worthless) to 10 (could not be better), with two decimals:
Rating: [[5.00]]

[Question]
{question}

[A reference answer, which need not be the only good one]
{reference}

[The assistant's answer]
{answer}
"""


@dataclass(frozen=True)
class Case:
    """A stored answer to be rated."""

    row: str  # id of the row
    question: str
    reference: str
    answer: str

    @property
    def prompt(self) -> str:
        return PROMPT.format(question=self.question, reference=self.reference, answer=self.answer or "(no answer)")


@dataclass(frozen=True)
class Verdict:
    status: Status
    rating: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Judge:
    """Where to ask, and how patiently."""

    url: str  # up to and with /v1
    model: str
    temperature: float = 0.7
    workers: int = 8  # questions under way at once
    timeout_s: float = 120.0
    attempts: int = 5
    wait_s: float = 1.0  # before the second attempt; doubled before each further one
    key: str = field(default_factory=lambda: _key(), repr=False)

    def content(self, case: Case) -> str:
        """What was asked, as a hash: the same question gets the same rating."""
        asked = json.dumps([VERSION, self.model, self.temperature, case.prompt])
        return hashlib.sha256(asked.encode()).hexdigest()[:24]

    def rate(self, case: Case) -> Verdict:
        """Never raises for what the endpoint does: it says so in the verdict."""
        asked = {"model": self.model, "temperature": self.temperature, "messages": [{"role": "user", "content": case.prompt}]}
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1))
            try:
                return _verdict(self._post(asked))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    break  # asking again would not help
            except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
        return Verdict("unreachable", None, reason.replace(self.key.strip(), "***") if self.key.strip() else reason)

    def _post(self, asked: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found


def _key() -> str:
    """From the environment; a line's end that came with it is no part of it."""
    return (os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY", "")).strip()


def _verdict(found: dict[str, Any]) -> Verdict:
    """The last rating in the answer; earlier ones may be quotes of the form asked for."""
    choice = found["choices"][0]
    text = choice["message"].get("content") or ""
    if choice["message"].get("refusal") or choice.get("finish_reason") == "content_filter":
        return Verdict("refused", None, str(choice["message"].get("refusal") or text)[:500])
    ratings = [float(number) for number in RATING.findall(text)]
    if not ratings or not 1 <= ratings[-1] <= 10:
        return Verdict("unparsable", None, text[:500])
    return Verdict("ok", ratings[-1], text[:500])


@dataclass
class Tally:
    """What came of the cases, by status; `again`: known from before."""

    statuses: Counter[str] = field(default_factory=Counter)
    again: int = 0
    reason: str = ""  # of the last that was not reached

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        return f"{counts or 'none asked'}, {self.again} known from before"


def judge_answers(options: JudgeOptions, tasks: Mapping[str, Task], out: Path) -> Tally:
    """Has the judge rate the stored answers to these tasks, by the names that rows give them."""
    asked = {name: task for name, task in tasks.items() if isinstance(task, Judged)}
    cases = []
    for row in read_rows(out):
        task = asked.get(row.key.benchmark)
        if task is not None and row.status == "ok" and (row.key.benchmark_params, row.key.data) == (repr(task), task.data):
            reference = task.example(row.key.example, row.key.seed, len).answers[0]
            cases.append(Case(row.key.id, task.question(row.key.example), reference, row.answer or ""))
    judge = Judge(options.url, options.model, workers=options.workers)
    with tqdm(total=len(cases), unit="answer", desc=f"judge {judge.model}", disable=not cases, file=sys.stderr) as bar:
        tally = judge_rows(judge, cases, out, bar.update)
    print(f"judge {judge.model}: {tally}", file=sys.stderr)
    return tally


def judge_rows(judge: Judge, cases: Sequence[Case], out: Path, progress: Callable[[int], Any]) -> Tally:
    """Rates what has no verdict yet, and keeps each as it comes.

    Raises:
        StoreError: the folder cannot be written to; or nobody answers there, after as many misses as there are workers.
    """
    path = out / "judge" / f"{slug(judge.model)}.jsonl"
    mine = [line for line in judge_lines(path) if line.get("model", judge.model) == judge.model]  # names may share a file
    known = {line["content"]: line for line in mine}
    rated = {line["row"] for line in mine}
    tally = Tally()
    waiting: dict[str, list[Case]] = {}
    for case in cases:
        content = judge.content(case)
        if content in known:
            tally.again += 1
            if case.row not in rated:
                _keep(path, judge, case, content, Verdict(*(known[content][name] for name in ("status", "rating", "text"))))
            progress(1)
        else:
            waiting.setdefault(content, []).append(case)
    for content, verdict in _ask(judge, waiting):
        tally.statuses[verdict.status] += len(waiting[content])
        progress(len(waiting[content]))
        if verdict.status == "unreachable":
            tally.reason = verdict.text
            if tally.statuses.total() == tally.statuses["unreachable"] >= min(judge.workers, len(waiting)):
                raise StoreError(
                    f"the judge at {judge.url} does not answer: {tally.reason}; all answers are stored, ask again later"
                )
            continue
        for case in waiting[content]:
            _keep(path, judge, case, content, verdict)
    return tally


def _ask(judge: Judge, waiting: dict[str, list[Case]]) -> Iterator[tuple[str, Verdict]]:
    """In the order in which they come. Questions not yet begun are dropped when the caller stops listening."""
    pool = ThreadPoolExecutor(judge.workers)
    try:
        asked = {pool.submit(judge.rate, cases[0]): content for content, cases in waiting.items()}
        for done in as_completed(asked):
            yield asked[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _keep(path: Path, judge: Judge, case: Case, content: str, verdict: Verdict) -> None:
    line = {"row": case.row, "content": content, "model": judge.model, "temperature": judge.temperature}
    append_line(path, json.dumps({**line, "status": verdict.status, "rating": verdict.rating, "text": verdict.text}))
