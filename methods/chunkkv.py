"""ChunkKV: keep whole chunks of neighbouring tokens, the same ones for all heads of a layer.

Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference", 2025.
arxiv.org/abs/2502.00299
A chunk's score is the mean, over its tokens and all heads, of another scorer's. Differs from the paper: the budget is spent to
the last entry, so the last chunk that is kept may be kept in part (its end). What the other scorer protects is protected, and
counts as much as the best of the rest. Its index reuse between layers is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected, Scorer
from methods.snapkv import WindowAttention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    over: Scorer = field(default_factory=WindowAttention)
    chunk: int = 20  # tokens

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk {self.chunk} must be at least 1")

    @property
    def needs(self) -> Needs:
        return self.over.needs

    @property
    def protected(self) -> Protected:
        return self.over.protected

    def score(self, layer: LayerKV) -> Tensor:
        import torch
        from torch.nn.functional import pad

        scores = self.over.score(layer).float()  # [S, n]
        held = self.protected.mask(layer.positions, layer.tokens)
        best = scores.masked_fill(held, float("-inf")).amax()  # of what is not protected, if anything is not
        scores = torch.where(held & best.isfinite(), best, scores)
        entries, wide = scores.shape[1], -scores.shape[1] % self.chunk
        chunks = pad(scores.mean(0), (0, wide)).unflatten(0, (-1, self.chunk)).sum(1)  # [chunks]
        sizes = pad(torch.ones(entries, device=scores.device), (0, wide)).unflatten(0, (-1, self.chunk)).sum(1)
        return (chunks / sizes).repeat_interleave(self.chunk)[:entries].expand(len(scores), -1)
