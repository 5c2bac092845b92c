"""SnapKV: keep what the prompt's last queries attend to, and its neighbours.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", 2024. arxiv.org/abs/2404.14469
Window and pooling are those of HeadKV's experiments (window 8, max over 7), which the family shares here. Follows the code
of KVCache-Factory's kv-head mode: mean over window and group, then pooling. On a layer with a sliding window the softmax runs
over the entries that are still inside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WindowAttention:
    window: int = 8  # last queries looked at; their own entries are never evicted
    kernel: int = 7  # odd: neighbours pooled
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window {self.window} must be at least 1 and kernel {self.kernel} odd")
        if self.pooling not in ("max", "mean"):
            raise ValueError(f"pooling {self.pooling!r} is neither max nor mean")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    @property
    def protected(self) -> Protected:
        return Protected(last=self.window)

    def score(self, layer: LayerKV) -> Tensor:
        import torch
        from torch.nn.functional import avg_pool1d, max_pool1d

        attention = layer.window_attention(self.window).mean(1)  # [Hq, n]
        scores = layer.mean_over_group(attention)  # [S, n]
        prefix = scores[:, : max(0, scores.shape[1] - self.window)]
        if prefix.shape[1]:
            pool = max_pool1d if self.pooling == "max" else avg_pool1d
            pooled = pool(prefix[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
            scores = torch.cat([pooled, scores[:, prefix.shape[1] :]], 1)
        return scores
