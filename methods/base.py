"""What a method is: a protocol, the full cache, and eviction by a scorer that ranks entries and an allocator that counts them.

Everything else (prompts, copying, decoding, files) is the harness's. It never asks which method it holds: whatever has the
members of `Method` runs, from a plugin too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from harness.cache import Budget, Granularity, Keeper, ModelShape, Needs, Prefill, Selection, keep_all
from methods.again import Again
from methods.declared import (
    Allocator,
    CannotRun,
    LooksAtPrefill,
    Protected,
    Rows,
    Scorer,
    Staged,
    Stages,
    UsesHeadScores,
)
from methods.ranking import Ranking, Scores, rank, row_sizes, score_prefill, select
from methods.sharing import share_out

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [  # what a plugin's author finds here
    "Allocator",
    "CannotRun",
    "Conversion",
    "Converter",
    "Eviction",
    "Full",
    "LooksAtPrefill",
    "Method",
    "Protected",
    "Ranking",
    "Rows",
    "Scorer",
    "Scores",
    "Staged",
    "Stages",
    "UsesHeadScores",
    "rank",
    "score_prefill",
    "scores_for",
]


class Method(Protocol):
    """What a cache keeps of a prefill. Frozen: its repr is the record's parameters, and equal methods are one method."""

    @property
    def version(self) -> int:
        """Raised when the same settings keep other entries."""
        ...

    @property
    def takes_budget(self) -> bool:
        """Is there a cell for each budget, or a single one?"""
        ...

    @property
    def is_reference(self) -> bool:
        """Is its cache the full one, which the others' predictions are compared with?"""
        ...

    @property
    def needs(self) -> Needs:
        """What is to be observed of the prefill, beside keys and values."""
        ...

    @property
    def scorer(self) -> Scorer | None:
        """What ranks the entries. Methods with equal scorers share its scores of a prefill. None: nothing is ranked."""
        ...

    @property
    def head_scores(self) -> str | None:
        """The kind of head scores (r, er, r2) of the model that it is to be given before it runs; None: none."""
        ...

    def with_head_scores(self, scores: Any) -> Method:
        """The same method, given the head scores of one model."""
        ...

    @property
    def given_head_scores(self) -> Any:
        """What `with_head_scores` gave, or None."""
        ...

    def cannot_run(
        self, shape: ModelShape, budget: Budget, tokens: int, granularity: Granularity, parent: ModelShape | None = None
    ) -> str | None:
        """Why a cell makes no sense, asked before the prefill; or None.

        Args:
            parent: the unconverted model's shape, in which budgets are counted, if the model is a variant.
        """
        ...

    def while_decoding(self, cap: Callable[[int], int]) -> Keeper | None:
        """What it does while an answer is decoded; None: nothing, and the cache grows with every token.

        Args:
            cap: how many entries the cache may hold once so many tokens were read, as `total` is for the prompt's.
        """
        ...

    def compress(self, prefill: Prefill, total: int, scores: Scores | None) -> Selection:
        """The rows of a cache of at most `total` entries. A row names the entries that it keeps, or brings merged ones.

        Args:
            scores: its scorer's, of this prefill.

        Raises:
            CannotRun: the cell makes no sense after all.
        """
        ...


def scores_for(method: Method, prefill: Prefill) -> Scores | None:
    """What a method ranks by, if it ranks."""
    return None if method.scorer is None else score_prefill(method.scorer, prefill)


