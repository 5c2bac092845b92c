"""What the harness itself costs: `run_all.py bench sweep | attention | linear | kernel`, each a JSON line of numbers by name.

`sweep`: 31 cells beside the plain prefills of their prompts. Its least, by arithmetic: the prefills, once; every kept entry read
once a decode step; the weights read once a step.
`attention`: decode attention of one layer at shares of the full cache.
`linear`: linear layers from prepacked weights for a few rows, beside plain ones.
`kernel`: decode attention over rows by the Triton kernel, beside the bandwidth of a copy and other kernels. Rows of unequal
length sum to about a gigabyte of keys and values; their roofline is those bytes over the copy's rate. flash-attn's and torch's
kernels for sequences of unequal length compute the same when each row is a sequence with one head: they check the kernel's
numbers, and are timed on the same rows, laid side by side.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_tokens import RandomTokens
from harness.cache import Budget, ExpertGroup, LayerKV, ModelShape, Prefill, Row
from harness.cost.roofline import copy_bandwidth
from harness.engine import flash, kernels
from harness.engine.attention import attend
from harness.engine.measure import OutOfMemory, keep_freed_memory, memory_errors, peak_resident_bytes, seconds_of
from harness.engine.model import Model
from harness.engine.prepacked import Prepacked
from harness.engine.rows import compact
from harness.engine.split_plan import plan_split, split_length
from harness.errors import BadRequest, first_line
from harness.evaluation.prompts import Prompt, Protocol, tokenize
from harness.evaluation.sweep import Cell, Sweep
from harness.models.shapes import SHAPES
from methods.base import Method

METHODS = ("snapkv", "pyramidkv", "streaming_llm", "ada_snapkv", "tova", "knorm")
BUDGETS = ("90%", "75%", "50%", "25%", "10%")
PROMPTS = 8
NEW_TOKENS = 32


def sweep_speed(methods: Mapping[str, Method], verify: bool = False) -> dict[str, float]:
    """Of 31 cells, on one thread; `verify` decodes every cell alone as well and counts the answers that differ."""
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
    prefill = Prefill(torch.zeros(tokens), torch.zeros(1), (kv,), ((ExpertGroup(group),),), shape)
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


def linear_speed() -> dict[str, float]:
    """Rates of linear layers for a few rows, plain and from prepacked weights, in GFLOP/s on one thread.

    Layers of SmolLM2's shape: of the attention's output, and of its vocabulary; enough of them to be read from memory.
    """
    torch.set_num_threads(1)
    line: dict[str, float] = {}
    for name, inner, outer in (("output", 576, 576), ("vocabulary", 576, 49152)):
        layers = [torch.nn.Linear(inner, outer, bias=False) for _ in range(max(1, 30_000_000 // (inner * outer)))]
        ready = Prepacked.of(torch.nn.Sequential(*layers)).layers
        plain: list[Callable[[Tensor], Tensor]] = list(layers)
        packed: list[Callable[[Tensor], Tensor]] = [layer.forward for layer in ready]
        ways = {"plain": plain, "packed": packed}
        for rows in (1, 3, 8, 22, 64, 512):
            for way, ours in ways.items():
                seconds = _least(ours, torch.randn(rows, inner))
                line[f"{name}_{rows}_{way}"] = 2 * rows * inner * outer * len(layers) / seconds / 1e9
    return {name: round(number, 1) for name, number in line.items()}


@torch.inference_mode()
def _least(layers: list[Callable[[Tensor], Tensor]], hidden: Tensor) -> float:
    def all_layers() -> None:
        for layer in layers:
            layer(hidden)

    return min(seconds_of(all_layers, hidden.device) for _ in range(5))


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


DIM = 128  # of a head
LAPS = 20  # launches between two looks at the clock
Varlen = Callable[[], Tensor]


def kernel_speed(
    device: torch.device, dtype: torch.dtype, size: int = 2**30, rows: int = 256, width: int = 4
) -> dict[str, float]:
    """Milliseconds, and the share of the copy's bandwidth; the peers that are here, and how far their numbers are apart.

    Args:
        size: bytes of all rows' keys and values. rows: as of a layer with 8 KV heads and 32 sequences. width: queries on each.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = np.random.default_rng(0).permutation(1 / np.arange(1, rows + 1) ** 0.5)  # far from equal, as of HeadKV
    length = np.maximum(1, (weight / weight.sum() * size / (2 * DIM * dtype.itemsize)).astype(np.int64))
    start = np.cumsum(length) - length
    keys, values = (torch.randn(int(length.sum()), DIM, generator=generator, device=device, dtype=dtype) for _ in range(2))
    queries = torch.randn(rows * width, DIM, generator=generator, device=device, dtype=dtype)
    widths = np.full(rows, width)
    split = split_length(length, widths, device)
    plan = plan_split(start, length, widths, np.arange(rows * width), rows * width, split).on(device)
    held = torch.as_tensor(length).to(device)

    def ours() -> Tensor:
        return kernels.attend_split(queries, keys, values, held, plan, DIM**-0.5)

    copied, read = copy_bandwidth(device), 2 * keys.numel() * dtype.itemsize
    found = {"rows_gb": read / 1e9, "copy_gb_s": copied / 1e9, "kernel_ms": 1000 * _lap(ours, device)}
    found["kernel_share_of_copy"] = read / (found["kernel_ms"] / 1000) / copied
    expected = ours().float()
    for name, peer in varlen_peers(queries, keys, values, length, width).items():
        try:
            found[f"{name}_apart"] = float((peer().float().view_as(expected) - expected).abs().max())
        except (RuntimeError, TypeError) as error:  # a version without grouped queries, or not made for this GPU
            print(f"{name} does not run here: {first_line(error)}", file=sys.stderr)
            continue
        found[f"{name}_ms"] = 1000 * _lap(peer, device)
    return {name: float(f"{number:.4g}") for name, number in found.items()}


