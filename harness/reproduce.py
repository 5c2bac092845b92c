"""`run_all.py reproduce headkv:table2`: runs what a paper's table asks for, and puts its numbers beside ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.data import BadData
from harness.choices import choose
from harness.load import check_name
from harness.papers import HUB, TRUNCATION, PaperTable, asked_for, paper_models, requests, rows_of, table_of
from harness.plan import BadRequest
from harness.request import run_request
from reports.paper import Side, write_side_by_side

LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k")


def reproduce_request(options: argparse.Namespace, parse: Callable[[list[str]], argparse.Namespace]) -> tuple[list[Path], int]:
    """The files that were written, and how many cells failed.

    Raises:
        BadRequest: an unknown table or model of the paper, or nothing of the table that can be run.
    """
    table = table_of(options.table)
    theirs = _paper_model(table, options.paper_model)
    model = options.model or HUB[theirs]
    check_name(model)
    rows = rows_of(table, theirs)
    asked = [asked_for(table, row, model, options.fair) for row in rows]
    wanted = requests(asked)
    if not wanted:
        raise BadRequest(f"{table.name}: no row of it can be run on {model}: first {asked[0].train}")
    benchmarks = _at_hand(_benchmarks(table, rows), options.data_dir)
    failed = 0
    keys: dict[tuple[str, str], set[str]] = {}
    for (name, budget), methods in wanted.items():
        mine = keys.setdefault((name, budget), set())
        failed += run_request(parse(_arguments(options, table, theirs, name, budget, methods, benchmarks)), mine)
    side = Side(
        table.name, theirs, model, options.limit, options.fair, tuple(_settings(table, options, theirs, model)), asked, keys
    )
    return write_side_by_side(options.out, table, rows, side), failed


def _paper_model(table: PaperTable, wanted: str | None) -> str:
    models = paper_models(table)
    found = [name for name in models if wanted is None or wanted.lower() in name.lower()]
    if not found:
        raise BadRequest(f"--paper-model {wanted!r} is none of {', '.join(models)}")
    return found[0]


def _benchmarks(table: PaperTable, rows: list[dict]) -> list[str]:
    if not table.columns_are_lengths:
        return list(table.columns.values())
    lengths = [length for length in LENGTHS if any(length in row["values"] for row in rows)]
    return [f"{task}(length={length})" for length in lengths for task in table.columns.values()]


def _at_hand(benchmarks: list[str], data_dir: Path | None) -> list[str]:
    """Those whose records can be had; the others are told, and their cells stay empty.

    Raises:
        BadData: none can.
    """
    found, missing = [], []
    for text in benchmarks:
        task = choose("benchmark", text, BENCHMARKS)[1]
        try:
            replace(task, data_dir=data_dir).records()  # type: ignore[type-var, attr-defined, call-arg]
            found.append(text)
        except BadData as error:
            missing.append(error)
            print(f"{text}: left out, {error}", file=sys.stderr)
    if not found:
        raise missing[0]
    return found


def _arguments(
    options: argparse.Namespace,
    table: PaperTable,
    theirs: str,
    model: str,
    budget: str,
    methods: list[str],
    benchmarks: list[str],
) -> list[str]:
    """The request as it would be typed."""
    found = ["run", "--suite", "smoke", "--model", model, "--methods", ",".join(methods), "--benchmarks", ",".join(benchmarks)]
    found += ["--prompt", "question_in", "--limit", str(options.limit), "--out", str(options.out), "--no-fidelity"]
    found += ["--budgets", budget] if budget else []
    if table.paper == "headkv":
        found += ["--granularity", "kv" if options.fair else "query"]
        found += ["--truncation", str(TRUNCATION[theirs])] if is_theirs(options, theirs) else []
    template = options.fair or table.chat == "template"
    found += ["--chat", "template"] if template and is_theirs(options, theirs) else []
    for name in ("data_dir", "head_scores", "device", "dtype"):
        if value := getattr(options, name):
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def is_theirs(options: argparse.Namespace, theirs: str) -> bool:
    """Is it the paper's model, from the hub or a folder of the same name? Then the paper's protocol fits it."""
    return options.model is None or Path(options.model).name == Path(HUB[theirs]).name


def _settings(table: PaperTable, options: argparse.Namespace, theirs: str, model: str) -> list[str]:
    """What differs from the paper, in words."""
    found = []
    if not is_theirs(options, theirs):
        found.append(f"The model is {model}, not {theirs}: the numbers are not comparable, the path is.")
        found.append("Prompts are cut to what this model has positions for, and no chat template is put around them.")
    found.append(f"At most {options.limit} examples a task; the paper takes 100 to 200.")
    if table.paper == "headkv" and options.fair:
        found.append(
            "A row a KV head, so all methods hold the same bytes; HeadKV spends its whole budget. The paper: a row a query head."
        )
    elif table.paper == "headkv":
        found.append("A row a query head, as the paper's code stores them: several times the bytes of a row a KV head.")
        found.append("PyramidKV spends exactly its budget here; the paper's code spends 0.5 to 12 % more.")
        found.append("Betas are the paper's, chosen there on the test examples.")
    else:
        found.append("Answers are greedy; judge columns need --judge-url on the stored rows and are not filled here.")
    return found
