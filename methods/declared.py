"""What a scorer and an allocator are, and what they may declare beside it: head scores, a look at the prefill, stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from harness.cache import LayerKV, Needs, Prefill
from harness.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Protected:
    """Positions that a method never evicts."""

    first: int = 0  # of the prompt: attention sinks
    last: int = 0  # of the prompt
    recent_share: float = 0.0  # and the newest entries of a row, as a share of what it keeps
    first_share: float = 0.0  # first and last ones as shares of the prompt, where these are more
    last_share: float = 0.0

    def ends(self, tokens: int) -> tuple[int, int]:
        """How many first and last positions of so many are protected."""
        return max(self.first, int(self.first_share * tokens)), max(self.last, int(self.last_share * tokens))

    def mask(self, positions: Tensor, tokens: int) -> Tensor:
        first, last = self.ends(tokens)
        return (positions < first) | (positions >= tokens - last)

    def count(self, candidates: int, tokens: int) -> int:
        """How many of the newest `candidates` of `tokens` positions are protected."""
        first, last = self.ends(tokens)
        last = min(last, candidates)
        return last + max(0, min(first, tokens - last) - (tokens - candidates))

    def __str__(self) -> str:
        first = f"first {self.first_share:.0%}" if self.first_share else f"first {self.first}" if self.first else ""
        last = f"last {self.last_share:.0%}" if self.last_share else f"last {self.last}" if self.last else ""
        recent = f"newest {self.recent_share:.0%} of what is kept" if self.recent_share else ""
        return ", ".join(filter(None, (first, last, recent))) or "nothing"


class CannotRun(UserError):
    """A cell that makes no sense: it is skipped with this reason."""


class Scorer(Protocol):
    """Which entries matter.

    One that scores each entry by itself, whatever its neighbours, may say `ordered = False`: while decoding it is then shown
    entries as they lie in the cache, with positions [n] or [S, n], which saves a copy at every eviction.
    """

    @property
    def needs(self) -> Needs: ...

    @property
    def protected(self) -> Protected: ...

    def score(self, layer: LayerKV) -> Tensor:
        """[S, n] float32, one score a stored head and candidate. Higher is kept longer, inf is never evicted."""
        ...


@dataclass(frozen=True)
class Rows:
    """The rows of one cache before eviction, in flat (layer, expert group, head) order, as numpy columns."""

    layer: np.ndarray
    length: np.ndarray  # entries that a row could keep
    floor: np.ndarray  # entries that are protected
    first: np.ndarray  # first query head that reads the row
    width: np.ndarray  # how many read it
    layers: int
    tokens: int  # of the prompt

    def __len__(self) -> int:
        return len(self.layer)


class Allocator(Protocol):
    """How many entries each row keeps."""

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        """Whole numbers between `rows.floor` and `rows.length` that sum to `total`.

        Args:
            scores: of each row, [length] in float32, protected entries inf.
        """
        ...


class LooksAtPrefill(ABC):
    """An allocator that looks at more than the scores, by declaration: it inherits from this."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What is to be observed for it."""

    @abstractmethod
    def after(self, prefill: Prefill) -> Allocator:
        """What shares out on this prompt: found once for all budgets, from what it sees."""


class Staged(ABC):
    """A scorer whose ranking depends on how much a row keeps, by declaration: it inherits from this.

    A first part of each row is taken by one score, the rest by another.
    """

    shares_after_first: bool = False  # is the first part that of an even share, which the allocator then sees as protected?

    @abstractmethod
    def stages(self, layer: LayerKV) -> Stages: ...

    @abstractmethod
    def first_counts(self, counts: np.ndarray, floors: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Entries of each row's first part, [R], the protected ones among them.

        Args:
            counts: entries that each row keeps, or an even share of them; floors: the protected ones; most: from `Stages`.
        """


@dataclass(frozen=True)
class Stages:
    """Of one layer: what allocators see, two scores of every entry, and how large a first part each stored head wants at most."""

    score: Tensor  # [S, n]
    first: Tensor  # [S, n]
    rest: Tensor  # [S, n]
    most: Tensor  # [S] entries, beyond the protected ones


class UsesHeadScores(ABC):
    """An allocator or scorer that is to be given scores of the model's heads, by declaration: it inherits from this."""

    @property
    @abstractmethod
    def head_score_kind(self) -> str:
        """r, er or r2; duo, a pattern; queries, statistics of them."""

    @property
    @abstractmethod
    def given_head_scores(self) -> Any:
        """What `with_head_scores` gave, or None."""

    @abstractmethod
    def with_head_scores(self, scores: Any) -> Self:
        """The same with the scores of one model."""

    @property
    def wanted(self) -> str:
        """What it is to be given, in words."""
        return f"{self.head_score_kind} head scores"

    @property
    def made_by(self) -> str:
        """The command that makes it."""
        return "run_all.py importance"
