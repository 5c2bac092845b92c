"""What a method is: a protocol, the full cache, and eviction by a scorer that ranks entries and an allocator that counts them.

Everything else (prompts, copying, decoding, files) is the harness's. It never asks which method it holds: whatever has the
members of `Method` runs, from a plugin too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from harness.cache import Budget, Granularity, HeldRows, Keeper, LayerKV, ModelShape, Needs, Prefill, Row, Selection, keep_all
from harness.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Protected:
    """Positions that a method never evicts."""

    first: int = 0  # of the prompt: attention sinks
    last: int = 0  # of the prompt
    recent_share: float = 0.0  # and the newest entries of a row, as a share of what it keeps

    def mask(self, positions: Tensor, tokens: int) -> Tensor:
        return (positions < self.first) | (positions >= tokens - self.last)

    def count(self, candidates: int, tokens: int) -> int:
        """How many of the newest `candidates` of `tokens` positions are protected."""
        last = min(self.last, candidates)
        return last + max(0, min(self.first, tokens - last) - (tokens - candidates))


class CannotRun(UserError):
    """A cell that makes no sense: it is skipped with this reason."""


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


class UsesHeadScores(ABC):
    """An allocator that is to be given head scores of the model, by declaration: it inherits from this."""

    @property
    @abstractmethod
    def head_score_kind(self) -> str:
        """r, er or r2."""

    @property
    @abstractmethod
    def given_head_scores(self) -> Any:
        """What `with_head_scores` gave, or None."""

    @abstractmethod
    def with_head_scores(self, scores: Any) -> Self:
        """The same allocator with the scores of one model."""


@dataclass
class Scores:
    """A scorer's view of one prefill: shared by all methods and budgets that use the scorer."""

    values: list[list[Tensor]]  # of each layer and expert group: [rows, m]; protected entries are inf
    _ranks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def rank(self, layer: int, expert_group: int) -> Tensor:
        """[rows, m]: 0 is the highest score of its row; of equals, the later position comes first."""
        key = (layer, expert_group)
        if key not in self._ranks:
            self._ranks[key] = rank(self.values[layer][expert_group])
        return self._ranks[key]

    def rows(self) -> list[Tensor]:
        return [row for layer in self.values for expert_group in layer for row in expert_group]


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
    values = []
    for layer, groups in zip(prefill.layers, prefill.expert_groups, strict=True):
        held = scorer.protected.mask(layer.positions, prefill.tokens)
        of_layer = []
        for group in groups:
            scores = _checked(scorer, layer, group.width).masked_fill(held, float("inf"))
            of_layer.append(scores if group.members is None else scores[:, group.members])
        values.append(of_layer)
    return Scores(values)


def scores_for(method: Method, prefill: Prefill) -> Scores | None:
    """What a method ranks by, if it ranks."""
    return None if method.scorer is None else score_prefill(method.scorer, prefill)


