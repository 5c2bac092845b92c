"""What one dense pass over a prompt leaves behind, and the words in which methods speak about it.

Shape letters: T tokens of the prompt, n candidates of a layer (T, or the layer's sliding window), Hq query heads, H KV
heads, G = Hq / H, S stored heads, W last queries, D head size. One prompt has no batch axis.

torch is imported where tensors are made: methods are listed and requests are checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any, Literal, Protocol

from harness.logits import Chunk, hidden, softcapped, with_sinks
from harness.storage import HALF, Storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

PromptProtocol = Literal[
    "question_in",  # the question is read before entries are chosen
    "question_after",  # it is asked behind them
    "first_question",  # entries are chosen with the context's first question in view, which is taken back before each is asked
    "turns",  # the same, but the first question stays, and each follows those before it with their right answers
    "turns_after",  # entries are chosen before any question is known, then as `turns`
]
Chat = Literal["raw", "template"]
Granularity = Literal["kv", "query"]  # a row for each KV head, or for each query head
Routing = Literal["expert_choice", "argmax"]  # of tokens to experts, where a layer has several


class Arena:
    """Memory kept from one batch to the next: fresh pages cost more than the copies that fill them."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self.tenant: object = None  # what a sweep read last and left here, for the next question on the same context

    def take(self, name: str, rows: int, like: Tensor) -> Tensor:
        """[rows, *like.shape[1:]] of `like`'s type, uninitialised. The same name is the same memory: one user at a time."""
        import torch

        held = self._tensors.get(name)
        if held is None or held.shape[0] < rows or held.dtype != like.dtype or held.shape[1:] != like.shape[1:]:
            self._tensors.pop(name, None)
            held = self._tensors[name] = torch.empty((rows, *like.shape[1:]), dtype=like.dtype, device=like.device)
        return held[:rows]


@dataclass(frozen=True)
class Ahead:
    """Queries as they are to be expected behind the prompt: their statistics before RoPE, turned to the positions to come."""

    positions: int = 512  # that follow the prompt, averaged over
    skipped: int = 4  # first positions of the prompt, whose queries are no part of the statistics


@dataclass(frozen=True)
class Replay:
    """A second pass: the prompt is repeated behind itself, a chunk at a time, over the keys and values that are there."""

    chunk: int = 2048  # tokens repeated at once
    sinks: int = 4  # first positions that later chunks are weighed against, too


@dataclass(frozen=True)
class Needs:
    """What a method wants to see of the prefill, beside keys and values. `a | b` serves both."""

    window: int = 0  # the last queries, after RoPE
    column_sums: bool = False  # attention that each key received, summed over all queries
    output_norms: bool = False  # of each value as the output projection writes it into the stream
    ahead: frozenset[Ahead] = frozenset()  # mean and covariance of the queries to come
    replays: frozenset[Replay] = frozenset()  # attention received in a second pass

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            max(self.window, other.window),
            self.column_sums or other.column_sums,
            self.output_norms or other.output_norms,
            self.ahead | other.ahead,
            self.replays | other.replays,
        )


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its cache."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # sliding window of each layer, or the chunk that it attends within
    itemsize: int  # bytes of one number in the cache
    head_dims: tuple[int, ...] = ()  # of each layer, where layers differ (Gemma 4); `head_dim` is then the largest

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    def candidates(self, layer: int, tokens: int) -> int:
        """Entries that one KV head of `layer` holds after `tokens` tokens."""
        window = self.windows[layer]
        if isinstance(window, Chunk):  # what the last token sees
            return (tokens - 1) % window + 1 if tokens else 0
        return tokens if window is None else min(tokens, window)

    def dim_of(self, layer: int) -> int:
        """Size of a head of `layer`."""
        return self.head_dims[layer] if self.head_dims else self.head_dim

    def full_entries(self, tokens: int) -> int:
        return self.kv_heads * sum(self.candidates(layer, tokens) for layer in range(self.layers))

    def entry_bytes(self) -> int:
        """Of one entry; where layers differ, of the widest layer's."""
        return 2 * self.head_dim * self.itemsize

    def deployed_bytes(self) -> int:
        """Of an entry in 16 bits, whatever type is computed in: what budgets and shares of packed caches are counted in."""
        return 2 * self.head_dim * HALF

    def full_bytes(self, tokens: int) -> int:
        """Of the full cache after `tokens` tokens."""
        numbers = sum(self.candidates(layer, tokens) * self.dim_of(layer) for layer in range(self.layers))
        return 2 * self.kv_heads * numbers * self.itemsize


