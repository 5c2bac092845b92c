"""From a cost suite to rows: every cell in a process of its own, round by round, stored as it comes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from harness.cache import Budget
from harness.cluster.options import WorkerOptions
from harness.cost.forks import Forks, forks
from harness.errors import BadRequest
from harness.evaluation.request import DTYPES, OUT, RunRequest, at_least, narrowed, tell_apart
from harness.registry import Registry
from harness.suites import COST_SUITES, SUITES, CostSuite
from results.record import DECODES

ROOT = Path(__file__).parents[2]
HOUR = 3600.0
ROWS = Path("cost", "rows.jsonl")
MEMORY_STEPS = 8  # tokens decoded while memory is watched: it does not move from one to the next
LARGEST = 0  # a batch of as many sequences as fit


@dataclass(frozen=True)
class CostRequest:
    """A cost suite, and what is changed of it. What is left empty is the suite's.

    Raises:
        BadRequest: a field that makes no sense by itself.
    """

    suite: str = "cost-small"
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()  # tokens of the prompts
    batches: tuple[int, ...] = ()  # sequences decoded together; LARGEST: as many as fit
    decodes: tuple[str, ...] = ()  # eager | graph | compiled
    new_tokens: int | None = None
    rounds: int | None = None
    out: Path = OUT
    plugins: tuple[Path, ...] = ()
    device: str | None = None
    dtype: str | None = None
    cluster: WorkerOptions | None = None  # None, or workers here: in processes of this one

    def __post_init__(self) -> None:
        tell_apart(self, ("models", "methods", "budgets", "contexts", "batches", "decodes"))
        at_least(self, rounds=1)
        if self.new_tokens is not None and self.new_tokens < 2:
            raise BadRequest("a cost suite needs 2 new tokens at least: the first is timed apart")
        if any(context < 1 for context in self.contexts) or any(batch < LARGEST for batch in self.batches):
            raise BadRequest("--contexts and --batches must be whole numbers above 0")
        if unknown := [name for name in self.decodes if name not in DECODES]:
            raise BadRequest(f"--decode {unknown[0]!r} must be some of {', '.join(DECODES)}, with commas")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadRequest(f"no dtype {self.dtype!r}; known: {', '.join(DTYPES)}")


@dataclass(frozen=True)
class CostCell:
    """What is measured. Its JSON is the row's identity, beside the environment."""

    model: str
    method: str
    budget: str  # "" for full
    context: int  # tokens
    batch: int  # 0: the largest that fits
    new_tokens: int
    dtype: str
    device: str
    threads: int  # of the CPU
    what: str = "latency"  # latency | memory
    decode: str = "eager"  # eager | graph | compiled, see harness/engine/static_decode.py
    round: int = 0
    plugins: tuple[str, ...] = ()  # files that the method or model comes from


@dataclass(frozen=True)
class CostPlan:
    """How many cells `run` would measure."""

    suite: str
    cells: int
    memory: int  # of these
    latency: int
    finished: int


def cost_behind(request: RunRequest) -> CostRequest | None:
    """The cost suite behind a quality suite, if there is one and nothing of the request was narrowed.

    Of several shards the first has it: cells are not divided, and two processes would disturb each other's times.
    """
    suite = SUITES.get(request.suite)
    if suite is None or not suite.cost or narrowed(request) or request.shard.number > 1:
        return None
    shared = {name: getattr(request, name) for name in ("out", "plugins", "device", "dtype", "cluster")}
    return CostRequest(suite.cost, **shared)


def measure_here(request: CostRequest, registry: Registry) -> int:
    """Measures what has no row yet, and gives how many cells failed.

    Raises:
        UserError: the request makes no sense.
        StoreError: the folder cannot be written to.
    """
    from tqdm import tqdm

    from harness.env import record_environment
    from harness.models.load import one_device
    from results.store import append_line

    device = one_device(request.device, "a cost suite")
    env = record_environment(request.out, device)
    cells, _ = _left_to_do(request, registry, env)
    failed = 0
    with (
        tqdm(cells.items(), unit="cell", desc="cost", disable=not cells, file=sys.stderr) as bar,
        forks(_command(), _environment(), HOUR) as imported,
    ):
        shared = imported if device.type == "cpu" and hasattr(os, "fork") else None
        for row_id, cell in bar:
            bar.set_postfix_str(f"{cell.what} {cell.decode} {cell.method} {cell.budget} {cell.context}", refresh=False)
            row = row_of(row_id, cell, env, run_cell(cell, shared))
            failed += row["status"] == "failed"
            append_line(request.out / ROWS, json.dumps(row))
    return failed


