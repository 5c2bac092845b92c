"""CurDKV: keep the entries of large leverage, in keys and in values, beside their neighbours.

Sengupta et al., "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition", 2025. arxiv.org/abs/2509.15038
The leverage of an entry is its squared norm over that of its neighbourhood of `local` entries; keys' times values'. Differs from
the paper: no random projection before the norms, as in kvpress's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Leverage:
    sinks: int = 4
    local: int = 16  # entries of a neighbourhood
    needs = Needs()

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.local < 2:
            raise ValueError(f"sinks {self.sinks} must be 0 or more, local {self.local} at least 2")

    @property
    def protected(self) -> Protected:
        return Protected(first=self.sinks)

    def score(self, layer: LayerKV) -> Tensor:
        product = self._share(layer.stored_keys) * self._share(layer.stored_values)
        return product / product.sum(-1, keepdim=True).clamp(min=1e-20)

    def _share(self, states: Tensor) -> Tensor:
        """[S, n, D] -> [S, n]: squared norms, as shares of their neighbourhood's."""
        from torch.nn.functional import pad

        squares = states.float().square().sum(-1)
        entries = squares.shape[1]
        cut = pad(squares, (0, -entries % self.local)).unflatten(1, (-1, self.local))
        return (cut / cut.sum(-1, keepdim=True).clamp(min=1e-20)).flatten(1)[:, :entries]
