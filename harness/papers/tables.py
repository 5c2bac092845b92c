"""The papers' tables as requests: which of our models, variants, methods and benchmarks stand for a row and a column.

The numbers themselves are data, `reports/papers/<paper>.json`. Nothing measured is ever filled from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.instruct import SETS
from benchmarks.longbench import ENGLISH, HEADKV
from benchmarks.loogle import KINDS
from harness.errors import BadRequest
from harness.training.request import TrainRequest
from results.store import slug

FOLDER = Path(__file__).parents[2] / "reports" / "papers"
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
SHAPE = {  # the same as random weights: enough for costs and sizes
    "Llama-3-8B-Instruct": "llama-3-8b",
    "Mistral-7B-Instruct-v0.2": "mistral-7b",
    "OPT-125m": "opt-125m",
    "Llama3.2-1B": "llama-3.2-1b",
    "Llama3.2-3B": "llama-3.2-3b",
    "Llama3.1-8B": "llama-3-8b",  # 3.1 differs in RoPE alone
    "Gemma2-2B": "gemma-2-2b",
    "TinyLlama-1.1B": "tinyllama-1.1b",
}
TRUNCATION = {"Llama-3-8B-Instruct": 7950, "Mistral-7B-Instruct-v0.2": 31500}
LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k")
PERPLEXITY = "wikitext2 perplexity"

Kind = Literal["scores", "sizes", "decoding", "latency", "tokens"]


@dataclass(frozen=True)
class Sizes:
    """What an estimate of a table's cost goes by, of one of the paper's models."""

    prompts: int = 0
    tokens: int = 0  # of a prompt
    answer: int = 0  # tokens
    trained: int = 0  # tokens, of each variant


@dataclass(frozen=True)
class PaperTable:
    """How one table or figure is asked for. `columns`: the paper's column -> our benchmark."""

    paper: str
    table: str
    columns: Mapping[str, str]
    kind: Kind = "scores"
    chat: str = "raw"
    query_rows: bool = False  # the paper stores a row a query head
    lengths: bool = False  # columns are lengths: `columns` says which tasks are averaged, a row's `task` which one it is
    scale: Mapping[str, float] = field(default_factory=dict)  # by column, what our score is multiplied by
    exponent: tuple[str, ...] = ()  # columns that print the exponential of our score
    recipe: str = ""  # that its variants are trained by
    data: tuple[str, ...] = ()  # folders of --data-dir
    sizes: Sizes = Sizes()
    notes: tuple[str, ...] = ()  # what differs from the paper even on its own model
    fair_notes: tuple[str, ...] = ()  # the same under --fair

    @property
    def name(self) -> str:
        return f"{self.paper}:{self.table}"

    @property
    def numbers(self) -> dict[str, Any]:
        """What the paper prints: about, unit, averages, rows."""
        found: dict[str, Any] = paper(self.paper)["tables"][self.table]
        return found

    def benchmarks(self, row: Mapping[str, Any], column: str, facts: bool) -> tuple[str, ...]:
        """Those whose mean a cell is; empty for what no benchmark of ours fills. `facts`: the embedded model's own sentences."""
        if self.lengths:
            tasks = [self.columns[row["task"]]] if "task" in row else list(self.columns.values())
            return tuple(f"{task}(length={column})" for task in tasks) if column in LENGTHS else ()
        if column not in self.columns:
            return ()
        return ("needle_facts",) if facts and self.columns[column].startswith("needle") else (self.columns[column],)


LONG = {column: f"longbench_{column}" for column in HEADKV}
LOOGLE = {kind: f"loogle_{kind}" for kind in KINDS if kind != "short_qa"}
OTHER = {column: f"longbench_{column}" for column in ENGLISH if column not in HEADKV}
TASKS = {f"qa{number}": f"babilong_qa{number}" for number in range(1, 6)}
SHOTS = {task: f"lm_eval:{task}" for task in ZERO_SHOT}
PERCENT = dict.fromkeys(ZERO_SHOT, 100.0)
QUERY_NOTES = (
    "A row a query head, as the paper's code stores them: several times the bytes of a row a KV head.",
    "PyramidKV spends exactly its budget here; the paper's code spends 0.5 to 12 % more.",
    "Betas are the paper's, chosen there on the test examples.",
)
FAIR_NOTES = (
    "A row a KV head, so all methods hold the same bytes; HeadKV spends its whole budget. The paper: a row a query head.",
)
SFT_NOTES = ("Answers are greedy; judge columns need --judge-url on the stored rows and are not filled here.",)
PRE_NOTES = (
    "Perplexities are of one pass a window. mixSGA's experts are chosen over the whole window, as the paper presumably has it: "
    "that sees what follows.",
)
SIZE_NOTES = (
    "Told from shapes. A tied embedding counts once. Where a family's configuration cannot say that there are fewer KV heads "
    "(OPT), GQA averages projections that keep all heads, so that no parameter goes.",
)
COST_NOTES = ("Weights are random: times and bytes do not depend on them.",)


