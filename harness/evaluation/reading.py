"""A context as it was read, and what was found out from it: kept for the next question on the same context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from harness.cache import Needs, Prefill, Row, Selection
from harness.evaluation.prompts import Prompt
from methods.base import Scorer, Scores, score_prefill

if TYPE_CHECKING:
    from harness.evaluation.sweep import Cell


@dataclass
class Reading:
    """One dense pass over a context, and what methods made of it. It lives as long as its arena holds the prefill."""

    ids: tuple[int, ...]  # that were read
    taken_back: int  # of them, the last so many, once entries were chosen
    scored: int  # of them, the last so many, in the pass that read them
    needs: Needs  # what was observed
    prefill: Prefill
    scores: dict[Scorer, Scores] = field(default_factory=dict)
    selections: dict[Cell, Selection] = field(default_factory=dict)

    def serves(self, prompt: Prompt, needs: Needs) -> bool:
        """Would reading this prompt's context give the same?"""
        same = self.ids == read_of(prompt) and (self.taken_back, self.scored) == (len(prompt.looked), len(prompt.one_pass))
        return same and self.needs | needs == self.needs

    def scores_of(self, scorer: Scorer | None) -> Scores | None:
        """Once for all methods, budgets and questions that rank by the same scorer."""
        if scorer is None:
            return None
        if scorer not in self.scores:
            self.scores[scorer] = score_prefill(scorer, self.prefill)
        return self.scores[scorer]

    def without_question(self, selection: Selection) -> Selection:
        """The same rows without the entries of the question that was looked at."""
        if not self.taken_back:
            return selection
        end = self.prefill.tokens - self.taken_back
        layers = zip(self.prefill.layers, selection, strict=True)
        return tuple(_before(end, kv.positions, rows) for kv, rows in layers)


def read_of(prompt: Prompt) -> tuple[int, ...]:
    """What is read before entries are chosen."""
    return (*prompt.ids[: prompt.context], *prompt.looked)


def _before(end: int, positions: torch.Tensor, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows with the entries before position `end` alone."""
    found = []
    for row in rows:
        kept = torch.arange(len(positions), device=positions.device) if row.kept is None else row.kept
        stay = positions[kept] < end
        merged = None if row.merged is None else (row.merged[0][stay], row.merged[1][stay])
        found.append(replace(row, kept=kept[stay], merged=merged))
    return tuple(found)
