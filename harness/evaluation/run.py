"""The loop of a run: each unit's cells from one prefill, a record a cell, stored as they are finished."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from benchmarks.base import NLL, Task, embedded_can
from benchmarks.data import BadData
from harness.cache import Arena
from harness.engine.generate import Answer
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.engine.reach import UnsupportedModel
from harness.env import record_environment
from harness.errors import BadRequest, first_line
from harness.evaluation.artifacts import record_artifacts, record_routing
from harness.evaluation.head_scores import with_head_scores
from harness.evaluation.judge import judge_answers
from harness.evaluation.lm_eval_replay import replay
from harness.evaluation.plan import (
    Grid,
    Opened,
    Plan,
    Unit,
    answer_tokens,
    check_shares,
    check_tasks,
    checked,
    grids_of,
    marked,
    opened,
    plan_of,
    requests_behind,
    units,
)
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.request import RunRequest
from harness.evaluation.sweep import CELL_BYTES, NOT_A_NUMBER, Cell, Outcome, Sweep
from harness.families import CannotConvert, CannotStore
from harness.models.gguf import BadGguf
from harness.models.load import check_name, load_model
from harness.registry import Registry
from harness.storage import HALF
from results.record import Record, Status
from results.store import Store


@dataclass
class Tally:
    """Cells of a run, by what became of them."""

    ok: int = 0
    skipped: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        setattr(self, record.status, getattr(self, record.status) + 1)
        if record.reason:
            self.reasons[record.reason] = self.reasons.get(record.reason, 0) + 1


@dataclass
class Ran:
    """What came of a request."""

    failed: int = 0  # cells, and models that were left out
    keys: set[str] = field(default_factory=set)  # ids of all rows that were asked for, finished before or not


def run_request(request: RunRequest, registry: Registry) -> Ran:
    """Runs what has no row yet, model by model.

    Raises:
        UserError: the request makes no sense, or none of its models can be used.
        StoreError: the folder cannot be written to.
    """
    grids = grids_of(request, registry)
    store = Store(request.out)
    keep_freed_memory()
    for name in grids:
        check_name(name, registry)
    ran = Ran()
    refused: list[Exception] = []
    for name, grid in grids.items():
        model: Model | None = None  # the last one's memory is free before the next is loaded
        try:
            model = load_model(name, request, registry)
            grid = with_head_scores(grid, model, request.head_scores, request.data_dir)
            check_shares(model, grid)
            check_tasks(model, grid)
            found = checked(model, units(model, grid, store))
        except (BadRequest, CannotConvert, CannotStore, UnsupportedModel) as refusal:
            refused.append(refusal)
            if len(refused) == len(grids):  # nothing is left to run
                raise refused[0] from None
            print(f"{name}: skipped, {refusal}", file=sys.stderr)
            ran.failed += 1
            continue
        tally = _run_on(model, request, grid, found, store, ran.keys)
        replay(request.out, grid)
        ran.failed += tally.failed
        print(f"{name}: {tally.ok} cells done, {tally.skipped} skipped, {tally.failed} failed", file=sys.stderr)
        for reason, count in tally.reasons.items():
            print(f"  {count} x {reason}", file=sys.stderr)
    return ran


def run_behind(request: RunRequest, registry: Registry) -> int:
    """Runs the suites behind a request's own, and gives how many cells failed. What is not here is left out, and said so."""
    failed = 0
    for behind in requests_behind(request):
        try:
            failed += run_request(behind, registry).failed
        except (BadGguf, BadData) as missing:
            print(f"suite {behind.suite} is left out: {missing}", file=sys.stderr)
    return failed


def _run_on(model: Model, request: RunRequest, grid: Grid, found: Iterator[Unit], store: Store, keys: set[str]) -> Tally:
    env = record_environment(request.out, model.device, model.checked)
    record_artifacts(request.out, grid)
    sweeps = Sweeps(model, grid.fidelity, request.cell_bytes or CELL_BYTES)
    tally = Tally()
    with tqdm(total=grid.size, unit="cell", desc=model.name, delay=1, file=sys.stderr) as bar:
        left = grid.size
        for unit in in_turn(found, store):
            keys |= {key.id for key in unit.keys.values()}
            record_routing(request.out, model, unit)
            left -= len(unit.finished)
            bar.total = left  # what was finished before takes no time, and is no part of the time left
            for record in run_unit(sweeps, unit, env):
                store.write(record)
                tally.add(record)
                bar.update(1)
        bar.total = bar.n  # a text may have had fewer pieces than were asked for
    return tally


def in_turn(found: Iterator[Unit], store: Store) -> Iterator[Unit]:
    """The units, each claimed while it is worked on: another process in the same folder takes others. What was claimed elsewhere
    comes last, with what is then left of it, so that nothing stays undone where the other process is killed.
    """
    elsewhere: list[Unit] = []
    for unit in found:
        if not unit.left:
            yield unit
            continue
        with store.claim(unit.name, wait=False) as mine:
            if mine:
                yield marked(unit, store)  # it may have been finished since it was listed
            else:
                elsewhere.append(unit)
    if elsewhere:
        print(f"another process in {store.out} has {len(elsewhere)} of the prompts in hand; waiting for it", file=sys.stderr)
    for unit in elsewhere:
        with store.claim(unit.name):
            yield marked(unit, store)


def plans_of(request: RunRequest, registry: Registry) -> list[Plan]:
    """What `run` would do on each model; runs nothing and writes nothing."""
    store = Store(request.out, reading=True) if (request.out / "rows").is_dir() else None
    plans = []
    for name, grid in grids_of(request, registry).items():
        model = load_model(name, request, registry)
        plans.append(plan_of(model, with_head_scores(grid, model, request.head_scores, request.data_dir), store))
    return plans


