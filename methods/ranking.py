"""From a scorer's numbers to the entries that a row keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from harness.cache import LayerKV, Prefill, Row, Selection
from methods.declared import Protected, Rows, Scorer, Staged, Stages

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Scores:
    """A scorer's view of one prefill: shared by all methods and budgets that use the scorer."""

    values: list[list[Tensor]]  # of each layer and expert group: [rows, m]; protected entries are inf
    stages: list[list[Stages]] | None = None  # likewise, of a scorer in stages
    _ranks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def rank(self, layer: int, expert_group: int) -> Tensor:
        """[rows, m]: 0 is the highest score of its row; of equals, the later position comes first."""
        key = (layer, expert_group)
        if key not in self._ranks:
            self._ranks[key] = rank(self.values[layer][expert_group])
        return self._ranks[key]

    def rows(self) -> list[Tensor]:
        return [row for layer in self.values for expert_group in layer for row in expert_group]

    def most(self) -> np.ndarray:
        """[R] entries that each row's first part wants at most."""
        assert self.stages is not None
        return np.concatenate([group.most.cpu().numpy() for layer in self.stages for group in layer]).astype(np.int64)

    def with_recent(self, counts: np.ndarray, share: float) -> Scores:
        """The same with the newest entries of each row, that share of its count, protected too."""
        import torch

        values, done = [], 0
        for layer in self.values:
            of_layer = []
            for group in layer:
                mine = torch.as_tensor(counts[done : done + len(group)], device=group.device)
                done += len(group)
                of_layer.append(keep_recent(group, mine, share))
            values.append(of_layer)
        return Scores(values)

    def staged(self, first: np.ndarray) -> Scores:
        """The scores by which rows are ranked whose first parts are so large, [R]: entries of a first part are inf."""
        assert self.stages is not None
        import torch

        values, done = [], 0
        for layer in self.stages:
            of_layer = []
            for group in layer:
                mine = torch.as_tensor(first[done : done + len(group.first)], device=group.first.device)
                done += len(group.first)
                of_layer.append(group.rest.masked_fill(rank(group.first) < mine[:, None], float("inf")))
            values.append(of_layer)
        return Scores(values)


def rank(values: Tensor) -> Tensor:
    """Position of each entry in its row's descending order; ties go to the later position. [R, m] -> [R, m]"""
    import torch

    order = values.shape[1] - 1 - values.flip(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def score_prefill(scorer: Scorer, prefill: Prefill) -> Scores:
    """Runs a scorer over every layer.

    Raises:
        ValueError: scores of another shape than [S, n], or not numbers.
    """
    values: list[list[Tensor]] = []
    stages: list[list[Stages]] = []
    for layer, groups in zip(prefill.layers, prefill.expert_groups, strict=True):
        held = scorer.protected.mask(layer.positions, prefill.tokens)
        of_layer, staged = [], []
        for group in groups:

            def mine(scores: Tensor, held: Tensor = held, members: Tensor | None = group.members) -> Tensor:
                scores = scores.masked_fill(held, float("inf"))
                return scores if members is None else scores[:, members]

            seen = _as_stored(layer, group.width)
            if isinstance(scorer, Staged):
                found = scorer.stages(seen)
                score, first, rest = (mine(checked(scorer, seen, part)) for part in (found.score, found.first, found.rest))
                staged.append(Stages(score, first, rest, found.most))
                of_layer.append(score)
            else:
                of_layer.append(mine(checked(scorer, seen, scorer.score(seen))))
        values.append(of_layer)
        stages.append(staged)
    return Scores(values, stages if isinstance(scorer, Staged) else None)


def _as_stored(layer: LayerKV, width: int) -> LayerKV:
    """The layer with one stored head for every `width` query heads, in every layer of the model that reads it."""
    of_all = width * layer.readers
    return layer if layer.width == of_all else layer.read_by(of_all)


def checked(scorer: Scorer, seen: LayerKV, scores: Tensor) -> Tensor:
    scores = scores.float()
    expected = (seen.query_heads // seen.width, seen.keys.shape[1])
    if scores.shape != expected:
        raise ValueError(f"{type(scorer).__name__} scored {tuple(scores.shape)} entries of layer {seen.index}, not {expected}")
    if scores.isnan().any():
        raise ValueError(f"{type(scorer).__name__} gave scores that are not numbers in layer {seen.index}")
    return scores


@dataclass(frozen=True)
class Ranking:
    """What a selection follows from: of each row the `counts` best by `scores`."""

    counts: np.ndarray  # [R]
    scores: Scores


def row_sizes(prefill: Prefill, protected: Protected) -> Rows:
    columns: list[tuple[int, int, int, int, int]] = []
    for layer, groups in zip(prefill.layers, prefill.expert_groups, strict=True):
        held = protected.mask(layer.positions, prefill.tokens)
        for group in groups:
            mine = held if group.members is None else held[group.members]
            sizes = (layer.index, len(mine), int(mine.sum()))
            columns += [(*sizes, first, group.width) for first in range(0, prefill.shape.query_heads, group.width)]
    table = np.array(columns, dtype=np.int64)
    layers, lengths, floors, firsts, widths = table.T
    return Rows(layers, lengths, floors, firsts, widths, len(prefill.layers), prefill.tokens)


def select(prefill: Prefill, scores: Scores, counts: np.ndarray) -> Selection:
    """The `counts` best entries of every row, in order of position."""
    import torch

    layers, done = [], 0
    for layer, groups in enumerate(prefill.expert_groups):
        rows: list[Row] = []
        for number, group in enumerate(groups):
            values = scores.values[layer][number]
            wanted = torch.as_tensor(counts[done : done + len(values)], device=values.device)
            done += len(values)
            kept = (scores.rank(layer, number) < wanted[:, None]).nonzero()[:, 1].split(wanted.tolist())
            for head, indices in enumerate(kept):
                members = indices if group.members is None else group.members[indices]
                rows.append(Row(head * group.width, group.width, number, members))
        layers.append(tuple(rows))
    return tuple(layers)


def keep_recent(values: Tensor, counts: Tensor, share: float) -> Tensor:
    """The newest entries of each row [R, n], that share of its count, as protected."""
    import torch

    newest = values.shape[1] - (counts * share).long()
    return values.masked_fill(torch.arange(values.shape[1], device=values.device) >= newest[:, None], float("inf"))
