"""The quality benchmarks, by name. This table is the only list; it has no logic."""

from benchmarks import babilong, loogle, reasoning
from benchmarks.babilong import BabiLong
from benchmarks.base import Task
from benchmarks.facts import NeedleText, Recall, RecallEach, RecallMany, TwoHop
from benchmarks.instruct import SETS, Instruct
from benchmarks.lm_eval_tasks import LmEval
from benchmarks.longbench import CATEGORIES, ENGLISH, HEADKV, KINDS, LongBench
from benchmarks.loogle import LooGLE
from benchmarks.manual_questions import ManualQuestions
from benchmarks.needle import NeedleInHaystack
from benchmarks.perplexity import Perplexity, PerplexityOwn, PerplexityWindows, Streaming
from benchmarks.random_tokens import RandomTokens
from benchmarks.reasoning import Reasoning
from benchmarks.ruler import RulerMultiKey, RulerSingle, RulerVariables
from benchmarks.write_out import WriteOut

BENCHMARKS: dict[str, Task] = {
    "recall": Recall(),
    "two_hop": TwoHop(),
    "recall_many": RecallMany(),
    "recall_each": RecallEach(),
    "needle_text": NeedleText(),
    "perplexity_own": PerplexityOwn(),
    "perplexity": Perplexity(),
    "perplexity_windows": PerplexityWindows(),
    "streaming": Streaming(),
    "needle": NeedleInHaystack(),
    "needle_facts": NeedleInHaystack(needles="facts"),
    "ruler_single": RulerSingle(),
    "ruler_multi_key": RulerMultiKey(),
    "ruler_variables": RulerVariables(),
    "write_out": WriteOut(),
    "manual_questions": ManualQuestions(),
    "random_tokens": RandomTokens(),
    **{f"longbench_{task}": LongBench(task) for task in KINDS},
    **{f"longbench_{task}_e": LongBench(task, extended=True) for task, kind in KINDS.items() if kind.extended},
    **{name: Instruct(name) for name in SETS},
    **{f"babilong_qa{task}": BabiLong(task) for task in babilong.LABELS},
    **{f"loogle_{kind}": LooGLE(kind) for kind in loogle.KINDS},
    **{name: Reasoning(name) for name in reasoning.SETS},
    "lm_eval": LmEval(),
}

GROUPS: dict[str, tuple[str, ...]] = {  # names that stand for several
    "longbench": tuple(f"longbench_{task}" for task in KINDS),
    "longbench_en": tuple(f"longbench_{task}" for task in ENGLISH),
    "longbench_headkv": tuple(f"longbench_{task}" for task in HEADKV),
    **{
        f"longbench_{category.replace('-', '_')}": tuple(
            f"longbench_{task}" for task in KINDS if KINDS[task].category == category
        )
        for category in CATEGORIES
    },
    "longbench_e": tuple(f"longbench_{task}_e" for task, kind in KINDS.items() if kind.extended),
    "instruct": tuple(SETS),
    "babilong": tuple(f"babilong_qa{task}" for task in babilong.LABELS),
    "loogle": tuple(f"loogle_{kind}" for kind in loogle.KINDS),
    "reasoning": tuple(reasoning.SETS),
    "ruler": ("ruler_single", "ruler_multi_key", "ruler_variables"),
}
