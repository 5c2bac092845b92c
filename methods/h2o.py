"""H2O: keep the keys that have received the most attention, and as many of the newest.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs", 2023. arxiv.org/abs/2306.14048
As it stands it is scored once, after the prefill; with `every=1` it evicts at every step of the answer, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeavyHitters:
    recent_share: float = 0.5  # of what a row keeps
    recent: int = 1  # newest positions kept in any case; 8, with a share of 0, is KVCache-Factory's H2O
    needs = Needs(column_sums=True)
    ordered = False  # each entry is scored by itself: neighbours do not matter

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1 or self.recent < 0:
            raise ValueError(f"recent_share {self.recent_share} must lie between 0 and 1, recent {self.recent} be 0 or more")

    @property
    def protected(self) -> Protected:
        return Protected(last=self.recent, recent_share=self.recent_share)

    def score(self, layer: LayerKV) -> Tensor:
        assert layer.column_sums is not None
        return layer.mean_over_group(layer.column_sums)
