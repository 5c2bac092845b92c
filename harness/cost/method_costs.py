"""What each method adds to a prefill, and what all of them cost in one sweep: `run_all.py bench methods`.

One prompt of 4,000 tokens on the model of `bench sweep`, one thread, in CPU seconds of this process, so that other programs on
the machine disturb less. Everything is divided by a plain prefill of transformers' own. Observation is a prefill that observes
less one that does not; what it costs less than a hundredth or two of is noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import torch

from benchmarks.random_tokens import RandomTokens
from harness.cache import Arena, Budget, Needs
from harness.cost.microbench import NEW_TOKENS, speed_model
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.evaluation.prompts import Prompt, Protocol, tokenize
from harness.evaluation.sweep import Cell, Sweep
from methods.base import Method, scores_for

TOKENS = 4000
BUDGET = Budget.parse("25%")


def method_costs(methods: Mapping[str, Method], rounds: int = 1) -> dict[str, float]:
    """Of each method that needs no head scores: what it observes, and what scoring and choosing a quarter take.

    `sweep` is one sweep of all of them at a quarter, answers of 32 tokens and all, without those that make a second pass;
    `sweep second pass` is what the second passes add to it before a token is said.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    model = speed_model()
    task = RandomTokens(length=TOKENS, question=16, max_new_tokens=NEW_TOKENS, vocabulary=4096)
    protocol = Protocol(prompt="question_after", stop="none")
    prompt = tokenize(None, task.example(0, 0, len), protocol, 10**6)
    ids, arena = torch.tensor(prompt.ids[: prompt.context]), Arena()
    plain = min(_cpu(lambda: _plain(model, ids)) for _ in range(rounds + 1))  # the first warms up
    bare = min(_cpu(lambda: model.prefill(ids, Needs(), arena)) for _ in range(rounds))
    alone = {name: method for name, method in methods.items() if not method.head_scores and not method.is_reference}
    needs = {method.needs for method in alone.values()}
    seen = {one: min(_cpu(partial(model.prefill, ids, one, arena)) for _ in range(rounds)) - bare for one in needs}
    found = {"plain prefill s": plain, "observed nothing": bare / plain}
    for name, method in alone.items():
        prefill = model.prefill(ids, method.needs, arena)[0]
        scoring = min(_cpu(partial(_choose, model, method, prefill)) for _ in range(rounds))
        found[f"{name} observe"], found[f"{name} score"] = max(0.0, seen[method.needs]) / plain, scoring / plain
    cheap = {name: method for name, method in alone.items() if not method.needs.replays}
    found["sweep"] = _cpu(lambda: _sweep(model, protocol, prompt, methods["full"], cheap)) / plain
    replays = reduce(Needs.__or__, (method.needs for method in alone.values() if method.needs.replays), Needs())
    found["sweep second pass"] = max(0.0, seen.get(replays, 0.0)) / plain
    found["cells"] = len(cheap) + 1
    return {name: round(number, 3) for name, number in found.items()}


def _cpu(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.inference_mode()
def _plain(model: Model, ids: torch.Tensor) -> None:
    ours = model.network.config._attn_implementation
    model.network.set_attn_implementation("sdpa")
    model.network(ids[None], use_cache=False, logits_to_keep=1)
    model.network.set_attn_implementation(ours)


def _choose(model: Model, method: Method, prefill: Any) -> None:
    method.compress(prefill, BUDGET.entries(model.parent_shape, prefill.tokens, "kv"), scores_for(method, prefill))


def _sweep(model: Model, protocol: Protocol, prompt: Prompt, full: Method, methods: Mapping[str, Method]) -> None:
    cells = [Cell("full", full, None), *(Cell(name, method, BUDGET) for name, method in methods.items())]
    for cell, outcome in Sweep(model, protocol, with_fidelity=False).example(prompt, cells, NEW_TOKENS):
        if outcome.answer is None:
            raise RuntimeError(f"{cell.name}: {outcome.failed or outcome.skipped}")
