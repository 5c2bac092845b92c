"""StreamingLLM: keep the first tokens and the newest ones.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023. arxiv.org/abs/2309.17453
With `every=1` it evicts at every step of the answer, and with `renumber=true` positions are those inside the cache, as in
the paper. As it stands it acts once, after the prefill, and kept entries stay at their original positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SinksAndRecent:
    sinks: int = 4
    needs = Needs()
    blind = True  # looks at positions alone
    ordered = False  # each entry is scored by itself: neighbours do not matter

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks {self.sinks} must be 0 or more")

    @property
    def protected(self) -> Protected:
        return Protected(first=self.sinks, last=1)

    def score(self, layer: LayerKV) -> Tensor:
        heads = layer.query_heads // layer.width
        return layer.positions.float().expand(heads, -1)
