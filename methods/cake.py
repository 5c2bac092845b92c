"""CAKE: layers whose attention is spread out and changes keep more; entries whose attention changes count more.

Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", ICLR 2025. arxiv.org/abs/2503.12491
A layer's preference is the entropy of its window attention to the power 1 / t1, times its variance over the window's queries to
the power 1 / t2; budgets are in proportion to it. An entry's score is its mean attention plus `gamma` times its variance. Written
from the paper. Differs from it: layers are shared out after the prefill, not layer by layer while it runs, which gives the same
shares; the total is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harness.cache import LayerKV, Needs, Prefill
from methods.base import LooksAtPrefill, Protected, Rows
from methods.sharing import share_out

if TYPE_CHECKING:
    from torch import Tensor


def _over_queries(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, [Hq, W, n] -> [Hq, n] each; torch's own `var` takes four times as long over an axis in the middle."""
    mean = attention.mean(1)
    return mean, (attention - mean[:, None]).square_().mean(1)


@dataclass(frozen=True)
class MeanAndVariance:
    window: int = 32  # last queries looked at; their own entries are never evicted
    kernel: int = 5  # odd: neighbours pooled
    gamma: float = 200.0

    def __post_init__(self) -> None:
        if self.window < 2 or self.kernel < 1 or self.kernel % 2 == 0 or self.gamma < 0:
            raise ValueError(f"window {self.window} must be at least 2, kernel {self.kernel} odd, gamma {self.gamma:g} 0 or more")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    @property
    def protected(self) -> Protected:
        return Protected(last=self.window)

    def score(self, layer: LayerKV) -> Tensor:
        from torch.nn.functional import avg_pool1d

        mean, variance = _over_queries(layer.window_attention(self.window))
        scores = mean + self.gamma * variance
        before = max(0, scores.shape[1] - self.window)
        if before:
            scores[:, :before] = avg_pool1d(scores[:, None, :before], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        return layer.mean_over_group(scores)


@dataclass(frozen=True)
class LayerPreference(LooksAtPrefill):
    window: int = 32
    t1: float = 1.0  # of the entropy; the authors set both for each model
    t2: float = 1.0  # of the variance

    def __post_init__(self) -> None:
        if self.window < 2 or self.t1 <= 0 or self.t2 <= 0:
            raise ValueError(f"window {self.window} must be at least 2, t1 {self.t1:g} and t2 {self.t2:g} above 0")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def after(self, prefill: Prefill) -> LayerShares:
        return LayerShares(tuple(self._preference(layer) for layer in prefill.layers))

    def _preference(self, layer: LayerKV) -> float:
        attention = layer.window_attention(self.window)
        before = attention[..., : max(0, attention.shape[2] - self.window)].double()  # [Hq, W, m]
        if not before.numel():
            return 0.0
        mean, over_queries = _over_queries(before)
        entropy = -float((mean * mean.clamp(min=1e-20).log()).sum())
        variance = float(over_queries.sum())
        return max(entropy, 0.0) ** (1 / self.t1) * variance ** (1 / self.t2)


@dataclass(frozen=True)
class LayerShares:
    """What each layer weighs; a layer's part goes to its rows by their lengths."""

    weights: tuple[float, ...]

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        size = np.bincount(rows.layer, rows.length, minlength=rows.layers)
        weights = np.array(self.weights)[rows.layer] * rows.length / size[rows.layer]
        return share_out(total, weights, rows.floor, rows.length)
