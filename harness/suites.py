"""Suites as data. The command line selects one and narrows it; it has no setting that a suite lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from harness.cache import Chat, PromptProtocol
from results.record import DECODES

GIB = 2**30


@dataclass(frozen=True)
class Suite:
    """What to run. Fixed before methods are compared on it."""

    about: str
    models: tuple[str, ...] = ("reference",)
    methods: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()  # models run beside them, with fewer methods
    variant_methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()  # or names of groups of them
    prompts: tuple[PromptProtocol, ...] = ("question_in",)
    limit: int = 20  # examples of each benchmark
    limits: Mapping[str, int] = field(default_factory=dict)  # of some of them, where it is another number
    seeds: tuple[int, ...] = (0,)  # of generated examples and sampled answers
    temperature: float = 0.0
    fidelity: bool = True
    protect: str = ""  # "4:8": each method a second time, with these first and last positions protected instead of its own
    chat: Chat = "raw"  # is a chat template put around the prompts?
    truncation: int | None = None  # tokens of a prompt; None: what the model has positions for
    cost: str = ""  # the cost suite that is run behind it, unless the request is narrowed
    behind: tuple[str, ...] = ()  # suites that are run behind it, likewise; one whose model is not here is left out, and said so
    worker_bytes: int | None = None  # of memory: on a CPU a process a core is then started, as far as there is memory for them


@dataclass(frozen=True)
class CostSuite:
    """Whose cost to measure, on random prompts: latency in rounds, memory once, every cell in a process of its own."""

    about: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    contexts: tuple[int, ...]  # tokens
    batches: tuple[int, ...] = (1,)  # 0: as many sequences as fit
    new_tokens: int = 32
    rounds: int = 3
    decodes: tuple[str, ...] = ("eager",)  # eager | graph | compiled


EVICTING = ("random", "streaming_llm", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "ada_snapkv")
AGNOSTIC = ("keydiff", "lagkv", "cur", "expected_attention", "expected_adakv", "kvzip", "kvzip_uniform")  # see no question
NEWER = ("chunkkv", "adakv", "cake", "criticalkv", "critical_adakv", "defensivekv", "layer_defensivekv", "duo_attention")
BY_HEAD = ("headkv_r", "headkv_er", "headkv_r2")
VARIANTS = ("reference+gqa-2", "reference+mqa", "reference+mixsga-3:1:6", "reference+none")
RULER = ("ruler_single", "ruler_multi_key", "ruler_variables")
LONGBENCH = ("single-doc", "multi-doc", "summarization", "few-shot", "synthetic", "code")  # its categories
LADDER = ("50%", "25%", "12.5%", "6.25%")  # of the bytes of the full cache in 16 bits
FEWER_BITS = ("int8", "int4", "turbo-4(spared=0)", "turbo-3(spared=0)", "kivi-4", "kivi-2")
BITS = ("int8", "int4", "turbo-3(spared=0)", "kivi-2(residual=32)")  # behind methods that evict, from many to few
COMPARED = ("full", "streaming_llm", "h2o", "snapkv", "pyramidkv", "ada_snapkv", "headkv_r", "headkv_r2")


def longbench(about: str, group: str) -> Suite:
    """Every record of some of LongBench's tasks."""
    return Suite(about, methods=COMPARED, budgets=("128", "1024", "25%"), benchmarks=(group,), limit=1000)


def instruct(about: str, seeds: tuple[int, ...] = (0,), temperature: float = 0.0) -> Suite:
    """Every record of the instruction sets."""
    return Suite(
        about,
        methods=COMPARED,
        budgets=("32", "64", "50%"),
        benchmarks=("instruct",),
        limit=1000,
        seeds=seeds,
        temperature=temperature,
        fidelity=not temperature,
    )


