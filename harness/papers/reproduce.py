"""Runs what a paper's table asks for (`reproduce headkv:table2`), so that its numbers can stand beside ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.base import reads_data
from benchmarks.data import BadData
from harness.cluster.options import WorkerOptions
from harness.cost.request import CostRequest
from harness.cost.run import run_cost
from harness.errors import BadRequest
from harness.evaluation.request import RunRequest, at_least
from harness.evaluation.run import on_workers, run_request
from harness.families import shape_of
from harness.models.load import check_name, device_of
from harness.models.shapes import SHAPES
from harness.models.variants import bytes_a_token
from harness.papers.needs import needs
from harness.papers.tables import (
    HUB,
    LENGTHS,
    SHAPE,
    TRUNCATION,
    VARIANTS,
    Asked,
    PaperTable,
    asked_for,
    conversion_of_row,
    paper_models,
    requests,
    rows_of,
    table_of,
)
from harness.papers.token_importance import TokenImportanceRequest
from harness.registry import Registry
from harness.training.request import train
from results.store import read_costs

MEAN_LENGTH = 5000  # entries a head while 10,000 tokens are generated, on average: where table 10 is measured
TRIALS = 5
METHODS = {"FullKV": "full", "SnapKV": "snapkv", "PyramidKV": "pyramidkv", "Ada-SnapKV": "ada_snapkv"}  # of figure 6


@dataclass(frozen=True)
class ReproduceRequest:
    """A table of a paper, and what is changed of its setting.

    Raises:
        BadRequest: a field that makes no sense by itself.
    """

    table: str  # headkv:table2
    model: str | None = None  # None: the paper's
    paper_model: str | None = None  # a part of the name of one of the paper's models; None: the first
    fair: bool = False  # a row a KV head and chat templates: equal bytes
    limit: int = 200  # examples of each task
    train: bool = False  # the variants that are missing, by the paper's recipe
    steps: int | None = None  # of that training, instead of the recipe's epochs
    epochs: float | None = None
    instruct: Path | None = None  # of that training: a .jsonl instead of Dolly-15k
    variants: Path = VARIANTS  # where trained variants are looked for and put
    context: int | None = None  # tokens of the prompt, for tables of time
    data_dir: Path | None = None
    head_scores: tuple[Path, ...] = ()
    device: str | None = None
    dtype: str | None = None
    cluster: WorkerOptions | None = None  # workers for what has prompts and costs; training stays here
    out: Path = Path("results/papers")

    def __post_init__(self) -> None:
        at_least(self, limit=1, steps=1, context=1)


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


def reproduce(request: ReproduceRequest, registry: Registry) -> Reproduced:
    """
    Raises:
        UserError: an unknown table or model of the paper, or nothing of the table that can be run.
    """
    table = table_of(request.table)
    theirs = _paper_model(table, request.paper_model)
    if table.kind != "scores":
        return _without_scores(request, table, theirs, registry)
    model = request.model or HUB[theirs]
    check_name(model, registry)
    if is_theirs(request, theirs):
        _check_gpu(table, theirs, request)
    rows = rows_of(table, theirs)

    def ask() -> list[Asked]:
        return [asked_for(table, row, model, request.fair, request.variants) for row in rows]

    if request.train:
        _train(request, ask(), registry)
    asked = ask()
    wanted = requests(asked)
    if not wanted:
        raise BadRequest(f"{table.name}: no row of it can be run on {model}: add --train, or first {asked[0].command}")
    facts = model == "reference"
    benchmarks = tuple(_at_hand(_benchmarks(table, rows, facts), request.data_dir, registry))
    failed, keys = 0, dict[tuple[str, str], set[str]]()
    shared = _run_request(request, table, theirs)
    with on_workers(request.cluster):
        for (name, budget), methods in wanted.items():
            budgets = (budget,) if budget else ()
            ran = run_request(
                replace(shared, models=(name,), methods=tuple(methods), budgets=budgets, benchmarks=benchmarks), registry
            )
            failed += ran.failed
            keys[name, budget] = ran.keys
    settings = _settings(table, request, theirs, model)
    return Reproduced(table, theirs, model, rows, asked, settings, facts, keys, failed=failed)


def tokens_behind(request: ReproduceRequest) -> TokenImportanceRequest | None:
    """What a figure of single tokens asks for; None: the table is another."""
    table = table_of(request.table)
    if table.kind != "tokens":
        return None
    text = (request.data_dir or Path()) / "lm" / "wikitext2" / "wiki.test.raw"
    out = request.out / "report" / f"paper_{table.name.replace(':', '_')}"
    model = request.model or HUB[_paper_model(table, request.paper_model)]
    return TokenImportanceRequest(model, text, out=out, device=request.device, dtype=request.dtype)


def _paper_model(table: PaperTable, wanted: str | None) -> str:
    models = paper_models(table)
    found = [name for name in models if wanted is None or wanted.lower() in name.lower()]
    if not found:
        raise BadRequest(f"--paper-model {wanted!r} is none of {', '.join(models)}")
    return found[0]


def _check_gpu(table: PaperTable, theirs: str, request: ReproduceRequest) -> None:
    """
    Raises:
        BadRequest: the GPU is too small for the paper's model; says by how much.
    """
    need = needs(table, theirs, request.data_dir, request.variants)
    wanted = need.gigabytes if request.train or not need.variants else need.measuring_gigabytes
    if device_of(request.device).type == "cuda" and wanted > need.gpu_gigabytes:
        short = wanted - need.gpu_gigabytes
        raise BadRequest(
            f"{table.name} with {theirs} needs about {wanted:.0f} GB, {need.gpu} has {need.gpu_gigabytes:.0f} GB: {short:.0f} GB "
            "too small; choose a smaller --paper-model or --model, or --device cpu"
        )


def _train(request: ReproduceRequest, asked: Sequence[Asked], registry: Registry) -> None:
    """Makes the variants that are not there."""
    for one in {one.train: one for one in asked if not one.model and one.train}.values():
        assert one.train is not None
        names = ("steps", "epochs", "instruct", "data_dir", "device", "dtype")
        given = {name: value for name in names if (value := getattr(request, name)) is not None}
        print("training:", one.command, file=sys.stderr)
        train(replace(one.train, **given), registry)


def _benchmarks(table: PaperTable, rows: list[dict[str, Any]], facts: bool) -> list[str]:
    columns = sorted({c for row in rows for c in row["values"]}, key=lambda c: LENGTHS.index(c) if c in LENGTHS else 0)
    found = [name for column in columns for row in rows for name in table.benchmarks(row, column, facts)]
    return list(dict.fromkeys(found))


def _at_hand(benchmarks: list[str], data_dir: Path | None, registry: Registry) -> list[str]:
    """Those whose records can be had; the others are told, and their cells stay empty.

    Raises:
        BadData: none can.
    """
    found, missing = [], []
    for text in benchmarks:
        task = registry.benchmark(text)[1]
        try:
            if reads_data(task):
                replace(task, data_dir=data_dir).records()  # type: ignore[type-var]
            found.append(text)
        except BadData as error:
            missing.append(error)
            print(f"{text}: left out, {error}", file=sys.stderr)
    if not found:
        raise missing[0]
    return found


def _run_request(request: ReproduceRequest, table: PaperTable, theirs: str) -> RunRequest:
    """What all rows of a table share."""
    own = is_theirs(request, theirs)
    return RunRequest(
        "smoke",
        prompts=("question_in",),
        limit=request.limit,
        fidelity=False,
        chat="template" if own and (request.fair or table.chat == "template") else "raw",
        granularity="query" if table.query_rows and not request.fair else "kv",
        truncation=TRUNCATION.get(theirs) if own else None,
        out=request.out,
        data_dir=request.data_dir,
        head_scores=request.head_scores,
        device=request.device,
        dtype=request.dtype,
        cluster=request.cluster,
    )


def is_theirs(request: ReproduceRequest, theirs: str) -> bool:
    """Is it the paper's model, from the hub or a folder of the same name? Then the paper's protocol fits it."""
    return request.model is None or Path(request.model).name == Path(HUB[theirs]).name


def _settings(table: PaperTable, request: ReproduceRequest, theirs: str, model: str) -> list[str]:
    """What differs from the paper, in words."""
    found = []
    if not is_theirs(request, theirs):
        found.append(f"The model is {model}, not {theirs}: the numbers are not comparable, the path is.")
        found.append("Prompts are cut to what this model has positions for, and no chat template is put around them.")
    found.append(f"At most {request.limit} examples a task; the paper takes 100 to 200, or a whole set.")
    shortened = [f"--{name} {value}" for name in ("steps", "epochs", "instruct") if (value := getattr(request, name)) is not None]
    if request.train and shortened:
        found.append(f"Variants that were missing were trained with {', '.join(shortened)}, not as the paper has it.")
    return [*found, *(table.fair_notes if request.fair and table.fair_notes else table.notes)]


def _without_scores(request: ReproduceRequest, table: PaperTable, theirs: str, registry: Registry) -> Reproduced:
    """Sizes, times and memory: random weights of the paper's shape are enough."""
    model = request.model or f"random:{SHAPE[theirs]}"
    check_name(model, registry)
    rows = rows_of(table, theirs)
    if table.kind == "sizes":
        numbers, failed = [_sizes(row, model, registry) for row in rows], 0
    elif table.kind == "decoding":
        numbers, failed = _decoding(request, rows, model, registry)
    else:
        numbers, failed = _latency(request, rows, model, registry)
    settings = list(table.notes)
    if request.model:
        settings.insert(0, f"The shape is {model}, not {theirs}: the numbers are not comparable, the path is.")
    asked = [Asked(model, "", "") for _ in rows]
    return Reproduced(table, theirs, model, rows, asked, settings, numbers=numbers, failed=failed)


