"""mixSGA's router: a module that gives each token an expert, by expert choice in a prompt and by argmax behind it.

Song et al., EMNLP 2025 (arxiv.org/abs/2506.13541), sections 3.2 and 3.3. methods/mixsga.py tells what is done with the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from harness.cache import Routing

RouterLoss = Literal["logits", "sigmoid"]


def capacities(ratios: Sequence[int], tokens: int) -> list[int]:
    """How many tokens each expert takes: the ceiling of its share, as far as there are tokens left. The last takes the rest."""
    taken: list[int] = []
    for ratio in ratios[:-1]:
        taken.append(min(-(-ratio * tokens // sum(ratios)), tokens - sum(taken)))
    return [*taken, tokens - sum(taken)]


def expert_choice(scores: Tensor, ratios: Sequence[int], segments: Tensor) -> Tensor:
    """Progressive, exclusive expert choice within each sequence (section 3.2).

    Not causal: which expert a token gets depends on later tokens of its sequence. Of equal scores the earlier token is taken.

    Args:
        scores: [N, E], of all tokens side by side; experts in order of cost, largest cache first.
        segments: [N], which sequence each token belongs to, from 0; below 0: padding, never routed.

    Returns:
        [N] expert of each token; -1 for padding
    """
    count = int(segments.max()) + 1 if len(segments) else 0
    sizes = torch.bincount(segments[segments >= 0], minlength=count).tolist()
    limits = torch.tensor([capacities(ratios, size) for size in sizes], device=scores.device)  # [S, E]
    expert = torch.full_like(segments, -1)
    for number in range(scores.shape[1]):
        free = (segments >= 0) & (expert < 0)
        rank = _rank_within(scores[:, number], segments, free)
        expert[free & (rank < limits[segments.clamp(min=0), number])] = number
    return expert


def _rank_within(scores: Tensor, segments: Tensor, free: Tensor) -> Tensor:
    """Place of each free token among the free ones of its sequence, highest score first, [N]. Of the others: anything."""
    order = scores.argsort(descending=True, stable=True)
    order = order[free[order]]
    order = order[segments[order].argsort(stable=True)]  # by sequence, within each by score
    mine = segments[order]
    start = torch.searchsorted(mine, mine)  # where each sequence begins
    rank = torch.zeros_like(segments)
    rank[order] = torch.arange(len(order), device=order.device) - start
    return rank


class Router(nn.Module):
    """Scores of the experts for each token, S(x) = sigmoid(x W + b), and which expert it gets.

    Experts of ratio 0 take part in nothing and are left out.

    Args:
        groups: heads averaged by each expert, ascending; ratios: their shares of the tokens.
        learned: else experts are drawn at random, in their shares (the paper's ablation).
    """

    def __init__(self, hidden: int, groups: Sequence[int], ratios: Sequence[int], learned: bool = True) -> None:
        super().__init__()
        kept = [(group, ratio) for group, ratio in zip(groups, ratios, strict=True) if ratio]
        self.groups, self.ratios = tuple(g for g, _ in kept), tuple(r for _, r in kept)
        self.current = self.ratios  # of this step of a training that approaches them
        self.learned = learned
        self.score = nn.Linear(hidden, len(kept))
        nn.init.kaiming_normal_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.score.requires_grad_(learned)
        self.mode: Routing = "expert_choice"
        self.segments: Tensor | None = None  # [B, T] of the next pass, in training; None: every row is one sequence
        self.assigned: Tensor | None = None  # [B, T] of the last pass
        self.wanted: Tensor | None = None  # [B, T] of it: what expert choice says, whatever was assigned in training
        self.logits: Tensor | None = None  # [B, T, E] of the last pass, float32
        self.scores: Tensor | None = None  # what was ranked: the logits, or random scores
        self.softness = 0.0  # of a training: 1, every token has all experts' heads by its scores; 0, its expert's
        self.mixed: Tensor | None = None  # [B, T, E] of the last pass: the shares in which it has them; None: it has one expert's

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, hidden] -> [B, T], the expert of each token; -1 for padding."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = nn.functional.linear(hidden.float(), self.score.weight.float(), self.score.bias.float())
        self.logits = logits
        scores = self.scores = logits.detach() if self.learned else self._random(logits.detach())
        best, self.mixed = scores.argmax(-1), None
        if self.mode == "argmax" and not self.training:
            self.assigned = best
            return best
        wanted = self.wanted = self._chosen(scores)
        chosen = self.assigned = wanted if self.mode == "expert_choice" else best.masked_fill(wanted < 0, -1)
        if self.training and self.softness:
            hard = nn.functional.one_hot(chosen.clamp(min=0), logits.shape[-1])
            self.mixed = self.softness * logits.softmax(-1) + (1 - self.softness) * hard
        return chosen

    def _chosen(self, scores: Tensor) -> Tensor:
        """[B, T, E] -> [B, T], by expert choice."""
        rows, tokens = scores.shape[:2]
        segments = self.segments
        if segments is None:
            segments = torch.arange(rows, device=scores.device)[:, None].expand(rows, tokens)
        # the sigmoid changes no ranking, but rounds logits together that differ: ranked are the logits
        return expert_choice(scores.flatten(0, 1), self.current, segments.flatten()).view(rows, tokens)

    def approach(self, done: float) -> None:
        """Moves the shares that expert choice gives from all tokens at the first expert (0) to the ratios (1), in a line.

        The first expert keeps the most heads: a training can begin with the model as it was.
        """
        whole, parts = sum(self.ratios), 1000
        if done >= 1:
            self.current = self.ratios
            return
        moved = [round(parts * done * ratio / whole) for ratio in self.ratios]
        self.current = (parts - sum(moved[1:]), *moved[1:])

    def _random(self, logits: Tensor) -> Tensor:
        """Random scores, from each token alone, so that decoding needs no state. Their argmax follows the ratios."""
        draw = (logits * 37.0).frac().abs().mean(-1, keepdim=True).mul(53.0).frac()  # [B, T, 1], spread over 0..1
        ends = [sum(self.ratios[: number + 1]) / sum(self.ratios) for number in range(len(self.ratios))]
        inside = [(draw >= begin) & (draw < end) for begin, end in pairwise([0.0, *ends])]
        return torch.where(torch.cat(inside, -1), 1.0 + draw, draw)

    def loss(self, form: RouterLoss) -> Tensor:
        """Cross-entropy between the last pass's scores and what expert choice says, over real tokens (section 3.3)."""
        assert self.logits is not None and self.wanted is not None
        scores = self.logits if form == "logits" else self.logits.sigmoid()
        return cross_entropy(scores.flatten(0, 1), self.wanted.flatten(), ignore_index=-1)

    def agreement(self) -> tuple[int, int]:
        """Of the last pass: tokens for which argmax says what was assigned, and all real tokens."""
        assert self.scores is not None and self.assigned is not None
        real = self.assigned >= 0
        return int((self.scores.argmax(-1) == self.assigned)[real].sum()), int(real.sum())
