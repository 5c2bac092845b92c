"""Cost cells, here or on a cluster: there on one of its nodes, one after the other, and nothing beside them.

The worker holds a GPU and all cores of its node, so that no other worker of the cluster disturbs the times; and since one worker
measures all cells, no two devices are mixed. Each cell has a process of its own there, as it has here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from harness.cluster.job import Listed
from harness.cluster.options import RayOptions
from harness.cluster.plugins import PluginFile
from harness.cost.request import ROWS, CostCell, CostRequest, cells_asked, measure_here, row_of, rows_done, run_cell
from harness.env import environment, environment_id, write_environment
from harness.errors import BadRequest
from harness.models.load import one_device
from harness.registry import Registry, registry_of
from results.store import append_line


@dataclass(frozen=True)
class Measured:
    """A cell, as a unit; the cells keep the order of the suite."""

    id: str
    cell: CostCell
    env: str
    part: str = "cost"
    size: float = 1.0
    group: str = "cost"


@dataclass(frozen=True)
class CostJob:
    """What the worker does."""

    request: CostRequest
    plugins: tuple[PluginFile, ...] = ()

    def open(self, part: str) -> CostRequest:
        return replace(self.request, plugins=tuple(file.here() for file in self.plugins))

    def list(self, opened: CostRequest) -> Listed:
        found = environment(one_device(opened.device, "a cost suite"))
        env = environment_id(found)
        cells = cells_asked(opened, registry_of(opened.plugins), env)
        return Listed([Measured(row, cell, env) for row, cell in cells.items()], found)

    def run(self, opened: CostRequest, unit: Measured) -> dict[str, Any]:
        return row_of(unit.id, unit.cell, unit.env, run_cell(unit.cell))


class CostLedger:
    """Rows of costs as they come."""

    def __init__(self, request: CostRequest) -> None:
        self.out, self.failed = request.out, 0
        self.bar: Any = tqdm(total=0, unit="cell", desc="cost", file=sys.stderr)

    def listed(self, part: str, found: Listed) -> Sequence[Measured]:
        write_environment(self.out, found.about)
        done = rows_done(self.out)
        left = [unit for unit in found.units if unit.id not in done]
        self.bar.total = len(left)
        return left

    def claim(self, unit: Measured) -> bool:
        return True

    def left(self, unit: Measured) -> Measured:
        return unit

    def back(self, unit: Measured) -> None:
        """Nothing was claimed."""

    def done(self, unit: Measured, found: dict[str, Any], seconds: float) -> None:
        self.failed += found["status"] == "failed"
        append_line(self.out / ROWS, json.dumps(found))
        self.bar.update(1)

    def lost(self, unit: Measured, reason: str) -> None:
        self.done(unit, row_of(unit.id, replace(unit.cell, plugins=()), unit.env, {"status": "failed", "reason": reason}), 0.0)

    def opened(self, part: str, seconds: float) -> None:
        """Nothing is loaded beforehand: each cell's process loads its model."""

    def refused(self, part: str, refusal: Exception) -> None:
        raise refusal


def run_cost(request: CostRequest, registry: Registry) -> int:
    """Measures what has no row yet, here or on a node of a cluster, and gives how many cells failed.

    Raises:
        UserError: the request makes no sense; no such cluster, or a node that differs from this one.
        StoreError: the folder cannot be written to.
    """
    if request.cluster is None or request.cluster.here:
        return measure_here(request, registry)
    return _measure_away(request)


def _measure_away(request: CostRequest) -> int:
    from harness.cluster.drive import Driver
    from harness.cluster.places import places_for
    from harness.cluster.ray_crew import RayCrew, check_nodes, connected, machines

    assert isinstance(request.cluster, RayOptions)
    plugins = tuple(PluginFile.read(path) for path in request.plugins)
    with connected(request.cluster):
        where = places_for(replace(request.cluster, workers=1), machines(), request.device)
        if where.gpus > 1:
            raise BadRequest(f"--gpus-per-worker {where.gpus}: a cost cell is measured on one GPU")
        check_nodes(where, [name for name in request.models if "/" in name])
        ledger = CostLedger(request)
        try:
            Driver(["cost"], ledger, RayCrew(CostJob(request, plugins), where)).run()
        finally:
            ledger.bar.close()
    return ledger.failed
