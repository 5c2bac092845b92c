"""The loop of a run: each unit's cells from one prefill, a record a cell, stored as they are finished."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from tqdm import tqdm

from benchmarks.base import Task
from benchmarks.data import BadData
from harness.cluster.options import RayOptions, WorkerOptions
from harness.env import write_environment
from harness.evaluation.artifacts import artifacts_of, record_routing, write_artifacts
from harness.evaluation.head_scores import with_head_scores
from harness.evaluation.judge import judge_answers
from harness.evaluation.lm_eval_replay import replay
from harness.evaluation.plan import Plan, Unit, checked, grids_of, marked, plan_of, requests_behind, units
from harness.evaluation.request import RunRequest
from harness.evaluation.tally import LEFT_OUT, Ran, Tally
from harness.evaluation.unit import Loaded, load, run_unit
from harness.models.gguf import BadGguf
from harness.models.load import check_name, load_model
from harness.registry import Registry
from results.store import Store


def run_request(request: RunRequest, registry: Registry) -> Ran:
    """Runs what has no row yet, model by model.

    Raises:
        UserError: the request makes no sense, or none of its models can be used.
        StoreError: the folder cannot be written to.
    """
    grids = grids_of(request, registry)
    store = Store(request.out, own_rows=request.own_rows)
    for name in grids:
        check_name(name, registry)
    if request.cluster is not None:
        from harness.evaluation.spread import run_on_workers

        return run_on_workers(request, grids, store)
    ran = Ran(len(grids))
    for name, grid in grids.items():
        loaded: Loaded | None = None  # the last one's memory is free before the next is loaded
        try:
            loaded = load(request, grid)
            found = checked(loaded.model, units(loaded.model, loaded.grid, store))
        except LEFT_OUT as refusal:
            ran.leave_out(name, refusal)
            continue
        tally = _run_on(loaded, request, found, store, ran.keys)
        replay(request.out, loaded.grid)
        ran.failed += tally.failed
        tally.tell(name)
    return ran


def on_workers(options: WorkerOptions | None) -> AbstractContextManager[None]:
    """Ray is there for several requests, and gone when the block ends. Without it nothing is done."""
    if not isinstance(options, RayOptions):
        return nullcontext()
    from harness.cluster.ray_crew import connected

    return connected(options)


def run_behind(request: RunRequest, registry: Registry) -> int:
    """Runs the suites behind a request's own, and gives how many cells failed. What is not here is left out, and said so."""
    failed = 0
    for behind in requests_behind(request):
        try:
            failed += run_request(behind, registry).failed
        except (BadGguf, BadData) as missing:
            print(f"suite {behind.suite} is left out: {missing}", file=sys.stderr)
    return failed


def _run_on(loaded: Loaded, request: RunRequest, found: Iterator[Unit], store: Store, keys: set[str]) -> Tally:
    write_environment(request.out, loaded.environment)
    write_artifacts(request.out, artifacts_of(loaded.grid))
    tally = Tally()
    with tqdm(total=loaded.grid.size, unit="cell", desc=loaded.model.name, delay=1, file=sys.stderr) as bar:
        left = loaded.grid.size
        for unit in in_turn(found, store):
            keys |= {key.id for key in unit.keys.values()}
            record_routing(request.out, loaded.model, unit)
            left -= len(unit.finished)
            bar.total = left  # what was finished before takes no time, and is no part of the time left
            for record in run_unit(request, unit, loaded):
                store.write(record)
                tally.add(record.status, record.reason)
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
