"""Eviction while an answer is decoded: the rows are scored as a prefill's, and the best of them stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.cache import HeldRows, Needs
from methods.declared import Protected, Rows, Scorer
from methods.ranking import checked, keep_recent, rank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Again:
    """Scores the rows of an answer that is being decoded as a prefill's, and keeps the best of them again."""

    scorer: Scorer
    allocator: Any
    every: int
    cap: Callable[[int], int]
    renumbers: bool = False

    @property
    def needs(self) -> Needs:
        return self.scorer.needs

    @property
    def ordered(self) -> bool:
        return getattr(self.scorer, "ordered", True)

    def keep(self, held: Sequence[HeldRows], tokens: int) -> list[Tensor]:
        """See `Keeper`. Never fewer than what the method protects."""
        import torch

        protected = self.scorer.protected
        values = [_held_scores(self.scorer, rows, tokens) for rows in held]
        rows = _held_sizes(held, protected, tokens)
        total = max(self.cap(tokens), int(rows.floor.sum()))
        if total >= sum(scores.numel() for scores in values):
            return [torch.ones_like(scores, dtype=torch.bool) for scores in values]
        counts = self.allocator.counts(rows, min(total, int(rows.length.sum())), [row for scores in values for row in scores])
        kept, done = [], 0
        for one, scores in zip(held, values, strict=True):
            kept.append(_best(scores, one.kv.positions, counts[done : done + len(scores)], tokens, protected.recent_share))
            done += len(scores)
        return kept


def _best(scores: Tensor, positions: Tensor, counts: np.ndarray, tokens: int, recent_share: float) -> Tensor:
    """[S, n]: the `counts` best of each row; of equals the later position.

    Args:
        positions: [n] or [S, n], in any order.
    """
    import torch

    positions = positions.expand_as(scores)
    wanted = torch.as_tensor(counts, device=scores.device)
    if bool((counts == scores.shape[1] - 1).all()):  # one entry of each row goes: no need to sort them all
        newest = tokens - (wanted * recent_share).long()[:, None]
        held = positions >= newest
        if not recent_share or bool((held.sum(1) == (wanted * recent_share).long()).all()):
            ranked = scores.masked_fill(held, float("inf")) if recent_share else scores
            worst = ranked == ranked.amin(1, keepdim=True)
            gone = positions.masked_fill(~worst, tokens).argmin(1, keepdim=True)
            return torch.ones_like(worst).scatter_(1, gone, False)
    order = positions.argsort(1)
    by_position = scores.gather(1, order)
    ranks = rank(keep_recent(by_position, wanted, recent_share) if recent_share else by_position)
    return torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, order, ranks < wanted[:, None])


def _held_scores(scorer: Scorer, rows: HeldRows, tokens: int) -> Tensor:
    scores = checked(scorer, rows.kv, scorer.score(rows.kv))
    return scores.masked_fill(scorer.protected.mask(rows.kv.positions, tokens), float("inf"))


def _held_sizes(held: Sequence[HeldRows], protected: Protected, tokens: int) -> Rows:
    columns: list[tuple[int, int, int, int, int]] = []
    for rows in held:
        mask = protected.mask(rows.kv.positions, tokens)
        floors = [int(mask.sum())] * len(rows.first) if mask.dim() == 1 else mask.sum(1).tolist()
        most = min(mask.shape[-1], rows.most)
        sizes = zip(rows.first.tolist(), floors, strict=True)
        columns += [(rows.kv.index, max(floor, most), floor, first, rows.width) for first, floor in sizes]
    layers, lengths, floors, firsts, widths = np.array(columns, dtype=np.int64).T
    return Rows(layers, lengths, floors, firsts, widths, int(layers.max()) + 1, tokens)