def checked_kernel_speed(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """
    Raises:
        BadRequest: no GPU, no kernel for this type, or too little memory.
    """
    if device.type != "cuda":
        raise BadRequest("bench kernel measures a GPU, and there is none here")
    if reason := kernels.unsupported(dtype, DIM):
        raise BadRequest(f"bench kernel has nothing to measure: {reason}")
    try:
        with memory_errors():
            return kernel_speed(device, dtype)
    except OutOfMemory as error:
        raise BadRequest(f"bench kernel needs about 4 GB of the GPU's memory: {error}") from None


def varlen_peers(queries: Tensor, keys: Tensor, values: Tensor, length: np.ndarray, width: int) -> dict[str, Varlen]:
    """Other kernels over the same rows, those that are here: torch's own and flash-attn's.

    A row is a sequence of one KV head, which the queries read as heads of one token: so they split long sequences.

    Args:
        queries: [R * width, D], row by row; keys, values: [P, D], the rows side by side without room; length: [R].
    """
    if queries.device.type != "cuda" or queries.dtype not in flash.TYPES:
        return {}
    ends = torch.as_tensor(np.concatenate([[0], np.cumsum(length)]), dtype=torch.int32).to(queries.device)
    asked = torch.arange(len(length) + 1, dtype=torch.int32, device=queries.device)
    rows = (queries.view(len(length), width, -1), keys[:, None], values[:, None], asked, ends, 1, int(length.max()))
    found: dict[str, Varlen] = {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        found["torch_varlen"] = lambda: cast(Tensor, varlen_attn(*rows, enable_gqa=True))
    except ImportError:
        pass
    if flash.installed():
        from flash_attn import flash_attn_varlen_func

        found["flash_attn"] = lambda: flash_attn_varlen_func(*rows)
    return found


def _lap(work: Varlen, device: torch.device) -> float:
    """Seconds of one launch, in a row of many: the first ones warm up."""
    laps = LAPS if device.type == "cuda" else 1

    def many() -> None:
        for _ in range(laps):
            work()

    many()
    return min(seconds_of(many, device) for _ in range(3)) / laps
