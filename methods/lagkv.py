"""LagKV: keep what stands out against the part of the prompt that comes next.

Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", 2025.
arxiv.org/abs/2504.04704
The prompt behind the first positions is cut into parts of `lag` tokens. Each channel of a part is put on the scale of the next
part's smallest and largest value; an entry's spread over the channels, of keys and of values, is ranked inside its part. The
last whole part has no next one: it and what follows rank above all others. A prompt of fewer than two parts keeps its newest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LagRelative:
    sinks: int = 4
    lag: int = 128  # tokens of a part
    needs = Needs()

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.lag < 2:
            raise ValueError(f"sinks {self.sinks} must be 0 or more, lag {self.lag} at least 2")

    @property
    def protected(self) -> Protected:
        return Protected(first=self.sinks)

    def score(self, layer: LayerKV) -> Tensor:
        import torch

        keys, values = layer.stored_keys, layer.stored_values
        heads, entries = keys.shape[:2]
        skipped = min(self.sinks, entries)
        parts = (entries - skipped) // self.lag
        if parts < 2:
            return layer.positions.float().expand(heads, -1)
        scores = torch.ones(heads, entries, device=keys.device)
        compared = (parts - 1) * self.lag
        spread = (self._spread(keys[:, skipped:], parts) + self._spread(values[:, skipped:], parts)) / 2  # [S, parts - 1, lag]
        places = spread.argsort(-1).argsort(-1) / self.lag  # 0 up to, and never, 1
        scores[:, skipped : skipped + compared] = places.flatten(1)
        return scores

    def _spread(self, states: Tensor, parts: int) -> Tensor:
        """[S, n, D] -> [S, parts - 1, lag], each entry's share of its part."""
        cut = states[:, : parts * self.lag].float().unflatten(1, (parts, self.lag))
        after = cut[:, 1:]
        low, high = after.amin(2, keepdim=True), after.amax(2, keepdim=True)
        scaled = (cut[:, :-1] - low) / (high - low).clamp(min=1e-20)
        return scaled.std(-1).softmax(-1)