def _headkv(table: str, columns: Mapping[str, str], sizes: Sizes, *data: str, **more: Any) -> PaperTable:
    settings: dict[str, Any] = {"query_rows": True, "notes": QUERY_NOTES, "fair_notes": FAIR_NOTES, **more}
    return PaperTable("headkv", table, columns, sizes=sizes, data=(*data, "headkv"), **settings)


def _sft(table: str, sets: Sequence[str] = tuple(SETS)) -> PaperTable:
    sizes = Sizes(prompts=500 * len(sets), tokens=150, answer=256, trained=40 * 14_000 * 200)
    columns = {name: name for name in sets}
    return PaperTable("mixsga", table, columns, recipe="mixsga-sft", data=("instruct",), sizes=sizes, notes=SFT_NOTES)


def _pretrained(table: str, columns: Mapping[str, str], **more: Any) -> PaperTable:
    sizes = Sizes(prompts=30_000 if len(columns) > 1 else 200, tokens=120, trained=1_600_000_000)
    settings: dict[str, Any] = {"scale": PERCENT, "exponent": (PERPLEXITY,), "notes": PRE_NOTES, **more}
    return PaperTable("mixsga", table, columns, recipe="mixsga-pretrain", data=("lm_eval", "lm"), sizes=sizes, **settings)


LONG_SIZES, BOTH_SIZES = Sizes(1150, 7900, 64), Sizes(1550, 7900, 64)
NEEDLE = "needle(lengths=8,longest={},needles=text,shortest=1000)"  # as rows name it
WITH_PERPLEXITY = SHOTS | {PERPLEXITY: "perplexity_windows"}

TABLES: dict[str, PaperTable] = {
    table.name: table
    for table in (
        _headkv("table1", LONG | LOOGLE, BOTH_SIZES, "longbench", "loogle"),
        _headkv("table2", LONG, LONG_SIZES, "longbench"),
        _headkv("table3", TASKS, Sizes(2500, 5000, 15), "babilong", chat="template", lengths=True),
        _headkv("table4", LONG | LOOGLE, BOTH_SIZES, "longbench", "loogle"),
        _headkv("table6", OTHER, Sizes(1950, 7900, 128), "longbench"),
        _headkv("figure5", {"needle": NEEDLE.format(8000)}, Sizes(200, 4500, 30), "PaulGrahamEssays"),
        _headkv("figure8", {"needle": NEEDLE.format(31_000)}, Sizes(200, 16_000, 30), "PaulGrahamEssays"),
        _headkv("figure13", TASKS, Sizes(2500, 5000, 15), "babilong", chat="template", lengths=True),
        PaperTable("headkv", "figure6", {}, kind="latency", notes=COST_NOTES, sizes=Sizes(24, 32_000, 128)),
        _sft("table1"),
        _pretrained("table2", WITH_PERPLEXITY),
        _pretrained("table3", WITH_PERPLEXITY),
        _sft("table4"),
        _sft("table5"),
        _sft("table6", list(SETS)[:4]),
        _sft("table11", list(SETS)[:4]),
        PaperTable("mixsga", "table9", {}, kind="sizes", notes=SIZE_NOTES),
        PaperTable("mixsga", "table10", {}, kind="decoding", notes=COST_NOTES, sizes=Sizes(10, 5000, 128)),
        PaperTable("mixsga", "figure1", {}, kind="tokens", data=("lm",), sizes=Sizes(128, 128)),
        _pretrained("figure3", {PERPLEXITY: "perplexity_windows"}),
    )
}


def paper(name: str) -> dict[str, Any]:
    """The numbers of one paper."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table_of(name: str) -> PaperTable:
    """
    Raises:
        BadRequest: no such table.
    """
    if name not in TABLES:
        raise BadRequest(f"no table {name!r}; known: {', '.join(TABLES)}")
    return TABLES[name]


def paper_models(table: PaperTable) -> list[str]:
    return list(dict.fromkeys(str(row["model"]) for row in table.numbers["rows"]))


def rows_of(table: PaperTable, model: str) -> list[dict[str, Any]]:
    """The paper's rows of one of its models."""
    return [row for row in table.numbers["rows"] if row["model"] == model]


