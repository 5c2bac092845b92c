"""Expected Attention: keep what the queries to come will attend to, by their statistics in the prompt.

Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", 2025.
arxiv.org/abs/2510.00636
Queries are taken as normal: mean and covariance before RoPE, turned by the average rotation of the next positions. A key's
expected weight is then the exponential of its product with the mean plus half of its variance; weights are normalised, averaged
over a group, and multiplied by the value's norm. A softcap on the logits is not part of the expectation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import Ahead, LayerKV, Needs
from methods.base import CannotRun, Protected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExpectedAttention:
    ahead: int = 512  # positions behind the prompt that are averaged over
    sinks: int = 4  # first positions: kept, and left out of the statistics
    epsilon: float = 0.0  # added to a weight before the value's norm multiplies it
    value_norms: bool = True

    def __post_init__(self) -> None:
        if self.ahead < 1 or self.sinks < 0 or self.epsilon < 0:
            raise ValueError(f"ahead {self.ahead} must be at least 1, sinks {self.sinks} and epsilon {self.epsilon:g} 0 or more")

    @property
    def _asked(self) -> Ahead:
        return Ahead(self.ahead, self.sinks)

    @property
    def needs(self) -> Needs:
        return Needs(ahead=frozenset({self._asked}))

    @property
    def protected(self) -> Protected:
        return Protected(first=self.sinks)

    def score(self, layer: LayerKV) -> Tensor:
        scores = layer.values.new_zeros(layer.query_heads // layer.width, layer.keys.shape[1]).float()
        skipped = max(0, self.sinks - (layer.tokens - layer.keys.shape[1]))  # of the candidates
        if skipped >= scores.shape[1]:
            return scores  # everything is protected
        if self._asked not in layer.ahead:
            raise CannotRun("queries to come cannot be told: the family turns its queries in a way that is not known here")
        mean, covariance = layer.ahead[self._asked]
        per_head = layer.read_by(1).stored_keys[:, skipped:].float()  # [Hq, n, D]
        logits = (per_head @ mean[..., None])[..., 0] * layer.scaling
        logits += ((per_head @ covariance) * per_head).sum(-1) * (layer.scaling**2 / 2)
        weights = layer.mean_over_group(logits.softmax(-1))  # [S, n]
        if self.value_norms:
            weights = (weights + self.epsilon) * layer.stored_values[:, skipped:].float().norm(dim=-1)
        scores[:, skipped:] = weights
        return scores
