"""Eviction while an answer is decoded: the rows are scored as a prefill's, and the best of them stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.cache import HeldRows, Needs
from methods.declared import Rows, Scorer
from methods.ranking import checked, keep_recent, rank

if TYPE_CHECKING:
    from torch import Tensor

STACKED = 2**20  # entries that are looked at in one go, at most


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

        stacks = _stacked(held, [checked(self.scorer, rows.kv, self.scorer.score(rows.kv)) for rows in held])
        protected = [self.scorer.protected.mask(stack.positions, tokens) for stack in stacks]
        values = [stack.scores.masked_fill(mask, float("inf")) for stack, mask in zip(stacks, protected, strict=True)]
        rows = _held_sizes(held, [count for mask in protected for count in mask.sum(1).tolist()], tokens)
        total = max(self.cap(tokens), int(rows.floor.sum()))
        if total >= sum(scores.numel() for scores in values):
            return [torch.ones(stop - start, *scores.shape[1:], dtype=torch.bool, device=scores.device)
                    for stack, scores in zip(stacks, values, strict=True) for start, stop in pairwise(stack.edges)]  # fmt: skip
        counts = self.allocator.counts(rows, min(total, int(rows.length.sum())), [row for scores in values for row in scores])
        kept, done = [], 0
        for stack, scores in zip(stacks, values, strict=True):
            mine = counts[done : done + len(scores)]
            best = _best(scores, stack.positions, mine, tokens, self.scorer.protected.recent_share)
            kept += [best[start:stop] for start, stop in pairwise(stack.edges)]
            done += len(scores)
        return kept


@dataclass(frozen=True)
class _Stack:
    """Rows of neighbouring layers with equally many entries, looked at in one go: what costs at short rows are the calls."""

    scores: Tensor  # [R, n]
    positions: Tensor  # [R, n]
    edges: list[int]  # where each part's rows begin, and the end


def _stacked(held: Sequence[HeldRows], scores: Sequence[Tensor]) -> list[_Stack]:
    import torch

    runs: list[list[int]] = []
    for number, found in enumerate(scores):
        last = scores[runs[-1][-1]] if runs else None
        same = last is not None and last.shape[1] == found.shape[1] and last.device == found.device
        if same and sum(scores[one].numel() for one in runs[-1]) + found.numel() <= STACKED:
            runs[-1].append(number)
        else:
            runs.append([number])
    stacks = []
    for run in runs:
        positions = [held[number].kv.positions.expand_as(scores[number]) for number in run]
        edges = [0, *accumulate(len(scores[number]) for number in run)]
        stacks.append(_Stack(torch.cat([scores[number] for number in run]), torch.cat(positions), edges))
    return stacks


def _best(scores: Tensor, positions: Tensor, counts: np.ndarray, tokens: int, recent_share: float) -> Tensor:
    """[S, n]: the `counts` best of each row; of equals the later position.

    Args:
        positions: [S, n], in any order.
    """
    import torch

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


def _held_sizes(held: Sequence[HeldRows], floors: Sequence[int], tokens: int) -> Rows:
    """floors: of each row, how many of its entries are protected."""
    columns: list[tuple[int, int, int, int]] = []
    for rows in held:
        most = min(rows.kv.keys.shape[1], rows.most)
        columns += [(rows.kv.index, most, first, rows.width) for first in rows.first.tolist()]
    layers, most_of, firsts, widths = np.array(columns, dtype=np.int64).T
    protected = np.array(floors, dtype=np.int64)
    return Rows(layers, np.maximum(protected, most_of), protected, firsts, widths, int(layers.max()) + 1, tokens)
