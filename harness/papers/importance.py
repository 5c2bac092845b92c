"""Head scores of a model, estimated: needles in haystacks, and what each head looks at while the model answers.

The driver of `run_all.py importance`; the formulas are in methods/headkv.py. Attention is observed at decode steps only, over the
full cache, in one pass over the answer once it is known: its queries are those of the steps. No T x T attention is made.
An attempt counts if the model answered (Fu et al., appendix E); `teacher_forced`, an option of our own, feeds the right answer
instead and counts every attempt, for models too weak to answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.haystack import Haystack
from benchmarks.needles import REASONING_NEEDLES, RETRIEVAL_NEEDLES, TEXTS, Needle
from benchmarks.wording import english_f1, rouge
from harness.cache import Arena, Chat, Needs, keep_all
from harness.cluster.options import WorkerOptions
from harness.engine.generate import Decoder, NgramTable, Stop, generate
from harness.engine.model import Model
from harness.engine.rows import RowCache, compact
from harness.errors import BadRequest
from harness.evaluation.prompts import encode
from harness.models.load import load_model
from harness.registry import Registry
from methods.headkv import HeadScores, Kind, attended, copied
from results.store import append_line, slug

LONGEST_NEEDLE = 64  # tokens of an answer, at most


@dataclass(frozen=True)
class Estimate:
    """What to run. Every attempt follows from these and its number."""

    kind: Kind
    needles: str = "text"  # text | facts
    haystack: str = ""  # "" for generated prose, else the sha256 of the folder's text
    max_length: int = 10_000  # tokens of the longest prompt
    lengths: int = 5  # evenly spaced in (0, max_length]
    depths: int = 10  # evenly spaced in 0..100 %
    attempts: int = 100
    seed: int = 0
    chat: Chat = "raw"
    teacher_forced: bool = False

    def __post_init__(self) -> None:
        for name in ("max_length", "lengths", "depths", "attempts"):
            if getattr(self, name) < 1:
                raise BadRequest(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")

    def place(self, number: int) -> tuple[int, float]:
        """Length and depth of an attempt: every length before the next depth."""
        depth = (number // self.lengths) % self.depths
        return (
            self.max_length * (number % self.lengths + 1) // self.lengths,
            depth / (self.depths - 1) if self.depths > 1 else 0.5,
        )

    def needle(self, number: int) -> Needle:
        """Needles take turns in another order each round, so that none is bound to a length or depth."""
        what, draws = ("retrieval", RETRIEVAL_NEEDLES) if self.kind in ("r", "er") else ("reasoning", REASONING_NEEDLES)
        draw, written = draws[self.needles], len(TEXTS[what])
        turn, place = divmod(number, written)
        order = random.Random(f"{self.seed}/{turn}").sample(range(written), written)
        return draw(order[place], random.Random(f"importance/{self.needles}/{self.kind}/{self.seed}/{number}"))


@dataclass(frozen=True)
class ImportanceRequest:
    """Whose head scores to estimate, and how. What is None follows from the model."""

    model: str
    kind: Kind
    needles: str | None = None  # text, or facts for the embedded model and its variants
    haystack: Path | None = None  # folder of .txt files; None: generated prose
    max_length: int | None = None  # 10,000 tokens, or what the model has positions for
    lengths: int = 5
    depths: int = 10
    attempts: int = 100
    seed: int = 0
    chat: Chat = "raw"
    teacher_forced: bool = False
    out: Path | None = None  # a .json file; None: results/head_scores/<model>_<kind>.json
    plugins: tuple[Path, ...] = ()
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    cluster: WorkerOptions | None = None  # None: this process

    @property
    def path(self) -> Path:
        return self.out or Path("results/head_scores") / f"{slug(self.model)}_{self.kind}.json"


def prepared(request: ImportanceRequest, registry: Registry) -> tuple[Model, Estimate, Haystack]:
    """The model, what follows from it and the request, and the text around the needles.

    Raises:
        UserError: the request makes no sense on this model.
    """
    haystack = Haystack.of(request.haystack)
    model = load_model(request.model, request, registry)
    if model.tokenizer is None:
        raise BadRequest(f"model {model.name} has no tokenizer, so it cannot read a needle")
    room = model.max_tokens - LONGEST_NEEDLE
    estimate = Estimate(
        kind=request.kind,
        needles=request.needles or ("facts" if model.name.partition("+")[0] == "reference" else "text"),
        haystack=haystack.sha256,
        max_length=min(10_000, room) if request.max_length is None else request.max_length,
        lengths=request.lengths,
        depths=request.depths,
        attempts=request.attempts,
        seed=request.seed,
        chat=request.chat,
        teacher_forced=request.teacher_forced,
    )
    if estimate.max_length > room:
        raise BadRequest(
            f"--max-length {estimate.max_length} leaves no room for an answer: {model.name} has {model.max_tokens} positions"
        )
    return model, estimate, haystack


@dataclass(frozen=True)
class Attempt:
    """One prompt as tokens, and where in it the answer stands."""

    ids: list[int]
    span: tuple[int, int]  # tokens
    answer: list[int]  # the right one, as it would follow the prompt
    words: str


def attempt(tokenizer: PreTrainedTokenizerBase, estimate: Estimate, haystack: Haystack, number: int) -> Attempt:
    """
    Raises:
        BadRequest: needle and question alone are longer than the context.
    """
    needle = estimate.needle(number)
    length, depth = estimate.place(number)

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    bare = encode(tokenizer, needle.text + needle.question, estimate.chat)
    room = length - len(bare.ids) - 2
    if room < 0:
        raise BadRequest(
            f"a needle and its question take {len(bare.ids) + 2} tokens and do not fit into a context of {length}: "
            "raise --max-length or lower --lengths"
        )
    before: list[str] = []
    for line in haystack.sentences(f"haystack/{estimate.seed}/{number}"):
        room -= size(" " + line)
        if room < 0:
            break
        before.append(line)
    cut = int(len(before) * depth)
    front = "".join(f"{line} " for line in before[:cut])
    behind = "".join(f" {line}" for line in before[cut:])
    text = front + needle.text + behind + needle.question
    start = len(front) + needle.span_start
    encoded = encode(tokenizer, text, estimate.chat)
    span = encoded.tokens_of(start, start + len(needle.span[1]))
    return Attempt(encoded.ids, span, _continuation(tokenizer, text, needle.answer, estimate.chat), needle.answer)


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str, answer: str, chat: Chat) -> list[int]:
    """The answer's tokens, as they follow the prompt: in a raw prompt as one text with it, else at the reply's beginning."""
    if chat == "template":
        return list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    whole = encode(tokenizer, f"{text} {answer}", chat)
    return [token for token, (_, stop) in zip(whole.ids, whole.offsets, strict=True) if stop > len(text)]


@dataclass(frozen=True)
class Observed:
    """What came of one attempt."""

    answer: str
    success: bool
    scores: np.ndarray | None  # [L, Hq]


def observe(model: Model, work: Attempt, estimate: Estimate, arena: Arena) -> Observed:
    """Runs one attempt. The last token of the prompt is the first step's query."""
    ids = torch.tensor(work.ids, device=model.device)
    prefill = model.prefill(ids[:-1], Needs(), arena)[0]
    steps = work.span[1] - work.span[0]
    room = max(steps, len(work.answer)) + 1
    cache = compact(prefill, [keep_all(prefill)], room, arena)
    if estimate.teacher_forced:
        said, text, success = work.answer, work.words, True
    else:
        said, text = _answer(model, cache, work, max(steps, len(work.answer)))
        success = succeeded(estimate.kind, text, work.words)
    scores = _look(model, cache, work, estimate.kind, said[:steps]) if success and said else None
    return Observed(text, scores is not None, scores)