def row_of(row_id: str, cell: CostCell, env: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a cell that was measured."""
    shown = asdict(replace(cell, plugins=tuple(Path(path).name for path in cell.plugins)))  # no folder of a machine
    return {"id": row_id, "cell": shown, "env": env, "sources": sources_of(cell), **found}


def plan_cost(request: CostRequest, registry: Registry) -> CostPlan:
    """What `run_cost` would do; runs and writes nothing."""
    from harness.env import environment, environment_id
    from harness.models.load import one_device

    left, every = _left_to_do(request, registry, environment_id(environment(one_device(request.device, "a cost suite"))))
    memory, latency = (sum(cell.what == what for cell in left.values()) for what in ("memory", "latency"))
    return CostPlan(request.suite, len(left), memory, latency, every - len(left))


def _left_to_do(request: CostRequest, registry: Registry, env: str) -> tuple[dict[str, CostCell], int]:
    """The cells without a row, by the row's id, and how many there are in all."""
    asked, done = cells_asked(request, registry, env), rows_done(request.out)
    return {row_id: cell for row_id, cell in asked.items() if row_id not in done}, len(asked)


def rows_done(out: Path) -> set[str]:
    """Ids of the rows that need not be measured again."""
    from results.store import read_costs

    return {row["id"] for row in read_costs(out) if row["status"] in ("ok", "skipped")}


def cells_asked(request: CostRequest, registry: Registry, env: str) -> dict[str, CostCell]:
    """Every cell by its row's id, in this environment."""
    from harness.models.load import check_name, dtype_of, one_device, source_of

    suite = cost_suite_of(request, registry)
    for name in suite.models:
        check_name(name, registry)
    device = one_device(request.device, "a cost suite")
    dtype = str(dtype_of(request.dtype, device)).removeprefix("torch.")
    plugins = tuple(str(Path(path).resolve()) for path in request.plugins)
    every = [replace(cell, plugins=plugins) for cell in cells_of(suite, registry, dtype, str(device))]
    weights = {name: source_of(name) for name in suite.models}
    return {identity(cell, env, weights[cell.model]): cell for cell in every}


def cost_suite_of(request: CostRequest, registry: Registry) -> CostSuite:
    """The suite, with what the request changes of it.

    Raises:
        BadRequest, UnknownChoice: no such suite, a budget or method that makes no sense.
    """
    if request.suite not in COST_SUITES:
        raise BadRequest(f"no cost suite {request.suite!r}; known: {', '.join(COST_SUITES)}")
    names = ("models", "methods", "budgets", "contexts", "batches", "decodes", "new_tokens", "rounds")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(request, name)) not in (None, ())}
    suite = replace(COST_SUITES[request.suite], **changes)
    try:
        for budget in suite.budgets:
            Budget.parse(budget)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    for method in suite.methods:
        registry.method(method)
    return suite


def cells_of(suite: CostSuite, registry: Registry, dtype: str, device: str) -> Iterator[CostCell]:
    """Memory once a cell, decoded eagerly; then the rounds of latency, every cell once a round: what drifts drifts for all."""
    import torch

    threads = torch.get_num_threads()
    asked = []
    for model, context, batch, method in product(suite.models, suite.contexts, suite.batches, suite.methods):
        budgets: Sequence[str] = suite.budgets if registry.method(method)[1].takes_budget else ("",)
        sizes = (context, batch, suite.new_tokens, dtype, device, threads)
        asked += [CostCell(model, method, budget, *sizes) for budget in budgets]
    yield from (replace(cell, what="memory", new_tokens=min(MEMORY_STEPS, cell.new_tokens)) for cell in asked)
    for number in range(suite.rounds):
        yield from (replace(cell, round=number, decode=decode) for cell in asked for decode in suite.decodes)


def identity(cell: CostCell, env: str, weights: str = "") -> str:
    """Times belong to an environment: another machine, or other versions, measure anew. So does another text of a plugin.

    Args:
        weights: what tells the model's weights from others of its name; "" for one of the suite's own.
    """
    asked = [asdict(replace(cell, plugins=())), env, sources_of(cell), *([weights] if weights else [])]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]


def sources_of(cell: CostCell) -> list[str]:
    """Hashes of the plugins' texts."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in cell.plugins]


def run_cell(cell: CostCell, imported: Forks | None = None) -> dict[str, Any]:
    """What the cell's own process printed. Where it could not capture its step: what an eager one's printed, and why.

    Args:
        imported: where that process is forked from; None: it is started from nothing.
    """
    found = _in_a_process(cell, imported)
    if found["status"] == "fell back":
        return _in_a_process(replace(cell, decode="eager"), imported) | {"fell_back": found["reason"]}
    return found


def _command(*more: str) -> list[str]:
    return [sys.executable, "-m", "harness.cost", *more]


def _environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": paths}


def _in_a_process(cell: CostCell, imported: Forks | None) -> dict[str, Any]:
    """What it printed, or why it printed nothing. The process ends with this one, however this one ends."""
    told = json.dumps(asdict(cell))
    try:
        if imported is not None:
            ran = imported.measure(told)
        else:
            ran = subprocess.run(_command(told), env=_environment(), capture_output=True, text=True, timeout=HOUR, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"no result after {HOUR:.0f} s"}
    if ran.returncode < 0:
        return {"status": "failed", "reason": f"its process was ended by signal {-ran.returncode}: too little memory?"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        said = ran.stderr.strip().splitlines()
        return {"status": "failed", "reason": said[-1][:300] if said else f"its process ended with code {ran.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
