"""middle_layers: SnapKV's scores, but the layers in the middle keep more than the first and the last.

A scorer ranks the entries of one layer, an allocator says how many each row keeps. This file brings an allocator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from methods.base import Eviction, Rows
from methods.sharing import share_out
from methods.snapkv import WindowAttention


@dataclass(frozen=True)  # its repr is part of every row, so every setting is on record
class MiddleLayers:
    lift: float = 1.0  # how much more the middle keeps; `middle_layers(lift=2)` on the command line changes it

    def __post_init__(self) -> None:
        if self.lift < 0:
            raise ValueError(f"lift {self.lift} must not be negative")

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        """Whole numbers between `rows.floor` and `rows.length` that sum to `total`.

        `rows` has a line for every row of the cache: its layer, length, protected entries, and the query heads that read it.
        """
        depth = rows.layer / max(1, rows.layers - 1)  # 0 in the first layer, 1 in the last
        weight = (1 + self.lift * np.sin(np.pi * depth)) * rows.length
        return share_out(total, weight, rows.floor, rows.length)  # respects floors and lengths, and spends the whole budget


METHODS = {"middle_layers": Eviction(WindowAttention(), MiddleLayers())}
