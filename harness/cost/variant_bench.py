"""What decoding mixSGA costs beside GQA-2, which holds as many bytes: `run_all.py bench variants`, a JSON line.

One thread, four layers of the TinyLlama shape (32 query and 4 KV heads of 64, hidden 2048), the full cache of 4,000 random
tokens. CPU time of the thread, a token of each in turns; least and median, since other programs on the machine disturb the
second. By arithmetic the least is nearly the same for both: as many bytes of rows and the weights, read once; mixSGA's key and
value projections are twice the size.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.cache import Needs
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.engine.rows import RowCache, compact
from harness.models.shapes import SHAPES
from harness.registry import Registry
from methods.base import keep_all

VARIANTS = ("gqa-2", "mixsga-3:1:6")
LAYERS, TOKENS, TURNS = 4, 4000, 80


def variant_speed(registry: Registry, tokens: int = TOKENS, turns: int = TURNS) -> dict[str, float]:
    """Of each: milliseconds a token and the bytes of its cache; of mixSGA the ratio to GQA-2."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ids = torch.randint(0, 4096, (tokens,), generator=torch.Generator().manual_seed(0))
    held = {name: _opened(name, ids, turns, registry) for name in VARIANTS}
    laps: dict[str, list[float]] = {name: [] for name in held}
    for turn in range(turns):
        for name, (model, cache) in held.items():
            start = time.thread_time()
            model.decode(cache, torch.tensor([[turn]]))
            laps[name].append(time.thread_time() - start)
    base, *others = held
    line: dict[str, float] = {}
    for name, (_, cache) in held.items():
        line[f"{name}_ms"] = 1000 * min(laps[name])
        line[f"{name}_median_ms"] = 1000 * median(laps[name])
        line[f"{name}_bytes"] = cache.counts()[0].bytes_kept
    for name in others:
        line[f"{name}_ratio"] = min(laps[name]) / min(laps[base])
        line[f"{name}_median_ratio"] = median(laps[name]) / median(laps[base])
    return {name: round(number, 3) for name, number in line.items()}


def _opened(conversion: str, ids: torch.Tensor, more: int, registry: Registry) -> tuple[Model, RowCache]:
    """A converted model, and a cache that holds everything it has read, with room for so many tokens more."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{**SHAPES["tinyllama-1.1b"], "num_hidden_layers": LAYERS, "vocab_size": 4096, "max_position_embeddings": 8192}
    )
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    registry.conversion(conversion).apply(network, 0)
    model = Model(network, None, f"random:tinyllama+{conversion}", "seed-0")
    prefill, _ = model.prefill(ids, Needs())
    return model, compact(prefill, [keep_all(prefill)], more)
