"""The one cache: rows of unequal length in flat pools, extended in place, counted by their storages.

A row is one stored head of one sequence. All rows of a layer, of all the cells that are decoded together, lie in one pool
of keys [P, D], values [P, D] and original positions [P]. Each has room for the tokens to come, so appending copies
nothing. Rows of equal width and length lie side by side, so that attention can read them as one strided batch.
Lengths belong to rows and token counts to cells: cells of one batch may be at different tokens of their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from harness.cache import Arena, LayerKV, ModelShape, Prefill, Row, Selection, Stripe
from harness.engine.split_plan import Tables, plan, split_for, within_runs

ROOM_STEP = 64  # the room behind a row is a multiple of this
KEPT_PLANS = 8  # of steps that bring other numbers of tokens


@dataclass(frozen=True)
class Counts:
    """What one cell holds."""

    entries: int
    bytes_kept: int
    bytes_allocated: int

    def __add__(self, other: Counts) -> Counts:
        sums = (self.entries + other.entries, self.bytes_kept + other.bytes_kept, self.bytes_allocated + other.bytes_allocated)
        return Counts(*sums)


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of equal width, length and capacity: `rows` of the table, one strided block of the pool."""

    rows: slice
    width: int
    start: int
    capacity: int
    length: int
    tokens: int  # new ones of each row's cell

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    def block(self, pool: Tensor) -> Tensor:
        """[P, D] -> [rows, length, D], a view."""
        return self.whole(pool)[:, : self.length]

    def whole(self, pool: Tensor) -> Tensor:
        """[P, D] -> [rows, capacity, D], with the room, a view."""
        return pool[self.start : self.start + self.count * self.capacity].view(self.count, self.capacity, -1)

    def room(self, pool: Tensor) -> Tensor:
        """[P, D] -> [rows, capacity - length, D], a view."""
        return self.whole(pool)[:, self.length :]


@dataclass(frozen=True)
class Step:
    """New tokens of the cells, side by side: the first cell's, then the second's, ... Cells may bring different numbers."""

    counts: np.ndarray  # [C] tokens of each cell
    positions: np.ndarray  # [N] original positions

    @property
    def starts(self) -> np.ndarray:
        """[C] where each cell's tokens begin."""
        return np.cumsum(self.counts) - self.counts


