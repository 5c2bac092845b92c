"""Eviction while decoding: what is remembered of the answer for scorers, and rows that lose entries in place.

A cell that evicts while decoding holds its rows in slots with room for the tokens between two evictions. At an eviction the
entries that go leave holes, and survivors from the end of the row fill them: as many entries move as go, nothing is allocated,
and capacities stay, so that plans and captured steps stay valid. Entries of a row are then no longer in order of position;
attention never needed that, and scorers are shown them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from harness.cache import HeldRows, Keeper, LayerKV, Needs
from harness.engine.rows import Counts, RowCache, RowLayer, Step
from harness.logits import earliest


@dataclass
class Memory:
    """What scorers may ask of a layer while it is decoded. Tokens that it has seen are never taken back."""

    like: LayerKV  # of the prefill, without its entries
    queries: Tensor | None  # [C, Hq, W, D], the newest of each cell; Hq of all layers that read the rows, as in LayerKV
    mass: Tensor | None  # [P] float32: attention that each entry of the pool received, over all queries and reading heads
    # [G, P] float32: the same from the newest query alone, by reading head of a row. Every step writes it anew, so it stays where
    # it is when entries move: a cell evicts once after a step.
    newest: Tensor | None = None
    noted: bool = False  # has a query been written down there since the prefill?
    reads: int = 0  # of the model's layers that read these rows, in the step that is running
    known: dict[tuple[bytes, int], Tensor] = field(default_factory=dict)

    def heads(self, first: np.ndarray, width: int) -> Tensor:
        """[Hq] which of the layer's query heads read rows that begin with these."""
        asked = (first.tobytes(), width)
        if asked not in self.known:
            self.known[asked] = _asking(torch.arange(self.like.query_heads), self.like, first, width)
        return self.known[asked]

    def see(self, queries: Tensor, step: Step) -> None:
        """queries: [Hq, N, D] of one of the layers that read the rows, for the tokens of `step`."""
        reader, self.reads = self.reads, (self.reads + 1) % self.like.readers
        if self.queries is None:
            return
        cells, _, window, dim = self.queries.shape
        heads = self.like.keys.shape[0]
        mine = self.queries.view(cells, heads, self.like.readers, -1, window, dim)[:, :, reader]  # [C, H, G, W, D]
        for cell, (start, count) in enumerate(zip(step.starts.tolist(), step.counts.tolist(), strict=True)):
            new = queries[:, start : start + count].unflatten(0, (heads, -1))  # [H, G, n, D]
            mine[cell] = torch.cat([mine[cell], new], 2)[:, :, -window:]

    def keep(self, cells: Sequence[int]) -> None:
        if self.queries is not None:
            self.queries = self.queries[list(cells)]


def remember(cache: RowCache, layers: Sequence[LayerKV], keepers: Sequence[Keeper]) -> None:
    """Makes a cache that was just compacted remember what its cells' methods ask for, from the prefill's layers on."""
    needs = reduce(Needs.__or__, (keeper.needs for keeper in keepers), Needs())
    for layer, kv in zip(cache.parts, map(without_entries, layers), strict=True):
        layer.memory = Memory(
            replace(kv, queries=None, column_sums=None),
            _queries(kv, needs.window, cache.cells) if needs.window else None,
            _mass(layer, kv) if needs.column_sums else None,
            _newest(layer, kv) if any(keeper.needs.window == 1 for keeper in keepers) else None,
        )


def without_entries(kv: LayerKV) -> LayerKV:
    """What was observed of a layer, so that its keys and values can be freed."""
    nothing = kv.keys.new_empty(kv.keys.shape[0], 0, kv.keys.shape[2])  # a slice would keep the memory that it is of
    return replace(kv, keys=nothing, values=nothing)


