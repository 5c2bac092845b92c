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
    """Experts of 1, 2, 4, ... heads a group, and a router a layer. With a single expert there is no router."""

    ratios: tuple[int, ...]  # of the tokens, in order of cost; 0: no such expert
    learned: bool = True  # else experts are drawn at random

    @classmethod
    def of(cls, numbers: tuple[int, ...], option: str) -> MixSGA:
        """
        Raises:
            ValueError: ratios that make no sense, or an option that is not there.
        """
        if any(ratio < 0 for ratio in numbers) or not any(numbers):
            raise ValueError("ratios must not be negative, nor all 0")
        if option not in ("", "random"):
            raise ValueError(f"{option!r} is no ablation of it; random is")
        return cls(numbers, learned=not option)

    @property
    def experts(self) -> list[tuple[int, int]]:
        """Heads a group, and ratio, of those that take part."""
        return [(2**number, ratio) for number, ratio in enumerate(self.ratios) if ratio]

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
                if router is not None:
                    router.to(next(handle.attention.parameters()).device)
                wrap(handle, Grouping(used, router))