class RowLayer:
    """The rows of one layer: a table with one line a row, in the order of the pool, kept on the host."""

    def __init__(
        self,
        pool: tuple[Tensor, Tensor, Tensor],
        shape: ModelShape,
        window: int | None,
        table: np.ndarray,
        stripes: int = 1,
        cells: int = 0,
    ) -> None:
        self.keys, self.values, self.positions = pool
        self.shape, self.window, self.table, self.stripes = shape, window, table, stripes
        # the stripe of each token since compaction, if there are several
        self.taken: list[list[int]] = [[] for _ in range(cells)]
        self._pieces: dict[bytes, Tables] = {}

    cell = property(lambda self: self.table[:, 0])
    stripe = property(lambda self: self.table[:, 1])
    first = property(lambda self: self.table[:, 2])  # query head
    width = property(lambda self: self.table[:, 3])
    start = property(lambda self: self.table[:, 4])
    capacity = property(lambda self: self.table[:, 5])
    length = property(lambda self: self.table[:, 6])

    @property
    def striped(self) -> bool:
        return self.stripes > 1

    def append(self, keys: Tensor, values: Tensor, step: Step, stripes: np.ndarray | None = None) -> None:
        """Writes the new tokens behind the rows that take them.

        Args:
            keys, values: [H, N, D], the tokens of `step`.
            stripes: [N], the stripe that takes each token; None where a layer has only one.
        """
        row, token = self.pairs(step)
        if self.striped:
            if stripes is None:
                raise ValueError("rows of several stripes need to know which stripe takes each token")
            takes = stripes[token] == self.stripe[row]
            row, token = row[takes], token[takes]
            for taken, start, count in zip(self.taken, step.starts.tolist(), step.counts.tolist(), strict=True):
                taken += stripes[start : start + count].tolist()
        added = np.bincount(row, minlength=len(self.table))
        if (self.length + added > self.capacity).any():
            raise ValueError(f"no room for {int(added.max())} more tokens: make the cache with more room")
        behind = within_runs(added)  # the how-manieth new entry of its row
        where = self._index((self.start + self.length)[row] + behind)
        source = self._index((self.first // self.shape.group)[row] * keys.shape[1] + token)
        self.keys.index_copy_(0, where, keys.reshape(-1, keys.shape[2])[source])
        self.values.index_copy_(0, where, values.reshape(-1, values.shape[2])[source])
        self.positions.index_copy_(0, where, self._index(step.positions[token]).int())
        self.length[:] += added

    def pairs(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Every row with every new token of its cell, as (row, token), row by row."""
        counts = step.counts[self.cell]
        row = np.repeat(np.arange(len(self.table)), counts)
        within = within_runs(counts)
        return row, step.starts[self.cell[row]] + within

    def groups(self, step: Step) -> list[Group]:
        """Runs of rows of equal width, length and capacity, whose cells bring equally many tokens."""
        if not len(self.table):
            return []
        table, news = self.table, step.counts[self.cell]
        follows = (table[1:, 4] == table[:-1, 4] + table[:-1, 5]) & (news[1:] == news[:-1])
        follows &= (table[1:, [3, 5, 6]] == table[:-1, [3, 5, 6]]).all(1)
        edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(table)]
        found = []
        for a, b in pairwise(edges):
            width, start, capacity, length = table[a, 3:7].tolist()
            found.append(Group(slice(a, b), width, start, capacity, length, int(news[a])))
        return found

    def readers(self, step: Step) -> np.ndarray:
        """Which query (head * N + token) reads, row by row: the row's first head's new tokens, its second head's, ..."""
        news = step.counts[self.cell]
        sizes = self.width * news
        row = np.repeat(np.arange(len(self.table)), sizes)
        within = within_runs(sizes)
        head, token = np.divmod(within, news[row])
        return (self.first[row] + head) * len(step.positions) + step.starts[self.cell[row]] + token

    def pieces(self, step: Step, queries: int) -> Tables:
        """The kernel's work, on the device: for rows as long as they can become, so that it holds until cells leave."""
        asked = step.counts.tobytes()
        if asked not in self._pieces:
            if len(self._pieces) == KEPT_PLANS:
                self._pieces.clear()
            readers = self.width * step.counts[self.cell]
            split = split_for(self.capacity, readers, self.keys.device)
            work = plan(self.start, self.capacity, readers, self.readers(step), queries, split)
            self._pieces[asked] = work.on(self.keys.device)
        return self._pieces[asked]

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, device=self.keys.device)

    def crop(self, drop: np.ndarray) -> None:
        """Forgets each cell's last `drop[cell]` tokens."""
        if not self.striped:  # every row took every token
            self.length[:] -= drop[self.cell]
            return
        lost = np.zeros((len(drop), self.stripes), dtype=np.int64)
        for cell, count in enumerate(drop.tolist()):
            if count:
                np.add.at(lost[cell], self.taken[cell][-count:], 1)
                del self.taken[cell][-count:]
        self.length[:] -= lost[self.cell, self.stripe]

    def keep(self, cells: Sequence[int]) -> None:
        """Only these cells stay; they are renumbered in this order."""
        number = {cell: new for new, cell in enumerate(cells)}
        self.table = self.table[np.isin(self.cell, list(cells))]
        self.taken = [self.taken[cell] for cell in cells] if self.striped else []
        self._pieces.clear()
        self.cell[:] = [number[cell] for cell in self.cell.tolist()]


class RowCache:
    """The caches of the cells that are decoded together."""

    def __init__(self, layers: list[RowLayer], shape: ModelShape, seen: Sequence[int]) -> None:
        self.layers, self.shape = layers, shape
        self.seen = np.array(seen, dtype=np.int64)  # [C] tokens read so far: the next one's position

    @property
    def cells(self) -> int:
        return len(self.seen)

    def step(self, counts: Sequence[int]) -> Step:
        """The next `counts[cell]` tokens of each cell, not yet read."""
        many = np.asarray(counts, dtype=np.int64)
        within = within_runs(many)
        return Step(many, np.repeat(self.seen, many) + within)

    def crop(self, drop: Sequence[int] | np.ndarray) -> None:
        """Takes back the last `drop[cell]` tokens, all of them appended after compaction."""
        drop = np.asarray(drop, dtype=np.int64)
        self.seen = self.seen - drop
        if drop.any():
            for layer in self.layers:
                layer.crop(drop)

    def keep(self, cells: Sequence[int]) -> None:
        self.seen = self.seen[list(cells)]
        for layer in self.layers:
            layer.keep(cells)

    def counts(self) -> list[Counts]:
        """Of each cell. Allocated: its share of the pools, so keys, values, positions, slack and room.

        Kept: keys and values, and the bits that name each token's expert where a layer has several. Rows do not need them; they
        are counted as mixSGA's paper counts them, for the tokens seen or as many as a layer has entries.
        """
        entries, allocated = np.zeros(self.cells, np.int64), np.zeros(self.cells, np.int64)
        bits = np.zeros(self.cells, np.int64)
        for layer in self.layers:
            mine = np.bincount(layer.cell, layer.length, minlength=self.cells).astype(np.int64)
            entries += mine
            bits += (layer.stripes - 1).bit_length() * np.minimum(mine, self.seen)
            size = self.shape.entry_bytes() + layer.positions.element_size()
            np.add.at(allocated, layer.cell, layer.capacity * size)
        kept = entries * self.shape.entry_bytes() + -(-bits // 8)
        return [Counts(int(e), int(k), int(a)) for e, k, a in zip(entries, kept, allocated, strict=True)]


def compact(prefill: Prefill, selections: Sequence[Selection], room: int, arena: Arena | None = None) -> RowCache:
    """Copies each cell's entries out of the prefill, one cell a selection, with room for `room` more tokens."""
    arena = arena or Arena()
    room = -(-room // ROOM_STEP) * ROOM_STEP
    plans = [_plan(kv, [s[kv.index] for s in selections], room) for kv in prefill.layers]
    sizes = [int(table[:, 5].sum()) for table, _ in plans]
    like = prefill.layers[0].keys[0]
    keys, values = arena.take("keys", sum(sizes), like), arena.take("values", sum(sizes), like)
    positions = arena.take("positions", sum(sizes), torch.zeros(0, dtype=torch.int32, device=like.device))
    layers, offset = [], 0
    for kv, (table, rows), size in zip(prefill.layers, plans, sizes, strict=True):
        pool = (keys[offset : offset + size], values[offset : offset + size], positions[offset : offset + size])
        stripes = len(prefill.stripes[kv.index])
        layers.append(_filled(kv, table, rows, RowLayer(pool, prefill.shape, kv.window, table, stripes, len(selections))))
        offset += size
    return RowCache(layers, prefill.shape, [prefill.tokens] * len(selections))


def compact_and_free(
    held: list[LayerKV | None],
    stripes: Sequence[tuple[Stripe, ...]],
    shape: ModelShape,
    selections: Sequence[Selection],
    room: int,
) -> RowCache:
    """As `compact`, but a layer at a time into pools of their own, and each layer of `held` is dropped once it was copied.

    Nobody else may hold the layers, or nothing is freed: no more than the full cache and one layer lie in memory.
    """
    room = -(-room // ROOM_STEP) * ROOM_STEP
    layers, tokens = [], 0
    for index, kv in enumerate(held):
        assert kv is not None
        table, rows = _plan(kv, [selection[index] for selection in selections], room)
        size, tokens = int(table[:, 5].sum()), kv.tokens
        keys, values = (kv.keys.new_empty(size, shape.head_dim) for _ in range(2))
        pool = (keys, values, torch.empty(size, dtype=torch.int32, device=keys.device))
        layers.append(_filled(kv, table, rows, RowLayer(pool, shape, kv.window, table, len(stripes[index]), len(selections))))
        held[index] = kv = None
    return RowCache(layers, shape, [tokens] * len(selections))


def _filled(kv: LayerKV, table: np.ndarray, rows: list[Row], layer: RowLayer) -> RowLayer:
    for row, start, length in zip(rows, table[:, 4].tolist(), table[:, 6].tolist(), strict=True):
        _fill(layer, slice(start, start + length), kv, row)
    return layer


def _plan(kv: LayerKV, cells: Sequence[tuple[Row, ...]], room: int) -> tuple[np.ndarray, list[Row]]:
    """The table of one layer, rows of equal width and length side by side, and the rows in that order."""
    candidates = kv.keys.shape[1]
    rows = [(cell, row, row.entries(candidates)) for cell, layer in enumerate(cells) for row in layer]
    rows.sort(key=lambda item: (item[1].width, item[2], item[0], item[1].first))
    table = np.zeros((len(rows), 7), dtype=np.int64)
    for number, (cell, row, length) in enumerate(rows):
        table[number] = (cell, row.stripe, row.first, row.width, 0, length + room, length)
    table[1:, 4] = np.cumsum(table[:-1, 5])
    return table, [row for _, row, _ in rows]


def _fill(layer: RowLayer, where: slice, kv: LayerKV, row: Row) -> None:
    head = row.first // layer.shape.group
    positions = kv.positions
    if row.kept is None:
        layer.keys[where].copy_(kv.keys[head])
        layer.values[where].copy_(kv.values[head])
    else:
        torch.index_select(kv.keys[head], 0, row.kept, out=layer.keys[where])
        torch.index_select(kv.values[head], 0, row.kept, out=layer.values[where])
        positions = positions[row.kept]
    layer.positions[where].copy_(positions)
