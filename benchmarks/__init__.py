"""The quality benchmarks, by name. This table is the only list; it has no logic."""

from benchmarks.base import Task
from benchmarks.facts import NeedleText, Recall, RecallMany, TwoHop
from benchmarks.instruct import SETS, Instruct
from benchmarks.longbench import KINDS, LongBench
from benchmarks.perplexity import PerplexityOwn
from benchmarks.random_tokens import RandomTokens

BENCHMARKS: dict[str, Task] = {
    "recall": Recall(),
    "two_hop": TwoHop(),
    "recall_many": RecallMany(),
    "needle_text": NeedleText(),
    "perplexity_own": PerplexityOwn(),
    "random_tokens": RandomTokens(),
    **{f"longbench_{task}": LongBench(task) for task in KINDS},
    **{f"longbench_{task}_e": LongBench(task, extended=True) for task, kind in KINDS.items() if kind.extended},
    **{name: Instruct(name) for name in SETS},
}
