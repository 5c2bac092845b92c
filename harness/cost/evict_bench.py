"""What eviction while decoding adds to a step: `run_all.py bench evict`, a JSON line of milliseconds a token, by method.

One thread, CPU time, the 8-layer shape of `bench sweep`, one cell whose rows hold 4,096 entries. Laps of all methods go in turns,
and the least of each counts. By arithmetic the least that a method can add: nothing for positions alone, one read of the keys for
attention that no pass has computed before, and the entries that move.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from harness.cache import Needs, Prefill
from harness.cost.microbench import speed_model
from harness.engine.evict import Turns, remember
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.engine.rows import compact
from methods.base import Method, score_prefill

ENTRIES, PROMPT, TOKENS, LAPS = 4096, 4500, 16, 9
EVERY = {"streaming_llm": (1, 128), "h2o": (1, 128), "tova": (1, 128), "snapkv": (16, 128)}


def evict_speed(methods: Mapping[str, Method]) -> dict[str, float]:
    """Milliseconds a token without eviction, and of each method the ratio to it; an interval's evictions are spread over it."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model = speed_model()
    ids = torch.randint(0, 4096, (PROMPT,), generator=torch.Generator().manual_seed(0))
    prefill, _ = model.prefill(ids, Needs(8, column_sums=True))
    laps: dict[tuple[str, int], list[float]] = {}
    for _ in range(LAPS):
        for name, every in [("", 0), *((name, every) for name, some in EVERY.items() for every in some)]:
            laps.setdefault((name, every), []).append(_lap(model, prefill, methods[name or "snapkv"], every if name else 0))
    plain = min(laps["", 0])
    line = {"plain_ms": 1000 * plain}
    line |= {f"{name}_every_{every}": min(found) / plain for (name, every), found in laps.items() if name}
    return {name: round(number, 3) for name, number in line.items()}


def _lap(model: Model, prefill: Prefill, method: Any, every: int) -> float:
    """CPU seconds a token. Where an interval is longer than the lap, one eviction is timed apart and spread over the interval."""
    rows = model.shape.layers * model.shape.kv_heads
    kept = method.compress(prefill, ENTRIES * rows, score_prefill(method.scorer, prefill))
    cache = compact(prefill, [kept], TOKENS + every)
    keeper = replace(method, every=every).while_decoding(lambda _: ENTRIES * rows) if every else None
    if keeper is not None:
        remember(cache, prefill.layers, [keeper])
    turns = Turns(cache, [keeper], every - 1 if every <= TOKENS else 0) if keeper is not None else None
    spent = 0.0
    for _ in range(TOKENS):
        start = time.thread_time()
        model.decode(cache, torch.tensor([[7]]))
        if turns is not None:
            turns.took(1)
        spent += time.thread_time() - start
    if turns is not None and every > TOKENS:
        turns.since = [every]
        start = time.thread_time()
        turns.evict()
        return spent / TOKENS + (time.thread_time() - start) / every
    return spent / TOKENS
