"""The Python API: a request in, records out as a table."""

from __future__ import annotations

import pandas as pd

from harness.cost.request import CostRequest
from harness.cost.run import run_cost
from harness.errors import BadRequest
from harness.evaluation.conformance import check_all
from harness.evaluation.request import RunRequest
from harness.evaluation.run import run_request
from harness.registry import registry_of
from results.frame import cost_frame, frame
from results.store import read_costs, read_rows


def evaluate(request: RunRequest | CostRequest) -> pd.DataFrame:
    """Runs what has no row yet, and gives every row that the request asks for, finished before or not.

    One line a cell. Of a `RunRequest`: what was asked (model, benchmark, example, method, budget, ...), what came out (status,
    answer, entries, bytes), each metric in a column of its own, and fidelity as `fidelity.kl`, `fidelity.top1`, `fidelity.loss`.
    Of a `CostRequest`: the cell, and its times and bytes. Cells that failed are lines with their reason.

    Raises:
        harness.errors.UserError: the request makes no sense. (Its message is the line that the command line prints.)
    """
    registry = registry_of(request.plugins)
    check_all(registry.plugins)
    if isinstance(request, CostRequest):
        run_cost(request, registry)
        return cost_frame(read_costs(request.out))
    if not isinstance(request, RunRequest):
        raise BadRequest(f"evaluate takes a RunRequest or a CostRequest, not {type(request).__name__}")
    ran = run_request(request, registry)
    return frame([row for row in read_rows(request.out) if row.key.id in ran.keys])