REAL_METHODS = (
    "full",
    *("random", "streaming_llm", "h2o", "snapkv", "pyramidkv", "ada_snapkv", "headkv_r2"),
    "headkv_r2(shuffle=1)",
    *("snapkv(window=32)", "headkv_r2(window=32)"),
)
WIDE_METHODS = (
    "full",
    *EVICTING,
    *AGNOSTIC,
    *NEWER,
    *BY_HEAD,
    *(f"headkv_r2(shuffle={seed})" for seed in (1, 2)),
    *(f"{method}(window=32)" for method in ("snapkv", "ada_snapkv", "headkv_r2")),
)


def real(about: str, *benchmarks: str, limit: int, chat: Chat = "template", behind: tuple[str, ...] = ()) -> Suite:
    """A part of the study of a real small model. Truncated to what the model reads well."""
    return Suite(
        about,
        models=("smollm2",),
        methods=REAL_METHODS,
        budgets=("128", "25%"),
        benchmarks=benchmarks,
        limit=limit,
        chat=chat,
        truncation=3500,
        cost="cost-real" if behind else "",
        behind=behind,
        worker_bytes=4 * GIB,
    )


WIDER = "-wide"  # behind the names of these parts: see `wide`
ASKED_ONCE = ("perplexity", "lm-eval", "instruct", "longbench-raw", "longbench-e")  # parts that are asked under one protocol


def wide(name: str, suite: Suite) -> Suite:
    """The same with every method, more budgets and, where a question may come later, both protocols: days instead of hours."""
    return replace(
        suite,
        about=f"{name} with every method, at seven budgets and, where it may be asked later, with its question behind: days",
        methods=WIDE_METHODS,
        budgets=("64", "128", "256", "512", "10%", "25%", "50%"),
        prompts=("question_in",) if name.removeprefix("real-") in ASKED_ONCE else ("question_in", "question_after"),
        behind=tuple(f"{part}{WIDER}" for part in suite.behind),
    )


