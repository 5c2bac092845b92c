"""`run --precision W`: examples are added, twice as many each time, until every interval is as narrow, or up to the limit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from benchmarks.base import NLL, Task
from harness.errors import BadRequest
from harness.evaluation.plan import Grid, grids_of
from harness.evaluation.request import RunRequest, Shard
from harness.evaluation.run import Ran, run_request
from harness.registry import Registry
from reports.sequential import Watched, half_width, read_watched, sizes_up_to, write_watched
from reports.tables import Line, lines
from results.store import read_rows

WIDEST = 0.5  # half of a range


def run_until_narrow(request: RunRequest, registry: Registry, precision: float) -> Ran:
    """Runs the request at growing numbers of examples. A benchmark is left alone once its intervals on every model are narrow.

    Raises:
        BadRequest: a precision that is none, or examples that are shared with other processes.
    """
    if not 0 < precision <= WIDEST:
        raise BadRequest(
            f"--precision {precision:g} must be above 0 and at most {WIDEST:g}: half of an interval, of a range of 1"
        )
    if request.shard != Shard():
        raise BadRequest("--precision looks at all examples: leave --shard out")
    grids = grids_of(request, registry)
    names = {label: grid.benchmark_name(label) for grid in grids.values() for label in grid.tasks}
    units = {names[label]: _unit(task) for grid in grids.values() for label, task in grid.tasks.items()}
    sizes = sizes_up_to(max(grid.limit for grid in grids.values()))
    known = {(one.model, one.benchmark): one for one in read_watched(request.out)}
    ran, left = Ran(), list(names)
    for size in sizes:
        part = run_request(replace(request, benchmarks=tuple(left), limit=size), registry)
        ran.failed += part.failed
        ran.keys |= part.keys
        found = _watched(request, ran.keys, (precision, tuple(sizes)), known, units)
        write_watched(request.out, found)
        wide = {one.benchmark for one in found if not one.narrow}
        ended = {label for label in left if all(_ended(grid, label, size) for grid in grids.values())}
        _tell(found, size, {names[label] for label in left})
        left = [label for label in left if names[label] in wide and label not in ended]
        if not left:
            break
    return ran


def _ended(grid: Grid, label: str, size: int) -> bool:
    """Has the benchmark no more examples?"""
    most = grid.tasks[label].size if label in grid.tasks else 0
    return most is not None and size >= most


def _unit(task: Task) -> str:
    return NLL.unit if task.forced else task.metrics[0].unit


def _watched(
    request: RunRequest,
    keys: set[str],
    asked: tuple[float, tuple[int, ...]],
    known: Mapping[tuple[str, str], Watched],
    units: Mapping[str, str],
) -> list[Watched]:
    """What the rows so far come to; whoever looked before, in another run, is counted too."""
    precision, sizes = asked
    rows = [row for row in read_rows(request.out) if row.key.id in keys]
    where = sorted({(row.key.model, row.key.benchmark) for row in rows})
    every = {at: tuple(sorted({*sizes, *(known[at].sizes if at in known else ())})) for at in where}
    grouped: dict[tuple[str, str], list[Line]] = {at: [] for at in where}
    for line in lines(rows, looks={at: len(found) for at, found in every.items()}):
        grouped[line.at.asked.model, line.at.asked.benchmark].append(line)
    return [_one(at, grouped[at], precision, every[at], units[at[1]]) for at in where]


def _one(at: tuple[str, str], found: Sequence[Line], precision: float, sizes: tuple[int, ...], unit: str) -> Watched:
    widths = [half_width(line, unit) for line in found if line.score is not None]
    widest = max(widths, default=float("inf"))
    examples = max((line.n for line in found), default=0)
    return Watched(*at, precision, sizes, examples, widest if isfinite(widest) else None)


def _tell(found: Sequence[Watched], size: int, looked_at: set[str]) -> None:
    for one in found:
        if one.benchmark in looked_at:
            wide = "no width yet" if one.widest is None else f"widest interval ±{one.widest:.3f}"
            verdict = "narrow enough" if one.narrow else f"wanted: ±{one.half_width:g}"
            print(f"{one.model}, {one.benchmark}: {min(size, one.examples)} examples, {wide}, {verdict}", file=sys.stderr)
