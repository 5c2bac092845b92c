"""mixSGA: tokens are routed to experts that share one set of key and value weights and keep fewer and fewer heads.

Song et al., "Mixture of Weight-shared Heterogeneous Group Attention Experts for Dynamic Token-wise KV Optimization", EMNLP 2025.
arxiv.org/abs/2506.13541
Expert e averages neighbouring KV heads in groups of g_e. A prompt is routed by expert choice: in order of cost, each expert takes
the tokens that score highest for it among those left, so every token has one expert and no token is dropped. Tokens that come
later go to their argmax. docs/methods/mixsga.md says what the paper leaves open and what we chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.cache import ModelShape


@dataclass(frozen=True)
class MixSGA:
    """Experts of 1, 2, 4, ... heads a group, or of the sizes that are named, and a router a layer. With a single expert there is
    no router.
    """

    ratios: tuple[int, ...]  # of the tokens, in order of cost; 0: no such expert
    learned: bool = True  # else experts are drawn at random
    groups: tuple[int, ...] = ()  # heads a group of each expert, ascending; empty: 1, 2, 4, ...
    scaled: bool = False  # a learned number for the averaged keys of each layer and expert: ours, not the paper's

    @classmethod
    def of(cls, numbers: tuple[int, ...] | tuple[tuple[int, int], ...], option: str) -> MixSGA:
        """
        Args:
            numbers: ratios (3:1:6), or ratios each with its heads a group (1x1:2x3), for models whose KV heads are no power of 2.

        Raises:
            ValueError: ratios or groups that make no sense, or an option that is not there.
        """
        named = sum(isinstance(number, tuple) for number in numbers)
        if named not in (0, len(numbers)):
            raise ValueError("either all ratios come with their heads a group, or none does")
        pairs = [number if isinstance(number, tuple) else (number, 2**place) for place, number in enumerate(numbers)]
        ratios, groups = tuple(ratio for ratio, _ in pairs), tuple(group for _, group in pairs)
        if any(ratio < 0 for ratio in ratios) or not any(ratios):
            raise ValueError("ratios must not be negative, nor all 0")
        if min(groups) < 1 or list(groups) != sorted(set(groups)):
            raise ValueError("groups must be sizes of at least 1 that grow from expert to expert")
        if option not in ("", "random", "scaled"):
            raise ValueError(f"{option!r} is no option of it; random and scaled are")
        return cls(ratios, option != "random", groups if named else (), option == "scaled")

    @property
    def experts(self) -> list[tuple[int, int]]:
        """Heads a group, and ratio, of those that take part."""
        groups = self.groups or [2**number for number in range(len(self.ratios))]
        return [(group, ratio) for group, ratio in zip(groups, self.ratios, strict=True) if ratio]

    def groups_of(self, kv_heads: int) -> tuple[int, ...]:
        return tuple(group for group, _ in self.experts)

    def share(self, shape: ModelShape) -> float:
        return sum(ratio / group for group, ratio in self.experts) / sum(self.ratios)

    @property
    def index_bits(self) -> int:
        return (len(self.experts) - 1).bit_length()

    def apply(self, network: Any, seed: int = 0) -> None:
        import torch

        from harness.families import Grouping, check_groups, wrap
        from methods.mixsga_router import Router

        used, ratios = ([expert[part] for expert in self.experts] for part in (0, 1))
        found = check_groups(network, used)
        if used == [1]:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for handle in found:
                router = Router(handle.hidden, used, ratios, self.learned) if len(used) > 1 else None
                wrap(handle, Grouping(used, router, self.scaled).to(next(handle.attention.parameters()).device))
