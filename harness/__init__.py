"""The harness, and its Python API: `evaluate` runs a request and gives its records as a pandas DataFrame.

Everything is imported when it is first asked for, so that `import harness` costs nothing and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.api import evaluate as evaluate
    from harness.cost.request import CostRequest as CostRequest
    from harness.evaluation.request import RunRequest as RunRequest
    from harness.papers.importance import ImportanceRequest as ImportanceRequest
    from harness.papers.reproduce import ReproduceRequest as ReproduceRequest
    from harness.training.request import TrainRequest as TrainRequest

API = {
    "evaluate": "harness.api",
    "RunRequest": "harness.evaluation.request",
    "CostRequest": "harness.cost.request",
    "TrainRequest": "harness.training.request",
    "ImportanceRequest": "harness.papers.importance",
    "ReproduceRequest": "harness.papers.reproduce",
}


def __getattr__(name: str) -> Any:
    if name in API:
        return getattr(import_module(API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
