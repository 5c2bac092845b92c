"""DefensiveKV: score an entry by the worst case over the window, not by the mean, and never below the head's mean.

Feng et al., "Taming the Fragility of KV Cache Eviction in LLM Inference", ICLR 2026. arxiv.org/abs/2510.13334
Each window query's attention is pooled over neighbours; an entry's score is the largest of any query and head of its group,
raised at least to the row's mean, times the L1 norm of its value behind the output projection as a share of all heads' norms.
Before that, and as far as an even share of the budget reaches, a row keeps the entries that hold the first `mass` of its mean
window attention. Follows the authors' code, but for one thing: it takes from `mass` the attention to the last columns before the
window, where the window's own is meant by its name; here it is the window's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harness.cache import LayerKV, Needs
from methods.base import Protected, Staged, Stages
from methods.criticalkv import output_norms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WorstCase(Staged):
    window: int = 32  # last queries looked at; their own entries are never evicted
    kernel: int = 5  # odd: neighbours pooled
    mass: float = 0.9  # of the attention of the window, its own entries' included, that is kept first
    shares_after_first = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or not 0 <= self.mass <= 1:
            raise ValueError(
                f"window {self.window} must be at least 1, kernel {self.kernel} odd, mass {self.mass:g} between 0 and 1"
            )

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window, output_norms=True)

    @property
    def protected(self) -> Protected:
        return Protected(last=self.window)

    def score(self, layer: LayerKV) -> Tensor:
        return self.stages(layer).rest

    def stages(self, layer: LayerKV) -> Stages:
        attention = layer.window_attention(self.window)  # [Hq, W, n]
        before = max(0, attention.shape[2] - self.window)
        mean = layer.mean_over_group(attention.mean(1))  # [S, n]
        most = mean.new_zeros(len(mean))
        if not before:
            return Stages(mean, mean, mean, most)
        inside = attention[..., before:].sum(-1).mean()
        shares = mean[:, :before] / mean[:, :before].sum(-1, keepdim=True).clamp(min=1e-20)
        reached = shares.sort(-1, descending=True).values.cumsum(-1) >= self.mass - inside
        most = reached.int().argmax(-1).float()  # entries before the mass is reached
        norms = output_norms(layer)[:, :before]
        risk = self._risk(layer, attention[..., :before]) * norms / norms.sum(0, keepdim=True).clamp(min=1e-20)
        rest = mean.clone()
        rest[:, :before] = risk
        return Stages(rest, mean, rest, most)

    def _risk(self, layer: LayerKV, attention: Tensor) -> Tensor:
        """[Hq, W, n] -> [S, n], the largest pooled attention."""
        from torch.nn.functional import avg_pool1d

        pooled = avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        whole = attention.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp(min=1e-20)  # pooling loses some at the ends
        largest = (pooled * whole).amax(1).unflatten(0, (-1, layer.width)).amax(1)
        return largest.maximum(largest.mean(-1, keepdim=True))

    def first_counts(self, counts: np.ndarray, floors: np.ndarray, most: np.ndarray) -> np.ndarray:
        return floors + np.minimum(most, counts - floors)
