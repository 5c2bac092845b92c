"""TOVA: keep what the newest query attends to, the same positions for all heads of a layer.

Oren et al., "Transformers are Multi-State RNNs", 2024. arxiv.org/abs/2401.06104
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
class LastQuery:
    needs = Needs(window=1)
    ordered = False  # each entry is scored by itself: neighbours do not matter

    @property
    def protected(self) -> Protected:
        return Protected(last=1)

    def score(self, layer: LayerKV) -> Tensor:
        scores = layer.window_attention(1)[:, 0].mean(0)  # [n]
        return scores.expand(layer.query_heads // layer.width, -1)
