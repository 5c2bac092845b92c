"""From a request to units of work: which cells there are, which of them have rows, and which cannot run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import chain, product
from typing import TYPE_CHECKING, Any

from benchmarks.base import Example, Task, context_of, reads_data, scores_likelihoods, sees_ahead
from harness.cache import Budget, renumbers
from harness.engine.model import Model
from harness.engine.renumber import cannot_renumber
from harness.errors import BadRequest
from harness.evaluation.loglikelihood import likelihood_prompts
from harness.evaluation.prompts import CannotPrompt, Prompt, Protocol, has_example
from harness.evaluation.reading import read_of
from harness.evaluation.request import Part, RunRequest, Shard, narrowed
from harness.evaluation.sweep import Cell
from harness.evaluation.tokens import beyond
from harness.evaluation.turns import prompt_of
from harness.registry import BUILTIN, Registry
from harness.suites import COST_SUITES, SUITES, WIDER, Suite
from methods.base import Method
from results.record import Key
from results.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = Budget(share=Fraction(1))  # what a method that takes none is asked with
NOTHING_TO_COMPRESS = (
    "a text scored in the pass that reads it never meets a cache that could be compressed: only `full` applies, here and for "
    "variants; the benchmark `perplexity` compresses what it has read before it scores"
)


def is_held_out(example: int) -> bool:
    """3 of every 20 examples, 15 %: for choosing settings, such as HeadKV's beta."""
    return example % 20 < 3


@dataclass(frozen=True)
class Grid:
    """What to run on one model: tasks x protocols x seeds x examples, and on each prompt methods x budgets."""

    tasks: dict[str, Task]
    methods: dict[str, Method]
    budgets: tuple[Budget, ...]
    protocols: tuple[Protocol, ...]
    limit: int
    seeds: tuple[int, ...]
    shard: Shard = field(default_factory=Shard)
    part: Part = "all"
    fidelity: bool = True
    registry: Registry = field(default=BUILTIN, repr=False)
    variant: str = ""  # the model as it was asked for
    limits: Mapping[str, int] = field(default_factory=dict)  # by label, of tasks for which it is another one

    def cells(self) -> list[Cell]:
        found = []
        for name, method in self.methods.items():
            budgets: Sequence[Budget | None] = self.budgets if method.takes_budget else (None,)
            found += [Cell(name, method, budget) for budget in budgets]
        return found

    def examples(self, task: Task) -> list[int]:
        """Their numbers, questions on one context behind each other: they share what is read, and belong to one shard."""
        limit = next((most for label, most in self.limits.items() if self.tasks[label] == task), self.limit)
        count = limit if task.size is None else min(limit, task.size)
        asked = [n for n in range(count) if self.part == "all" or is_held_out(n) == (self.part == "held_out")]
        contexts: dict[int, list[int]] = {}
        for number in asked:
            contexts.setdefault(context_of(task, number), []).append(number)
        mine = list(contexts.values())[self.shard.number - 1 :: self.shard.of]
        return [number for questions in mine for number in questions]

    @property
    def size(self) -> int:
        """Cells in all, as far as can be told before a text is cut into examples."""
        prompts = sum(len(self.examples(task)) * len(protocols_of(task, self)) for task in self.tasks.values())
        return prompts * len(self.seeds) * len(self.cells())

    def benchmark_name(self, label: str) -> str:
        """As asked for, with the version of its prompts and scores, and where it comes from if it is not ours."""
        return f"{label}@{self.tasks[label].name.split('@')[1]}{self.registry.mark('BENCHMARKS', label)}"

    def method_name(self, cell: Cell) -> str:
        return f"{cell.name}@{cell.method.version}{self.registry.mark('METHODS', cell.name)}"


