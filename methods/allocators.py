"""Allocators that belong to no single paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
