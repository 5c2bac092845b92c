"""One plain function from a request and one of its units to records: the loop on one machine calls it, and so do workers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.base import NLL, context_of, embedded_can
from harness.cache import Arena
from harness.engine.generate import Answer
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.env import environment, environment_id
from harness.errors import first_line
from harness.evaluation.head_scores import with_head_scores
from harness.evaluation.plan import (
    Grid,
    Opened,
    Unit,
    answer_tokens,
    check_shares,
    check_tasks,
    grids_of,
    opened,
)
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.request import RunRequest
from harness.evaluation.sweep import CELL_BYTES, NOT_A_NUMBER, Cell, Outcome, Sweep
from harness.models.load import load_model
from harness.registry import registry_of
from harness.storage import HALF
from results.record import Column, Record, Status


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


@dataclass
class Loaded:
    """A model of a request with what all its units need: the grid with the model's head scores, sweeps, and the environment."""

    model: Model
    grid: Grid
    sweeps: Sweeps
    environment: dict[str, object]
    env: str  # its id

    @classmethod
    def of(cls, model: Model, grid: Grid, request: RunRequest) -> Loaded:
        found = environment(model.device, model.checked)
        sweeps = Sweeps(model, grid.fidelity, request.cell_bytes or CELL_BYTES)
        return cls(model, grid, sweeps, found, environment_id(found))


def load(request: RunRequest, grid: Grid) -> Loaded:
    """Loads the model of a grid, and checks what can be checked before anything is run on it.

    Raises:
        UserError: the model cannot be used, or the grid makes no sense on it.
    """
    keep_freed_memory()
    model = load_model(grid.variant, request, grid.registry)
    grid = with_head_scores(grid, model, request.head_scores, request.data_dir)
    check_shares(model, grid)
    check_tasks(model, grid)
    return Loaded.of(model, grid, request)


def run_unit(request: RunRequest, unit: Unit, loaded: Loaded | None = None) -> Iterator[Record]:
    """The records of a unit's cells that have no row yet, as they are finished.

    Args:
        loaded: the unit's model, which its other units share; None: it is loaded for this unit alone.
    """
    if not unit.left:
        return
    if loaded is None:
        loaded = load(request, grids_of(request, registry_of(request.plugins))[unit.variant])
    model, env = loaded.model, loaded.env
    found = opened(model, unit)
    for cell, outcome in _outcomes(loaded.sweeps.of(unit), unit, found):
        try:
            yield record_of(model, unit, found.prompts, cell, outcome, env)
        except Exception as error:  # a benchmark's own scoring, which may be a plugin's or lm-eval's
            reason = f"scoring: {type(error).__name__}: {first_line(error)}"
            yield Record(unit.keys[cell], "failed", env, reason=reason, columns=columns_of(unit))


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


def columns_of(unit: Unit) -> dict[str, Column]:
    """The example's, and which question on its context it is, where there are several; numbered from 1."""
    example = unit.example
    if len(example.turns) < 2:
        return example.columns
    return example.columns | {"question": example.turn + 1, "shares": context_of(unit.task, example.index)}


def record_of(model: Model, unit: Unit, prompts: list[Prompt], cell: Cell, outcome: Outcome, env: str) -> Record:
    key, can = unit.keys[cell], embedded_can(unit.task)
    reason = outcome.failed or outcome.skipped
    if reason or not prompts:
        status: Status = "failed" if outcome.failed else "skipped"
        return Record(key, status, env, reason=reason, columns=columns_of(unit), embedded_can=can)
    assert outcome.answer is not None and outcome.counts is not None
    text = said(model, prompts[0], outcome.answer)
    end, held = outcome.answer.end, outcome.answer.held
    whole = sum(model.parent_shape.full_bytes(prompt.context) for prompt in prompts)
    full = whole * HALF // model.parent_shape.itemsize if outcome.packed else whole
    scored = (NLL,) if prompts[0].forced else unit.task.metrics
    metrics = {NLL.name: outcome.fidelity["loss"]} if prompts[0].forced else unit.task.score(str(text), unit.example)
    if wrong := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        return Record(key, "failed", env, reason=f"{NOT_A_NUMBER}: {', '.join(wrong)}", answer=text, columns=columns_of(unit))
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
        fidelity={} if outcome.by_distance else outcome.fidelity,
        by_distance=outcome.by_distance,
        columns=columns_of(unit),
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
