"""What a quality benchmark is: examples by number, and a score for an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Metric:
    """What a number means, once, so that tables and plots need no special cases."""

    name: str
    unit: str  # share | percent | nats
    higher_is_better: bool = True
    right_or_wrong: bool = False  # an answer has 0 or 1: the mean is a proportion, with an interval of its own


NLL = Metric("nll", unit="nats", higher_is_better=False)  # what a task is scored by that is `forced`


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` behind `context`? Or, `rolling`, how likely is `continuation` as a whole text?"""

    context: str
    continuation: str
    rolling: bool = False


@dataclass(frozen=True)
class Turn:
    """A question on a context, and its right answer, as they stand in a text that holds several."""

    question: str  # all that stands behind the context, up to where the answer begins
    answer: str  # with the white space before it, and with what ends it


@dataclass(frozen=True)
class Example:
    """One prompt and what a right answer to it is.

    `context_end` cuts the prompt: what lies behind it is asked after the context was read (and, under `question_after`,
    compressed). It counts characters of `prompt`, or tokens where a benchmark gives `ids` or `piece`.
    """

    index: int
    prompt: str
    context_end: int
    answers: tuple[str, ...]
    max_new_tokens: int
    ids: tuple[int, ...] | None = None
    columns: dict[str, str | int | float] = field(default_factory=dict)  # length, depth, ...
    until: tuple[str, ...] = ()  # texts at which an answer ends; neither they nor what follows is part of it
    requests: tuple[Request, ...] = ()  # likelihoods that are asked for instead of an answer
    piece: tuple[int, int] | None = None  # of the prompt's tokens only [first, last)
    one_pass: bool = False  # what is scored is read in the same pass as what lies before it: there is no cache to compress
    streamed: bool = False  # scored token by token as it comes, whatever its length: nothing is compared with the full cache
    cut: Literal["middle", "start", "never"] = "middle"  # what is left out of a prompt that is too long; never: it is skipped
    turns: tuple[Turn, ...] = ()  # all questions on its context, in order, where there are several
    turn: int = 0  # which of them this is


@dataclass(frozen=True)
class Data:
    """The records of one file."""

    rows: tuple[dict[str, Any], ...]
    sha256: str
    source: str  # the file's name, or where on the hub it lies, with the commit
    licence: str


@runtime_checkable
class ReadsData(Protocol):
    """A task whose records lie in a file: it has a field `data_dir` for the user's folder."""

    data_dir: Path | None

    def records(self) -> Data:
        """
        Raises:
            UserError: they are missing or broken.
        """
        ...


@runtime_checkable
class Judged(Protocol):
    """A task whose answers a judge may rate."""

    def question(self, index: int) -> str:
        """What an example asks, without a template around it."""
        ...


class Task(Protocol):
    """A benchmark. Frozen: its repr is the record's parameters.

    `name` ends in a version ("recall@1"), raised when prompts or scoring change: old rows must not mix with new ones.

    A task may have members more. They are no fields of a dataclass, so that they do not change its repr:
    `likelihoods = True` where nothing is generated (see `Example.requests`), `sees_ahead = True` where what is scored is routed
    together with what follows it, `embedded_can = True`, and `context_of(index) -> int` where several examples ask about one
    context (see below).
    """

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def size(self) -> int | None:
        """How many examples there are; None: as many as one likes."""
        ...

    @property
    def forced(self) -> bool:
        """What lies behind the context is not asked but scored: how likely is it, given the cache?"""
        ...

    @property
    def chat(self) -> bool:
        """May a chat template be put around its prompts?"""
        ...

    @property
    def data(self) -> str:
        """sha256 of the data, "" where examples are generated."""
        ...

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        """Example `index` is the same whether or not others were made."""
        ...

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """A value for every metric."""
        ...


def reads_data(task: Task) -> TypeGuard[ReadsData]:
    """Does it read records of a file, which may lie in the user's folder?"""
    return isinstance(task, ReadsData)


def scores_likelihoods(task: Task) -> bool:
    """Are its requests scored for their likelihood, so that nothing is generated? A task says so with `likelihoods = True`."""
    return bool(getattr(task, "likelihoods", False))


def sees_ahead(task: Task) -> bool:
    """Does an expert-choice likelihood of it know the future? Then the causal one, routed by argmax, is measured beside it."""
    return bool(getattr(task, "sees_ahead", False))


def context_of(task: Task, index: int) -> int:
    """The number of the first example that asks about the same context; an example's own where a task does not say."""
    found = getattr(task, "context_of", None)
    return index if found is None else int(found(index))


def embedded_can(task: Task) -> bool:
    """Was the embedded model (`reference`) made to do this task? Elsewhere its scores prove the path and are not ranked on.

    A task that does not say is one that it was not made for.
    """
    return bool(getattr(task, "embedded_can", False))
