"""A run on several workers: units by name go out, rows as they are stored come back, and the driver alone writes them.

What crosses the network: the request once a worker; names of units; answers, counts and metrics as lines of JSON. No prompt, no
cache, no weights: a worker makes its examples and loads its models itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.base import Example
from harness.cluster.crews import crew_of
from harness.cluster.drive import Crew, Driver
from harness.cluster.job import Listed
from harness.cluster.plugins import PluginFile, registry_here
from harness.env import environment_id, write_environment
from harness.evaluation.artifacts import artifacts_of, has_routing, routing_file, routing_of, write_artifacts
from harness.evaluation.lm_eval_replay import replay
from harness.evaluation.plan import Grid, Unit, answer_tokens, checked, grids_of, unit_of, units
from harness.evaluation.prompts import Protocol
from harness.evaluation.request import RunRequest
from harness.evaluation.tally import LEFT_OUT, Ran, Tally
from harness.evaluation.unit import Loaded, load, run_unit
from harness.registry import Registry, split
from results.record import Key, Record
from results.store import Row, Store, append_line, file_of, write_json

STEP = 100  # tokens of a prompt that take as long as one of the answers, roughly: only the order of units depends on it
SHARED = 0.9  # of a prompt, at least, is a context that other questions may have too
TIMES = "units.jsonl"  # seconds of units and of models' loading; `bench cluster` reads them
FLUSH = 64  # of its lines at once


@dataclass(frozen=True)
class Named:
    """A unit by name: what a worker makes it from, and by what the driver knows its rows."""

    part: str  # the model as it was asked for
    label: str
    protocol: Protocol
    seed: int
    index: int
    size: float
    group: str
    key: Key = field(compare=False)  # of its first cell
    rows: tuple[str, ...] = field(compare=False)  # ids, in the order of the grid's cells
    finished: frozenset[str] = field(default=frozenset(), compare=False)  # of these

    @property
    def name(self) -> str:
        """As `Unit.name`."""
        return " ".join(sorted(self.rows))


@dataclass(frozen=True)
class About:
    """What a worker says of a model, once."""

    model: str
    revision: str
    environment: dict[str, object]
    artifacts: dict[str, Any]
    routing: dict[str, Any] | None
    cells: tuple[tuple[str, str, str], ...]  # method, its parameters, budget: what tells a unit's keys apart
    files: dict[str, tuple[str, ...]]  # of rows, by a benchmark's label, in the cells' order


@dataclass(frozen=True)
class Done:
    """A unit's rows, and where they were made."""

    rows: list[Row]
    env: str  # id of the environment
    environment: dict[str, object]


@dataclass
class RunJob:
    """What a worker does for a run."""

    request: RunRequest
    plugins: tuple[PluginFile, ...] = ()
    _registry: Registry | None = None

    def open(self, part: str) -> Loaded:
        if self._registry is None:
            self._registry = registry_here(self.plugins)
        return load(self.request, grids_of(self.request, self._registry)[part])

    def list(self, opened: Loaded) -> Listed:
        model, grid = opened.model, opened.grid
        found, routing = [], None
        files: dict[str, tuple[str, ...]] = {}
        cells: tuple[tuple[str, str, str], ...] = ()
        for unit in checked(model, units(model, grid)):
            if routing is None and has_routing(model, unit):
                routing = routing_of(model, unit)
            keys = list(unit.keys.values())
            cells = cells or tuple((key.method, key.params, key.budget) for key in keys)
            files.setdefault(unit.label, tuple(file_of(key) for key in keys))
            rows = tuple(key.id for key in keys)
            where = (grid.variant, unit.label, unit.protocol, unit.seed, unit.example.index)
            found.append(Named(*where, _size(unit), group_of(unit), keys[0], rows))
        about = About(model.name, model.revision, opened.environment, artifacts_of(grid), routing, cells, files)
        return Listed(found, about)

    def run(self, opened: Loaded, unit: Named) -> Done:
        where = (unit.label, unit.protocol, unit.seed, unit.index)
        made = unit_of(opened.model, opened.grid, *where, opened.grid.cells())
        assert made is not None, "it was listed"
        finished = frozenset(cell for cell, row in zip(made.keys, unit.rows, strict=True) if row in unit.finished)
        records = run_unit(self.request, replace(made, finished=finished), opened)
        return Done([Row.of(record) for record in records], opened.env, opened.environment)


def _size(unit: Unit) -> float:
    """Roughly how long a unit takes, in tokens of a prompt."""
    example = unit.example
    if example.piece is not None:
        tokens = example.piece[1] - example.piece[0]
    else:
        tokens = len(example.prompt.encode()) // 4 if example.ids is None else len(example.ids)
    return min(tokens, unit.limit) + STEP * answer_tokens(example, unit.protocol)


def group_of(unit: Unit) -> str:
    """The same for questions on one context."""
    alone = f"{unit.label} {unit.protocol} {unit.seed} {unit.example.index}"
    context = _context(unit.example)
    asked = f"{unit.label} {unit.protocol} {context}" if context else alone
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _context(example: Example) -> str:
    """The text that is read before the question, where it is nearly all of the prompt."""
    if example.ids is not None or example.piece is not None or example.context_end < SHARED * len(example.prompt):
        return ""
    return example.prompt[: example.context_end] if example.context_end < len(example.prompt) else ""