def _sizes(row: Mapping[str, Any], model: str, registry: Registry) -> dict[str, float]:
    """Parameters, and bytes of a token in float32, without weights. mixSGA's table cuts fractions of a byte off."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not model.startswith("random:"):
        raise BadRequest(f"sizes are told of shapes: --model random:<shape>, not {model}; `list models` names them")
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[model.removeprefix("random:")]))
    shape = replace(shape_of(network), itemsize=4)
    text = conversion_of_row(row)[0]
    registry.conversion(text).apply(network)
    every = {id(weight): weight.numel() for weight in network.parameters()}
    return {"parameters": float(sum(every.values())), "cache bytes a token": float(int(bytes_a_token(shape, text)))}


def _cost(request: ReproduceRequest, registry: Registry, asked: CostRequest) -> tuple[list[dict[str, Any]], int]:
    """The rows of cost cells, decoded eagerly at a batch of one, run where they are missing."""
    asked = replace(asked, decodes=("eager",), batches=(1,), out=request.out, device=request.device, dtype=request.dtype)
    asked = replace(asked, cluster=request.cluster)
    failed = run_cost(asked, registry)
    rows = [row for row in read_costs(request.out) if row["status"] == "ok" and row["cell"]["model"] in asked.models]
    rows = [row for row in rows if row["cell"].get("decode", "eager") == "eager"]
    return [row for row in rows if row["cell"]["context"] in asked.contexts], failed


def _decoding(
    request: ReproduceRequest, rows: Sequence[Mapping[str, Any]], model: str, registry: Registry
) -> tuple[list[dict[str, float]], int]:
    """Tokens a second of GQA and mixSGA, each the median of its trials."""
    variants = {"GQA": f"{model}+gqa-2", "mixSGA": f"{model}+mixsga-3:1:6"}
    contexts = (request.context or MEAN_LENGTH,)
    asked = CostRequest("cost", tuple(variants.values()), ("full",), contexts=contexts, rounds=TRIALS)
    costs, failed = _cost(request, registry, asked)
    found = {}
    for name, variant in variants.items():
        times = sorted(row["token"] for row in costs if row["cell"]["model"] == variant and "token" in row)
        if times:
            found[name] = 1 / times[len(times) // 2]
    if len(found) == 2:
        found["mixSGA slower by"] = 100 * (1 - found["mixSGA"] / found["GQA"])
    return [found] * len(rows), failed


def _latency(
    request: ReproduceRequest, rows: Sequence[Mapping[str, Any]], model: str, registry: Registry
) -> tuple[list[dict[str, float]], int]:
    """Seconds of a whole answer by its length, from the phases of one, and the peak of the memory above the weights."""
    contexts = (request.context or 32_000,)
    asked = CostRequest("cost", (model,), tuple(METHODS.values()), ("128",), contexts=contexts)
    costs, failed = _cost(request, registry, asked)
    numbers = []
    for row in rows:
        mine = [cost for cost in costs if cost["cell"]["method"] == METHODS.get(str(row["method"]))]
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
