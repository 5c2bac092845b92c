"""The suites that measure the harness itself: `sweep-speed` and `attention-speed`. Each prints one JSON line.

`sweep-speed`: what a sweep of 31 cells costs beside the plain prefills of its prompts.

Floor, by arithmetic: the prefills, once; every kept entry read once a decode step; the weights read once a step.
"""

from __future__ import annotations

import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_tokens import RandomTokens
from harness.cache import Budget, LayerKV, ModelShape, Prefill, Row, Stripe
from harness.engine.attention import attend
from harness.engine.measure import keep_freed_memory, peak_resident_bytes
from harness.engine.model import Model
from harness.engine.rows import compact
from harness.evaluation.prompts import Prompt, Protocol, tokenize
from harness.evaluation.sweep import Cell, Sweep
from harness.models.shapes import SHAPES
from methods.base import Method

METHODS = ("snapkv", "pyramidkv", "streaming_llm", "ada_snapkv", "tova", "knorm")
BUDGETS = ("90%", "75%", "50%", "25%", "10%")
PROMPTS = 8
NEW_TOKENS = 32


def sweep_speed(methods: dict[str, Method], verify: bool = False) -> dict[str, float]:
    """Runs it on one thread; `verify` decodes every cell alone as well and counts the answers that differ."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model = speed_model()
    task = RandomTokens(length=4000, question=16, max_new_tokens=NEW_TOKENS, vocabulary=4096)
    protocol = Protocol(prompt="question_after", stop="none")
    prompts = [tokenize(None, task.example(n, 0, len), protocol, 10**6) for n in range(PROMPTS)]
    cells = [Cell("full", methods["full"], None)]
    cells += [Cell(name, methods[name], Budget.parse(budget)) for budget in BUDGETS for name in METHODS]
    plain = _plain_prefills(model, prompts)
    sweep = Sweep(model, protocol, with_fidelity=False)
    start = time.perf_counter()
    answers = [_answers(sweep, prompt, cells) for prompt in prompts]
    total = time.perf_counter() - start
    laps = sweep.laps
    line = {
        "plain_prefill_s": plain,
        "prefill_s": laps.prefill.seconds,
        "observe_s": laps.observe.seconds,
        "score_s": laps.score.seconds,
        "compact_s": laps.compact.seconds,
        "append_s": laps.append.seconds,
        "decode_s": laps.decode.seconds,
        "total_s": total,
        "ratio": total / plain,
        "peak_bytes": peak_resident_bytes(),
        "prompts": len(prompts),
        "cells": len(cells),
    }
    if verify:
        line["answers_differing"] = sum(
            _answers(sweep, prompt, [cell])[cell.name, str(cell.budget)] != together[cell.name, str(cell.budget)]
            for prompt, together in zip(prompts, answers, strict=True)
            for cell in cells
        )
    return {name: round(number, 4) for name, number in line.items()}


def attention_speed() -> dict[str, float]:
    """Decode attention of one layer at shares of the full cache, beside the same share of the full cache's time.

    8,000 tokens, 8 KV heads of size 128 with 4 query heads each, one thread. A cache of one entry a head is the fixed overhead,
    which is taken off both.
    """
    torch.set_num_threads(1)
    tokens, heads, group, dim = 8000, 8, 4, 128
    keys, values = torch.randn(2, heads, tokens, dim).unbind(0)
    kv = LayerKV(0, tokens, keys, values, dim**-0.5, group, query_heads=heads * group)
    shape = ModelShape(1, heads * group, heads, dim, (None,), 4)
    prefill = Prefill(torch.zeros(tokens), torch.zeros(1), (kv,), ((Stripe(group),),), shape)
    query, line = torch.randn(heads * group, 1, dim), {}

    def seconds(kept: int) -> float:
        rows = tuple(Row(head * group, group, 0, torch.randperm(tokens)[:kept].sort().values) for head in range(heads))
        caches = [compact(prefill, [(rows,)], 1) for _ in range(8)]  # more than the processor's caches hold
        laps = []
        for turn in range(80):
            cache = caches[turn % len(caches)]
            step = cache.step([1])
            start = time.perf_counter()
            attend(cache.layers[0], query, step, dim**-0.5)
            laps.append(time.perf_counter() - start)
        return sorted(laps[8:])[36]

    fixed = seconds(1)
    full = line["full_ms"] = seconds(tokens)
    for share in (0.1, 0.25, 0.5):
        mine = line[f"kept_{share:.0%}_ms"] = seconds(int(share * tokens))
        line[f"kept_{share:.0%}_over_its_share"] = (mine - fixed) / (share * (full - fixed)) / 1000
    line["fixed_ms"] = fixed
    return {name: round(number * 1000, 3) for name, number in line.items()}


def speed_model() -> Model:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES["small-llama"])
    return Model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), None, "random:sweep-speed", "seed-0")


def _plain_prefills(model: Model, prompts: list[Prompt]) -> float:
    """Seconds of transformers' own sdpa prefills, without a cache and with the last logits only."""
    ours = model.network.config._attn_implementation
    model.network.set_attn_implementation("sdpa")
    seconds = 0.0
    with torch.inference_mode():
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first warms up
            start = time.perf_counter()
            model.network(torch.tensor([prompt.ids[: prompt.context]]), use_cache=False, logits_to_keep=1)
            seconds += (time.perf_counter() - start) * (number > 0)
    model.network.set_attn_implementation(ours)
    return seconds


def _answers(sweep: Sweep, prompt: Prompt, cells: list[Cell]) -> dict[tuple[str, str], list[int]]:
    found = {}
    for cell, outcome in sweep.example(prompt, cells, NEW_TOKENS):
        if outcome.answer is None:
            raise RuntimeError(f"{cell.name} {cell.budget}: {outcome.failed or outcome.skipped}")
        found[cell.name, str(cell.budget)] = outcome.answer.tokens
    return found
