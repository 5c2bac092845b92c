"""What each method adds to a prefill, and what all of them cost in one sweep: `run_all.py bench methods`.

One prompt of 4,000 tokens on four layers of SmolLM2's shape with random weights, one thread, in CPU seconds of this process, so
that other programs on the machine disturb less. Everything is divided by a plain prefill of transformers' own. Observation is a
prefill that observes, less one that does not: hundredths of it are noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_tokens import RandomTokens
from harness.cache import Arena, Budget, Needs, Prefill
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.evaluation.prompts import Prompt, Protocol, tokenize
from harness.evaluation.sweep import Cell, Sweep
from methods.base import Method, scores_for

TOKENS, NEW_TOKENS = 4000, 32
BUDGET = Budget.parse("25%")
SHAPE: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 576, "intermediate_size": 1536}
SHAPE |= {"vocab_size": 4096}
SHAPE |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}


def method_costs(methods: Mapping[str, Method]) -> dict[str, float]:
    """Of each method that needs no head scores: what it observes, and what scoring and choosing a quarter take.

    `sweep` is one sweep of all of them at a quarter, answers of 32 tokens and all, without those that make a second pass.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE), dtype=torch.float32)
    model = Model(network, None, "random:methods", "seed-0")
    task = RandomTokens(length=TOKENS, question=16, max_new_tokens=NEW_TOKENS, vocabulary=4096)
    protocol = Protocol(prompt="question_after", stop="none")
    prompt = tokenize(None, task.example(0, 0, len), protocol, 10**6)
    ids, arena = torch.tensor(prompt.ids[: prompt.context]), Arena()
    plain = min(_cpu(partial(_plain, model, ids)) for _ in range(2))  # the first warms up
    bare = min(_cpu(partial(model.prefill, ids, Needs(), arena)) for _ in range(2))
    alone = {name: method for name, method in methods.items() if not method.head_scores and not method.is_reference}
    seen = {one: _cpu(partial(model.prefill, ids, one, arena)) - bare for one in {method.needs for method in alone.values()}}
    everything = reduce(Needs.__or__, seen, Needs())
    prefill = model.prefill(ids, everything, arena)[0]
    found = {"plain_prefill_s": plain}
    for name, method in alone.items():
        found[f"{name}.observe"] = max(0.0, seen[method.needs]) / plain
        found[f"{name}.score"] = _cpu(partial(_choose, model, method, prefill)) / plain
    cheap = {name: method for name, method in alone.items() if not method.needs.replays}
    found["sweep"] = _cpu(partial(_sweep, model, protocol, prompt, methods["full"], cheap)) / plain
    found["cells"] = len(cheap) + 1
    return {name: round(number, 3) for name, number in found.items()}


def _cpu(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.inference_mode()
def _plain(model: Model, ids: Tensor) -> None:
    ours = model.network.config._attn_implementation
    model.network.set_attn_implementation("sdpa")
    model.network(ids[None], use_cache=False, logits_to_keep=1)
    model.network.set_attn_implementation(ours)


def _choose(model: Model, method: Method, prefill: Prefill) -> None:
    method.compress(prefill, BUDGET.entries(model.parent_shape, prefill.tokens, "kv"), scores_for(method, prefill))


def _sweep(model: Model, protocol: Protocol, prompt: Prompt, full: Method, methods: Mapping[str, Method]) -> None:
    cells = [Cell("full", full, None), *(Cell(name, method, BUDGET) for name, method in methods.items())]
    for cell, outcome in Sweep(model, protocol, with_fidelity=False).example(prompt, cells, NEW_TOKENS):
        if outcome.answer is None:
            raise RuntimeError(f"{cell.name}: {outcome.failed or outcome.skipped}")
