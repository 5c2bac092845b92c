"""From a cost suite to rows: every cell in a process of its own, round by round, stored as it comes."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from harness.cache import Budget
from harness.choices import choose, split
from harness.cost.cell import CostCell
from harness.env import environment, environment_id, record_environment
from harness.evaluation.plan import BadRequest
from harness.evaluation.request import device_of
from harness.models.load import check_name
from harness.suites import COST_SUITES, SUITES, CostSuite
from methods import METHODS
from results.record import DECODES
from results.store import append_line, read_costs

HOUR = 3600.0
MEMORY_STEPS = 8  # tokens decoded while memory is watched: it does not move from one to the next


NARROWING = ("model", "methods", "budgets", "benchmarks", "prompt")


def cost_behind(options: argparse.Namespace) -> int:
    """Runs the cost suite behind a quality suite, if there is one and nothing of the request was narrowed."""
    cost = SUITES[options.suite].cost
    if not cost or any(getattr(options, name) for name in NARROWING):
        return 0
    return cost_request(argparse.Namespace(**{**vars(options), "suite": cost, "max_new_tokens": None}))


def cost_request(options: argparse.Namespace) -> int:
    """Runs what has no row yet, and gives how many cells failed.

    Raises:
        BadRequest, UnknownChoice, UnknownModel: the request makes no sense.
        StoreError: the folder cannot be written to.
    """
    env = record_environment(options.out, device_of(options.device))
    cells, _ = _left_to_do(options, env)
    failed = 0
    with tqdm(cells, unit="cell", desc="cost", disable=not cells, file=sys.stderr) as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell.what} {cell.decode} {cell.method} {cell.budget} {cell.context}", refresh=False)
            found = run_cell(cell)
            failed += found["status"] == "failed"
            shown = asdict(replace(cell, plugins=tuple(Path(path).name for path in cell.plugins)))  # no folder of a machine
            row = {"id": identity(cell, env), "cell": shown, "env": env, "sources": sources_of(cell), **found}
            append_line(options.out / "cost" / "rows.jsonl", json.dumps(row))
    return failed


def cost_plan(options: argparse.Namespace) -> dict[str, Any]:
    """How many cells `run` would measure; runs nothing."""
    left, every = _left_to_do(options, environment_id(environment(device_of(options.device))))
    kinds = {what: sum(cell.what == what for cell in left) for what in ("memory", "latency")}
    return {"suite": options.suite, "cells": len(left), **kinds, "finished": every - len(left)}


def _left_to_do(options: argparse.Namespace, env: str) -> tuple[list[CostCell], int]:
    """The cells without a row, and how many there are in all."""
    suite = cost_suite_of(options)
    for name in suite.models:
        check_name(name)
    device = device_of(options.device)
    done = {row["id"] for row in read_costs(options.out) if row["status"] in ("ok", "skipped")}
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    plugins = tuple(str(Path(path).resolve()) for path in options.plugin or ())
    every = [replace(cell, plugins=plugins) for cell in cells_of(suite, dtype, str(device))]
    return [cell for cell in every if identity(cell, env) not in done], len(every)


def cost_suite_of(options: argparse.Namespace) -> CostSuite:
    """The suite, with what the command line changes of it."""
    changes: dict[str, Any] = {}
    for field in ("models", "methods", "budgets"):
        text = getattr(options, field if field != "models" else "model")
        if text:
            changes[field] = tuple(split(text))
    for field in ("contexts", "batches"):
        if text := getattr(options, field):
            changes[field] = _numbers(field, text, largest=field == "batches")
    if options.decode:
        changes["decodes"] = decodes = tuple(split(options.decode))
        if not decodes or any(name not in DECODES for name in decodes):
            raise BadRequest(f"--decode {options.decode!r} must be some of {', '.join(DECODES)}, with commas")
    if options.max_new_tokens is not None:
        changes["new_tokens"] = options.max_new_tokens
    if options.rounds is not None:
        changes["rounds"] = options.rounds
    suite = replace(COST_SUITES[options.suite], **changes)
    if suite.new_tokens < 2 or suite.rounds < 1:
        raise BadRequest("a cost suite needs at least one round, and 2 new tokens: the first is timed apart")
    try:
        for budget in suite.budgets:
            Budget.parse(budget)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    for method in suite.methods:
        choose("method", method, METHODS)
    return suite


def _numbers(field: str, text: str, largest: bool) -> tuple[int, ...]:
    """Whole numbers; `largest` becomes 0, where it is one of the choices."""
    parts = split(text)
    if largest and parts and parts[-1] == "largest":
        return (*(_numbers(field, ",".join(parts[:-1]), False) if parts[:-1] else ()), 0)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadRequest(f"--{field} {text!r} must be whole numbers above 0, with commas")
    return tuple(map(int, parts))


def cells_of(suite: CostSuite, dtype: str, device: str) -> Iterator[CostCell]:
    """Memory once a cell, decoded eagerly; then the rounds of latency, every cell once a round: what drifts drifts for all."""
    threads = torch.get_num_threads()
    asked = []
    for model, context, batch, method in product(suite.models, suite.contexts, suite.batches, suite.methods):
        budgets: Sequence[str] = suite.budgets if choose("method", method, METHODS)[1].takes_budget else ("",)
        sizes = (context, batch, suite.new_tokens, dtype, device, threads)
        asked += [CostCell(model, method, budget, *sizes) for budget in budgets]
    yield from (replace(cell, what="memory", new_tokens=min(MEMORY_STEPS, cell.new_tokens)) for cell in asked)
    for number in range(suite.rounds):
        yield from (replace(cell, round=number, decode=decode) for cell in asked for decode in suite.decodes)


def identity(cell: CostCell, env: str) -> str:
    """Times belong to an environment: another machine, or other versions, measure anew. So does another text of a plugin."""
    asked = [asdict(replace(cell, plugins=())), env, sources_of(cell)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]


def sources_of(cell: CostCell) -> list[str]:
    """Hashes of the plugins' texts."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in cell.plugins]


def run_cell(cell: CostCell) -> dict[str, Any]:
    """What the cell's own process printed. Where it could not capture its step: what an eager one's printed, and why."""
    found = _in_a_process(cell)
    if found["status"] == "fell back":
        return _in_a_process(replace(cell, decode="eager")) | {"fell_back": found["reason"]}
    return found


def _in_a_process(cell: CostCell) -> dict[str, Any]:
    """What it printed, or why it printed nothing."""
    command = [sys.executable, "-m", "harness.cost", json.dumps(asdict(cell))]
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=HOUR, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"no result after {HOUR:.0f} s"}
    if ran.returncode < 0:
        return {"status": "failed", "reason": f"its process was ended by signal {-ran.returncode}: too little memory?"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        said = ran.stderr.strip().splitlines()
        return {"status": "failed", "reason": said[-1][:300] if said else f"its process ended with code {ran.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