def _queries(kv: LayerKV, window: int, cells: int) -> Tensor:
    assert kv.queries is not None
    last = kv.queries[:, -window:]
    if last.shape[1] < window:  # a prompt that is shorter: queries of nothing stand before it
        last = torch.cat([last.new_zeros(last.shape[0], window - last.shape[1], last.shape[2]), last], 1)
    return last.expand(cells, *last.shape).clone()


def _mass(layer: RowLayer, kv: LayerKV) -> Tensor:
    assert kv.column_sums is not None
    mass = torch.zeros(len(layer.positions), device=layer.positions.device)
    first = kv.tokens - kv.column_sums.shape[1]
    table = layer.table
    by_head = kv.column_sums.unflatten(0, (kv.keys.shape[0], kv.readers, -1)).sum(1).flatten(0, 1)  # [Hq of one layer, n]
    for start, length, head, width in zip(
        *(c.tolist() for c in (table.start, table.length, table.first, table.width)), strict=True
    ):
        where = slice(start, start + length)
        mass[where] = by_head[head : head + width].sum(0)[layer.positions[where].long() - first]
    return mass


def _newest(layer: RowLayer, kv: LayerKV) -> Tensor | None:
    """Where attention over the rows is written down, so that it need not be computed again for the newest query. A kernel keeps
    it to itself; what layers share, and sinks take part of, is not that of a row by itself.
    """
    if layer.positions.is_cuda or kv.readers > 1 or kv.sinks is not None or not len(layer.table):
        return None
    return torch.full((int(layer.table.width.max()), len(layer.positions)), float("nan"), device=layer.positions.device)


@dataclass
class Held:
    """What a cell that evicts while decoding held over its answer, token by token."""

    entries_peak: int
    bytes_peak: int
    entries_sum: int = 0
    bytes_sum: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, counts: Counts) -> Held:
        return cls(counts.entries, counts.bytes_kept)

    @classmethod
    def growing(cls, before: Counts, end: Counts, tokens: int) -> Held:
        """Over so many tokens without an eviction, each of which added as much to `before` as the others."""
        entries, size = end.entries - before.entries, end.bytes_kept - before.bytes_kept
        return cls(
            end.entries,
            end.bytes_kept,
            tokens * before.entries + entries * (tokens + 1) // 2,
            tokens * before.bytes_kept + size * (tokens + 1) // 2,
            tokens,
        )

    def add(self, counts: Counts, tokens: int = 1) -> None:
        self.entries_peak = max(self.entries_peak, counts.entries)
        self.bytes_peak = max(self.bytes_peak, counts.bytes_kept)
        self.entries_sum += counts.entries * tokens
        self.bytes_sum += counts.bytes_kept * tokens
        self.tokens += tokens

    @property
    def entries_mean(self) -> float:
        return self.entries_sum / self.tokens if self.tokens else float(self.entries_peak)

    @property
    def bytes_mean(self) -> float:
        return self.bytes_sum / self.tokens if self.tokens else float(self.bytes_peak)


class Turns:
    """Whose turn it is to evict, among the cells of a cache that decode together.

    Args:
        keepers: of each cell.
        since: tokens that each cell has taken since its entries were chosen: the question's, where it was asked afterwards.
    """

    def __init__(self, cache: RowCache, keepers: Sequence[Keeper], since: int = 0) -> None:
        self.cache, self.keepers = cache, list(keepers)
        self.since = [since] * len(keepers)
        self.held = [Held.of(counts) for counts in cache.counts()]
        self.evict()

    @property
    def room(self) -> int:
        """Tokens that every cell can take before the next eviction of one of them."""
        return min(keeper.every - since for keeper, since in zip(self.keepers, self.since, strict=True))

    def took(self, tokens: int) -> None:
        """Every cell has taken so many tokens, at most `room`; those whose turn it is evict."""
        self.since = [since + tokens for since in self.since]
        for held, counts in zip(self.held, self.cache.counts(), strict=True):
            held.add(counts, tokens)
        self.evict()

    def evict(self) -> None:
        for cell, (keeper, since) in enumerate(zip(self.keepers, self.since, strict=True)):
            if since >= keeper.every:
                evict(self.cache, cell, keeper)
                self.since[cell] = 0

    def stay(self, cells: Sequence[int]) -> None:
        """Only these cells go on."""
        self.keepers = [self.keepers[cell] for cell in cells]
        self.since = [self.since[cell] for cell in cells]
        self.held = [self.held[cell] for cell in cells]


