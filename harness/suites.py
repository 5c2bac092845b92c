"""Suites as data. The command line selects one and narrows it; it has no setting that a suite lacks."""

from __future__ import annotations

from dataclasses import dataclass

from harness.prompts import PromptProtocol


@dataclass(frozen=True)
class Suite:
    """What to run. Fixed before methods are compared on it."""

    about: str
    models: tuple[str, ...] = ("reference",)
    methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    prompts: tuple[PromptProtocol, ...] = ("question_in",)
    limit: int = 20  # examples of each benchmark
    seed: int = 0
    fidelity: bool = True


EVICTING = ("random", "streaming_llm", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "ada_snapkv")
HEADKV = ("headkv_r", "headkv_er", "headkv_r2")

SUITES: dict[str, Suite] = {
    "default": Suite(
        about="every eviction method at equal bytes on the embedded model: what `python run_all.py` runs",
        methods=("full", *EVICTING, *HEADKV, "snapkv(kernel=5)", "ada_snapkv(kernel=5)"),
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
        methods=("full", "snapkv", "ada_snapkv", *HEADKV, *(f"headkv_r2(shuffle={seed})" for seed in (1, 2, 3)), "headkv_paper"),
        budgets=("16", "32", "64", "128"),
        benchmarks=("recall", "two_hop", "recall_many"),
        limit=100,
        seed=11,
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
