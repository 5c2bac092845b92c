"""The papers' tables as requests: which of our models, variants, methods and benchmarks stand for a row and a column.

The numbers themselves are data, `reports/papers/<paper>.json`. Nothing measured is ever filled from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.instruct import SETS
from benchmarks.longbench import ENGLISH, HEADKV
from benchmarks.loogle import KINDS
from harness.plan import BadRequest
from results.store import slug

FOLDER = Path(__file__).parent.parent / "reports" / "papers"
VARIANTS = Path("results/variants")  # where `train` puts them
ZERO_SHOT = ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")
HUB = {  # the papers' models
    "Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "Mistral-7B-Instruct-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "OPT-125m": "facebook/opt-125m",
    "OPT-355m": "facebook/opt-350m",
    "Llama3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama3.2-3B": "meta-llama/Llama-3.2-3B",
    "Llama3.1-8B": "meta-llama/Llama-3.1-8B",
    "Gemma2-2B": "google/gemma-2-2b",
    "TinyLlama-1.1B": "TinyLlama/TinyLlama_v1.1",
}
TRUNCATION = {"Llama-3-8B-Instruct": 7950, "Mistral-7B-Instruct-v0.2": 31500}


@dataclass(frozen=True)
class PaperTable:
    """How one table is asked for. `columns`: the paper's column -> our benchmark."""

    paper: str
    table: str
    columns: Mapping[str, str]
    needs: str  # in words: weights, data, machine
    chat: str = "raw"
    columns_are_lengths: bool = False  # then `columns` says which tasks are averaged
    scale: Mapping[str, float] = field(default_factory=dict)  # by column, what our score is multiplied by

    @property
    def name(self) -> str:
        return f"{self.paper}:{self.table}"


LONG = {column: f"longbench_{column}" for column in HEADKV}
LOOGLE = {kind: f"loogle_{kind}" for kind in KINDS if kind != "short_qa"}
OTHER = {column: f"longbench_{column}" for column in ENGLISH if column not in HEADKV}
TASKS = {f"qa{number}": f"babilong_qa{number}" for number in range(1, 6)}
SHOTS = {task: f"lm_eval:{task}" for task in ZERO_SHOT}
PERCENT = dict.fromkeys(ZERO_SHOT, 100.0)
HEADKV_NEEDS = "the weights (gated for Llama-3), {data}, head scores (published ones lie in --data-dir), a GPU of 40 GB"
SFT_NEEDS = "base weights, the instruction sets in --data-dir, variants trained by `train --instruct`, a GPU of 80 GB"
PRE_NEEDS = "TinyLlama or Gemma-2 weights, MiniPile, variants trained on 1.6 billion tokens, a GPU of 80 GB"


def _headkv(table: str, columns: Mapping[str, str], data: str, **more: Any) -> PaperTable:
    return PaperTable("headkv", table, columns, HEADKV_NEEDS.format(data=data), **more)


TABLES: dict[str, PaperTable] = {
    table.name: table
    for table in (
        _headkv("table1", LONG | LOOGLE, "LongBench and LooGLE"),
        _headkv("table2", LONG, "LongBench"),
        _headkv("table3", TASKS, "BABILong", chat="template", columns_are_lengths=True),
        _headkv("table4", LONG | LOOGLE, "LongBench and LooGLE"),
        _headkv("table6", OTHER, "LongBench"),
        PaperTable("mixsga", "table1", {name: name for name in SETS}, SFT_NEEDS),
        PaperTable("mixsga", "table2", SHOTS, PRE_NEEDS, scale=PERCENT),
        PaperTable("mixsga", "table3", SHOTS, PRE_NEEDS, scale=PERCENT),
        PaperTable("mixsga", "table4", {name: name for name in SETS}, SFT_NEEDS),
        PaperTable("mixsga", "table5", {name: name for name in SETS}, SFT_NEEDS),
        PaperTable("mixsga", "table6", {name: name for name in list(SETS)[:4]}, SFT_NEEDS),
        PaperTable("mixsga", "table11", {name: name for name in list(SETS)[:4]}, SFT_NEEDS),
    )
}