@dataclass(frozen=True)
class Budget:
    """How many entries a cache may hold: a KV size (mean entries a stored head) or a share of the full cache."""

    entries_a_head: int | None = None
    share: Fraction | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`"128"` or `"25%"`.

        Raises:
            ValueError: anything else, zero, negative numbers, shares over 100 %.
        """
        wanted = f"budget {text!r} is neither a whole number of entries (128) nor a share of the full cache (25%)"
        try:
            number = Decimal(text.strip().removesuffix("%").strip())
        except InvalidOperation:
            raise ValueError(wanted) from None
        if not number.is_finite():
            raise ValueError(wanted)
        if number <= 0:
            raise ValueError(f"budget {text!r} must be above 0")
        if not text.strip().endswith("%"):
            if number != number.to_integral_value() or not text.strip().isdecimal():
                raise ValueError(wanted)
            return cls(entries_a_head=int(number))
        if number > 100:
            raise ValueError(f"budget {text!r} is over 100 % of the full cache")
        return cls(share=Fraction(number) / 100)

    def entries(self, shape: ModelShape, tokens: int, granularity: Granularity) -> int:
        """Entries in the whole cache for a prompt of `tokens` tokens; `shape` is the unconverted model's."""
        if self.share is not None:
            return floor(self.share * shape.full_entries(tokens))
        assert self.entries_a_head is not None
        heads = shape.query_heads if granularity == "query" else shape.kv_heads
        return self.entries_a_head * shape.layers * heads

    def __str__(self) -> str:
        if self.share is None:
            return str(self.entries_a_head)
        percent = self.share * 100
        exact = (Decimal(percent.numerator) / Decimal(percent.denominator)).normalize()
        return f"{exact:f}%"


@dataclass(frozen=True)
class ExpertGroup:
    """Rows of one layer that share a width and hold the same positions before anything is evicted.

    An ordinary layer is one group; mixSGA's has a group for each expert.
    """

    width: int  # query heads that read one row
    members: Tensor | None = None  # [m] indices into the layer's candidates, ascending; None: all


