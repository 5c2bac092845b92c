"""What several test files need: tiny random models of every family, prompts for them, dense references, and the command line."""

from __future__ import annotations

import random
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import run_all
from harness.cache import Budget, Needs, Prefill, Selection
from harness.engine.model import Model, own_attention
from harness.evaluation.conformance import drawn_statistics
from harness.families import routers, shape_of
from harness.registry import BUILTIN
from harness.training.data import PackedBatches
from harness.training.recipes import Recipe
from methods import METHODS
from methods.base import Eviction, Method, score_prefill
from methods.headkv import HeadScores

DATA = Path(__file__).parent.parent.parent / "shared" / "data"  # real records, where they are at hand

VOCABULARY = 97
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 24},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "sliding_window": 24, "head_dim": 16, "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3"},
    "opt": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": 4},
}
MAIN = ("llama", "mistral-window", "qwen3", "gemma2", "opt")  # of each kind of cache: GQA, windows, key norm, softcap, MHA


def network(family: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """Weights large enough that attention is far from uniform. `more`: of its configuration."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**BASE, **FAMILIES[family], **more})
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15)
    return net


_MODELS: dict[str, Model] = {}


def tiny(family: str) -> Model:
    if family not in _MODELS:
        _MODELS[family] = Model(network(family), None, f"tiny-{family}", "0")
    return _MODELS[family]


def head_scores(layers: int = 3, heads: int = 4, kind: str = "r2") -> HeadScores:
    """A power law over the heads, two runs."""
    runs = np.random.default_rng(3).permutation(1.0 / (1 + np.arange(2 * layers * heads))).reshape(2, layers, heads)
    return HeadScores("tiny", "0", kind, runs, attempts=2)  # type: ignore[arg-type]


def with_scores(method: Method) -> Method:
    if method.head_scores == "queries":
        return method.with_head_scores(drawn_statistics())
    return method.with_head_scores(head_scores()) if method.head_scores else method


FOR_SHORT = ("cake(window=8)", "defensivekv(window=8)", "layer_defensivekv(window=8)", "duo_attention(sinks=4,streaming=9)")
SHORTENED = {text.partition("(")[0]: BUILTIN.method(text)[1] for text in FOR_SHORT}  # that protect no more than tests' budgets
SCORED = {name: with_scores(method) for name, method in (METHODS | SHORTENED).items()}  # every method, ready for a tiny model


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


EVERYTHING = reduce(Needs.__or__, (method.needs for method in METHODS.values()), Needs())  # what any method wants observed


def read(family: str, ids: torch.Tensor) -> Prefill:
    return tiny(family).prefill(ids, EVERYTHING)[0]


SMALL = ("--benchmarks", "random_tokens(length=48,max_new_tokens=4)", "--limit", "2", "--device", "cpu")


def call(*arguments: str) -> int:
    return run_all.main(list(arguments))


def small(out: Path, *more: str) -> tuple[str, ...]:
    return ("run", "--suite", "smoke", "--out", str(out), *SMALL, *more)


WIDE = ("llama", "qwen2", "qwen3", "gemma2", "opt", "phi3", "gpt_neox", "mistral-window")


def wide(family: str, **more: Any) -> Any:
    """The tiny network with four KV heads, so that groups of 1, 2 and 4 can be formed."""
    return network(family, num_attention_heads=8, num_key_value_heads=8 if family in ("opt", "gpt_neox") else 4, **more)


def converted(family: str, text: str, net: Any = None) -> Model:
    net = net or wide(family)
    parent = shape_of(net)
    BUILTIN.conversion(text).apply(net)
    for router in routers(net):
        router.score.weight.data.mul_(3.0)  # far from ties
    return Model(net, None, f"{family}+{text}", "0", parent)


def dense(net: Any, ids: Tensor) -> Tensor:
    """Logits of transformers alone, eager, [T, V]."""
    net.set_attn_implementation("eager")
    with torch.no_grad():
        return net(ids[None], use_cache=False).logits[0]


def selection(name: str, prefill: Prefill, total: int) -> Selection:
    method = SCORED[name]
    assert isinstance(method, Eviction)
    return method.compress(prefill, total, score_prefill(method.scorer, prefill))


def total_of(prefill: Prefill, budget: str) -> int:
    return Budget.parse(budget).entries(prefill.shape, prefill.tokens, "kv")


def masked_logits(
    family: str,
    ids: Tensor,
    read_first: int,
    kept: Selection | None,
    net: Any = None,
    gone: list[Tensor] | None = None,
    seen: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Logits [T, V] of one dense pass in which queries behind `read_first` do not see what was evicted: no rows, no cache.

    Args:
        gone: of each layer [Hq, T, T], keys that queries do not see in any case.
        seen: is given each layer's queries [Hq, T, D] and attention [Hq, T, T].
    """
    net = net or network(family)
    net.set_attn_implementation("eager")
    shape = shape_of(net)
    hidden = torch.zeros(shape.layers, shape.query_heads, len(ids), dtype=torch.bool)
    for layer, rows in enumerate(kept or ()):
        candidates = shape.candidates(layer, read_first)
        hidden[layer, :, :read_first] = True
        for row in rows:
            indices = torch.arange(candidates) if row.kept is None else row.kept
            hidden[layer, row.first : row.first + row.width, read_first - candidates + indices] = False  # rows of a head add up

    def attention(module, query, key, value, mask, scaling, softcap=None, sliding_window=None, **_):
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        place = torch.arange(query.shape[2])
        unseen = place[None, :] > place[:, None]
        if sliding_window is not None:
            unseen = unseen | (place[None, :] <= place[:, None] - sliding_window)
        evicted = hidden[module.layer_idx][:, None, :] & (place >= read_first)[None, :, None]
        if gone is not None:
            evicted = evicted | gone[module.layer_idx]
        weights = logits.masked_fill(unseen | evicted, float("-inf")).softmax(-1)
        if seen is not None:
            seen[module.layer_idx] = query[0], weights[0]
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_in_test", attention)
    AttentionMaskInterface.register("masked_in_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    net.set_attn_implementation("masked_in_test")
    with torch.no_grad():
        return net(ids[None], use_cache=False).logits[0]


FAST = Recipe(steps=6, bf16=False, save_every=2, lr=1e-2)


def documents(count: int, seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    rng = random.Random(seed)
    sizes = [rng.randint(3, 30) for _ in range(count)]
    return [([rng.randrange(3, 97) for _ in range(size)], [True] * size) for size in sizes]


def batches(rows: int = 3, length: int = 40) -> PackedBatches:
    return PackedBatches.of(documents(60), length, rows, seed=0)


def trainable(family: str, text: str) -> Any:
    net = converted(family, text).network
    net.set_attn_implementation(own_attention(net))
    return net.train()
