"""`run_all.py reproduce headkv:table2`: runs what a paper's table asks for, so that its numbers can stand beside ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import BENCHMARKS
from benchmarks.data import BadData
from harness.choices import choose
from harness.cost.request import cost_request
from harness.evaluation.plan import BadRequest
from harness.evaluation.request import device_of, run_request
from harness.families import shape_of
from harness.models.load import check_name
from harness.models.shapes import SHAPES
from harness.models.variants import bytes_a_token, conversion_of
from harness.papers.needs import needs
from harness.papers.tables import (
    HUB,
    LENGTHS,
    SHAPE,
    TRUNCATION,
    Asked,
    PaperTable,
    asked_for,
    conversion_of_row,
    paper_models,
    requests,
    rows_of,
    table_of,
)
from harness.training.request import train_request
from results.store import read_costs

Parse = Callable[[list[str]], argparse.Namespace]
MEAN_LENGTH = 5000  # entries a head while 10,000 tokens are generated, on average: where table 10 is measured
TRIALS = 5


@dataclass(frozen=True)
class Reproduced:
    """What stands for a table of a paper, and which stored rows say what came out."""

    table: PaperTable
    paper_model: str
    model: str
    rows: Sequence[dict[str, Any]]
    asked: Sequence[Asked]  # for each row
    settings: Sequence[str]  # what differs from the paper, in words
    facts: bool = False  # needles are the embedded model's own sentences
    keys: Mapping[tuple[str, str], set[str]] = field(default_factory=dict)  # of rows, by model and budget
    numbers: Sequence[Mapping[str, float]] = ()  # for each row, where they do not come from scores
    failed: int = 0  # cells


def reproduce_request(options: argparse.Namespace, parse: Parse) -> Reproduced:
    """
    Args:
        parse: of a command line of ours.

    Raises:
        BadRequest: an unknown table or model of the paper, or nothing of the table that can be run.
    """
    table = table_of(options.table)
    theirs = _paper_model(table, options.paper_model)
    if options.limit < 1:
        raise BadRequest(f"--limit {options.limit} must be at least 1")
    if table.kind != "scores":
        return _without_scores(options, table, theirs, parse)
    model = options.model or HUB[theirs]
    check_name(model)
    if is_theirs(options, theirs):
        _check_gpu(table, theirs, options)
    rows = rows_of(table, theirs)

    def ask() -> list[Asked]:
        return [asked_for(table, row, model, options.fair, options.variants) for row in rows]

    if options.train:
        _train(options, ask(), parse)
    asked = ask()
    wanted = requests(asked)
    if not wanted:
        raise BadRequest(f"{table.name}: no row of it can be run on {model}: add --train, or first {asked[0].command}")
    facts = model == "reference"
    benchmarks = _at_hand(_benchmarks(table, rows, facts), options.data_dir)
    failed = 0
    keys: dict[tuple[str, str], set[str]] = {}
    for (name, budget), methods in wanted.items():
        mine = keys.setdefault((name, budget), set())
        failed += run_request(parse(_arguments(options, table, theirs, name, budget, methods, benchmarks)), mine)
    settings = _settings(table, options, theirs, model)
    return Reproduced(table, theirs, model, rows, asked, settings, facts, keys, failed=failed)


def _paper_model(table: PaperTable, wanted: str | None) -> str:
    models = paper_models(table)
    found = [name for name in models if wanted is None or wanted.lower() in name.lower()]
    if not found:
        raise BadRequest(f"--paper-model {wanted!r} is none of {', '.join(models)}")
    return found[0]


def _check_gpu(table: PaperTable, theirs: str, options: argparse.Namespace) -> None:
    """
    Raises:
        BadRequest: the GPU is too small for the paper's model; says by how much.
    """
    need = needs(table, theirs, options.data_dir, options.variants)
    wanted = need.gigabytes if options.train or not need.variants else need.measuring_gigabytes
    if device_of(options.device).type == "cuda" and wanted > need.gpu_gigabytes:
        short = wanted - need.gpu_gigabytes
        raise BadRequest(
            f"{table.name} with {theirs} needs about {wanted:.0f} GB, {need.gpu} has {need.gpu_gigabytes:.0f} GB: {short:.0f} GB "
            "too small; choose a smaller --paper-model or --model, or --device cpu"
        )


def _train(options: argparse.Namespace, asked: Sequence[Asked], parse: Parse) -> None:
    """Makes the variants that are not there."""
    for command in dict.fromkeys(one.train for one in asked if not one.model):
        names = ("steps", "epochs", "instruct", "data_dir", "device", "dtype")
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        more = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        print("training:", " ".join(command), file=sys.stderr)
        train_request(parse([*command, *more]))


def _benchmarks(table: PaperTable, rows: list[dict[str, Any]], facts: bool) -> list[str]:
    columns = sorted({c for row in rows for c in row["values"]}, key=lambda c: LENGTHS.index(c) if c in LENGTHS else 0)
    found = [name for column in columns for row in rows for name in table.benchmarks(row, column, facts)]
    return list(dict.fromkeys(found))


def _at_hand(benchmarks: list[str], data_dir: Path | None) -> list[str]:
    """Those whose records can be had; the others are told, and their cells stay empty.

    Raises:
        BadData: none can.
    """
    found, missing = [], []
    for text in benchmarks:
        task = choose("benchmark", text, BENCHMARKS)[1]
        if not hasattr(task, "records"):  # made, not read
            found.append(text)
            continue
        try:
            replace(task, data_dir=data_dir).records()  # type: ignore[type-var, call-arg]
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
    if table.query_rows:
        found += ["--granularity", "kv" if options.fair else "query"]
    if is_theirs(options, theirs):
        found += ["--truncation", str(TRUNCATION[theirs])] if theirs in TRUNCATION else []
        found += ["--chat", "template"] if options.fair or table.chat == "template" else []
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
    found.append(f"At most {options.limit} examples a task; the paper takes 100 to 200, or a whole set.")
    shortened = [f"--{name} {value}" for name in ("steps", "epochs", "instruct") if (value := getattr(options, name)) is not None]
    if options.train and shortened:
        found.append(f"Variants that were missing were trained with {', '.join(shortened)}, not as the paper has it.")
    return [*found, *(table.fair_notes if options.fair and table.fair_notes else table.notes)]


def _without_scores(options: argparse.Namespace, table: PaperTable, theirs: str, parse: Parse) -> Reproduced:
    """Sizes, times and memory: random weights of the paper's shape are enough."""
    model = options.model or f"random:{SHAPE[theirs]}"
    check_name(model)
    rows = rows_of(table, theirs)
    if table.kind == "sizes":
        numbers, failed = [_sizes(row, model) for row in rows], 0
    elif table.kind == "decoding":
        numbers, failed = _decoding(options, table, model, parse)
    else:
        numbers, failed = _latency(options, rows, model, parse)
    settings = list(table.notes)
    if options.model:
        settings.insert(0, f"The shape is {model}, not {theirs}: the numbers are not comparable, the path is.")
    asked = [Asked(model, "", "") for _ in rows]
    return Reproduced(table, theirs, model, rows, asked, settings, numbers=numbers, failed=failed)


