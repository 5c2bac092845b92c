"""From a request to records: which cells there are, which are left, and the loop that runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from benchmarks.base import NLL, Example, Task, embedded_can
from harness.cache import Budget
from harness.engine.generate import Answer
from harness.engine.model import Model
from harness.evaluation.loglikelihood import likelihood_prompts
from harness.evaluation.prompts import CannotPrompt, Prompt, Protocol, has_example, tokenize
from harness.evaluation.sweep import Cell, Outcome, Sweep
from harness.plugins import mark
from methods.base import Eviction, Method
from results.record import Key, Record, Status
from results.store import Store

NOTHING_TO_COMPRESS = (
    "a text scored in the pass that reads it never meets a cache that could be compressed: only `full` applies, here and for "
    "variants; the benchmark `perplexity` compresses what it has read before it scores"
)


class BadRequest(ValueError):
    """A request that makes no sense: one line for the user, exit code 2."""


@dataclass(frozen=True)
class Shard:
    """Examples `index` with index % of == number - 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise BadRequest(f"shard {text!r} is not of the form i/n with 1 <= i <= n")
        return cls(int(number), int(of))


Part = Literal["all", "held_out", "test"]


def is_held_out(example: int) -> bool:
    """3 of every 20 examples, 15 %: for choosing settings, such as HeadKV's beta."""
    return example % 20 < 3


@dataclass(frozen=True)
class Work:
    """What to run on one model."""

    tasks: dict[str, Task]
    methods: dict[str, Method]
    budgets: tuple[Budget, ...]
    protocols: tuple[Protocol, ...]
    limit: int
    seeds: tuple[int, ...]
    shard: Shard = Shard()
    part: Part = "all"
    fidelity: bool = True

    def cells(self) -> list[Cell]:
        found = []
        for name, method in self.methods.items():
            budgets: Sequence[Budget | None] = self.budgets if method.takes_budget else (None,)
            found += [Cell(name, method, budget) for budget in budgets]
        return found

    def examples(self, task: Task) -> list[int]:
        count = self.limit if task.size is None else min(self.limit, task.size)
        numbers = range(self.shard.number - 1, count, self.shard.of)
        return [n for n in numbers if self.part == "all" or is_held_out(n) == (self.part == "held_out")]


@dataclass(frozen=True)
class Todo:
    """One prompt and the cells of it that have no row yet."""

    task: Task
    example: Example
    protocol: Protocol
    seed: int
    limit: int  # tokens
    keys: dict[Cell, Key]


@dataclass
class Tally:
    ok: int = 0
    skipped: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, status: str, reason: str | None) -> None:
        setattr(self, status, getattr(self, status) + 1)
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1


def left_to_do(model: Model, work: Work, store: Store | None) -> Iterator[Todo]:
    """Prompts with at least one cell that has no finished row. Without a store: all of them."""
    for label, task in work.tasks.items():
        wanted = product(protocols_of(task, work, bool(model.routers)), work.seeds, work.examples(task))
        for protocol, seed, index in wanted:
            example = _example(model, label, task, index, seed)
            if not has_example(model.tokenizer, example):
                continue
            limit = protocol.truncation or model.max_tokens - _most(example, protocol)
            if protocol.truncation and protocol.truncation > model.max_tokens:
                raise BadRequest(
                    f"--truncation {protocol.truncation} is more than the {model.max_tokens} positions of {model.name}"
                )
            if limit < 2:
                raise BadRequest(f"{task.name}: answers of {_most(example, protocol)} tokens leave no room for a prompt")
            todo = Todo(task, example, protocol, seed, limit, {})
            name = benchmark_name(label, task)
            for cell in work.cells():
                key = key_of(model, work, name, todo, cell)
                if store is None or not store.finished(key):
                    todo.keys[cell] = key
            if todo.keys:
                yield todo


def protocols_of(task: Task, work: Work, routed: bool = True) -> tuple[Protocol, ...]:
    """Those asked for, as far as they apply to the task, and to a model that does not route its tokens.

    A likelihood has no question: what is scored always comes after the compressed context. Some tasks are never put into a chat
    template.
    """
    found = work.protocols
    if task.forced:
        found = tuple(replace(protocol, prompt="question_after") for protocol in found)
    if scores_likelihoods(task):
        found = tuple(replace(protocol, temperature=0.0, max_new_tokens=None) for protocol in found)
    if not task.chat:
        found = tuple(replace(protocol, chat="raw") for protocol in found)
    if not routed:
        found = tuple(replace(protocol, routing="expert_choice") for protocol in found)
    return tuple(dict.fromkeys(found))


