"""What the user asked for, checked at the edge and turned into work."""

from __future__ import annotations

import argparse
import sys
from dataclasses import is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from benchmarks import BENCHMARKS, GROUPS
from benchmarks.base import Task
from benchmarks.data import BadData
from benchmarks.haystack import Haystack
from harness.cache import Arena, Budget, Routing
from harness.choices import UnknownChoice, choose, expand, split
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model, UnsupportedModel
from harness.env import record_data, record_environment
from harness.evaluation.artifacts import record_heads, record_routing
from harness.evaluation.head_scores import with_head_scores
from harness.evaluation.judge import Case, Judge, judge_rows
from harness.evaluation.judge import Tally as JudgeTally
from harness.evaluation.lm_eval_replay import replay
from harness.evaluation.plan import BadRequest, Shard, Tally, Work, benchmark_name, check, left_to_do, protocols_of, run
from harness.evaluation.plan import cannot_run as cells_that_cannot
from harness.evaluation.prompts import CannotPrompt, PromptProtocol, Protocol
from harness.evaluation.sweep import CELL_BYTES, Sweep
from harness.families import CannotConvert
from harness.models.load import UnknownModel, check_name, load
from harness.models.variants import BadVariant
from harness.papers.importance import LONGEST_NEEDLE, Estimate, estimate_scores
from harness.papers.token_importance import first_tokens, perplexity_changes
from harness.plugins import BadPlugin
from harness.suites import COST_SUITES, SPEED_SUITES, SUITES, Suite
from harness.training.checkpoint import CannotTrain
from harness.training.data import BadText
from harness.training.loop import Recipe
from methods import METHODS
from methods.headkv import BadScores, HeadScores
from results.store import Store, read_rows, slug

AVERAGED_NUMBERS = 2**26  # logits held at once when tokens are averaged one by one
REFERENCE_RECIPE = Recipe(steps=600, lr=3e-3)  # the embedded model is small: it stands higher rates
REFUSED = (
    BadData,
    BadPlugin,
    BadRequest,
    BadScores,
    BadText,
    BadVariant,
    CannotConvert,
    CannotPrompt,
    CannotTrain,
    UnknownChoice,
    UnknownModel,
    UnsupportedModel,
)


def suite_of(options: argparse.Namespace) -> Suite:
    """The suite, with what the command line changes of it."""
    if options.suite in COST_SUITES:
        raise BadRequest(f"suite {options.suite} measures cost: `run` and `plan` take it, this command needs a suite of scores")
    if options.suite in SPEED_SUITES:
        raise BadRequest(f"suite {options.suite} measures the harness itself: only `run` takes it")
    if options.suite not in SUITES:
        raise BadRequest(f"no suite {options.suite!r}; known: {', '.join((*SUITES, *COST_SUITES))}")
    changes: dict[str, Any] = {
        "models": split(options.model) if options.model else None,
        "methods": split(options.methods) if options.methods else None,
        "variants": () if options.model or options.methods else None,
        "budgets": split(options.budgets) if options.budgets else None,
        "benchmarks": expand(split(options.benchmarks), BENCHMARKS, GROUPS) if options.benchmarks else None,
        "prompts": split(options.prompt) if options.prompt else None,
        "limit": options.limit,
        "seeds": _seeds(options.seed) if options.seed is not None else None,
        "temperature": options.temperature,
        "fidelity": False if options.no_fidelity else None,
    }
    wanted: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items() if v is not None}
    return replace(SUITES[options.suite], **wanted)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in split(text)))
    except ValueError:
        raise BadRequest(f"--seed {text!r} is not a whole number, nor several with commas") from None


def tasks_of(options: argparse.Namespace, suite: Suite) -> dict[str, Task]:
    """The benchmarks by name, told where the user's data lie."""
    found: dict[str, Task] = {}
    for text in suite.benchmarks:
        label, task = choose("benchmark", text, BENCHMARKS)
        if found.setdefault(label, task) != task:
            raise BadRequest(f"two benchmarks would both be named {label}: rename one of the files")
    reads_data = {name for name, task in found.items() if is_dataclass(task) and hasattr(task, "data_dir")}
    if options.data_dir and reads_data and not options.data_dir.is_dir():
        raise BadRequest(f"--data-dir {options.data_dir}: no such folder")
    return {
        name: replace(task, data_dir=options.data_dir) if name in reads_data else task  # type: ignore[type-var, call-arg]
        for name, task in found.items()
    }


