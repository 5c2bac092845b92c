"""From a request to records: which cells there are, which are left, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from benchmarks.base import Example, Task
from harness.cache import Budget
from harness.model import Model
from harness.prompts import CannotPrompt, Prompt, Protocol, tokenize
from harness.sweep import Cell, Outcome, Sweep
from methods.base import Eviction, Method
from results.record import Key, Record
from results.store import Store


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
        wanted = product(protocols_of(task, work), work.seeds, work.examples(task))
        for protocol, seed, index in wanted:
            example = _example(model, label, task, index, seed)
            limit = protocol.truncation or model.max_tokens - _most(example, protocol)
            if protocol.truncation and protocol.truncation > model.max_tokens:
                raise BadRequest(
                    f"--truncation {protocol.truncation} is more than the {model.max_tokens} positions of {model.name}"
                )
            if limit < 2:
                raise BadRequest(f"{task.name}: answers of {_most(example, protocol)} tokens leave no room for a prompt")
            todo = Todo(task, example, protocol, seed, limit, {})
            name = f"{label}@{task.name.split('@')[1]}"
            for cell in work.cells():
                key = key_of(model, work, name, todo, cell)
                if store is None or not store.finished(key):
                    todo.keys[cell] = key
            if todo.keys:
                yield todo


def protocols_of(task: Task, work: Work) -> tuple[Protocol, ...]:
    """Those asked for, as far as they apply to the task.

    A likelihood has no question: what is scored always comes after the compressed context. Some tasks are never put into a chat
    template.
    """
    found = work.protocols
    if task.forced:
        found = tuple(replace(protocol, prompt="question_after", temperature=0.0) for protocol in found)
    if not task.chat:
        found = tuple(replace(protocol, chat="raw") for protocol in found)
    return tuple(dict.fromkeys(found))


def _example(model: Model, label: str, task: Task, index: int, seed: int) -> Example:
    try:
        example = task.example(index, seed, token_counter(model))
    except ValueError as error:
        raise BadRequest(f"benchmark {label}: {error}") from None
    words = model.network.config.vocab_size
    if example.ids is not None and max(example.ids, default=0) >= words:
        raise BadRequest(f"benchmark {label}: token {max(example.ids)} is not one of the {words} of model {model.name}")
    return example


def key_of(model: Model, work: Work, name: str, todo: Todo, cell: Cell) -> Key:
    protocol, most = todo.protocol, _most(todo.example, todo.protocol)
    return Key(
        model=model.name,
        revision=model.revision,
        benchmark=name,
        benchmark_params=repr(todo.task),
        data=todo.task.data,
        example=todo.example.index,
        method=f"{cell.name}@{cell.method.version}",
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
        fidelity=work.fidelity,
    )


def check(model: Model, work: Work) -> list[str]:
    """Reasons for which cells of the first prompt cannot run.

    Raises:
        BadRequest: none of them can.
    """
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
        prompt, skipped = _open(model, todo)
        for cell, outcome in _outcomes(sweep, todo, prompt, skipped):
            record = record_of(model, todo, prompt, cell, outcome, env)
            store.write(record)
            tally.add(record.status, record.reason)
            progress(1)
    return tally


def _open(model: Model, todo: Todo) -> tuple[Prompt | None, dict[Cell, str]]:
    """The prompt, and the cells that cannot run on it, with reasons."""
    try:
        prompt = tokenize(model.tokenizer, todo.example, todo.protocol, todo.limit, todo.task.forced)
    except CannotPrompt as reason:
        return None, dict.fromkeys(todo.keys, str(reason))
    skipped = {}
    for cell in todo.keys:
        if isinstance(cell.method, Eviction) and cell.budget is not None:
            where = (prompt.context, todo.protocol.granularity)
            why = cell.method.cannot_run(model.least_shape, cell.budget, *where, model.parent_shape)
            if why:
                skipped[cell] = why
    return prompt, skipped


def _outcomes(sweep: Sweep, todo: Todo, prompt: Prompt | None, skipped: dict[Cell, str]) -> Iterator[tuple[Cell, Outcome]]:
    yield from ((cell, Outcome(skipped=why)) for cell, why in skipped.items())
    cells = [cell for cell in todo.keys if cell not in skipped]
    if prompt is None or not cells:
        return
    done: set[Cell] = set()
    try:
        for cell, outcome in sweep.example(prompt, cells, _most(todo.example, todo.protocol)):
            done.add(cell)
            yield cell, outcome
    except (ValueError, RuntimeError, IndexError) as error:  # the one place where a prompt may fail without ending the run
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield from ((cell, Outcome(failed=reason)) for cell in cells if cell not in done)


def record_of(model: Model, todo: Todo, prompt: Prompt | None, cell: Cell, outcome: Outcome, env: str) -> Record:
    key = todo.keys[cell]
    reason = outcome.failed or outcome.skipped
    if reason or prompt is None:
        return Record(key, "failed" if outcome.failed else "skipped", env, reason=reason, columns=todo.example.columns)
    assert outcome.answer is not None and outcome.counts is not None
    text = None if prompt.forced else decode(model, outcome.answer.tokens)
    end = outcome.answer.end
    return Record(
        key,
        "ok",
        env,
        answer=text,
        stop_reason=outcome.answer.stop_reason,
        metrics={"nll": outcome.fidelity["loss"]} if prompt.forced else todo.task.score(str(text), todo.example),
        fidelity=outcome.fidelity,
        columns=todo.example.columns,
        prompt_tokens=len(prompt.ids),
        new_tokens=len(outcome.answer.tokens),
        compressed=outcome.compressed,
        entries_asked=outcome.entries_asked,
        entries=outcome.counts.entries,
        bytes_kept=outcome.counts.bytes_kept,
        bytes_allocated=outcome.counts.bytes_allocated,
        entries_end=end.entries if end else None,
        bytes_kept_end=end.bytes_kept if end else None,
        bytes_full=model.parent_shape.full_entries(prompt.context) * model.parent_shape.entry_bytes(),
    )


def decode(model: Model, tokens: list[int]) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, tokens))
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))


def token_counter(model: Model) -> Callable[[str], int]:
    if model.tokenizer is None:
        return lambda text: len(text.split())
    tokenizer = model.tokenizer
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _most(example: Example, protocol: Protocol) -> int:
    return protocol.max_new_tokens or example.max_new_tokens