@dataclass(frozen=True)
class Unit:
    """One prompt and the cells that are asked of it: what is worked on together, since the cells share its prefill."""

    label: str  # of the task
    task: Task
    example: Example
    protocol: Protocol
    seed: int
    limit: int  # tokens of the prompt
    keys: dict[Cell, Key]
    variant: str = ""  # the model as it was asked for
    finished: frozenset[Cell] = frozenset()  # those that have a row

    @property
    def name(self) -> str:
        """The same for everyone who asks for the same cells."""
        return " ".join(sorted(key.id for key in self.keys.values()))

    @property
    def left(self) -> list[Cell]:
        return [cell for cell in self.keys if cell not in self.finished]


@dataclass(frozen=True)
class Opened:
    """A unit's prompts, one but where likelihoods are asked for, and the cells that cannot run on them, with reasons."""

    prompts: list[Prompt]
    skipped: dict[Cell, str]


@dataclass
class Plan:
    """What `run` would do on one model."""

    model: str
    cells: int = 0
    prefills: int = 0
    finished: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # cells, by the reason why they cannot run


def suite_of(request: RunRequest, registry: Registry) -> Suite:
    """The suite, with what the request changes of it.

    Raises:
        BadRequest: no such suite, or one of costs.
    """
    if request.suite in COST_SUITES:
        raise BadRequest(f"suite {request.suite} measures cost: `run` and `plan` take it, this command needs a suite of scores")
    if request.suite not in SUITES:
        known = [name for name in (*SUITES, *COST_SUITES) if not name.endswith(WIDER)]
        raise BadRequest(f"no suite {request.suite!r}; known: {', '.join(known)}; real and its parts with {WIDER} behind it, too")
    suite = SUITES[request.suite]
    changes: dict[str, Any] = {
        name: value
        for name in (
            "models",
            "methods",
            "budgets",
            "benchmarks",
            "prompts",
            "limit",
            "seeds",
            "temperature",
            "fidelity",
            "chat",
            "truncation",
            "protect",
        )
        if (value := getattr(request, name)) not in (None, ())
    }
    if request.models or request.methods:
        changes["variants"] = ()
    if request.limit is not None or request.benchmarks:
        changes["limits"] = {}
    suite = replace(suite, **changes)
    return replace(suite, benchmarks=tuple(registry.benchmark_names(suite.benchmarks)))


def requests_behind(request: RunRequest) -> list[RunRequest]:
    """The suites behind the request's own, if nothing of it was narrowed."""
    suite = SUITES.get(request.suite)
    if suite is None or narrowed(request):
        return []
    return [replace(request, suite=name) for name in suite.behind]


def tasks_of(request: RunRequest, suite: Suite, registry: Registry) -> dict[str, Task]:
    """The benchmarks by label, told where the user's data lie.

    Raises:
        BadRequest: two that would have one label, or no such folder.
        UnknownChoice: a name or setting that is not there.
    """
    found: dict[str, Task] = {}
    for text in suite.benchmarks:
        label, task = registry.benchmark(text)
        if found.setdefault(label, task) != task:
            raise BadRequest(f"two benchmarks would both be named {label}: rename one of the files")
    if request.data_dir is None:
        return found
    reading = {label: task for label, task in found.items() if reads_data(task)}
    if reading and not request.data_dir.is_dir():
        raise BadRequest(f"--data-dir {request.data_dir}: no such folder")
    told: dict[str, Any] = {label: replace(task, data_dir=request.data_dir) for label, task in reading.items()}  # type: ignore[type-var]
    return found | told


