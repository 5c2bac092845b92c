"""PyramidKV: lower layers keep more.

Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", 2024.
arxiv.org/abs/2406.02069
Counts fall linearly from the first layer to the last. Differs from the released code: its floor division puts the total over
the budget, and it cuts the pyramid at the prompt's length; here the total is exact and what a layer cannot hold goes to the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from methods.allocators import Uniform
from methods.base import Rows
from methods.sharing import share_out

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pyramid:
    steepness: float = 20.0  # the last layer's share of the mean is 1 / steepness; 1 is flat

    def __post_init__(self) -> None:
        if self.steepness < 1:
            raise ValueError(f"steepness {self.steepness} must be at least 1")

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        even = Uniform().counts(rows, total, scores)
        lowest = 1 / self.steepness
        depth = rows.layer / max(1, rows.layers - 1)
        slope = (2 - lowest) + depth * (2 * lowest - 2)  # from 2 - lowest in the first layer to lowest in the last
        return share_out(total, slope * (even - rows.floor), rows.floor, rows.length, base=rows.floor)
