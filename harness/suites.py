"""Suites as data. The command line selects one and narrows it; it has no setting that a suite lacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.instruct import SETS
from benchmarks.longbench import ENGLISH, HEADKV, KINDS
from harness.prompts import PromptProtocol


@dataclass(frozen=True)
class Suite:
    """What to run. Fixed before methods are compared on it."""

    about: str
    models: tuple[str, ...] = ("reference",)
    methods: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()  # models run beside them, with fewer methods
    variant_methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    prompts: tuple[PromptProtocol, ...] = ("question_in",)
    limit: int = 20  # examples of each benchmark
    seeds: tuple[int, ...] = (0,)  # of generated examples and sampled answers
    temperature: float = 0.0
    fidelity: bool = True


EVICTING = ("random", "streaming_llm", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "ada_snapkv")
BY_HEAD = ("headkv_r", "headkv_er", "headkv_r2")
COMPARED = ("full", "streaming_llm", "h2o", "snapkv", "pyramidkv", "ada_snapkv", "headkv_r", "headkv_r2")


def longbench(about: str, tasks: Iterable[str]) -> Suite:
    """Every record of some of LongBench's tasks."""
    benchmarks = tuple(f"longbench_{task}" for task in tasks)
    return Suite(about, methods=COMPARED, budgets=("128", "1024", "25%"), benchmarks=benchmarks, limit=1000)


CATEGORIES = tuple(dict.fromkeys(kind.category for kind in KINDS.values()))

SUITES: dict[str, Suite] = {
    "default": Suite(
        about="every eviction method at equal bytes on the embedded model, and its variants: what `python run_all.py` runs",
        variants=("reference+gqa-2", "reference+mqa", "reference+mixsga-3:1:6", "reference+none"),
        variant_methods=("full", "snapkv", "h2o"),
        methods=("full", *EVICTING, *BY_HEAD, "snapkv(kernel=5)", "ada_snapkv(kernel=5)"),
        budgets=("16", "32", "64", "128", "25%"),
        benchmarks=("recall", "two_hop", "recall_many", "perplexity_own"),
        prompts=("question_in", "question_after"),
        limit=10,
    ),
    "smoke": Suite(
        about="a minute of everything, on a random model: does the machinery run here?",
        models=("random:tiny-llama",),
        methods=("full", *EVICTING),
        budgets=("32", "25%"),
        benchmarks=("random_tokens(length=128)",),
        prompts=("question_in", "question_after"),
        limit=2,
    ),
    "headkv-ablation": Suite(
        about="HeadKV against SnapKV, uniform, and its own scores dealt out to other heads, on the embedded model",
        methods=("full", "snapkv", "ada_snapkv", *BY_HEAD, *(f"headkv_r2(shuffle={seed})" for seed in (1, 2, 3)), "headkv_paper"),
        budgets=("16", "32", "64", "128"),
        benchmarks=("recall", "two_hop", "recall_many"),
        limit=100,
        seeds=(11,),
    ),
    "longbench": longbench("LongBench, all 21 tasks", KINDS),
    "longbench-en": longbench("LongBench, the 16 English tasks", ENGLISH),
    "longbench-headkv": longbench("LongBench, the six tasks of HeadKV's main tables", HEADKV),
    **{
        f"longbench-{category}": longbench(
            f"LongBench, {category}", (t for t, kind in KINDS.items() if kind.category == category)
        )
        for category in CATEGORIES
    },
    "longbench-e": longbench("LongBench-E, its 13 tasks", (f"{task}_e" for task, kind in KINDS.items() if kind.extended)),
    "instruct": Suite(
        about="Dolly, Self-Instruct, Vicuna, Super-Natural and Unnatural Instructions, greedy, by ROUGE-L",
        methods=COMPARED,
        budgets=("32", "64", "50%"),
        benchmarks=tuple(SETS),
        limit=1000,
    ),
    "instruct-sampled": Suite(
        about="the same, sampled at temperature 1 with five seeds, as MiniLLM does",
        methods=COMPARED,
        budgets=("32", "64", "50%"),
        benchmarks=tuple(SETS),
        limit=1000,
        seeds=(10, 20, 30, 40, 50),
        temperature=1.0,
        fidelity=False,
    ),
    "sweep-speed": Suite(
        about="cost of a sweep of 31 cells beside the plain prefills of its prompts; prints one JSON line, stores nothing",
        models=("random:sweep-speed",),
    ),
    "attention-speed": Suite(
        about="decode attention at 10 to 50 % of a full cache, beside that share of the full cache's time; one JSON line",
        models=(),
    ),
}
