"""Fewer bits beside fewer entries: any method whose rows a storage packs, `snapkv+int4`; behind the full cache, `int4` alone.

A budget is bytes. Where it would hold N entries in 16 bits, the method is asked for as many as fit into their bytes once they are
packed, with scales, newest entries in 16 bits and spared layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import floor
from typing import Any

import numpy as np

from harness.cache import Budget, Granularity, Keeper, ModelShape, Needs, Prefill, Selection, keep_all, renumbers
from harness.storage import Storage, cannot_hold, entry_bytes, of_layer, row_bytes
from methods.base import CannotRun, Method, Scorer, Scores

PROBES = 12  # places behind a first fit at which more entries may take fewer bytes, a quarter of a residual apart
TRIES = 60  # bisections, far more than there are


@dataclass(frozen=True)
class Exactly(Budget):
    """So many entries in the whole cache, whatever the prompt."""

    total: int = 0

    def entries(self, shape: ModelShape, tokens: int, granularity: Granularity) -> int:
        return self.total


@dataclass(frozen=True)
class Packed:
    """What a method keeps, held by a storage."""

    method: Method
    storage: Storage
    is_reference = False

    @property
    def version(self) -> int:
        return self.method.version

    @property
    def takes_budget(self) -> bool:
        return self.method.takes_budget

    @property
    def needs(self) -> Needs:
        return self.method.needs

    @property
    def scorer(self) -> Scorer | None:
        return self.method.scorer

    @property
    def head_scores(self) -> str | None:
        return self.method.head_scores

    @property
    def given_head_scores(self) -> Any:
        return self.method.given_head_scores

    def with_head_scores(self, scores: Any) -> Packed:
        return replace(self, method=self.method.with_head_scores(scores))

    def while_decoding(self, cap: Callable[[int], int]) -> Keeper | None:
        """`cap` counts packed entries."""
        return self.method.while_decoding(cap)

    def cannot_run(
        self, shape: ModelShape, budget: Budget, tokens: int, granularity: Granularity, parent: ModelShape | None = None
    ) -> str | None:
        if reason := self._cannot_hold(shape):
            return reason
        if reason := self._cannot_evict():
            return reason
        if not self.takes_budget:
            return self.method.cannot_run(shape, budget, tokens, granularity, parent)
        total = budget.entries(parent or shape, tokens, granularity)
        heads = shape.query_heads if granularity == "query" else shape.kv_heads
        each = total / (shape.layers * heads)
        longest = max(shape.candidates(layer, tokens) for layer in range(shape.layers))
        if each < min(self.storage.residual, longest):
            return (
                f"the bytes of {each:g} entries a head cannot hold the newest {self.storage.residual} that stay in 16 bits, "
                "so nothing would be packed: a smaller residual is set as in kivi-4(residual=32)"
            )
        least = min(entry_bytes(of_layer(self.storage, layer, shape.layers), shape.head_dim) or 4.0 * shape.head_dim
                    for layer in range(shape.layers))  # fmt: skip
        most = Exactly(total=floor(total * shape.deployed_bytes() / least))
        return self.method.cannot_run(shape, most, tokens, granularity, parent)

    def _cannot_evict(self) -> str | None:
        """Why single entries cannot leave its rows while an answer is decoded, or None."""
        keeper = self.method.while_decoding(lambda tokens: tokens)
        if keeper is None:
            return None
        if self.storage.residual:
            return "keys that share scales cannot leave one by one while decoding: name a storage that packs by token, as int4"
        if self.storage.spared:
            return (
                "it evicts while decoding, where every entry takes the same bytes: the first and last layers are packed too with "
                "spared=0, as in turbo-4(spared=0)"
            )
        if renumbers(keeper):
            return "positions inside the cache turn keys at every step, which packed ones are not: use it without a storage"
        return None

    def _cannot_hold(self, shape: ModelShape) -> str | None:
        if shape.layers <= 2 * self.storage.spared:
            spared = self.storage.spared
            return (
                f"the first and the last {spared} layers stay in 16 bits, and this model has {shape.layers}: nothing would be "
                "packed; spared=0 packs all, as in turbo-3(spared=0)"
            )
        if len(set(shape.head_dims)) > 1:
            return "the model's layers have heads of several sizes: entries of fewer bits have no one number of bytes then"
        return cannot_hold(self.storage, shape.head_dim)

    def compress(self, prefill: Prefill, total: int, scores: Scores | None) -> Selection:
        """The rows of a cache that takes at most the bytes of `total` entries in 16 bits."""
        if reason := self._cannot_hold(prefill.shape):
            raise CannotRun(reason)
        if self.takes_budget:
            kept = _Fit(self, prefill, scores, total * prefill.shape.deployed_bytes()).most()
        else:
            kept = self.method.compress(prefill, total, scores)
        layers = len(kept)
        return tuple(
            tuple(replace(row, storage=of_layer(self.storage, number, layers)) for row in rows)
            for number, rows in enumerate(kept)
        )


@dataclass
class _Fit:
    """The largest number of entries whose rows fit into so many bytes.

    A row's bytes grow with its entries, but for the residual: one entry more may complete a block that is packed. So behind the
    first number that does not fit there may be others that do, at most a residual or two away.
    """

    packed: Packed
    prefill: Prefill
    scores: Scores | None
    allowed: int
    tried: dict[int, tuple[Selection | CannotRun, int]] = field(default_factory=dict)

    def most(self) -> Selection:
        """
        Raises:
            CannotRun: what is protected does not fit.
        """
        storage, dim = self.packed.storage, self.prefill.shape.head_dim
        every = keep_all(self.prefill)
        everything = sum(int(counts.sum()) for counts in self._counts(every))
        if self._bytes(every) <= self.allowed:
            return self._of(self.packed.method.compress(self.prefill, everything, self.scores))
        if not storage.residual and not storage.spared:
            return self._of(self._try(min(everything, floor(self.allowed / entry_bytes(storage, dim))))[0])
        low, high = 0, everything
        rows = sum(len(layer) for layer in every)
        while True:
            low = self._between(low, high)
            step = max(1, storage.residual * rows // 4)
            further = [low + number * step for number in range(1, PROBES) if low + number * step < everything]
            found = [place for place in further if self._fits(place)] if storage.residual else []
            if not found:
                return self._of(self._try(low)[0])
            low, high = found[-1], min(found[-1] + step, everything)

    def _between(self, low: int, high: int) -> int:
        """A number that fits whose next does not; `low` fits, `high` does not. By interpolation and halves in turn."""
        for turn in range(TRIES):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            if turn % 2 == 0:
                least, most = self._try(low)[1] if low else 0, self._try(high)[1]
                middle = low + int((high - low) * (self.allowed - least) / max(most - least, 1))
            middle = min(max(middle, low + 1), high - 1)
            if self._fits(middle):
                low = middle
            else:
                high = middle
        return low

    def _fits(self, total: int) -> bool:
        return self._try(total)[1] <= self.allowed

    def _try(self, total: int) -> tuple[Selection | CannotRun, int]:
        """The rows of so many entries, and their bytes. Too few to hold what is protected: they would fit."""
        if total not in self.tried:
            try:
                kept = self.packed.method.compress(self.prefill, total, self.scores)
                self.tried[total] = (kept, self._bytes(kept))
            except CannotRun as reason:
                self.tried[total] = (reason, 0)
        return self.tried[total]

    def _of(self, found: Selection | CannotRun) -> Selection:
        if isinstance(found, CannotRun):
            raise found
        return found

    def _counts(self, kept: Selection) -> list[np.ndarray]:
        return [
            np.array([row.entries(kv.keys.shape[1]) for row in rows], dtype=np.int64)
            for kv, rows in zip(self.prefill.layers, kept, strict=True)
        ]

    def _bytes(self, kept: Selection) -> int:
        storage, dim, layers = self.packed.storage, self.prefill.shape.head_dim, len(kept)
        counts = enumerate(self._counts(kept))
        return sum(int(row_bytes(of_layer(storage, layer, layers), of_rows, dim).sum()) for layer, of_rows in counts)
