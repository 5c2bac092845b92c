"""HeadKV's beta, chosen on examples that are held out, so that nobody tunes on the test. `run_all.py beta`.

The papers' tables report the best beta by the test average; here each budget's beta is the best mean of task means over 15 % of
the examples, all betas' means are written down, and the other 85 % are what `run --examples test` runs on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from benchmarks import BENCHMARKS
from harness.choices import choose, split
from harness.evaluation.plan import BadRequest
from harness.evaluation.request import run_request, suite_of
from methods import METHODS
from methods.base import Eviction
from results.record import Record
from results.store import StoreError, read_rows

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


def beta_request(options: argparse.Namespace) -> tuple[list[Choice], Path]:
    """Runs every beta on the held-out examples, and gives the best of each method and budget with the file that holds them."""
    named = split(options.methods or "headkv_r,headkv_er,headkv_r2")
    for name in named:
        method = choose("method", name, METHODS)[1]
        if not (isinstance(method, Eviction) and method.head_scores):
            raise BadRequest(f"method {name!r} has no beta to choose; headkv_r, headkv_er and headkv_r2 have")
    try:
        betas = [float(text) for text in split(options.betas)] if options.betas else list(BETAS)
    except ValueError:
        raise BadRequest(f"--betas {options.betas!r} are not numbers with commas") from None
    labels = {name: {beta: _with_beta(name, beta) for beta in betas} for name in named}
    options.methods = ",".join(label for mine in labels.values() for label in mine.values())
    options.examples = "held_out"
    for text in suite_of(options).benchmarks:
        if not choose("benchmark", text, BENCHMARKS)[1].metrics:
            raise BadRequest(f"benchmark {text} has no score to choose by")
    keys: set[str] = set()
    if run_request(options, keys):
        raise BadRequest("some cells failed, so no beta was chosen; see the messages above")
    choices = _choices([row for row in read_rows(options.out) if row.key.id in keys], labels)
    path = options.out / "beta.json"
    try:
        path.write_text(json.dumps([asdict(choice) for choice in choices], indent=1) + "\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
    return choices, path


def _with_beta(name: str, beta: float) -> str:
    """The method as it is named in rows, with this beta beside its other settings."""
    inside = f"{name[:-1]}," if name.endswith(")") else f"{name}("
    return choose("method", f"{inside}beta={beta!r})", METHODS)[0]


def _choices(records: list[Record], labels: dict[str, dict[float, str]]) -> list[Choice]:
    """One for each model, prompt protocol, method and budget; of equal means the larger beta, which trusts the scores less."""
    done = [record for record in records if record.status == "ok"]
    found = []
    for where in dict.fromkeys(map(_where, done)):
        mine = [record for record in done if _where(record) == where]
        for name, named in labels.items():
            by_beta = {beta: [r for r in mine if r.key.method_name == label] for beta, label in named.items()}
            means = {beta: _mean_of_means(rows) for beta, rows in by_beta.items() if rows}
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


def _mean_of_means(records: list[Record]) -> float:
    tasks: dict[str, list[float]] = {}
    for record in records:
        metric = choose("benchmark", record.key.benchmark_name, BENCHMARKS)[1].metrics[0]
        value = record.metrics[metric.name]
        tasks.setdefault(record.key.benchmark, []).append(value if metric.higher_is_better else -value)
    return mean(mean(values) for values in tasks.values())