def _checked(scorer: Scorer, layer: LayerKV, width: int) -> Tensor:
    of_all = width * layer.readers  # a stored head's readers in every layer that reads it
    seen = layer if layer.width == of_all else layer.read_by(of_all)
    scores = scorer.score(seen).float()
    expected = (layer.query_heads // of_all, layer.keys.shape[1])
    if scores.shape != expected:
        raise ValueError(f"{type(scorer).__name__} scored {tuple(scores.shape)} entries of layer {layer.index}, not {expected}")
    if scores.isnan().any():
        raise ValueError(f"{type(scorer).__name__} gave scores that are not numbers in layer {layer.index}")
    return scores


@dataclass(frozen=True)
class Eviction:
    """Keeps the best-scored entries, as many a row as its allocator says; once, after the prefill, or again and again."""

    scorer: Scorer
    allocator: Allocator
    version: int = 1  # raised when the same settings keep other entries
    every: int = field(default=0, repr=False)  # tokens of an answer after which entries are chosen again; 0: never
    takes_budget = True
    is_reference = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every {self.every} must be 0, never, or a number of tokens")

    def __repr__(self) -> str:
        """The parameters of a row: as they were before methods could evict while decoding, for those that do not."""
        again = f", every={self.every}" if self.every else ""
        return f"Eviction(scorer={self.scorer!r}, allocator={self.allocator!r}, version={self.version!r}{again})"

    @property
    def needs(self) -> Needs:
        return self.scorer.needs

    @property
    def head_scores(self) -> str | None:
        return self.allocator.head_score_kind if isinstance(self.allocator, UsesHeadScores) else None

    @property
    def given_head_scores(self) -> Any:
        return self.allocator.given_head_scores if isinstance(self.allocator, UsesHeadScores) else None

    def with_head_scores(self, scores: Any) -> Eviction:
        if not isinstance(self.allocator, UsesHeadScores):
            return self
        return replace(self, allocator=self.allocator.with_head_scores(scores))

    def cannot_run(
        self, shape: ModelShape, budget: Budget, tokens: int, granularity: Granularity, parent: ModelShape | None = None
    ) -> str | None:
        """A layer whose tokens lie in rows of several widths can do with less than is asked for: `compress` has the last word."""
        heads = shape.query_heads if granularity == "query" else shape.kv_heads
        sizes = [shape.candidates(layer, tokens) for layer in range(shape.layers)]
        if self.every and replace(self.needs, window=0, column_sums=False) != Needs():
            return "what it looks at is seen in a prefill alone, so it cannot choose again while decoding"
        if self.head_scores and self.given_head_scores is None:
            return f"it needs {self.head_scores} head scores of this model: see `run_all.py importance` and --head-scores"
        floor = heads * sum(self.scorer.protected.count(size, tokens) for size in sizes)
        return too_small(budget.entries(parent or shape, tokens, granularity), floor, heads * shape.layers)

    def while_decoding(self, cap: Callable[[int], int]) -> Keeper | None:
        return Again(self, self.every, cap) if self.every else None

    def compress(self, prefill: Prefill, total: int, scores: Scores | None) -> Selection:
        """The rows of a cache of min(total, everything) entries."""
        assert scores is not None
        rows = row_sizes(prefill, self.scorer.protected)
        if total >= int(rows.length.sum()):
            return keep_all(prefill)
        if reason := too_small(total, int(rows.floor.sum()), len(rows)):
            raise CannotRun(reason)
        counts = self.allocator.counts(rows, total, scores.rows())
        return select(prefill, scores, counts, self.scorer.protected.recent_share)


@dataclass(frozen=True)
class Again:
    """Scores the rows of an answer that is being decoded as a prefill's, and keeps the best of them again."""

    method: Eviction
    every: int
    cap: Callable[[int], int]

    @property
    def needs(self) -> Needs:
        return self.method.needs

    @property
    def ordered(self) -> bool:
        return getattr(self.method.scorer, "ordered", True)

    def keep(self, held: Sequence[HeldRows], tokens: int) -> list[Tensor]:
        """See `Keeper`. Never fewer than what the method protects."""
        import torch

        protected = self.method.scorer.protected
        values = [_held_scores(self.method.scorer, rows, tokens) for rows in held]
        rows = _held_sizes(held, protected, tokens)
        total = max(self.cap(tokens), int(rows.floor.sum()))
        if total >= sum(scores.numel() for scores in values):
            return [torch.ones_like(scores, dtype=torch.bool) for scores in values]
        counts = self.method.allocator.counts(
            rows, min(total, int(rows.length.sum())), [row for scores in values for row in scores]
        )
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
    ranks = rank(_keep_recent(by_position, wanted, recent_share) if recent_share else by_position)
    return torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, order, ranks < wanted[:, None])


def _held_scores(scorer: Scorer, rows: HeldRows, tokens: int) -> Tensor:
    scores = _checked(scorer, rows.kv, rows.kv.width // rows.kv.readers)
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
    """Changes a model's keys and values in place; every evicting method runs on top."""

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
    make: Callable[[tuple[int, ...], str], Converter]  # from numbers and option; ValueError says what is wrong with them
    numbers: str = ""  # what they are; "" where there are none


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


def select(prefill: Prefill, scores: Scores, counts: np.ndarray, recent_share: float) -> Selection:
    """The `counts` best entries of every row, in order of position."""
    import torch

    layers, done = [], 0
    for layer, groups in enumerate(prefill.expert_groups):
        rows: list[Row] = []
        for number, group in enumerate(groups):
            values = scores.values[layer][number]
            wanted = torch.as_tensor(counts[done : done + len(values)], device=values.device)
            done += len(values)
            ranks = scores.rank(layer, number) if not recent_share else rank(_keep_recent(values, wanted, recent_share))
            kept = (ranks < wanted[:, None]).nonzero()[:, 1].split(wanted.tolist())
            for head, indices in enumerate(kept):
                members = indices if group.members is None else group.members[indices]
                rows.append(Row(head * group.width, group.width, number, members))
        layers.append(tuple(rows))
    return tuple(layers)


def _keep_recent(values: Tensor, counts: Tensor, share: float) -> Tensor:
    import torch

    newest = values.shape[1] - (counts * share).long()
    return values.masked_fill(torch.arange(values.shape[1], device=values.device) >= newest[:, None], float("inf"))