@dataclass(frozen=True)
class _Part:
    """Rows that a keeper is shown together."""

    rows: np.ndarray  # numbers in the layer's table
    order: Tensor | None  # [S, n] which entry of its row each is, where they are shown by position; None: as they lie
    held: HeldRows


def evict(cache: RowCache, cell: int, keeper: Keeper) -> None:
    """Entries of one cell that its method does not keep are gone. The cell's tokens up to here can no longer be taken back."""
    tokens = int(cache.seen[cell])
    parts = [(layer, part) for layer in cache.parts for part in _Rows(layer, cell, tokens, keeper).parts()]
    for (layer, part), mask in zip(parts, keeper.keep([part.held for _, part in parts], tokens), strict=True):
        _leave(layer, part, mask)
    for layer in cache.parts:
        if layer.routed:
            layer.taken[cell].clear()


@dataclass(frozen=True)
class _Rows:
    """The rows of one cell in one layer, as its keeper is shown them."""

    layer: RowLayer
    cell: int
    tokens: int
    keeper: Keeper

    def parts(self) -> list[_Part]:
        """In flat order; those of an expert group that hold the same positions stand together."""
        table = self.layer.table
        mine = np.flatnonzero(table.cell == self.cell)
        mine = mine[np.argsort(table.first[mine], kind="stable")]
        found: list[_Part] = []
        for group in np.unique(table.expert_group[mine]).tolist():
            rows = mine[table.expert_group[mine] == group]
            lengths = table.length[rows]
            for some in [rows] if (lengths == lengths[0]).all() else rows[:, None]:
                found += self._of_equal_length(some)
        return found

    def _of_equal_length(self, rows: np.ndarray) -> list[_Part]:
        positions = _entries(self.layer, self.layer.positions, rows).long()  # [S, n]
        if self.layer.window is None and not self.keeper.ordered:
            if not self.keeper.needs.window:
                return [self._part(rows, None, positions)]
            if len(rows) == 1 or bool((positions == positions[:1]).all()):
                return [self._part(rows, None, positions[0])]
        positions, order = positions.sort(1)
        if len(rows) == 1 or bool((positions == positions[:1]).all()):
            return [self._part(rows, order, positions[0])]
        return [self._part(*some) for some in zip(rows[:, None], order[:, None], positions, strict=True)]

    def _part(self, rows: np.ndarray, order: Tensor | None, positions: Tensor) -> _Part:
        layer, table, memory = self.layer, self.layer.table, self.layer.memory
        assert memory is not None
        if order is not None and layer.window is not None:
            inside = positions >= earliest(self.tokens - 1, layer.window)
            order, positions = order[:, inside], positions[inside]

        def shown(pool: Tensor) -> Tensor:
            entries = _entries(layer, pool, rows)
            if order is None:
                return entries
            return entries.gather(1, order if pool.dim() == 1 else order[..., None].expand(-1, -1, pool.shape[1]))

        first, width = table.first[rows], int(table.width[rows[0]])
        reading = width * memory.like.readers  # query heads of all layers that read a row
        keys, values = layer.vectors(shown)
        asking = None if memory.queries is None else _asking(memory.queries[self.cell], memory.like, first, width)
        if layer.ranks is not None:  # as the next query would meet them
            keys = layer.ranks.rotation.turn(keys, shown(layer.ranks.of))
            asking = None if asking is None else layer.ranks.newest(asking, keys.shape[1])
        kv = replace(
            memory.like,
            tokens=self.tokens,
            keys=keys,
            values=values,
            width=reading,
            queries=asking,
            column_sums=None if memory.mass is None else (shown(memory.mass) / reading).repeat_interleave(reading, 0),
            query_heads=len(rows) * reading,
            newest=None if not memory.noted or layer.ranks is not None else self._weights(shown, width),
            heads=memory.heads(first, width),
            held=positions,
            sinks=None if memory.like.sinks is None else _asking(memory.like.sinks, memory.like, first, width),
        )
        most = int(table.capacity[rows].min()) - self.keeper.every
        return _Part(rows, order, HeldRows(kv, first, width, int(table.expert_group[rows[0]]), most))

    def _weights(self, shown: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """[S * width, n], how the newest query's heads weighed what the rows hold."""
        assert self.layer.memory is not None and self.layer.memory.newest is not None
        return shown(self.layer.memory.newest[:width].T).transpose(1, 2).flatten(0, 1)


def _entries(layer: RowLayer, pool: Tensor, rows: np.ndarray) -> Tensor:
    """[P, ...] -> [S, n, ...] of rows of equal length: a view where they lie side by side."""
    table, length = layer.table, int(layer.table.length[rows[0]])
    start, capacity = int(table.start[rows[0]]), int(table.capacity[rows[0]])
    if (table.start[rows] == start + capacity * np.arange(len(rows))).all():
        block = pool[start : start + len(rows) * capacity]
        return block.view(len(rows), capacity, *pool.shape[1:])[:, :length]
    starts = torch.as_tensor(table.start[rows], device=pool.device)[:, None]
    return pool[starts + torch.arange(length, device=pool.device)]


def _asking(by_head: Tensor, like: LayerKV, first: np.ndarray, width: int) -> Tensor:
    """What is of the query heads that read each of the rows, out of [Hq, ...]: [S * readers * width, ...], row by row."""
    heads, readers = like.keys.shape[0], like.readers
    if readers == 1 and (first == width * np.arange(len(first))).all() and len(first) * width == len(by_head):
        return by_head
    by_layer = by_head.unflatten(0, (heads, readers, -1)).transpose(0, 1).flatten(1, 2)  # [readers, Hq, ...]
    return torch.cat([by_layer[:, head : head + width].flatten(0, 1) for head in first.tolist()])


def _leave(layer: RowLayer, part: _Part, mask: Tensor) -> None:
    """Entries that are not in `mask` [S, n] leave, and survivors from the end of their row fill the holes."""
    table, device = layer.table, layer.positions.device
    stays = mask
    if part.order is not None:
        stays = torch.zeros(len(part.rows), int(table.length[part.rows[0]]), dtype=torch.bool, device=device)
        stays.scatter_(1, part.order, mask)  # what has left the window, and was not shown, goes too
    counts = stays.sum(1)
    found = counts.cpu().numpy()
    starts = torch.as_tensor(table.start[part.rows], device=device)
    if layer.ranks is not None:
        layer.ranks.leave(starts, stays)
    if (found == stays.shape[1] - 1).all():  # one of each row goes, as at every step of a full cache: the last takes its place
        holes, movers = starts + stays.byte().argmin(1), starts + counts
    else:
        holes, movers = _holes(stays, counts, int(found.min()), starts)
    for pool in layer.columns:
        pool.index_copy_(0, holes, pool[movers])
    table.length[part.rows] = found


def _holes(stays: Tensor, counts: Tensor, least: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the pool that survivors move to, and those that they come from. stays: [S, n]."""
    behind = torch.arange(stays.shape[1], device=stays.device)
    moving = stays[:, least:] & (behind[least:] >= counts[:, None])  # movers lie behind every row's count, holes before it
    hole_row, hole = (~stays & (behind < counts[:, None])).nonzero().unbind(1)
    mover_row, mover = moving.nonzero().unbind(1)
    return starts[hole_row] + hole, starts[mover_row] + least + mover