def _answer(model: Model, cache: RowCache, work: Attempt, most: int) -> tuple[list[int], str]:
    """What the model says, greedily, without its end token. The cache is left as it was."""
    read = cache.seen.copy()
    first = model.decode(cache, torch.tensor([work.ids[-1:]], device=model.device))[0, -1].argmax().item()
    answer = generate(model, cache, [[int(first)]], Decoder(NgramTable(), Stop(model.stop_ids, most)))[0]
    cache.crop(cache.seen - read)
    said = [token for token in answer.tokens if token not in model.stop_ids]
    assert model.tokenizer is not None
    return said, str(model.tokenizer.decode(said, skip_special_tokens=True)).split("\n")[0]


def succeeded(kind: Kind, said: str, wanted: str) -> bool:
    """As the authors' code: above one half of the answer's words, stemmed, for retrieval, or of the word F1 for reasoning."""
    if kind == "r2":
        return english_f1(said, wanted) > 0.5
    return rouge("rouge1", said, wanted)[1] > 0.5


def _look(model: Model, cache: RowCache, work: Attempt, kind: Kind, said: Sequence[int]) -> np.ndarray:
    """Scores of every head over the steps that produced `said`, [L, Hq]; the mean over layers that read the same rows."""
    steps = torch.tensor([[work.ids[-1], *said[:-1]]], device=model.device)
    ids = torch.tensor([*work.ids, *said], device=model.device)
    out = torch.tensor(list(said), device=model.device)
    scores = np.zeros((model.shape.layers, model.shape.query_heads))
    readers = np.zeros((model.shape.layers, 1))

    def watch(layer: int, attention: Tensor) -> None:
        found = copied(attention, work.span, ids, out) if kind == "r" else attended(attention, work.span)
        scores[layer] += found.double().cpu().numpy()
        readers[layer] += 1

    model.decode(cache, steps, watch=watch)
    return scores / readers


