"""large_values: keep the entries whose values are large, beside the sinks and the newest ones.

A scorer ranks the entries of one layer, an allocator says how many each row keeps. This file brings a scorer of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.cache import LayerKV, Needs
from methods.allocators import Uniform
from methods.base import Eviction, Protected


@dataclass(frozen=True)  # its repr is part of every row, so every setting is on record
class LargeValues:
    sinks: int = 4  # first positions, never evicted; `large_values(sinks=0)` on the command line changes it
    window: int = 8  # newest positions, never evicted
    needs = Needs()  # Needs(window=8) brings the last queries, Needs(column_sums=True) the attention each key received

    @property
    def protected(self) -> Protected:
        return Protected(first=self.sinks, last=self.window)

    def score(self, layer: LayerKV) -> Tensor:
        """[S, n], a number for every stored head and candidate: higher is kept longer. Never write to `layer`."""
        group = layer.query_heads // layer.values.shape[0]  # query heads that share a KV head
        stored = torch.arange(0, layer.query_heads, layer.width, device=layer.values.device) // group
        return layer.values[stored].float().norm(dim=-1)


METHODS = {"large_values": Eviction(LargeValues(), Uniform())}