@dataclass(frozen=True)
class Asked:
    """What of ours stands for a row of the paper."""

    model: str  # "" where the variant has to be trained first
    method: str
    budget: str
    train: TrainRequest | None = None  # what makes the variant

    @property
    def command(self) -> str:
        """What makes the variant, as it is typed."""
        if self.train is None:
            return ""
        asked = self.train
        parts = ["python run_all.py train", f"--model {asked.model}", *_conversion_options(asked.conversion)]
        parts += [f"--alpha {asked.alpha:g}"] if asked.alpha is not None else []
        parts += [f"--recipe {asked.recipe}"] if asked.recipe else []
        return " ".join([*parts, f"--out {asked.out}", "--data-dir D"])


FAIR = {"HeadKV-R": "headkv_r", "HeadKV-ER": "headkv_er", "HeadKV-R2": "headkv_r2"}
PLAIN = {"FullKV": "full", "SnapKV": "snapkv", "PyramidKV": "pyramidkv", "Ada-SnapKV": "ada_snapkv"}


def asked_for(table: PaperTable, row: Mapping[str, Any], model: str, fair: bool, variants: Path = VARIANTS) -> Asked:
    """A row of HeadKV is a method at a KV size; a row of mixSGA is a variant, with H2O on top in its table 3."""
    if table.paper == "headkv":
        name, budget = str(row["method"]), str(row["budget"])
        if name in PLAIN:
            return Asked(model, PLAIN[name], budget)
        kind = name.removeprefix("HeadKV-").lower()
        beta = f"beta={row['beta']:g}" if "beta" in row else ""
        if fair:
            return Asked(model, FAIR[name] + (f"({beta})" if beta else ""), budget)
        return Asked(model, f"headkv_paper({','.join(part for part in (beta, f'kind={kind}') if part)})", budget)
    conversion, alpha = conversion_of_row(row)
    method, budget = ("h2o", _half(str(row["h2o keeps"]))) if "h2o keeps" in row else ("full", "")
    out = variants / (variant_folder(model, conversion) + ("+alpha0" if alpha == 0 else ""))
    train = TrainRequest(model, conversion, table.recipe or None, alpha=alpha, out=out)
    return Asked(variant(model, conversion, out, alpha), method, budget, train)


def conversion_of_row(row: Mapping[str, Any]) -> tuple[str, float | None]:
    """Ours, and the weight of the consistency loss where it is another."""
    if row["method"] == "GQA":
        return "gqa-2", None
    if row["method"] == "CLA":
        return f"cla-{row.get('percent', 50)}", None
    ratios = str(row.get("ratios", "3:1:6")).removesuffix(":0")
    name = f"mixsga-{ratios}" + ("-random" if row["method"] == "random router" else "")
    return name, 0.0 if row["method"] == "no auxiliary loss" else None


def _half(keep: str) -> str:
    """H2O keeps a share of what the variant stores, which is half of the parent's cache."""
    return f"{float(keep.rstrip('%')) / 2:g}%"


def _conversion_options(conversion: str) -> list[str]:
    name, _, numbers = conversion.partition("-")
    ratios, _, ablation = numbers.partition("-")
    option = {"gqa": "--groups", "cla": "--percent", "mixsga": "--ratios"}[name]
    return [f"--conversion {name} {option} {ratios}", *([f"--ablation {ablation}"] if ablation else [])]


def variant_folder(model: str, conversion: str) -> str:
    """As `train` calls it."""
    return slug(f"{Path(model).name if Path(model).is_dir() else model}+{conversion}")


def variant(model: str, conversion: str, saved: Path, alpha: float | None = None) -> str:
    """The trained variant as a model's name: a saved one, or the one shipped with the embedded model; "" if there is none."""
    if (saved / "variant.json").exists():
        return str(saved)
    shipped = Path(__file__).parents[1] / "reference" / "variants" / conversion.replace(":", "_")
    there = model == "reference" and alpha is None and (shipped / "variant.json").exists()
    return f"{model}+{conversion}" if there else ""


def requests(asked: Sequence[Asked]) -> dict[tuple[str, str], list[str]]:
    """What to run together: methods by (model, budget), since a setting of a row belongs to its budget."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in asked:
        if one.model:
            found.setdefault((one.model, one.budget), []).append(one.method)
    return {where: list(dict.fromkeys(methods)) for where, methods in found.items()}