@dataclass(frozen=True)
class Subject:
    """Whose heads they are."""

    name: str
    revision: str
    dtype: str
    heads: tuple[int, int]  # layers, and query heads of a layer

    @classmethod
    def of(cls, model: Model) -> Subject:
        dtype = str(model.network.dtype).removeprefix("torch.")
        return cls(model.name, model.revision, dtype, (model.shape.layers, model.shape.query_heads))


class Attempts:
    """Those of an estimate, as they are finished: each is kept at once beside `out`.

    Raises:
        BadRequest: what is kept there belongs to another estimate, or the file cannot be written.
    """

    def __init__(self, subject: Subject, estimate: Estimate, out: Path) -> None:
        self.subject, self.estimate, self.out = subject, estimate, out
        self.settings: dict[str, Any] = {**asdict(estimate), "dtype": subject.dtype}
        same = {"variant": subject.name, "revision": subject.revision, **self.settings, "attempts": None}  # any number goes on
        name = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
        self.journal = Journal(out.with_suffix(f".{name}.attempts.jsonl"), same)
        self.done = {number: scores for number, scores in self.journal.read().items() if number < estimate.attempts}

    @property
    def left(self) -> list[int]:
        return [number for number in range(self.estimate.attempts) if number not in self.done]

    def add(self, number: int, found: Observed) -> None:
        """
        Raises:
            StoreError: it cannot be kept.
        """
        self.done[number] = None if found.scores is None else found.scores.ravel().tolist()
        self.journal.add(number, self.done[number], found.answer)

    def finish(self) -> HeadScores:
        """Writes the artefact.

        Raises:
            BadRequest: no attempt succeeded, or the file cannot be written.
        """
        subject, estimate = self.subject, self.estimate
        kept = [scores for _, scores in sorted(self.done.items()) if scores is not None]
        if not kept:
            raise BadRequest(
                f"model {subject.name} answered none of {estimate.attempts} attempts (0 successes): raise --attempts, choose "
                "other --needles, or take --teacher-forced, an option of our own that feeds the right answers"
            )
        runs = np.array(kept).reshape(len(kept), *subject.heads)
        scores = HeadScores(subject.name, subject.revision, estimate.kind, runs, estimate.attempts, self.settings)
        try:
            scores.save(self.out)
        except OSError as error:
            raise BadRequest(f"cannot write {self.out}: {error.strerror}; the attempts are kept beside it") from None
        self.journal.remove()
        return scores


def estimate_scores(
    model: Model, estimate: Estimate, haystack: Haystack, out: Path, progress: Callable[[int], Any]
) -> HeadScores:
    """Runs what is left of the attempts, and writes the artefact.

    Raises:
        BadRequest: no attempt succeeded, or the file cannot be written.
        StoreError: an attempt cannot be kept.
    """
    if model.tokenizer is None:
        raise BadRequest(f"model {model.name} has no tokenizer, so it cannot read a needle")
    attempts = Attempts(Subject.of(model), estimate, out)
    progress(len(attempts.done))
    arena = Arena()
    for number in attempts.left:
        attempts.add(number, observe(model, attempt(model.tokenizer, estimate, haystack, number), estimate, arena))
        progress(1)
    return attempts.finish()


@dataclass(frozen=True)
class Journal:
    """Attempts as they are finished, so that a stopped estimate goes on where it was."""

    path: Path
    settings: dict[str, Any]

    def read(self) -> dict[int, list[float] | None]:
        """Scores by attempt, None where it did not succeed. A torn last line is cut off.

        Raises:
            BadRequest: the attempts there belong to another estimate, or cannot be read or written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text() if self.path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if not whole:
                self.path.write_text(json.dumps({"settings": self.settings}) + "\n")
                return {}
            if whole != text:
                os.truncate(self.path, len(whole.encode()))
        except OSError as error:
            raise BadRequest(f"cannot write to {self.path}: {error.strerror}; choose another file with --out") from None
        try:
            head, *rows = [json.loads(line) for line in whole.splitlines()]
            if head != {"settings": self.settings}:
                raise ValueError("of another estimate")
            return {row["attempt"]: row["scores"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise BadRequest(f"{self.path} cannot be gone on with ({error}): remove it") from None

    def add(self, number: int, scores: list[float] | None, answer: str) -> None:
        append_line(self.path, json.dumps({"attempt": number, "answer": answer, "scores": scores}))

    def remove(self) -> None:
        self.path.unlink()
