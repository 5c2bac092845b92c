"""Head scores as they are asked for: here, or on workers, where an attempt is a unit and the driver keeps what comes of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from benchmarks.haystack import Haystack
from harness.cache import Arena
from harness.cluster.crews import crew_of
from harness.cluster.drive import Crew, Driver
from harness.cluster.job import Listed
from harness.cluster.plugins import PluginFile, registry_here
from harness.engine.model import Model
from harness.errors import BadRequest
from harness.models.load import check_name
from harness.papers.importance import (
    Attempts,
    Estimate,
    ImportanceRequest,
    Observed,
    Subject,
    attempt,
    estimate_scores,
    observe,
    prepared,
)
from harness.registry import Registry
from methods.headkv import HeadScores


@dataclass(frozen=True)
class Try:
    """An attempt, as a unit."""

    part: str
    number: int
    size: float  # tokens of its prompt

    @property
    def group(self) -> str:
        return str(self.number)


@dataclass
class Subjects:
    """A loaded model, and what its attempts are made from."""

    model: Model
    estimate: Estimate
    haystack: Haystack
    arena: Arena = field(default_factory=Arena)


@dataclass(frozen=True)
class ImportanceJob:
    """What a worker does for an estimate."""

    request: ImportanceRequest
    plugins: tuple[PluginFile, ...] = ()

    def open(self, part: str) -> Subjects:
        return Subjects(*prepared(self.request, registry_here(self.plugins)))

    def list(self, opened: Subjects) -> Listed:
        estimate = opened.estimate
        units = [Try(self.request.model, number, estimate.place(number)[0]) for number in range(estimate.attempts)]
        return Listed(units, (Subject.of(opened.model), estimate))

    def run(self, opened: Subjects, unit: Try) -> Observed:
        assert opened.model.tokenizer is not None  # see `prepared`
        work = attempt(opened.model.tokenizer, opened.estimate, opened.haystack, unit.number)
        return observe(opened.model, work, opened.estimate, opened.arena)


class ImportanceLedger:
    """Attempts as they are finished."""

    def __init__(self, request: ImportanceRequest) -> None:
        self.out = request.path
        self.attempts: Attempts | None = None
        self.lost_one = ""
        self.bar: Any = tqdm(total=request.attempts, unit="attempt", desc=request.model, file=sys.stderr)

    def listed(self, part: str, found: Listed) -> Sequence[Try]:
        subject, estimate = found.about
        self.attempts = Attempts(subject, estimate, self.out)
        self.bar.update(len(self.attempts.done))
        left = set(self.attempts.left)
        return [unit for unit in found.units if unit.number in left]

    def claim(self, unit: Try) -> bool:
        return True

    def left(self, unit: Try) -> Try:
        return unit

    def back(self, unit: Try) -> None:
        """Nothing was claimed."""

    def done(self, unit: Try, found: Observed, seconds: float) -> None:
        assert self.attempts is not None
        self.attempts.add(unit.number, found)
        self.bar.update(1)

    def lost(self, unit: Try, reason: str) -> None:
        self.lost_one = f"attempt {unit.number} {reason}"

    def opened(self, part: str, seconds: float) -> None:
        """How long a model takes to load is not kept here."""

    def refused(self, part: str, refusal: Exception) -> None:
        raise refusal


def estimate_importance(request: ImportanceRequest, registry: Registry) -> HeadScores:
    """Estimates head scores, and keeps them in the request's file.

    Raises:
        UserError: the request makes no sense, or the model answers nothing.
    """
    check_name(request.model, registry)
    out = request.path
    if out.suffix != ".json" or out.is_dir():
        raise BadRequest(f"--out {out} must name a .json file")
    if request.cluster is not None:
        return _on_workers(request)
    model, estimate, haystack = prepared(request, registry)
    with tqdm(total=estimate.attempts, unit="attempt", desc=model.name, file=sys.stderr) as bar:
        return estimate_scores(model, estimate, haystack, out, bar.update)


def _on_workers(request: ImportanceRequest) -> HeadScores:
    assert request.cluster is not None
    plugins = tuple(PluginFile.read(path) for path in request.plugins)

    def job(gpus: int) -> ImportanceJob:
        return ImportanceJob(replace(request, device="auto") if gpus > 1 and request.device is None else request, plugins)

    named = [str(path) for path in (request.model, request.haystack) if path]
    with crew_of(request.cluster, job, request.device, named) as crew:
        return carry_out(request, crew)


def carry_out(request: ImportanceRequest, crew: Crew) -> HeadScores:
    """
    Raises:
        BadRequest: an attempt was given up, so that the scores would not be those that were asked for.
    """
    ledger = ImportanceLedger(request)
    try:
        Driver([request.model], ledger, crew).run()
    finally:
        ledger.bar.close()
    if ledger.lost_one or ledger.attempts is None:
        raise BadRequest(
            f"no scores were written: {ledger.lost_one}; the others are kept, and the same command goes on from there"
        )
    return ledger.attempts.finish()