class RunLedger:
    """Rows, artefacts, progress and times of a run: all that is written is written here."""

    def __init__(self, request: RunRequest, grids: Mapping[str, Grid], store: Store, workers: int) -> None:
        self.request, self.grids, self.store, self.out = request, grids, store, request.out
        self.ran = Ran(len(grids))
        self.tallies: dict[str, Tally] = {}
        self.units = 0  # that were done
        self._about: dict[str, About] = {}
        self._claims: dict[Named, ExitStack] = {}
        self._environments: set[str] = set()
        self._times: list[dict[str, Any]] = []
        cells = sum(grid.size for grid in grids.values())
        desc = f"{workers} worker{'s' * (workers != 1)}"
        self.bar: Any = tqdm(total=cells, unit="cell", desc=desc, delay=1, file=sys.stderr)

    def listed(self, part: str, found: Listed) -> Sequence[Named]:
        about: About = found.about
        self._about[part], self.tallies[part] = about, Tally()
        self._environment(environment_id(about.environment), about.environment)
        write_artifacts(self.out, about.artifacts)
        if about.routing is not None:
            path = routing_file(self.out / "routing", about.model, about.revision)
            if not path.exists():
                write_json(path, about.routing)
        told = [self._told(unit) for unit in found.units]
        self.ran.keys |= {row for unit in told for row in unit.rows}
        left = sum(len(unit.rows) - len(unit.finished) for unit in told)
        self.bar.total += left - self.grids[part].size  # what was finished before takes no time
        self.bar.refresh()
        return [unit for unit in told if len(unit.finished) < len(unit.rows)]

    def claim(self, unit: Named) -> bool:
        claims = ExitStack()
        if not claims.enter_context(self.store.claim(unit.name, wait=False)):
            claims.close()
            return False
        self._claims[unit] = claims
        return True

    def left(self, unit: Named) -> Named | None:
        told = self._told(unit)
        self.bar.update(len(told.finished) - len(unit.finished))  # by another process meanwhile
        return None if len(told.finished) == len(told.rows) else told

    def back(self, unit: Named) -> None:
        if unit in self._claims:
            self._claims.pop(unit).close()

    def done(self, unit: Named, found: Done, seconds: float) -> None:
        self._environment(found.env, found.environment)
        self._add(unit, found.rows)
        self.units += 1
        key = unit.key
        asked = {"model": unit.part, "benchmark": key.benchmark, "prompt": key.prompt, "example": key.example, "seed": key.seed}
        self._time({**asked, "cells": len(found.rows), "seconds": round(seconds, 4), "size": unit.size})

    def lost(self, unit: Named, reason: str) -> None:
        about = self._about[unit.part]
        env = environment_id(about.environment)
        told = self._told(unit)
        failed = [
            Record(replace(unit.key, method=method, params=params, budget=budget), "failed", env, reason=reason)
            for row, (method, params, budget) in zip(unit.rows, about.cells, strict=True)
            if row not in told.finished
        ]
        self._add(unit, [Row.of(record) for record in failed])

    def opened(self, part: str, seconds: float) -> None:
        self._time({"model": part, "load_s": round(seconds, 4)})

    def refused(self, part: str, refusal: Exception) -> None:
        if not isinstance(refusal, LEFT_OUT):
            raise refusal
        self.ran.leave_out(part, refusal)

    def close(self) -> None:
        """Keeps what is not yet written, and lets go of what was claimed."""
        for unit in list(self._claims):
            self.back(unit)
        self._flush()
        self.bar.close()

    def tell(self) -> Ran:
        """What came of it all, model by model in the order of the request."""
        for part, grid in self.grids.items():
            if part in self.tallies:
                replay(self.out, grid)
                self.ran.failed += self.tallies[part].failed
                self.tallies[part].tell(part)
        return self.ran

    def _told(self, unit: Named) -> Named:
        files = self._about[unit.part].files[unit.label]
        return replace(unit, finished=self.store.which(files, unit.rows))

    def _add(self, unit: Named, rows: Sequence[Row]) -> None:
        self.store.add(rows)
        self.back(unit)
        for row in rows:
            self.tallies[unit.part].add(row.status, row.reason)
        self.bar.update(len(rows))

    def _environment(self, env: str, found: dict[str, object]) -> None:
        if env not in self._environments:
            write_environment(self.out, found)
            self._environments.add(env)

    def _time(self, line: dict[str, Any]) -> None:
        self._times.append(line)
        if len(self._times) >= FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._times:
            append_line(self.out / TIMES, "\n".join(map(json.dumps, self._times)))
            self._times.clear()


def run_on_workers(request: RunRequest, grids: Mapping[str, Grid], store: Store) -> Ran:
    """As `run_request`, on workers.

    Raises:
        BadRequest: the workers that were asked for cannot be had, or a node differs from this one.
    """
    assert request.cluster is not None
    plugins = tuple(PluginFile.read(path) for path in request.plugins)

    def job(gpus: int) -> RunJob:
        return RunJob(replace(request, device="auto") if gpus > 1 and request.device is None else request, plugins)

    with crew_of(request.cluster, job, request.device, paths_of(request, grids)) as crew:
        return carry_out(RunLedger(request, grids, store, crew.size), crew)


def carry_out(ledger: RunLedger, crew: Crew) -> Ran:
    """Runs what a ledger asks for on a crew."""
    start = time.thread_time()
    try:
        Driver(list(ledger.grids), ledger, crew).run()
        ledger._time({"units": ledger.units, "driver_s": round(time.thread_time() - start, 4)})
    finally:
        ledger.close()
    return ledger.tell()


def paths_of(request: RunRequest, grids: Mapping[str, Grid]) -> list[str]:
    """Files and folders that a request names: data, head scores, models, and what settings of benchmarks say."""
    found = [*request.head_scores, *([request.data_dir] if request.data_dir else []), *map(Path, grids)]
    for grid in grids.values():
        for label in grid.tasks:
            found += [Path(part.partition("=")[2] or part) for part in split(label.partition("(")[2].rstrip(")")) if "/" in part]
    return list(dict.fromkeys(map(str, found)))