def scores_likelihoods(task: Task) -> bool:
    """Nothing is generated then, so no setting of generation matters."""
    return task.forced or bool(getattr(task, "likelihoods", False))


def _example(model: Model, label: str, task: Task, index: int, seed: int) -> Example:
    try:
        example = task.example(index, seed, token_counter(model))
    except ValueError as error:
        raise BadRequest(f"benchmark {label}: {error}") from None
    words = model.network.config.vocab_size
    if example.ids is not None and max(example.ids, default=0) >= words:
        raise BadRequest(f"benchmark {label}: token {max(example.ids)} is not one of the {words} of model {model.name}")
    return example


def benchmark_name(label: str, task: Task) -> str:
    """As asked for, with the version of its prompts and scores, and where it comes from if it is not ours."""
    return f"{label}@{task.name.split('@')[1]}{mark('BENCHMARKS', label)}"


def key_of(model: Model, work: Work, name: str, todo: Todo, cell: Cell) -> Key:
    protocol, most = todo.protocol, _most(todo.example, todo.protocol)
    return Key(
        model=model.name,
        revision=model.revision,
        benchmark=name,
        benchmark_params=repr(todo.task),
        data=todo.task.data,
        example=todo.example.index,
        method=f"{cell.name}@{cell.method.version}{mark('METHODS', cell.name)}",
        params=repr(cell.method),
        budget="" if cell.budget is None else str(cell.budget),
        prompt=protocol.prompt,
        chat=protocol.chat,
        truncation=protocol.truncation or model.max_tokens - most,
        granularity=protocol.granularity,
        routing=protocol.routing if model.routers else "",
        stop=protocol.stop,
        max_new_tokens=most,
        dtype=str(model.network.dtype).removeprefix("torch."),
        seed=todo.seed,
        temperature=protocol.temperature,
        fidelity=work.fidelity and not getattr(todo.task, "likelihoods", False),
    )


def check(model: Model, work: Work) -> list[str]:
    """Reasons for which cells of the first prompt cannot run.

    Raises:
        BadRequest: none of them can.
    """
    if model.depth > model.shape.layers and any(protocol.granularity == "query" for protocol in work.protocols):
        raise BadRequest(f"{model.name}: layers share its rows, so that none can belong to one query head: use --granularity kv")
    reasons: list[str] = []
    for todo in left_to_do(model, work, None):
        _, skipped = _open(model, todo)
        reasons = [f"{cell.name} at {cell.budget or 'no budget'}: {why}" for cell, why in skipped.items()]
        if len(skipped) < len(todo.keys):
            return reasons
    if reasons:
        raise BadRequest(f"nothing can run: {reasons[0]}")
    raise BadRequest("nothing to run: no method, benchmark or example is left of this request")


def cannot_run(model: Model, todo: Todo) -> list[str]:
    """The reason of each cell of a prompt that cannot run."""
    return [f"{cell.name}: {why}" for cell, why in _open(model, todo)[1].items()]


def run(
    sweep_of: Callable[[Protocol, int], Sweep], model: Model, work: Work, store: Store, env: str, progress: Callable[[int], Any]
) -> Tally:
    """Runs what has no row and stores a record a cell, as they are finished."""
    tally = Tally()
    sweeps: dict[tuple[Protocol, int], Sweep] = {}
    for todo in left_to_do(model, work, store):
        sweep = sweeps.setdefault((todo.protocol, todo.seed), sweep_of(todo.protocol, todo.seed))
        prompts, skipped = _open(model, todo)
        for cell, outcome in _outcomes(sweep, todo, prompts, skipped):
            try:
                record = record_of(model, todo, prompts, cell, outcome, env)
            except Exception as error:  # a benchmark's own scoring, which may be a plugin's or lm-eval's
                reason = f"scoring: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                record = Record(todo.keys[cell], "failed", env, reason=reason, columns=todo.example.columns)
            store.write(record)
            tally.add(record.status, record.reason)
            progress(1)
    return tally


def _open(model: Model, todo: Todo) -> tuple[list[Prompt], dict[Cell, str]]:
    """The prompts, one but where likelihoods are asked for, and the cells that cannot run on them, with reasons."""
    try:
        if todo.example.requests:
            prompts = likelihood_prompts(model.tokenizer, todo.example, todo.protocol, todo.limit)
        else:
            prompts = [tokenize(model.tokenizer, todo.example, todo.protocol, todo.limit, todo.task.forced)]
    except CannotPrompt as reason:
        return [], dict.fromkeys(todo.keys, str(reason))
    skipped = {}
    for cell in todo.keys:
        for prompt in prompts:
            if (why := _why_not(model, todo, cell, prompt)) is not None:
                skipped[cell] = why
    return prompts, skipped


