"""What decoding over packed rows costs: `run_all.py bench storages`, a JSON line.

One thread, the 8-layer shape of `bench sweep`, 4,096 entries a row, random vectors. Of each storage the attention of a token in
all layers, over that of the rows in float32, and the packing of a prompt's rows in milliseconds. CPU time of the thread, laps of
all storages in turns, the least of each layer: other programs on the machine disturb less so. By arithmetic the least is the
bytes of the rows over the memory's rate.

Then a sweep over a prompt of that length: three storages of six methods at two budgets, beside as many cells in the model's type
at six budgets with the same mean share, and one of the same cells with as many entries in the model's type, in turns; and what
packing all entries took beside the prompt's prefill.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from harness.cache import Budget, ExpertGroup, LayerKV, ModelShape, Needs, Prefill, Row
from harness.cost import microbench
from harness.engine.attention import attend
from harness.engine.measure import keep_freed_memory
from harness.engine.rows import RowCache, compact
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.sweep import Cell, Sweep
from harness.models.shapes import SHAPES
from harness.registry import Registry, choose
from harness.storage import HALF, entry_bytes

ENTRIES, LAPS = 4096, 15
SWEPT = ("int8", "int4", "turbo-4(spared=0)")
BUDGETS = ("50%", "12.5%")
AS_MANY = ("50%", "43.75%", "37.5%", "25%", "18.75%", "12.5%")
TURNS = 3


def storage_speed(storages: Mapping[str, Any], entries: int = ENTRIES, laps: int = LAPS) -> dict[str, float]:
    """Milliseconds of the float32 rows, the ratio of each storage to them, and what packing took."""
    torch.set_num_threads(1)
    keep_freed_memory()
    prefill = _prefill(entries)
    heads, dim = prefill.shape.query_heads, prefill.shape.head_dim
    held: dict[str, Any] = {"full": None, **{name: replace(storage, spared=0) for name, storage in storages.items()}}
    caches: dict[str, RowCache] = {}
    line: dict[str, float] = {}
    for name, storage in held.items():
        start = time.thread_time()
        caches[name] = _grown(_cache(prefill, storage), prefill.shape)
        line[f"{name}_compact_ms"] = 1000 * (time.thread_time() - start)
    query = torch.randn(heads, 1, dim)
    least = {name: [float("inf")] * prefill.shape.layers for name in caches}
    with torch.inference_mode():
        for _ in range(laps):
            for name, cache in caches.items():
                step = cache.step([1])
                for number, layer in enumerate(cache.layers):
                    start = time.thread_time()
                    attend(layer, query, step, dim**-0.5)
                    least[name][number] = min(least[name][number], time.thread_time() - start)
    plain = sum(least["full"])
    line = {"full_ms": 1000 * plain} | line
    line |= {f"{name}_over_full": sum(spent) / plain for name, spent in least.items() if name != "full"}
    return {name: round(number, 3) for name, number in line.items()}


def storage_sweep(registry: Registry, tokens: int = ENTRIES) -> dict[str, float]:
    """CPU seconds of a sweep of packed cells, and its ratios to as many cells in the model's type: of the same mean bytes, and of
    the same entries. The least of each."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model = microbench.speed_model()
    ids = torch.randint(4096, (tokens,), generator=torch.Generator().manual_seed(0))
    prompt = Prompt(ids.tolist(), tokens)
    plain = [(name, budget) for name in microbench.METHODS for budget in AS_MANY]
    packed = [(f"{name}+{bits}", budget) for name in microbench.METHODS for bits in SWEPT for budget in BUDGETS]
    wide = [_as_many_entries(registry, bits, budget) for bits in SWEPT for budget in BUDGETS]
    entries = [(name, budget) for name in microbench.METHODS for budget in wide]
    assert len(plain) == len(packed) == len(entries)
    sweeps = {"sweep_plain_s": plain, "sweep_entries_s": entries, "sweep_packed_s": packed}
    least = dict.fromkeys((*sweeps, "prefill_s"), float("inf"))
    for _ in range(TURNS):
        for name, asked in sweeps.items():
            cells = [Cell(text, registry.method(text)[1], Budget.parse(budget)) for text, budget in asked]
            sweep = Sweep(model, Protocol("question_in", stop="none"), with_fidelity=False)
            start = time.thread_time()
            for cell, outcome in sweep.example(prompt, cells, microbench.NEW_TOKENS):
                if outcome.answer is None:
                    raise RuntimeError(f"{cell.name} {cell.budget}: {outcome.failed or outcome.skipped}")
            least[name] = min(least[name], time.thread_time() - start)
        start = time.thread_time()
        model.prefill(ids, Needs())
        least["prefill_s"] = min(least["prefill_s"], time.thread_time() - start)
    line = least | {
        "sweep_ratio": least["sweep_packed_s"] / least["sweep_plain_s"],
        "sweep_ratio_of_entries": least["sweep_packed_s"] / least["sweep_entries_s"],
        "sweep_cells": len(packed),
    }
    return {name: round(number, 3) for name, number in line.items()}


def _as_many_entries(registry: Registry, bits: str, budget: str) -> str:
    """The budget of 16-bit entries that holds as many as the storage does at this one."""
    dim = int(SHAPES["small-llama"]["head_dim"])
    storage = choose("storage", bits, registry.storages, colon_sets_first=False)[1]
    packed = float(budget[:-1]) * 2 * HALF * dim / entry_bytes(storage, dim)
    return f"{min(packed, 100):.2f}%"


def _prefill(entries: int) -> Prefill:
    shape = SHAPES["small-llama"]
    heads, kv_heads, dim, layers = (
        int(shape[name]) for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    )
    group = heads // kv_heads
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, kv_heads, entries, dim, generator=generator).unbind(0)
    kvs = tuple(LayerKV(layer, entries, keys, values, dim**-0.5, group, query_heads=heads) for layer in range(layers))
    size = ModelShape(layers, heads, kv_heads, dim, (None,) * layers, 4)
    return Prefill(torch.zeros(entries), torch.zeros(1), kvs, ((ExpertGroup(group),),) * layers, size)


def _cache(prefill: Prefill, storage: Any) -> RowCache:
    shape, every = prefill.shape, torch.arange(prefill.tokens)
    rows = tuple(Row(head * shape.group, shape.group, 0, every, storage=storage) for head in range(shape.kv_heads))
    return compact(prefill, [(rows,) * shape.layers], 1)


def _grown(cache: RowCache, shape: ModelShape) -> RowCache:
    """By one token, whose query is timed."""
    step = cache.step([1])
    for layer in cache.layers:
        layer.append(torch.randn(shape.kv_heads, 1, shape.head_dim), torch.randn(shape.kv_heads, 1, shape.head_dim), step)
    return cache