def judge_request(request: RunRequest, registry: Registry) -> int:
    """Has the judge rate what is stored of this request, and gives how many answers it could not be asked about."""
    if request.judge is None:
        return 0
    tasks: dict[str, Task] = {}
    for grid in grids_of(request, registry).values():
        tasks |= {grid.benchmark_name(label): task for label, task in grid.tasks.items()}
    return judge_answers(request.judge, tasks, request.out).statuses["unreachable"]


@dataclass
class Sweeps:
    """The sweeps of one model, by protocol and seed: they take turns in one memory."""

    model: Model
    fidelity: bool = True
    cell_bytes: int = CELL_BYTES
    arena: Arena = field(default_factory=Arena)
    _made: dict[tuple[Protocol, int], Sweep] = field(default_factory=dict)

    def of(self, unit: Unit) -> Sweep:
        where = (unit.protocol, unit.seed)
        if where not in self._made:
            settings = (self.cell_bytes, self.fidelity, unit.seed)
            self._made[where] = Sweep(self.model, unit.protocol, *settings, arena=self.arena)
        return self._made[where]


def run_unit(sweeps: Sweeps, unit: Unit, env: str) -> Iterator[Record]:
    """The records of a unit's cells that have no row yet, as they are finished."""
    if not unit.left:
        return
    model = sweeps.model
    found = opened(model, unit)
    for cell, outcome in _outcomes(sweeps.of(unit), unit, found):
        try:
            yield record_of(model, unit, found.prompts, cell, outcome, env)
        except Exception as error:  # a benchmark's own scoring, which may be a plugin's or lm-eval's
            reason = f"scoring: {type(error).__name__}: {first_line(error)}"
            yield Record(unit.keys[cell], "failed", env, reason=reason, columns=unit.example.columns)


def _outcomes(sweep: Sweep, unit: Unit, found: Opened) -> Iterator[tuple[Cell, Outcome]]:
    left = unit.left
    yield from ((cell, Outcome(skipped=found.skipped[cell])) for cell in left if cell in found.skipped)
    cells = [cell for cell in left if cell not in found.skipped]
    if not found.prompts or not cells:
        return
    done: set[Cell] = set()
    first: dict[Cell, Outcome] = {}  # of all prompts but the last
    most = answer_tokens(unit.example, unit.protocol)
    try:
        for prompt in found.prompts[:-1]:
            for cell, outcome in sweep.example(prompt, cells, most):
                first[cell] = first[cell].joined(outcome) if cell in first else outcome
        for cell, outcome in sweep.example(found.prompts[-1], cells, most):
            done.add(cell)
            yield cell, first[cell].joined(outcome) if cell in first else outcome
    except (ValueError, RuntimeError, IndexError) as error:  # where a prompt may fail without ending the run
        reason = f"{type(error).__name__}: {first_line(error)}"
        yield from ((cell, Outcome(failed=reason)) for cell in cells if cell not in done)


def record_of(model: Model, unit: Unit, prompts: list[Prompt], cell: Cell, outcome: Outcome, env: str) -> Record:
    key, can = unit.keys[cell], embedded_can(unit.task)
    reason = outcome.failed or outcome.skipped
    if reason or not prompts:
        status: Status = "failed" if outcome.failed else "skipped"
        return Record(key, status, env, reason=reason, columns=unit.example.columns, embedded_can=can)
    assert outcome.answer is not None and outcome.counts is not None
    text = said(model, prompts[0], outcome.answer)
    end, held = outcome.answer.end, outcome.answer.held
    whole = sum(model.parent_shape.full_bytes(prompt.context) for prompt in prompts)
    full = whole * HALF // model.parent_shape.itemsize if outcome.packed else whole
    scored = (NLL,) if prompts[0].forced else unit.task.metrics
    metrics = {NLL.name: outcome.fidelity["loss"]} if prompts[0].forced else unit.task.score(str(text), unit.example)
    if wrong := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        return Record(key, "failed", env, reason=f"{NOT_A_NUMBER}: {', '.join(wrong)}", answer=text, columns=unit.example.columns)
    return Record(
        key,
        "ok",
        env,
        answer=text,
        stop_reason=outcome.answer.stop_reason,
        metrics=metrics,
        lower_is_better=[metric.name for metric in scored if not metric.higher_is_better],
        right_or_wrong=[metric.name for metric in scored if metric.right_or_wrong],
        embedded_can=can,
        fidelity=outcome.fidelity,
        columns=unit.example.columns,
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        new_tokens=len(outcome.answer.tokens),
        compressed=outcome.compressed,
        entries_asked=outcome.entries_asked,
        entries=outcome.counts.entries,
        bytes_kept=outcome.counts.bytes_kept,
        bytes_allocated=outcome.counts.bytes_allocated,
        entries_end=end.entries if end else None,
        bytes_kept_end=end.bytes_kept if end else None,
        entries_peak=held.entries_peak if held else None,
        bytes_kept_peak=held.bytes_peak if held else None,
        entries_mean=held.entries_mean if held else None,
        bytes_kept_mean=held.bytes_mean if held else None,
        bytes_full=full,
        kept=outcome.kept if key.example == 0 else None,
    )


def said(model: Model, prompt: Prompt, answer: Answer) -> str | None:
    """The answer in words, up to a text that ends it; or, where likelihoods were asked for, those as JSON, in order."""
    if prompt.forced:
        return None
    if prompt.asks_likelihoods:
        found = [answer.likelihoods[number] for number in sorted(answer.likelihoods)]
        return json.dumps([[one.logprob, one.greedy, one.tokens] for one in found])
    text = model.words(answer.tokens)
    return text[: min((at for end in prompt.until if (at := text.find(end)) >= 0), default=len(text))]