def work_of(options: argparse.Namespace, suite: Suite) -> Work:
    try:
        budgets = tuple(dict.fromkeys(Budget.parse(text) for text in suite.budgets))
    except ValueError as error:
        raise BadRequest(str(error)) from None
    for what, asked, known in (
        ("prompt protocol", suite.prompts, get_args(PromptProtocol)),
        ("routing", split(options.routing), get_args(Routing)),
    ):
        if unknown := set(asked) - set(known):
            raise BadRequest(f"no {what} {sorted(unknown)[0]!r}; known: {', '.join(known)}")
    for name, least in (("limit", 1), ("truncation", 2), ("max_new_tokens", 1), ("cell_bytes", 1)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise BadRequest(f"--{name.replace('_', '-')} {given} must be at least {least}")
    methods = dict(choose("method", text, METHODS) for text in suite.methods)
    if suite.temperature < 0:
        raise BadRequest(f"--temperature {suite.temperature:g} must not be below 0")
    if not budgets and any(method.takes_budget for method in methods.values()):
        raise BadRequest("these methods need --budgets, such as 128,25%")
    return Work(
        tasks=tasks_of(options, suite),
        methods=methods,
        budgets=budgets,
        protocols=tuple(
            Protocol(
                prompt,
                options.chat,
                options.granularity,
                "eos",
                options.truncation,
                options.max_new_tokens,
                suite.temperature,
                routing,  # type: ignore[arg-type]
            )
            for prompt, routing in product(suite.prompts, split(options.routing))
        ),
        limit=suite.limit,
        seeds=suite.seeds,
        shard=Shard.parse(options.shard),
        part=options.examples,
        fidelity=suite.fidelity,
    )


def works_of(options: argparse.Namespace, suite: Suite) -> dict[str, Work]:
    """What to run on each model of the suite."""
    found = dict.fromkeys(suite.models, work_of(options, suite))
    if suite.variants:
        found |= dict.fromkeys(suite.variants, work_of(options, replace(suite, methods=suite.variant_methods)))
    return found


def load_model(options: argparse.Namespace, name: str) -> Model:
    device = device_of(options.device)
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return load(name, getattr(torch, dtype), device, options.revision)


def device_of(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(f"device {name!r} is not here: {str(error).splitlines()[0]}") from None
    return device


def run_request(options: argparse.Namespace, keys: set[str] | None = None) -> int:
    """Runs it, and gives how many cells failed.

    Args:
        keys: gets the ids of all rows that this request asks for, finished before or not.
    """
    suite = suite_of(options)
    works = works_of(options, suite)
    store = Store(options.out)
    keep_freed_memory()
    failed = 0
    if bool(options.judge_url) != bool(options.judge_model):
        raise BadRequest("a judge needs both --judge-url and --judge-model")
    if options.judge_workers < 1:
        raise BadRequest(f"--judge-workers {options.judge_workers} must be at least 1")
    for name in works:
        check_name(name)
    refused: list[Exception] = []
    for name, work in works.items():
        model: Model | None = None  # the last one's memory is free before the next is loaded
        try:
            model = load_model(options, name)
            mine = with_head_scores(work, model, head_score_files(options), options.data_dir)
            check(model, mine)
        except (BadRequest, CannotConvert) as refusal:
            refused.append(refusal)
            if len(refused) == len(works):  # nothing is left to run
                raise refused[0] from None
            print(f"{name}: skipped, {refusal}", file=sys.stderr)
            failed += 1
            continue
        if keys is not None:
            keys |= {key.id for todo in left_to_do(model, mine, None) for key in todo.keys.values()}
        tally = _run_on(model, options, suite, mine, store)
        replay(options.out, mine.tasks)
        failed += tally.failed
        print(f"{name}: {tally.ok} cells done, {tally.skipped} skipped, {tally.failed} failed", file=sys.stderr)
        for reason, count in tally.reasons.items():
            print(f"  {count} x {reason}", file=sys.stderr)
    return failed


def _run_on(model: Model, options: argparse.Namespace, suite: Suite, work: Work, store: Store) -> Tally:
    env = record_environment(options.out, model.device)
    record_data(options.out, work.tasks)
    record_heads(options.out, work)
    record_routing(options.out, model, work)
    total = sum(len(todo.keys) for todo in left_to_do(model, work, store))
    with tqdm(total=total, unit="cell", desc=model.name, disable=total == 0, file=sys.stderr) as bar:
        arena = Arena()  # one for all: sweeps take turns

        def sweep_of(protocol: Protocol, seed: int) -> Sweep:
            return Sweep(model, protocol, options.cell_bytes or CELL_BYTES, suite.fidelity, seed, arena=arena)

        return run(sweep_of, model, work, store, env, bar.update)


def plan_request(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What `run` would do for each model."""
    suite = suite_of(options)
    store = Store(options.out) if (options.out / "rows").is_dir() else None
    plans = []
    for name, work in works_of(options, suite).items():
        model = load_model(options, name)
        plans.append(_plan_of(model, with_head_scores(work, model, head_score_files(options), options.data_dir), store))
    return plans


def head_score_files(options: argparse.Namespace) -> list[Path]:
    return [Path(text) for text in split(options.head_scores or "")]


def importance_request(options: argparse.Namespace) -> tuple[HeadScores, Path]:
    """Estimates head scores, and gives them with the file that holds them."""
    check_name(options.model)
    out = options.out or Path("results/head_scores") / f"{slug(options.model)}_{options.kind}.json"
    if out.suffix != ".json" or out.is_dir():
        raise BadRequest(f"--out {out} must name a .json file")
    haystack = Haystack.of(options.haystack)
    model = load_model(options, options.model)
    if model.routers or model.depth > model.shape.layers:
        raise BadRequest(f"{model.name}: heads of this variant do not each hold every token, which the estimator needs")
    estimate = Estimate(
        kind=options.kind,
        needles=options.needles or ("facts" if model.name == "reference" else "text"),
        haystack=haystack.sha256,
        max_length=options.max_length or min(10_000, model.max_tokens - LONGEST_NEEDLE),
        lengths=options.lengths,
        depths=options.depths,
        attempts=options.attempts,
        seed=options.seed,
        chat=options.chat,
        teacher_forced=options.teacher_forced,
    )
    if estimate.max_length > model.max_tokens - LONGEST_NEEDLE:
        raise BadRequest(
            f"--max-length {estimate.max_length} leaves no room for an answer: {model.name} has {model.max_tokens} positions"
        )
    with tqdm(total=estimate.attempts, unit="attempt", desc=model.name, file=sys.stderr) as bar:
        return estimate_scores(model, estimate, haystack, out, bar.update), out


def judge_request(options: argparse.Namespace) -> JudgeTally:
    """Has the judge rate what is stored of this request."""
    work = work_of(options, suite_of(options))
    questions = {benchmark_name(label, task): task for label, task in work.tasks.items() if hasattr(task, "question")}
    cases = []
    for row in read_rows(options.out):
        task = questions.get(row.key.benchmark)
        if task is not None and row.status == "ok" and (row.key.benchmark_params, row.key.data) == (repr(task), task.data):
            reference = task.example(row.key.example, row.key.seed, len).answers[0]
            cases.append(Case(row.key.id, task.question(row.key.example), reference, row.answer or ""))  # type: ignore[attr-defined]
    judge = Judge(options.judge_url, options.judge_model, workers=options.judge_workers)
    with tqdm(total=len(cases), unit="answer", desc=f"judge {judge.model}", disable=not cases, file=sys.stderr) as bar:
        tally = judge_rows(judge, cases, options.out, bar.update)
    print(f"judge {judge.model}: {tally}", file=sys.stderr)
    return tally


def tokens_request(options: argparse.Namespace) -> tuple[str, list[str], list[float], float]:
    """The model's name, the tokens, what averaging each does to the perplexity, and the perplexity as it is."""
    check_name(options.model)
    model = load_model(options, options.model)
    if not 2 <= options.tokens <= model.max_tokens:
        raise BadRequest(f"--tokens {options.tokens} must lie between 2 and the model's {model.max_tokens} positions")
    ids = first_tokens(model, options.text, options.tokens)
    rows = max(1, min(16, AVERAGED_NUMBERS // (len(ids) * model.network.config.vocab_size)))
    with tqdm(total=len(ids), unit="token", desc=model.name, file=sys.stderr) as bar:
        plain, changes = perplexity_changes(model, torch.tensor(ids, device=model.device), rows, bar.update)
    return model.name, [str(model.tokenizer.decode([token])) for token in ids], changes, plain  # type: ignore[union-attr]


def _plan_of(model: Model, work: Work, store: Store | None) -> dict[str, Any]:
    check(model, work)
    cells = prefills = 0
    skipped: dict[str, int] = {}
    for todo in left_to_do(model, work, store):
        reasons = cells_that_cannot(model, todo)
        for reason in reasons:
            skipped[reason] = skipped.get(reason, 0) + 1
        cells += len(todo.keys) - len(reasons)
        prefills += len(todo.keys) > len(reasons)
    prompts = sum(len(work.examples(task)) * len(protocols_of(task, work)) for task in work.tasks.values())
    asked = prompts * len(work.seeds) * len(work.cells())
    finished = asked - cells - sum(skipped.values())
    return {"model": model.name, "cells": cells, "prefills": prefills, "finished": finished, "skipped": skipped}
