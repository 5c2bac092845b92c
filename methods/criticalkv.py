"""CriticalKV: half of what a row keeps by another scorer, the rest also by how much an entry's value changes the output.

Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective", 2025.
arxiv.org/abs/2502.03805
The second half is ranked by the score times the L1 norm of the value behind the output projection. A second stage over any
scorer: `criticalkv(over=keydiff)`; made for scores that are shares of attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from harness.cache import LayerKV, Needs
from methods.base import CannotRun, Protected, Scorer, Staged, Stages
from methods.snapkv import WindowAttention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Critical(Staged):
    over: Scorer = field(default_factory=WindowAttention)
    first_share: float = 0.5  # of a row's count, by the other scorer alone
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.first_share <= 1 or self.epsilon < 0:
            raise ValueError(f"first_share {self.first_share:g} must lie between 0 and 1, epsilon {self.epsilon:g} be 0 or more")

    @property
    def needs(self) -> Needs:
        return self.over.needs | Needs(output_norms=True)

    @property
    def protected(self) -> Protected:
        return self.over.protected

    def score(self, layer: LayerKV) -> Tensor:
        return self.over.score(layer)

    def stages(self, layer: LayerKV) -> Stages:
        scores = self.over.score(layer).float()
        return Stages(scores, scores, (scores + self.epsilon) * output_norms(layer), scores.new_zeros(len(scores)))

    def first_counts(self, counts: np.ndarray, floors: np.ndarray, most: np.ndarray) -> np.ndarray:
        first = (counts * self.first_share).astype(np.int64)
        return np.maximum(first, 1) if self.first_share else first


def output_norms(layer: LayerKV) -> Tensor:
    """[S, n] mean over a group.

    Raises:
        CannotRun: the family's output projection was not found.
    """
    if layer.output_norms is None:
        raise CannotRun("values cannot be weighed: the output projection of this family's attention was not found")
    return layer.mean_over_group(layer.output_norms)