def grid_of(request: RunRequest, suite: Suite, registry: Registry) -> Grid:
    """
    Raises:
        BadRequest, UnknownChoice: a budget, method or benchmark that makes no sense.
    """
    try:
        budgets = tuple(dict.fromkeys(Budget.parse(text) for text in suite.budgets))
    except ValueError as error:
        raise BadRequest(str(error)) from None
    methods = dict(registry.method(text) for text in suite.methods)
    if suite.protect:
        methods |= dict(
            registry.protected(label, suite.protect) for label, method in list(methods.items()) if method.takes_budget
        )
    if not budgets and any(method.takes_budget for method in methods.values()):
        raise BadRequest("these methods need --budgets, such as 128,25%")
    shared = (suite.chat, request.granularity, "eos", suite.truncation, request.max_new_tokens, suite.temperature)
    return Grid(
        tasks=tasks_of(request, suite, registry),
        methods=methods,
        budgets=budgets,
        protocols=tuple(Protocol(prompt, *shared, routing) for prompt, routing in product(suite.prompts, request.routings)),  # type: ignore[arg-type]
        limit=suite.limit,
        limits={registry.benchmark(text)[0]: most for text, most in suite.limits.items()},
        seeds=suite.seeds,
        shard=request.shard,
        part=request.examples,
        fidelity=suite.fidelity,
        registry=registry,
    )


def grids_of(request: RunRequest, registry: Registry) -> dict[str, Grid]:
    """What to run on each model of the suite, by the model's name."""
    suite = suite_of(request, registry)
    grids = {suite.models: grid_of(request, suite, registry)}
    if suite.variants:
        grids[suite.variants] = grid_of(request, replace(suite, methods=suite.variant_methods), registry)
    return {name: replace(grid, variant=name) for names, grid in grids.items() for name in names}


def marked(unit: Unit, store: Store) -> Unit:
    """The same, with the cells that have a finished row by now."""
    return replace(unit, finished=frozenset(cell for cell, key in unit.keys.items() if store.finished(key)))


def units(model: Model, grid: Grid, store: Store | None = None) -> Iterator[Unit]:
    """Every prompt of the grid with its cells; those that have a finished row in the store are marked."""
    cells = grid.cells()
    for label, task in grid.tasks.items():
        wanted = product(protocols_of(task, grid, bool(model.routers)), grid.seeds, grid.examples(task))
        for protocol, seed, index in wanted:
            unit = unit_of(model, grid, label, protocol, seed, index, cells)
            if unit is not None:
                yield unit if store is None else marked(unit, store)


def unit_of(
    model: Model, grid: Grid, label: str, protocol: Protocol, seed: int, index: int, cells: Sequence[Cell]
) -> Unit | None:
    """One prompt with these cells; None where a text has no such piece."""
    task = grid.tasks[label]
    example = _example(model, label, task, index, seed)
    if not has_example(model.tokenizer, example):
        return None
    unit = Unit(label, task, example, protocol, seed, _limit(model, task, example, protocol), {}, grid.variant)
    unit.keys.update((cell, key_of(model, grid, unit, cell)) for cell in cells)
    return unit


def checked(model: Model, found: Iterator[Unit]) -> Iterator[Unit]:
    """The same units, once it is known that one of their cells can run, finished or not.

    Raises:
        BadRequest: none can.
    """
    seen: list[Unit] = []
    reason = "no method, benchmark or example is left of this request"
    for unit in found:
        seen.append(unit)
        skipped = opened(model, unit).skipped
        if len(skipped) < len(unit.keys):
            return chain(seen, found)
        reason = next((f"{cell.name} at {cell.budget or 'no budget'}: {why}" for cell, why in skipped.items()), reason)
    raise BadRequest(f"nothing can run: {reason}" if seen else f"nothing to run: {reason}")


def check_shares(model: Model, grid: Grid) -> None:
    """
    Raises:
        BadRequest: rows for each query head are asked of a model whose layers share rows.
    """
    if model.depth > model.shape.layers and any(protocol.granularity == "query" for protocol in grid.protocols):
        raise BadRequest(f"{model.name}: layers share its rows, so that none can belong to one query head: use --granularity kv")


def check_tasks(model: Model, grid: Grid) -> None:
    """Makes the first example of every task, so that what makes no sense is refused before anything has run.

    Raises:
        BadRequest: it cannot be made, or leaves no room for a prompt.
    """
    for label, task in grid.tasks.items():
        for protocol, index in product(protocols_of(task, grid), grid.examples(task)[:1]):
            _limit(model, task, _example(model, label, task, index, grid.seeds[0]), protocol)


