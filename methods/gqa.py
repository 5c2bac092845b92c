"""GQA and MQA: neighbouring KV heads become one. And the control: the model as it is.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023.
arxiv.org/abs/2305.13245; Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", 2019. arxiv.org/abs/1911.02150
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.cache import ModelShape

if TYPE_CHECKING:
    from harness.families import How


@dataclass(frozen=True)
class GroupedHeads:
    """A `group`-th of the KV heads; 0: one for all."""

    group: int = 0
    how: How = "mean"  # first, random: the ablations of GQA's paper
    index_bits = 0

    @classmethod
    def of(cls, numbers: tuple[int, ...], option: str) -> GroupedHeads:
        """
        Raises:
            ValueError: not one group size of at least 1, or an option that is not there.
        """
        if len(numbers) > 1 or any(number < 1 for number in numbers):
            raise ValueError("one group size of at least 1 is expected")
        if option not in ("", "first", "random"):
            raise ValueError(f"{option!r} is no ablation of it; first and random are")
        return cls(sum(numbers), option or "mean")  # type: ignore[arg-type]

    def groups_of(self, kv_heads: int) -> tuple[int, ...]:
        return (self.group or kv_heads,)

    def share(self, shape: ModelShape) -> float:
        return 1 / (self.group or shape.kv_heads)

    def apply(self, network: Any, seed: int = 0) -> None:
        from harness.families import group_heads, handles

        group_heads(network, self.group or handles(network)[0].kv_heads, self.how, seed)


@dataclass(frozen=True)
class Untouched:
    """Every head stays: trained as long as the others, it shows what training alone does."""

    index_bits = 0

    @classmethod
    def of(cls, numbers: tuple[int, ...], option: str) -> Untouched:
        """
        Raises:
            ValueError: numbers or an option.
        """
        if numbers or option:
            raise ValueError("it takes neither numbers nor an ablation")
        return cls()

    def share(self, shape: ModelShape) -> float:
        return 1.0

    def apply(self, network: Any, seed: int = 0) -> None:
        from harness.families import handles

        handles(network)
