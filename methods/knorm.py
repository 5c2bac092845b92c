"""Knorm: keep the keys of small norm.

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024. arxiv.org/abs/2406.11430
Differs from the paper: every layer is compressed; the paper leaves the first two whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SmallKeys:
    needs = Needs()
    protected = Protected()

    def score(self, layer: LayerKV) -> Tensor:
        return -layer.stored_keys.float().norm(dim=-1)
