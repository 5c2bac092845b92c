"""Allocators that belong to no single paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from methods.base import Rows
from methods.sharing import share_out

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """Every row keeps the same share of its length: equal counts where rows are of equal length."""

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        return share_out(total, rows.length, rows.floor, rows.length)


@dataclass(frozen=True)
class Ranked:
    """One ranking over the rows of a layer, or of the whole cache: a row keeps as many as are among the best.

    With `within="layer"` and a safeguard of 0.2 this is Ada-KV as kvpress has it (Feng et al., 2024, algorithm 1: scores as they
    are); with `within="cache"` and none, KVzip's budget.
    """

    within: Literal["layer", "cache"] = "layer"
    safeguard: float = 0.2  # share of an even part that a row keeps in any case

    def __post_init__(self) -> None:
        if self.within not in ("layer", "cache") or not 0 <= self.safeguard <= 1:
            raise ValueError(f"within {self.within!r} must be layer or cache, safeguard {self.safeguard:g} between 0 and 1")

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        even = Uniform().counts(rows, total, scores)
        safe = np.maximum(rows.floor, (self.safeguard * even).astype(np.int64))
        counts = np.zeros_like(even)
        for layer in range(rows.layers) if self.within == "layer" else (None,):
            mine = np.arange(len(rows)) if layer is None else np.flatnonzero(rows.layer == layer)
            held = [scores[row].cpu().numpy() for row in mine.tolist()]
            counts[mine] = safe[mine] + self._won(held, safe[mine], int(even[mine].sum() - safe[mine].sum()))
        return counts

    @staticmethod
    def _won(scores: Sequence[np.ndarray], safe: np.ndarray, wanted: int) -> np.ndarray:
        """How many of the best `wanted` entries, beyond each row's `safe` best, are each row's."""
        rest = [_all_but_best(row, keep) for row, keep in zip(scores, safe.tolist(), strict=True)]
        if not wanted:
            return np.zeros(len(rest), dtype=np.int64)
        worst = np.partition(np.concatenate(rest), -wanted)[-wanted]  # the last one to win
        won = np.array([(row > worst).sum() for row in rest])
        for row, values in enumerate(rest):  # of those that equal it, the first rows' win
            won[row] += min(wanted - int(won.sum()), int((values == worst).sum()))
        return won


def _all_but_best(row: np.ndarray, keep: int) -> np.ndarray:
    return np.partition(row, len(row) - keep)[: len(row) - keep] if keep else row