def _sizes(row: Mapping[str, Any], model: str) -> dict[str, float]:
    """Parameters, and bytes of a token in float32, without weights. mixSGA's table cuts fractions of a byte off."""
    if not model.startswith("random:"):
        raise BadRequest(f"sizes are told of shapes: --model random:<shape>, not {model}; `list models` names them")
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[model.removeprefix("random:")]))
    shape = replace(shape_of(network), itemsize=4)
    text = conversion_of_row(row)[0]
    conversion_of(text).apply(network)
    every = {id(weight): weight.numel() for weight in network.parameters()}
    return {"parameters": float(sum(every.values())), "cache bytes a token": float(int(bytes_a_token(shape, text)))}


def _cost(options: argparse.Namespace, parse: Parse, model: str, *more: str) -> tuple[list[dict[str, Any]], int]:
    """The cost cells of these models, run where they are missing."""
    arguments = ["run", "--suite", "cost", "--model", model, "--decode", "eager", "--out", str(options.out), *more]
    for name in ("device", "dtype"):
        if value := getattr(options, name):
            arguments += [f"--{name}", value]
    asked = parse(arguments)
    failed = cost_request(asked)
    models, contexts = model.split(","), str(asked.contexts).split(",")
    rows = [row for row in read_costs(options.out) if row["status"] == "ok" and row["cell"]["model"] in models]
    rows = [row for row in rows if row["cell"].get("decode", "eager") == "eager"]
    return [row for row in rows if str(row["cell"]["context"]) in contexts], failed


def _decoding(options: argparse.Namespace, table: PaperTable, model: str, parse: Parse) -> tuple[list[dict[str, float]], int]:
    """Tokens a second of GQA and mixSGA, each the median of its trials."""
    variants = {"GQA": f"{model}+gqa-2", "mixSGA": f"{model}+mixsga-3:1:6"}
    context = options.context or MEAN_LENGTH
    more = ("--methods", "full", "--contexts", str(context), "--batches", "1", "--rounds", str(TRIALS))
    rows, failed = _cost(options, parse, ",".join(variants.values()), *more)
    found = {}
    for name, variant in variants.items():
        times = sorted(row["token"] for row in rows if row["cell"]["model"] == variant and "token" in row)
        if times:
            found[name] = 1 / times[len(times) // 2]
    if len(found) == 2:
        found["mixSGA slower by"] = 100 * (1 - found["mixSGA"] / found["GQA"])
    return [found] * len(rows_of(table, _paper_model(table, options.paper_model))), failed


def _latency(
    options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], model: str, parse: Parse
) -> tuple[list[dict[str, float]], int]:
    """Seconds of a whole answer by its length, from the phases of one, and the peak of the memory above the weights."""
    methods = {"FullKV": "full", "SnapKV": "snapkv", "PyramidKV": "pyramidkv", "Ada-SnapKV": "ada_snapkv"}
    context = options.context or 32_000
    more = ("--methods", ",".join(methods.values()), "--budgets", "128", "--contexts", str(context), "--batches", "1")
    costs, failed = _cost(options, parse, model, *more)
    numbers = []
    for row in rows:
        mine = [cost for cost in costs if cost["cell"]["method"] == methods.get(str(row["method"]))]
        timed = sorted((sum(c["phases"].values()) + c["first_token"], c["token"]) for c in mine if "token" in c)
        peaks = [cost["prefill_peak"] for cost in mine if "prefill_peak" in cost]
        found = {}
        for column in row["values"]:
            if column.endswith(("token", "tokens")) and timed:
                first, token = timed[len(timed) // 2]
                found[column] = first + (int(column.split()[0]) - 1) * token
            elif column == "peak GB" and peaks:
                found[column] = max(peaks) / 1e9
        numbers.append(found)
    return numbers, failed
