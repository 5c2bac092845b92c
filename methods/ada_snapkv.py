"""Ada-SnapKV: inside a layer, heads whose attention is spread out keep more.

Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", 2024.
arxiv.org/abs/2407.11550
Follows the code released with HeadKV: scores weighted by how much of a head's attention its own best entries hold, then one
ranking over the layer, then a floor. Differs from it: the layer's total is exact.
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
class AdaptiveHeads:
    floor: float = 0.2  # share of a row's even part that it keeps in any case; 1 is SnapKV

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor {self.floor} must lie between 0 and 1")

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        even = Uniform().counts(rows, total, scores)
        counts = np.zeros_like(even)
        for layer in range(rows.layers):
            mine = np.flatnonzero(rows.layer == layer)
            part = even[mine] - rows.floor[mine]  # beyond what is protected
            won = self._won([scores[row].cpu().numpy() for row in mine.tolist()], part)
            base = rows.floor[mine] + self.floor * part
            weights = (1 - self.floor) * won
            counts[mine] = share_out(int(even[mine].sum()), weights, rows.floor[mine], rows.length[mine], base)
        return counts

    @staticmethod
    def _won(scores: Sequence[np.ndarray], part: np.ndarray) -> np.ndarray:
        """How many of the layer's best weighted entries each row has. `part` [R]: the even number a row."""
        weighted = []
        for values, size in zip(scores, part.tolist(), strict=True):
            free = np.sort(values[np.isfinite(values)])[::-1]
            weighted.append(free * (free[:size].sum() / max(float(free.sum()), 1e-20)))
        wanted = int(part.sum())
        if not wanted:
            return np.zeros(len(part), dtype=np.int64)
        worst = np.partition(np.concatenate(weighted), -wanted)[-wanted]  # the last one to win
        won = np.array([(values > worst).sum() for values in weighted])
        for row, values in enumerate(weighted):  # of those that equal it, the first rows' win
            won[row] += min(wanted - int(won.sum()), int((values == worst).sum()))
        return won