@dataclass(frozen=True)
class LayerKV:
    """One layer of a prefill, as its scorers see it. Nobody writes to these tensors.

    Where several layers of the model read it (CLA), Hq and G are those of all of them: the G query heads of a stored head are
    the first layer's, then the second's, ...
    """

    index: int
    tokens: int  # T
    keys: Tensor  # [H, n, D], after RoPE
    values: Tensor  # [H, n, D]
    scaling: float
    width: int  # query heads that read one stored head: G at granularity "kv", 1 at "query"
    queries: Tensor | None = None  # [Hq, W, D], the last ones, after RoPE
    column_sums: Tensor | None = None  # [Hq, n], float32
    output_norms: Tensor | None = None  # [Hq, n], float32: L1 norm of each value behind its query head's output projection
    ahead: Mapping[Ahead, tuple[Tensor, Tensor]] = field(default_factory=dict)  # mean [Hq, D], covariance [Hq, D, D], float32
    replayed: Mapping[Replay, Tensor] = field(default_factory=dict)  # [Hq, n], float32: the most attention in a second pass
    softcap: float | None = None
    window: int | None = None
    query_heads: int = 0
    readers: int = 1  # layers of the model that read it
    prompt: int = 0  # a checksum of the prompt's ids: the seed of what is drawn at random
    sinks: Tensor | None = None  # [Hq], a logit of each head that is in every softmax and reads no value (gpt-oss)
    heads: Tensor | None = None  # [Hq] which of the layer's query heads these are, where they are not all of them in order
    newest: Tensor | None = None  # [Hq, n], float32: attention of the newest query, where decoding has written it down
    held: Tensor | None = None  # [n] positions where entries were evicted before; [S, n] for scorers that are not `ordered`

    @property
    def positions(self) -> Tensor:
        """Original positions of the candidates, [n]."""
        import torch

        if self.held is not None:
            return self.held
        return torch.arange(self.tokens - self.keys.shape[1], self.tokens, device=self.keys.device)

    @property
    def stored_keys(self) -> Tensor:
        """The keys of the stored heads, [S, n, D]."""
        import torch

        group = self.query_heads // self.keys.shape[0]
        first = torch.arange(0, self.query_heads, self.width, device=self.keys.device)
        return self.keys if self.width == group else self.keys[first // group]

    @property
    def stored_values(self) -> Tensor:
        """The values of the stored heads, [S, n, D]."""
        return replace(self, keys=self.values).stored_keys

    def read_by(self, width: int) -> LayerKV:
        """The same layer, stored with one head for every `width` query heads."""
        return replace(self, width=width)

    def mean_over_group(self, per_query_head: Tensor) -> Tensor:
        """[Hq, ...] -> [S, ...]: the mean over the query heads that read a stored head."""
        return per_query_head.unflatten(0, (-1, self.width)).mean(1)

    def window_attention(self, last: int) -> Tensor:
        """Attention probabilities of the last `last` queries over the candidates, [Hq, last, n], float32."""
        import torch

        if last == 1 and self.newest is not None:
            return self.newest[:, None]
        if self.queries is None:
            raise ValueError("the last queries were not observed: the method must declare Needs(window=...)")
        queries = self.queries[:, -last:].float()  # [Hq, last, D]
        grouped = queries.unflatten(0, (self.keys.shape[0], -1)).flatten(1, 2)  # [H, G * last, D]
        logits = (grouped * self.scaling) @ self.keys.float().transpose(1, 2)
        logits = logits.view(self.query_heads, queries.shape[1], -1)  # [Hq, last, n]
        if queries.shape[1] == 1 and self.window is None:  # it sees everything
            return with_sinks(softcapped(logits, self.softcap), self.sinks)
        asking = torch.arange(self.tokens - queries.shape[1], self.tokens, device=logits.device)[:, None]
        unseen = hidden(self.positions, asking, self.window)
        weights = with_sinks(softcapped(logits, self.softcap).masked_fill(unseen, float("-inf")), self.sinks)
        return weights.nan_to_num(0.0)  # a query that sees no candidate


@dataclass(frozen=True)
class HeldRows:
    """Rows of one layer of a cell that is being decoded, as a scorer sees them: equally many entries at the same positions."""

    kv: LayerKV  # one stored head a row
    first: np.ndarray  # [S] first query head of each row
    width: int  # query heads of a model layer that read one row
    expert_group: int
    most: int  # entries that a row has room for beside the tokens up to the next eviction


class Keeper(Protocol):
    """What a cell's method does while its answer is decoded: every so many tokens it says which entries stay."""

    @property
    def every(self) -> int:
        """Tokens between two evictions."""
        ...

    @property
    def needs(self) -> Needs:
        """What is to be remembered of decoding: the newest queries, or the attention that each entry has received."""
        ...

    @property
    def ordered(self) -> bool:
        """Does it want to see entries by position? Else it may be shown them as they lie, with positions [S, n] a row."""
        ...

    # A keeper may say `renumbers = True`: its cell's positions are then those inside the cache.

    def keep(self, held: Sequence[HeldRows], tokens: int) -> list[Tensor]:
        """[S, n] each, True for entries that stay.

        Args:
            held: all rows of the cell, by layer, expert group and first query head.
            tokens: read so far, the prompt's and the answer's.
        """
        ...


def renumbers(keeper: Keeper | None) -> bool:
    """Are positions those inside the cache? A keeper that does not say keeps original ones."""
    return bool(getattr(keeper, "renumbers", False))


@dataclass(frozen=True)
class Prefill:
    """One dense pass over one prompt, with what was observed on the way. Frozen: cells copy out of it."""

    ids: Tensor  # [T]
    logits: Tensor  # [V], of the last token
    layers: tuple[LayerKV, ...]
    expert_groups: tuple[tuple[ExpertGroup, ...], ...]  # of each layer
    shape: ModelShape
    tail: Tensor | None = None  # [S, V], logits of the last S tokens, if what follows each is scored
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # found out from it once, by who found it

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]

    def at(self, granularity: Granularity) -> Prefill:
        """This prefill, stored with one row a KV head (`kv`), or one row a query head as the papers' code (`query`)."""
        if granularity == "kv":
            return self
        return replace(
            self, expert_groups=tuple(tuple(replace(group, width=1) for group in layer) for layer in self.expert_groups)
        )


@dataclass(frozen=True)
class Row:
    """One stored head to be: the query heads that read it, and which candidates it keeps."""

    first: int  # first query head
    width: int
    expert_group: int  # of its layer
    kept: Tensor | None  # [k] ascending indices into the candidates; None: all of them
    merged: tuple[Tensor, Tensor] | None = None  # keys and values [k, D] that are stored in the place of those kept
    storage: Storage | None = None  # that packs its entries; None: they lie as the model's own type

    def entries(self, candidates: int) -> int:
        return candidates if self.kept is None else self.kept.shape[0]


Selection = tuple[tuple[Row, ...], ...]  # the rows of each layer


def keep_all(prefill: Prefill) -> Selection:
    """The full cache as rows."""
    return tuple(
        tuple(
            Row(first, group.width, number, group.members)
            for number, group in enumerate(groups)
            for first in range(0, prefill.shape.query_heads, group.width)
        )
        for groups in prefill.expert_groups
    )
