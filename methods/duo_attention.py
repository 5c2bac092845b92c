"""DuoAttention: heads that retrieve keep everything, the others only the first and the newest positions.

Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", ICLR 2025.
arxiv.org/abs/2410.10819
Which heads retrieve is the authors' published pattern of a model (`attn_patterns/MODEL/.../full_attention_heads.tsv`, MIT, looked
for in --data-dir), or, for a model without one, its own r2 head scores. The budget says how many heads: rows are filled in the
order of their scores, the next one in part. Differs from the paper: streaming heads grow by the answer's tokens instead of
sliding on; a budget below the streaming heads' own is shared out evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from methods.base import Rows, UsesHeadScores
from methods.headkv import BadScores, HeadScores
from methods.sharing import share_out

if TYPE_CHECKING:
    from torch import Tensor


def read_pattern(path: Path, model: str, shape: tuple[int, int, int]) -> HeadScores:
    """A published pattern, a line a layer and a number a KV head, as scores of the query heads.

    Args:
        shape: layers, KV heads and query heads of the model.

    Raises:
        BadScores: the file cannot be read, or lies under another model's name, or is of another shape.
    """
    layers, heads, query_heads = shape
    try:
        with path.open() as file:
            values = np.loadtxt(file, delimiter="\t", ndmin=2)
    except (OSError, ValueError) as error:
        raise BadScores(f"the pattern {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    owner, name = path.parent.parent.name.removeprefix("Meta-"), model.rsplit("/", 1)[-1].removeprefix("Meta-")
    if owner != name:
        raise BadScores(
            f"the pattern {path.name} lies in a folder of {owner or 'no model'}, the model is {name}: it is not inherited"
        )
    if values.shape != (layers, heads):
        found = "{} layers x {} KV heads".format(*values.shape)
        raise BadScores(f"the pattern {path.name} of {owner} is of {found}, the model has {layers} x {heads}")
    spread = np.clip(values, 0, 1).repeat(query_heads // heads, 1)
    return HeadScores(model, "", "duo", spread[None], 1, {"source": "published"})


@dataclass(frozen=True)
class RetrievalHeads(UsesHeadScores):
    streaming: int = 320  # entries of a streaming head: the authors' deployment has 64 first and 256 newest
    scores: HeadScores | None = None  # those of the model: put in before the method runs

    def __post_init__(self) -> None:
        if self.streaming < 1:
            raise ValueError(f"streaming {self.streaming} must be at least 1")

    @property
    def head_score_kind(self) -> str:
        return "duo"

    @property
    def given_head_scores(self) -> HeadScores | None:
        return self.scores

    def with_head_scores(self, scores: HeadScores) -> RetrievalHeads:
        return replace(self, scores=scores)

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        if self.scores is None:
            raise ValueError("no head scores were given")
        least = np.minimum(np.maximum(rows.floor, self.streaming), rows.length)
        if total <= least.sum():
            return share_out(total, rows.length, rows.floor, least)
        counts, left = least.copy(), total - int(least.sum())
        until = np.pad(self.scores.values.cumsum(1), ((0, 0), (1, 0)))  # [L, Hq + 1]
        read_by = (until[rows.layer, rows.first + rows.width] - until[rows.layer, rows.first]) / rows.width
        for row in np.argsort(-np.round(read_by, 12), kind="stable").tolist():
            more = min(left, int(rows.length[row] - counts[row]))
            counts[row], left = counts[row] + more, left - more
        return counts
