"""HeadKV's beta, chosen on examples that are held out, so that nobody tunes on the test. `run_all.py beta`.

The papers' tables report the best beta by the test average; here each budget's beta is the best mean of task means over 15 % of
the examples, all betas' means are written down, and the other 85 % are what `run --examples test` runs on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from benchmarks.base import Metric
from harness.errors import BadRequest
from harness.evaluation.plan import suite_of
from harness.evaluation.request import RunRequest
from harness.evaluation.run import run_request
from harness.registry import Registry
from results.record import Record
from results.store import read_rows, write_json

METHODS = ("headkv_r", "headkv_er", "headkv_r2")
BETAS = (1.005, 1.01, 1.1, 1.2, 1.5, 2.0, 5.0, 10.0)  # the paper's grid


@dataclass(frozen=True)
class Choice:
    """The beta of one method at one budget, and what it was chosen from."""

    model: str
    prompt: str
    method: str
    budget: str
    beta: float
    examples: int  # held out, of all benchmarks together
    means: dict[str, float]  # by beta: the mean of task means; higher is better


@dataclass(frozen=True)
class Chosen:
    """All choices of a request, and the file that holds them."""

    choices: list[Choice]
    path: Path


def choose_beta(request: RunRequest, registry: Registry, betas: Sequence[float] = BETAS) -> Chosen:
    """Runs every beta on the held-out examples, and gives the best of each method and budget.

    Args:
        request: what to run; its methods, or all that have a beta.

    Raises:
        UserError: a method without a beta, a benchmark without a score, or cells that failed.
    """
    named = request.methods or METHODS
    for name in named:
        if registry.method(name)[1].head_scores is None:
            raise BadRequest(f"method {name!r} has no beta to choose; {', '.join(METHODS)} have")
    labels = {name: {beta: _with_beta(name, beta, registry) for beta in betas} for name in named}
    methods = tuple(label for mine in labels.values() for label in mine.values())
    request = replace(request, methods=methods, examples="held_out")
    metrics = {}
    for text in suite_of(request, registry).benchmarks:
        label, task = registry.benchmark(text)
        if not task.metrics:
            raise BadRequest(f"benchmark {text} has no score to choose by")
        metrics[label] = task.metrics[0]
    ran = run_request(request, registry)
    if ran.failed:
        raise BadRequest("some cells failed, so no beta was chosen; see the messages above")
    choices = _choices([row for row in read_rows(request.out) if row.key.id in ran.keys], labels, metrics)
    path = request.out / "beta.json"
    write_json(path, [asdict(choice) for choice in choices])
    return Chosen(choices, path)


def _with_beta(name: str, beta: float, registry: Registry) -> str:
    """The method as it is named in rows, with this beta beside its other settings."""
    inside = f"{name[:-1]}," if name.endswith(")") else f"{name}("
    return registry.method(f"{inside}beta={beta!r})")[0]


def _choices(records: list[Record], labels: dict[str, dict[float, str]], metrics: Mapping[str, Metric]) -> list[Choice]:
    """One for each model, prompt protocol, method and budget; of equal means the larger beta, which trusts the scores less."""
    done = [record for record in records if record.status == "ok"]
    found = []
    for where in dict.fromkeys(map(_where, done)):
        mine = [record for record in done if _where(record) == where]
        for name, named in labels.items():
            by_beta = {beta: [r for r in mine if r.key.method_name == label] for beta, label in named.items()}
            means = {beta: _mean_of_means(rows, metrics) for beta, rows in by_beta.items() if rows}
            if means:
                best = max(means, key=lambda beta: (round(means[beta], 9), beta))
                count = len(by_beta[best])
                model, prompt, budget = where
                found.append(
                    Choice(model, prompt, name, budget, best, count, {f"{beta:g}": value for beta, value in means.items()})
                )
    return found


def _where(record: Record) -> tuple[str, str, str]:
    return (record.key.model, record.key.prompt, record.key.budget)


def _mean_of_means(records: list[Record], metrics: Mapping[str, Metric]) -> float:
    tasks: dict[str, list[float]] = {}
    for record in records:
        metric = metrics[record.key.benchmark_name]
        value = record.metrics[metric.name]
        tasks.setdefault(record.key.benchmark, []).append(value if metric.higher_is_better else -value)
    return mean(mean(values) for values in tasks.values())
