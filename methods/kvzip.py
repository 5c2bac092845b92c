"""KVzip: keep what the model looks at when it is asked to repeat the prompt, whatever will be asked later.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", 2025. arxiv.org/abs/2505.23416
A second pass over the prompt, a chunk at a time, is made once for all budgets; an entry's score is the most attention that any
repeated token and any head of its group pays to it. One ranking over all layers and heads, as the paper's non-uniform budget. A
prompt shorter than a chunk is one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs, Replay
from methods.base import CannotRun, Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    chunk: int = 2048  # tokens repeated at once
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.sinks < 0:
            raise ValueError(f"chunk {self.chunk} must be at least 1, sinks {self.sinks} 0 or more")

    @property
    def _asked(self) -> Replay:
        return Replay(self.chunk, self.sinks)

    @property
    def needs(self) -> Needs:
        return Needs(replays=frozenset({self._asked}))

    @property
    def protected(self) -> Protected:
        return Protected(first=self.sinks)

    def score(self, layer: LayerKV) -> Tensor:
        if self._asked not in layer.replayed:
            raise CannotRun(
                f"the second pass repeats up to {self.chunk} tokens behind the prompt of {layer.tokens}: over the model's "
                "positions; a smaller chunk may fit"
            )
        return layer.replayed[self._asked].unflatten(0, (-1, layer.width)).amax(1)