def protocols_of(task: Task, grid: Grid, routed: bool = True) -> tuple[Protocol, ...]:
    """Those asked for, as far as they apply to the task, and to a model that does not route its tokens.

    A likelihood has no question: what is scored always comes after the compressed context. Some tasks are never put into a chat
    template. Where expert choice would see what is to be scored, argmax is measured beside it.
    """
    found = grid.protocols
    if task.forced:
        found = tuple(replace(protocol, prompt="question_after") for protocol in found)
    if task.forced or scores_likelihoods(task):  # nothing is generated then, so no setting of generation matters
        found = tuple(replace(protocol, temperature=0.0, max_new_tokens=None) for protocol in found)
    if not task.chat:
        found = tuple(replace(protocol, chat="raw") for protocol in found)
    if not routed:
        found = tuple(replace(protocol, routing="expert_choice") for protocol in found)
    elif sees_ahead(task):
        found = (*found, *(replace(protocol, routing="argmax") for protocol in found))
    return tuple(dict.fromkeys(found))


def _example(model: Model, label: str, task: Task, index: int, seed: int) -> Example:
    try:
        example = task.example(index, seed, token_counter(model))
    except ValueError as error:
        raise BadRequest(f"benchmark {label}: {error}") from None
    words = model.config.vocab_size
    if example.ids is not None and max(example.ids, default=0) >= words:
        raise BadRequest(f"benchmark {label}: token {max(example.ids)} is not one of the {words} of model {model.name}")
    return example


def _limit(model: Model, task: Task, example: Example, protocol: Protocol) -> int:
    """Tokens that a prompt may have."""
    if protocol.truncation and protocol.truncation > model.max_tokens:
        raise BadRequest(f"--truncation {protocol.truncation} is more than the {model.max_tokens} positions of {model.name}")
    limit = protocol.truncation or model.max_tokens - answer_tokens(example, protocol)
    if limit < 2:
        raise BadRequest(f"{task.name}: answers of {answer_tokens(example, protocol)} tokens leave no room for a prompt")
    return limit


def answer_tokens(example: Example, protocol: Protocol) -> int:
    """Of an answer, at most."""
    return protocol.max_new_tokens or example.max_new_tokens


def key_of(model: Model, grid: Grid, unit: Unit, cell: Cell) -> Key:
    protocol, most = unit.protocol, answer_tokens(unit.example, unit.protocol)
    return Key(
        model=model.name,
        revision=model.revision,
        benchmark=grid.benchmark_name(unit.label),
        benchmark_params=repr(unit.task),
        data=unit.task.data,
        example=unit.example.index,
        method=grid.method_name(cell),
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
        seed=unit.seed,
        temperature=protocol.temperature,
        fidelity=grid.fidelity and not scores_likelihoods(unit.task) and not unit.example.streamed,
    )


def opened(model: Model, unit: Unit) -> Opened:
    """The prompts of a unit, and which of its cells cannot run on them."""
    try:
        if unit.example.requests:
            prompts = likelihood_prompts(model.tokenizer, unit.example, unit.protocol, unit.limit)
        else:
            prompts = [prompt_of(model.tokenizer, unit.example, unit.protocol, unit.limit, unit.task.forced)]
        check_vocabulary(model, prompts)
        _check_windows(model, prompts)
    except CannotPrompt as reason:
        return Opened([], dict.fromkeys(unit.keys, str(reason)))
    reasons = {cell: why for cell in unit.keys for prompt in prompts if (why := _why_not(model, unit, cell, prompt)) is not None}
    return Opened(prompts, reasons)


