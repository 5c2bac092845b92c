"""KeyDiff: keep the keys that point elsewhere than the head's average key.

Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
Environments", 2025. arxiv.org/abs/2504.15364
Differs from the paper: scored once, after the prefill; the paper scores block by block while it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DistinctKeys:
    needs = Needs()
    protected = Protected()

    def score(self, layer: LayerKV) -> Tensor:
        from torch.nn.functional import cosine_similarity, normalize

        keys = layer.stored_keys.float()  # [S, n, D]
        anchor = normalize(keys, dim=-1).mean(1, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)