@dataclass(frozen=True)
class Eviction:
    """Keeps the best-scored entries, as many a row as its allocator says; once, after the prefill, or again and again."""

    scorer: Scorer
    allocator: Allocator | LooksAtPrefill
    version: int = 1  # raised when the same settings keep other entries
    every: int = field(default=0, repr=False)  # tokens of an answer after which entries are chosen again; 0: never
    renumber: bool = field(
        default=False, repr=False
    )  # positions are those inside the cache, as StreamingLLM's, not original ones
    takes_budget = True
    is_reference = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every {self.every} must be 0, never, or a number of tokens")
        if self.renumber and getattr(self.scorer, "positional", False):
            raise ValueError("its scorer asks for original positions: they cannot be renumbered")
        if self.renumber and not self.every:
            raise ValueError("renumber is for caches that evict while decoding: name an interval too, every=1 or more")

    def __repr__(self) -> str:
        """The parameters of a row: as they were before methods could evict while decoding, for those that do not."""
        again = f", every={self.every}" if self.every else ""
        again += ", renumber=True" if self.renumber else ""
        return f"Eviction(scorer={self.scorer!r}, allocator={self.allocator!r}, version={self.version!r}{again})"

    @property
    def needs(self) -> Needs:
        return self.scorer.needs | self.allocator.needs if isinstance(self.allocator, LooksAtPrefill) else self.scorer.needs

    @property
    def head_scores(self) -> str | None:
        """Where allocator and scorer want some: of the one that has none yet."""
        return self._wants[1].head_score_kind if self._wants else None

    @property
    def given_head_scores(self) -> Any:
        return self._wants[1].given_head_scores if self._wants else None

    def with_head_scores(self, scores: Any) -> Eviction:
        changes: dict[str, Any] = {name: part.with_head_scores(scores) for name, part in [self._wants or ("", None)] if part}
        return replace(self, **changes)

    @property
    def wanted(self) -> str | None:
        """What of the model's heads it is to be given, in words; None: nothing."""
        return self._wants[1].wanted if self._wants else None

    @property
    def _wants(self) -> tuple[str, UsesHeadScores] | None:
        """The field whose turn it is to be given scores of the model's heads, and what stands there."""
        parts = [(name, getattr(self, name)) for name in ("allocator", "scorer")]
        wanting = [(name, part) for name, part in parts if isinstance(part, UsesHeadScores)]
        return min(wanting, key=lambda one: one[1].given_head_scores is not None, default=None)

    def cannot_run(
        self, shape: ModelShape, budget: Budget, tokens: int, granularity: Granularity, parent: ModelShape | None = None
    ) -> str | None:
        """A layer whose tokens lie in rows of several widths can do with less than is asked for: `compress` has the last word."""
        heads = shape.query_heads if granularity == "query" else shape.kv_heads
        sizes = [shape.candidates(layer, tokens) for layer in range(shape.layers)]
        seen = replace(self.needs, window=0, column_sums=False) != Needs() or isinstance(self.allocator, LooksAtPrefill)
        if self.every and seen:
            return "what it looks at is seen in a prefill alone, so it cannot choose again while decoding"
        if self._wants and self.given_head_scores is None:
            part = self._wants[1]
            return f"it needs {part.wanted} of this model: see `{part.made_by}` and --head-scores"
        floor = heads * sum(self.scorer.protected.count(size, tokens) for size in sizes)
        return too_small(budget.entries(parent or shape, tokens, granularity), floor, heads * shape.layers)

    def while_decoding(self, cap: Callable[[int], int]) -> Keeper | None:
        return Again(self.scorer, self.allocator, self.every, cap, self.renumber) if self.every else None

    def compress(self, prefill: Prefill, total: int, scores: Scores | None) -> Selection:
        """The rows of a cache of min(total, everything) entries."""
        assert scores is not None
        rows = row_sizes(prefill, self.scorer.protected)
        if total >= int(rows.length.sum()):
            return keep_all(prefill)
        if reason := too_small(total, int(rows.floor.sum()), len(rows)):
            raise CannotRun(reason)
        ranking = self.ranking(prefill, rows, total, scores)
        return select(prefill, ranking.scores, ranking.counts)

    def ranking(self, prefill: Prefill, rows: Rows, total: int, scores: Scores) -> Ranking:
        """How many entries each row keeps, and by which scores in the end."""
        if isinstance(self.scorer, Staged) and self.scorer.shares_after_first:
            even = share_out(total, rows.length, rows.floor, rows.length)
            scores = scores.staged(self.scorer.first_counts(even, rows.floor, scores.most()))
        counts = self._counts(prefill, rows, total, scores.rows())
        if isinstance(self.scorer, Staged) and not self.scorer.shares_after_first:
            scores = scores.staged(self.scorer.first_counts(counts, rows.floor, scores.most()))
        share = self.scorer.protected.recent_share
        return Ranking(counts, scores.with_recent(counts, share) if share else scores)

    def _counts(self, prefill: Prefill, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        if not isinstance(self.allocator, LooksAtPrefill):
            return self.allocator.counts(rows, total, scores)
        if self.allocator not in prefill.derived:
            prefill.derived[self.allocator] = self.allocator.after(prefill)
        return np.asarray(prefill.derived[self.allocator].counts(rows, total, scores))


def too_small(total: int, floor: int, rows: int) -> str | None:
    if total >= max(floor, 1):
        return None
    return f"{total / rows:g} entries a head cannot hold the {max(floor / rows, 1 / rows):g} protected ones"


@dataclass(frozen=True)
class Full:
    """Keeps everything: the line that the others are measured against."""

    version: int = 1
    needs = Needs()
    takes_budget = False
    is_reference = True
    scorer = None
    head_scores = None
    given_head_scores = None

    def with_head_scores(self, scores: Any) -> Full:
        return self

    def cannot_run(
        self, shape: ModelShape, budget: Budget, tokens: int, granularity: Granularity, parent: ModelShape | None = None
    ) -> str | None:
        return None

    def while_decoding(self, cap: Callable[[int], int]) -> Keeper | None:
        return None

    def compress(self, prefill: Prefill, total: int, scores: Scores | None) -> Selection:
        return keep_all(prefill)


class Converter(Protocol):
    """Changes a model's keys and values in place; every evicting method runs on top.

    One that averages KV heads may say in which groups, `groups_of(kv_heads) -> Sequence[int]`: `train --order` and `--agree` ask.
    """

    @property
    def index_bits(self) -> int:
        """That name the expert of a token, in each layer."""
        ...

    def share(self, shape: ModelShape) -> float:
        """Of the parent's bytes that a token adds to the cache."""
        ...

    def apply(self, network: Any, seed: int = 0) -> None:
        """
        Raises:
            CannotConvert: no handles for the family, heads that cannot form the groups, or a model converted before.
        """
        ...


@dataclass(frozen=True)
class Conversion:
    """A family of converters, as it is named: `name-numbers-option`."""

    about: str
    make: Callable[[tuple[Any, ...], str], Converter]  # from numbers and option; ValueError says what is wrong with them
    numbers: str = ""  # what they are; "" where there are none
    pairs: bool = False  # may numbers come as pairs, 2x3?