def check_vocabulary(model: Model, prompts: Sequence[Prompt]) -> None:
    """
    Raises:
        CannotPrompt: a token that the model has no embedding for.
    """
    for prompt in prompts:
        read = chain(prompt.ids, prompt.looked, prompt.forced, prompt.one_pass, *(branch.ids for branch in prompt.branches))
        if (why := beyond(max(read, default=0), model.vocabulary, model.tokenizer)) is not None:
            raise CannotPrompt(why)


def _check_windows(model: Model, prompts: Sequence[Prompt]) -> None:
    """
    Raises:
        CannotPrompt: a layer has let go of entries for a question that is to be taken back.
    """
    for prompt in prompts:
        narrowest = min((window for window in model.parent_shape.windows if window is not None), default=None)
        if prompt.looked and narrowest is not None and prompt.context + len(prompt.looked) > narrowest:
            raise CannotPrompt(
                f"a window of {narrowest} tokens has moved on to the first question, so that it cannot be taken back: use turns"
            )


def _why_not(model: Model, unit: Unit, cell: Cell, prompt: Prompt) -> str | None:
    if prompt.streamed and (why := _beyond_positions(model, unit, cell, prompt)) is not None:
        return why
    if cell.method.is_reference:
        return None
    if prompt.one_pass:
        return NOTHING_TO_COMPRESS
    if renumbers(cell.method.while_decoding(lambda tokens: tokens)) and (why := cannot_renumber(model)):
        return why
    if prompt.looked and cell.method.while_decoding(lambda tokens: tokens) is not None:
        return "it remembers what it has looked at, so that the first question cannot be taken back: use --prompt turns"
    where = (prompt.context, unit.protocol.granularity)
    return cell.method.cannot_run(model.least_shape, cell.budget or WHOLE, *where, model.parent_shape)


def _beyond_positions(model: Model, unit: Unit, cell: Cell, prompt: Prompt) -> str | None:
    """Why a cell cannot go on to the end of a streamed text."""
    tokens = prompt.context + len(prompt.forced)
    if tokens <= model.max_tokens:
        return None
    keeper = cell.method.while_decoding(lambda tokens: tokens)
    if keeper is None or not renumbers(keeper) or cell.budget is None:
        return (
            f"a text of {tokens} tokens is longer than the {model.max_tokens} positions of {model.name}: only caches whose "
            "positions are those inside go on, as in streaming_llm(every=1,renumber=true)"
        )
    most = cell.budget.entries(model.parent_shape, tokens, unit.protocol.granularity)
    heads = model.shape.query_heads if unit.protocol.granularity == "query" else model.shape.kv_heads
    if (longest := -(-most // (model.shape.layers * heads)) + keeper.every) > model.max_tokens:
        return f"{longest} entries of a row are more than the {model.max_tokens} positions of {model.name}"
    return None


def plan_of(model: Model, grid: Grid, store: Store | None) -> Plan:
    """
    Raises:
        BadRequest: nothing of it can run.
    """
    check_shares(model, grid)
    check_tasks(model, grid)
    plan = Plan(model.name)
    last: tuple[object, ...] = ()  # what is read for several questions is read once
    for unit in checked(model, units(model, grid, store)):
        left = unit.left
        found = opened(model, unit) if left else Opened([], {})
        reasons = [f"{cell.name}: {why}" for cell, why in found.skipped.items() if cell in left]
        for reason in reasons:
            plan.skipped[reason] = plan.skipped.get(reason, 0) + 1
        plan.cells += len(left) - len(reasons)
        if len(left) > len(reasons):
            read = (unit.protocol, unit.seed, *map(read_of, found.prompts))
            plan.prefills += read != last
            last = read
        plan.finished += len(unit.finished)
    return plan


def token_counter(model: Model) -> Callable[[str], int]:
    """The same function for the same tokenizer, so that what it counted can be remembered."""
    return _counter(model.tokenizer)


@lru_cache(maxsize=4)
def _counter(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[str], int]:
    if tokenizer is None:
        return lambda text: len(text.split())
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