REAL: dict[str, Suite] = {
    "real": real(
        "the study of SmolLM2-135M-Instruct that `make real` runs: hours; started again it goes on",
        "needle(haystack=python,shortest=512,longest=2048,lengths=5,depths=10)",
        limit=50,
        behind=tuple(
            f"real-{part}"
            for part in "ruler perplexity lm-eval instruct longbench longbench-raw babilong loogle longbench-e".split()
        ),
    ),
    "real-ruler": real(
        "of it: RULER-style tasks in Python's manual at 1,024, 2,048 and 3,400 tokens",
        *(f"{task}(haystack=python,length={length})" for length in (1024, 2048, 3400) for task in RULER),
        limit=20,
    ),
    "real-perplexity": real(
        "of it: likelihoods of three texts, scored behind a compressed cache",
        *("perplexity(text=python)", "perplexity", "perplexity(text=books)"),
        limit=30,
        chat="raw",
    ),
    "real-lm-eval": real(
        "of it: lm-eval's five tasks under a compressed cache",
        *(f"lm_eval:{task}" for task in ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")),
        limit=100,
        chat="raw",
    ),
    "real-instruct": real("of it: the five instruction sets by ROUGE-L", "instruct", limit=30),
    "real-longbench": real("of it: LongBench's 21 tasks, as a chat", "longbench", limit=10),
    "real-longbench-raw": real("of it: LongBench's 21 tasks, as plain text", "longbench", limit=10, chat="raw"),
    "real-babilong": real(
        "of it: BABILong at 0k to 4k",
        *(f"babilong_qa{task}(length={length})" for length in ("0k", "1k", "2k", "4k") for task in range(1, 6)),
        limit=10,
    ),
    "real-loogle": real("of it: LooGLE", "loogle", limit=10),
    "real-longbench-e": real("of it: LongBench-E, by length", "longbench_e", limit=10),
}
SUITES: dict[str, Suite] = {
    "default": Suite(
        about="every eviction method at equal bytes on the embedded model, and its variants: what `python run_all.py` runs",
        variants=VARIANTS,
        variant_methods=("full", "snapkv", "h2o"),
        methods=("full", *EVICTING, *BY_HEAD, "snapkv(kernel=5)", "ada_snapkv(kernel=5)"),
        budgets=("16", "32", "64", "128", "25%"),
        benchmarks=("recall", "two_hop", "recall_many", "perplexity_own"),
        prompts=("question_in", "question_after"),
        limit=10,
        cost="cost-default",
        behind=("smollm2-short",),
        worker_bytes=3 * GIB,
    ),
    "smollm2-short": Suite(
        about="behind the default run: needles, RULER-style tasks, likelihood and instructions in Python's manual, on SmolLM2",
        models=("smollm2",),
        methods=("full", "streaming_llm", "h2o", "snapkv", "ada_snapkv", "headkv_r2"),
        budgets=("25%", "50%"),
        benchmarks=(
            "needle(haystack=python,shortest=256,longest=768,lengths=3,depths=5)",
            *(f"{task}(haystack=python,length=512)" for task in RULER[:2]),
            "perplexity(text=python,read=512,scored=64)",
            "manual_questions(new_tokens=24)",
        ),
        limit=15,
        limits={"perplexity(text=python,read=512,scored=64)": 30, "manual_questions(new_tokens=24)": 10},
        chat="template",
        worker_bytes=3 * GIB,
    ),
    "smollm2": Suite(
        about="a real small model, SmolLM2-135M-Instruct: needles in Python's manual, and the manual's likelihood",
        models=("smollm2",),
        methods=("full", "streaming_llm", "h2o", "snapkv", "ada_snapkv", "headkv_r2"),
        budgets=("64", "128"),
        benchmarks=(
            "needle(haystack=python,shortest=512,longest=1024,lengths=3,depths=5)",
            "perplexity(text=python,read=512,scored=128)",
        ),
        chat="template",
        limit=30,
        worker_bytes=3 * GIB,
    ),
    "bits": Suite(
        about="bits against entries at 50, 25, 12.5 and 6.25 % of the bytes, on the embedded model; behind it on SmolLM2",
        methods=("full", *FEWER_BITS, "snapkv", *(f"snapkv+{bits}" for bits in BITS), "headkv_r2", "headkv_r2+int4"),
        budgets=LADDER,
        benchmarks=("recall", "two_hop", "recall_many", "perplexity_own"),
        prompts=("question_in", "question_after"),
        limit=40,
        behind=("bits-smollm2",),
    ),
    "bits-smollm2": Suite(
        about="bits against entries at equal bytes on SmolLM2: needles, RULER-style tasks, likelihood of Python's manual",
        models=("smollm2",),
        methods=("full", *FEWER_BITS, "snapkv", *(f"snapkv+{bits}" for bits in BITS), "headkv_r2", "headkv_r2+int4"),
        budgets=LADDER,
        benchmarks=(
            "needle(haystack=python,shortest=512,longest=1024,lengths=3,depths=5)",
            *(f"{task}(haystack=python,length=1024)" for task in RULER),
            "perplexity(text=python,read=512,scored=128)",
        ),
        chat="template",
        limit=30,
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
    "longbench": longbench("LongBench, all 21 tasks", "longbench"),
    "longbench-en": longbench("LongBench, the 16 English tasks", "longbench_en"),
    "longbench-headkv": longbench("LongBench, the six tasks of HeadKV's main tables", "longbench_headkv"),
    **{
        f"longbench-{category}": longbench(f"LongBench, {category}", f"longbench_{category.replace('-', '_')}")
        for category in LONGBENCH
    },
    "longbench-e": longbench("LongBench-E, its 13 tasks", "longbench_e"),
    "instruct": instruct("Dolly, Self-Instruct, Vicuna, Super-Natural and Unnatural Instructions, greedy, by ROUGE-L"),
    "instruct-sampled": instruct(
        "the same, sampled at temperature 1 with five seeds, as MiniLLM does", (10, 20, 30, 40, 50), temperature=1.0
    ),
    "query-agnostic": Suite(
        about="kvpress's board on a real small model: RULER-style tasks at 4k, compressed before the question is known",
        models=("smollm2",),
        methods=("full", "random", "streaming_llm", "knorm", "snapkv", "adakv", "criticalkv", "chunkkv", *AGNOSTIC),
        budgets=("75%", "50%", "25%", "12.5%"),
        benchmarks=tuple(f"{task}(haystack=python,length=4096)" for task in RULER),
        prompts=("question_after",),
        chat="template",
        limit=20,
    ),
    "ladder": Suite(
        about="every method at a half, a quarter, an eighth and a sixteenth of the bytes, on a real small model",
        models=("smollm2",),
        methods=("full", *EVICTING, *AGNOSTIC, *NEWER, *BY_HEAD),
        budgets=("50%", "25%", "12.5%", "6.25%"),
        benchmarks=(
            "needle(haystack=python,shortest=512,longest=2048,lengths=3,depths=5)",
            *(f"{task}(haystack=python,length=2048)" for task in RULER),
            "perplexity(text=python)",
        ),
        chat="template",
        limit=15,
    ),
    "needle": Suite(
        about="a needle in a haystack, lengths x depths, in the words of the embedded model: heat maps",
        methods=("full", "streaming_llm", "snapkv", "ada_snapkv", "headkv_r2"),
        budgets=("32", "128"),
        benchmarks=("needle_facts",),
        prompts=("question_in", "question_after"),
        limit=50,
    ),
    "babilong": Suite(
        about="BABILong, qa1 to qa5 at 0k to 4k: reasoning in a haystack",
        methods=COMPARED,
        budgets=("128",),
        benchmarks=tuple(f"babilong_qa{task}(length={length})" for length in ("0k", "1k", "2k", "4k") for task in range(1, 6)),
        limit=100,
    ),
    "loogle": Suite(
        about="LooGLE, short questions and the four kinds of long ones",
        methods=COMPARED,
        budgets=("128", "1024"),
        benchmarks=("loogle",),
        limit=100,
    ),
    "ruler": Suite(
        about="RULER-style tasks of our own at three lengths",
        methods=COMPARED,
        budgets=("64", "25%"),
        benchmarks=tuple(f"{task}(length={length})" for length in (512, 1024, 1792) for task in RULER),
    ),
    "perplexity": Suite(
        about="WikiText-2 under a compressed cache, and window by window for the embedded model and its variants",
        variants=VARIANTS,
        variant_methods=("full", "snapkv"),
        methods=("full", *EVICTING),
        budgets=("64", "25%"),
        benchmarks=("perplexity", "perplexity_windows"),
    ),
    "decoding": Suite(
        about="eviction while decoding beside eviction once, over a long continuation of a short prompt, on the embedded model",
        methods=(
            "full",
            *("streaming_llm", "h2o", "tova", "snapkv"),
            *("streaming_llm(every=1)", "h2o(every=1)", "tova(every=1)"),
            *("random(every=32)", "knorm(every=32)", "snapkv(every=32)", "ada_snapkv(every=32)", "rkv(every=32)"),
            "triattention(every=32)",
        ),
        budgets=("64", "128", "256"),
        benchmarks=("perplexity_own(length=256,scored=1536)",),
        limit=10,
    ),
    "long-answers": Suite(
        about="a register written out line by line on SmolLM2: eviction once and while the answer is written, and fewer bits",
        models=("smollm2",),
        methods=(
            "full",
            *("streaming_llm", "h2o", "tova", "snapkv", "headkv_r2"),
            *("streaming_llm(every=1)", "h2o(every=1)", "tova(every=1)"),
            *("snapkv(every=32)", "headkv_r2(every=32)", "rkv(every=32)", "triattention(every=32)"),
            *("int4", "snapkv+int4", "snapkv(every=32)+int4", "headkv_r2(every=32)+int4"),
        ),
        budgets=("50%", "25%", "12.5%"),
        benchmarks=("write_out",),
        limit=30,
        fidelity=False,
    ),
    "streaming": Suite(
        about="a text four times as long as the embedded model reaches, token by token under a cap (StreamingLLM's measure)",
        methods=("full", "streaming_llm(every=16)", "streaming_llm(every=16,renumber=true)", "snapkv(every=32,renumber=true)"),
        budgets=("128", "512"),
        benchmarks=("streaming(scored=3000)", "streaming"),
        limit=1,
    ),
    "reasoning": Suite(
        about="GSM8K, MATH-500 and AIME, four samples of a problem: eviction once and while the answer is written; for a GPU",
        models=("deepseek-ai/DeepSeek-R1-Distill-Llama-8B",),
        methods=("full", "snapkv", *("snapkv(every=128)", "streaming_llm(every=128)", "h2o(every=128)", "rkv", "triattention")),
        budgets=("512", "1024", "2048"),
        benchmarks=("reasoning",),
        limit=500,
        seeds=(0, 1, 2, 3),
        temperature=0.6,
        fidelity=False,
        chat="template",
    ),
    "lm-eval": Suite(
        about="lm-eval's HellaSwag, PIQA, WinoGrande and ARC under a compressed cache",
        methods=COMPARED,
        budgets=("32", "50%"),
        benchmarks=tuple(f"lm_eval:{task}" for task in ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")),
        limit=200,
    ),
}
SUITES |= REAL | {f"{name}{WIDER}": wide(name, suite) for name, suite in REAL.items()}

COST_SUITES: dict[str, CostSuite] = {
    "cost-default": CostSuite(
        about="the cost cells of the default run: one round on a small model",
        models=("random:small-llama",),
        methods=("full", "snapkv", "h2o", "ada_snapkv"),
        budgets=("10%",),
        contexts=(4096,),
        rounds=1,
    ),
    "cost-real": CostSuite(
        about="latency and memory of SmolLM2-135M-Instruct, beside the study of it",
        models=("smollm2",),
        methods=("full", "streaming_llm", "h2o", "snapkv", "pyramidkv", "ada_snapkv"),
        budgets=("128", "25%"),
        contexts=(1024, 4096),
    ),
    "cost-small": CostSuite(
        about="latency and memory on two CPU cores, in minutes",
        models=("random:small-llama",),
        methods=("full", "snapkv", "h2o", "ada_snapkv"),
        budgets=("10%",),
        contexts=(1024, 4096),
    ),
    "cost": CostSuite(
        about="latency and memory of an 8B model at 8K, 32K and 128K tokens: for a GPU",
        models=("random:llama-3-8b",),
        methods=("full", "streaming_llm", "snapkv", "pyramidkv", "ada_snapkv"),
        budgets=("128", "1024"),
        contexts=(8192, 32768, 130000),
        new_tokens=128,
        decodes=DECODES,
    ),
    "cost-batch": CostSuite(
        about="throughput of an 8B model by batch at 8K tokens, up to the largest that fits: for a GPU",
        models=("random:llama-3-8b",),
        methods=("full", "snapkv", "ada_snapkv"),
        budgets=("1024",),
        contexts=(8192,),
        batches=(1, 8, 32, 0),
        new_tokens=64,
        decodes=("eager", "compiled"),
    ),
    "cost-variants": CostSuite(
        about="an 8B model against its GQA and mixSGA conversions at equal and smaller bytes: for a GPU",
        models=("random:llama-3-8b", "random:llama-3-8b+gqa-2", "random:llama-3-8b+mqa", "random:llama-3-8b+mixsga-3:1:6"),
        methods=("full",),
        budgets=(),
        contexts=(8192, 32768),
        new_tokens=128,
        decodes=DECODES,
    ),
}