def _why_not(model: Model, todo: Todo, cell: Cell, prompt: Prompt) -> str | None:
    if not isinstance(cell.method, Eviction) or cell.budget is None:
        return None
    if prompt.one_pass:
        return NOTHING_TO_COMPRESS
    where = (prompt.context, todo.protocol.granularity)
    return cell.method.cannot_run(model.least_shape, cell.budget, *where, model.parent_shape)


def _outcomes(sweep: Sweep, todo: Todo, prompts: Sequence[Prompt], skipped: dict[Cell, str]) -> Iterator[tuple[Cell, Outcome]]:
    yield from ((cell, Outcome(skipped=why)) for cell, why in skipped.items())
    cells = [cell for cell in todo.keys if cell not in skipped]
    if not prompts or not cells:
        return
    done: set[Cell] = set()
    first: dict[Cell, Outcome] = {}  # of all prompts but the last
    most = _most(todo.example, todo.protocol)
    try:
        for prompt in prompts[:-1]:
            for cell, outcome in sweep.example(prompt, cells, most):
                first[cell] = first[cell].joined(outcome) if cell in first else outcome
        for cell, outcome in sweep.example(prompts[-1], cells, most):
            done.add(cell)
            yield cell, first[cell].joined(outcome) if cell in first else outcome
    except (ValueError, RuntimeError, IndexError) as error:  # where a prompt may fail without ending the run
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield from ((cell, Outcome(failed=reason)) for cell in cells if cell not in done)


def record_of(model: Model, todo: Todo, prompts: Sequence[Prompt], cell: Cell, outcome: Outcome, env: str) -> Record:
    key, can = todo.keys[cell], embedded_can(todo.task)
    reason = outcome.failed or outcome.skipped
    if reason or not prompts:
        status: Status = "failed" if outcome.failed else "skipped"
        return Record(key, status, env, reason=reason, columns=todo.example.columns, embedded_can=can)
    assert outcome.answer is not None and outcome.counts is not None
    text = said(model, todo.example, prompts[0], outcome.answer)
    end = outcome.answer.end
    full = sum(model.parent_shape.full_entries(prompt.context) for prompt in prompts)
    scored = (NLL,) if prompts[0].forced else todo.task.metrics
    return Record(
        key,
        "ok",
        env,
        answer=text,
        stop_reason=outcome.answer.stop_reason,
        metrics={NLL.name: outcome.fidelity["loss"]} if prompts[0].forced else todo.task.score(str(text), todo.example),
        lower_is_better=[metric.name for metric in scored if not metric.higher_is_better],
        right_or_wrong=[metric.name for metric in scored if metric.right_or_wrong],
        embedded_can=can,
        fidelity=outcome.fidelity,
        columns=todo.example.columns,
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        new_tokens=len(outcome.answer.tokens),
        compressed=outcome.compressed,
        entries_asked=outcome.entries_asked,
        entries=outcome.counts.entries,
        bytes_kept=outcome.counts.bytes_kept,
        bytes_allocated=outcome.counts.bytes_allocated,
        entries_end=end.entries if end else None,
        bytes_kept_end=end.bytes_kept if end else None,
        bytes_full=full * model.parent_shape.entry_bytes(),
        kept=outcome.kept if key.example == 0 else None,
    )


def said(model: Model, example: Example, prompt: Prompt, answer: Answer) -> str | None:
    """The answer in words, up to a text that ends it; or, where likelihoods were asked for, those as JSON, in order."""
    if prompt.forced:
        return None
    if prompt.asks_likelihoods:
        found = [answer.likelihoods[number] for number in sorted(answer.likelihoods)]
        return json.dumps([[one.logprob, one.greedy, one.tokens] for one in found])
    text = model.words(answer.tokens)
    return text[: min((at for end in example.until if (at := text.find(end)) >= 0), default=len(text))]


def token_counter(model: Model) -> Callable[[str], int]:
    """The same function for the same tokenizer, so that what it counted can be remembered."""
    return _counter(model.tokenizer)


@lru_cache(maxsize=4)
def _counter(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[str], int]:
    if tokenizer is None:
        return lambda text: len(text.split())
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _most(example: Example, protocol: Protocol) -> int:
    return protocol.max_new_tokens or example.max_new_tokens
