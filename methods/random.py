"""Random eviction: the end of the scale that a method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ByLot:
    seed: int = 0
    window: int = 8  # newest positions, kept as SnapKV keeps them
    needs = Needs()
    blind = True  # looks at positions alone

    @property
    def protected(self) -> Protected:
        return Protected(last=self.window)

    def score(self, layer: LayerKV) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(layer.prompt * 2**20 + self.seed * 1009 + layer.index)
        heads = layer.query_heads // layer.width
        return torch.rand(heads, layer.keys.shape[1], generator=generator).to(layer.keys.device)