def paper(name: str) -> dict[str, Any]:
    """The numbers of one paper."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table_of(name: str) -> PaperTable:
    """
    Raises:
        BadRequest: no such table, or one whose numbers are not a matter of scores.
    """
    if name in TABLES:
        return TABLES[name]
    known = ", ".join(TABLES)
    which, _, table = name.partition(":")
    if (FOLDER / f"{which}.json").exists() and table in paper(which)["tables"]:
        raise BadRequest(f"{name} is kept as data, but is no table of scores that a run fills; those are: {known}")
    raise BadRequest(f"no table {name!r}; known: {known}")


def paper_models(table: PaperTable) -> list[str]:
    rows = paper(table.paper)["tables"][table.table]["rows"]
    return list(dict.fromkeys(str(row["model"]) for row in rows))


def rows_of(table: PaperTable, model: str) -> list[dict[str, Any]]:
    """The paper's rows of one of its models."""
    rows = paper(table.paper)["tables"][table.table]["rows"]
    return [row for row in rows if row["model"] == model]


@dataclass(frozen=True)
class Asked:
    """What of ours stands for a row of the paper."""

    model: str  # "" where the variant has to be trained first
    method: str
    budget: str
    train: str = ""  # the command that makes the variant


FAIR = {"HeadKV-R": "headkv_r", "HeadKV-ER": "headkv_er", "HeadKV-R2": "headkv_r2"}
PLAIN = {"FullKV": "full", "SnapKV": "snapkv", "PyramidKV": "pyramidkv", "Ada-SnapKV": "ada_snapkv"}


def asked_for(table: PaperTable, row: Mapping[str, Any], model: str, fair: bool) -> Asked:
    """A row of HeadKV is a method at a KV size; a row of mixSGA is a variant, with H2O on top in its table 3."""
    if table.paper == "headkv":
        name = str(row["method"])
        if name in PLAIN:
            return Asked(model, PLAIN[name], str(row["budget"]))
        kind = name.removeprefix("HeadKV-").lower()
        beta = f"beta={row['beta']:g}" if "beta" in row else ""
        if fair:
            return Asked(model, FAIR[name] + (f"({beta})" if beta else ""), str(row["budget"]))
        return Asked(model, f"headkv_paper({','.join(part for part in (beta, f'kind={kind}') if part)})", str(row["budget"]))
    if row["method"] == "CLA":
        return Asked("", "full", "", "cross-layer attention is not among the conversions yet")
    conversion, options = _conversion(row)
    found = variant(model, conversion, options)
    method, budget = ("h2o", _half(str(row["h2o keeps"]))) if "h2o keeps" in row else ("full", "")
    made = f"python run_all.py train --model {model} {_train_options(conversion, options)} --instruct FILE.jsonl"
    return Asked(found, method, budget, made)


def _conversion(row: Mapping[str, Any]) -> tuple[str, str]:
    """Ours, and what else its training differs in."""
    if row["method"] == "GQA":
        return "gqa-2", ""
    ratios = str(row["ratios"]).removesuffix(":0")
    return {
        "random router": (f"mixsga-{ratios}-random", ""),
        "no auxiliary loss": (f"mixsga-{ratios}", "alpha0"),
    }.get(str(row["method"]), (f"mixsga-{ratios}", ""))


def _half(keep: str) -> str:
    """H2O keeps a share of what the variant stores, which is half of the parent's cache."""
    return f"{float(keep.rstrip('%')) / 2:g}%"


def _train_options(conversion: str, options: str) -> str:
    name, _, numbers = conversion.partition("-")
    ratios, _, ablation = numbers.partition("-")
    text = f"--conversion {name} " + (f"--groups {ratios}" if name == "gqa" else f"--ratios {ratios}")
    text += f" --ablation {ablation}" if ablation else ""
    return text + (" --alpha 0 --out results/variants/NAME+alpha0" if options else "")


def variant(model: str, conversion: str, options: str = "") -> str:
    """The trained variant as a model's name: a saved one, or the one shipped with the embedded model; "" if there is none."""
    name = f"{Path(model).name if Path(model).is_dir() else model}+{conversion}"  # as `train` calls it
    saved = VARIANTS / (slug(name) + (f"+{options}" if options else ""))
    if (saved / "variant.json").exists():
        return str(saved)
    shipped = Path(__file__).parent / "reference" / "variants" / conversion.replace(":", "_")
    return name if model == "reference" and not options and (shipped / "variant.json").exists() else ""


def requests(asked: Sequence[Asked]) -> dict[tuple[str, str], list[str]]:
    """What to run together: methods by (model, budget), since a setting of a row belongs to its budget."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in asked:
        if one.model:
            found.setdefault((one.model, one.budget), []).append(one.method)
    return {where: list(dict.fromkeys(methods)) for where, methods in found.items()}
