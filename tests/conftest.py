"""Tiny random models of every family, and prompts for them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run without a GPU; read when triton is imported

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness.cache import Needs, Prefill
from harness.engine.model import Model
from methods import METHODS
from methods.base import Eviction, Method
from methods.headkv import HeadScores

torch.set_num_threads(1)

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


def network(family: str, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**BASE, **FAMILIES[family]})
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
    return method.with_head_scores(head_scores()) if isinstance(method, Eviction) and method.head_scores else method


SCORED = {name: with_scores(method) for name, method in METHODS.items()}  # every method, ready to run on a tiny model


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def read(family: str, ids: torch.Tensor) -> Prefill:
    return tiny(family).prefill(ids, Needs(8, column_sums=True))[0]


@pytest.fixture(params=MAIN)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
