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

from harness.cache import Arena, LayerKV, ModelShape, Prefill, Row, Selection

ROOM_STEP = 64  # the room behind a row is a multiple of this


@dataclass(frozen=True)
class Counts:
    """What one cell holds."""

    entries: int
    bytes_kept: int
    bytes_allocated: int


@dataclass
class Group:
    """Neighbouring rows of equal width, length and capacity: `rows` of the table, one strided block of the pool."""

    rows: slice
    width: int
    start: int
    capacity: int
    length: int

    def block(self, pool: Tensor) -> Tensor:
        """[P, D] -> [rows, length, D], a view."""
        count = self.rows.stop - self.rows.start
        block = pool[self.start : self.start + count * self.capacity]
        return block.view(count, self.capacity, -1)[:, : self.length]


class RowLayer:
    """The rows of one layer. `cell`, `source`, ... are numpy columns of one table, in the order of the pool."""

    def __init__(self, pool: tuple[Tensor, Tensor, Tensor], shape: ModelShape, window: int | None) -> None:
        self.keys, self.values, self.positions = pool
        self.shape, self.window = shape, window
        self.table = np.zeros((0, 7), dtype=np.int64)
        self._derive()

    cell = property(lambda self: self.table[:, 0])
    stripe = property(lambda self: self.table[:, 1])
    first = property(lambda self: self.table[:, 2])
    width = property(lambda self: self.table[:, 3])
    start = property(lambda self: self.table[:, 4])
    capacity = property(lambda self: self.table[:, 5])
    length = property(lambda self: self.table[:, 6])

    def _derive(self) -> None:
        """Everything that follows from the table, on the device where attention wants it."""
        device = self.keys.device
        source = self.cell * self.shape.kv_heads + self.first // self.shape.group
        heads = [np.arange(f, f + w) + c * self.shape.query_heads for f, w, c in self.table[:, [2, 3, 0]]]
        flat = np.concatenate(heads) if heads else np.zeros(0, dtype=np.int64)
        self.source = torch.as_tensor(source, device=device)  # [R] head of the incoming keys
        self.cells = torch.as_tensor(self.cell.copy(), device=device)  # [R]
        self.reader_list = torch.as_tensor(flat, device=device)  # [sum of widths] query heads, in the order of rows
        self.merges = len(np.unique(flat)) < len(flat)  # some query head reads several rows
        self.striped = bool(self.stripe.any())
        self._refresh()

    def _refresh(self) -> None:
        self.end = torch.as_tensor(self.start + self.length, device=self.keys.device)  # [R] where the next entry goes
        self.groups = list(self._group())

    def _group(self) -> list[Group]:
        table = self.table
        groups: list[Group] = []
        if not len(table):
            return groups
        follows = (table[1:, 4] == table[:-1, 4] + table[:-1, 5]) & (table[1:, [3, 5, 6]] == table[:-1, [3, 5, 6]]).all(1)
        edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(table)]
        for a, b in pairwise(edges):
            width, start, capacity, length = (int(x) for x in table[a, 3:7])
            groups.append(Group(slice(a, b), width, start, capacity, length))
        return groups

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, stripes: Tensor | None = None) -> None:
        """Writes the new tokens behind the rows that take them.

        Args:
            keys, values: [C, H, Q, D], the cells' new tokens.
            positions: [C, Q].
            stripes: [C, Q], the stripe that takes each token; None where a layer has only one.
        """
        tokens = keys.shape[2]
        if self.striped:
            if stripes is None:
                raise ValueError("rows of several stripes need to know which stripe takes each token")
            self._append_routed(keys, values, positions, stripes)
            return
        if len(self.table) and int((self.length + tokens - self.capacity).max()) > 0:
            raise ValueError(f"no room for {tokens} more tokens: make the cache with more room")
        where = (self.end[:, None] + torch.arange(tokens, device=self.end.device)).view(-1)  # [R * Q]
        self._write(where, keys.flatten(0, 1)[self.source], values.flatten(0, 1)[self.source], positions[self.cells])
        self.length[:] += tokens
        self.end += tokens
        for group in self.groups:
            group.length += tokens

    def _append_routed(self, keys: Tensor, values: Tensor, positions: Tensor, stripes: Tensor) -> None:
        mine = torch.as_tensor(self.stripe.copy(), device=keys.device)
        takes = stripes[self.cells] == mine[:, None]  # [R, Q]
        row, token = takes.nonzero(as_tuple=True)
        where = self.end[row] + (takes.cumsum(1) - 1)[row, token]
        added = takes.sum(1).cpu().numpy()
        if int((self.length + added - self.capacity).max(initial=0)) > 0:
            raise ValueError("no room for more tokens: make the cache with more room")
        source = (self.source[row], token)
        self._write(where, keys.flatten(0, 1)[source], values.flatten(0, 1)[source], positions[self.cells[row], token])
        self.length[:] += added
        self._refresh()

    def _write(self, where: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys.index_copy_(0, where, keys.reshape(where.shape[0], -1))
        self.values.index_copy_(0, where, values.reshape(where.shape[0], -1))
        self.positions.index_copy_(0, where, positions.reshape(-1).int())

    def crop(self, seen: np.ndarray) -> None:
        """Forgets the entries at and behind position `seen[cell]` of each cell."""
        for row, (cell, start, length) in enumerate(self.table[:, [0, 4, 6]]):
            held = self.positions[start : start + length]
            self.length[row] = int((held < int(seen[cell])).sum())
        self._refresh()

    def crop_tail(self, drop: np.ndarray) -> None:
        """Forgets the last `drop[cell]` tokens of each cell, where every row took every token."""
        if not drop.any():
            return
        dropped = drop[self.cell]
        self.length[:] -= dropped
        if (drop == drop[0]).all():
            self.end -= int(drop[0])
            for group in self.groups:
                group.length -= int(drop[0])
        else:
            self._refresh()

    def keep(self, cells: Sequence[int]) -> None:
        """Only these cells stay; they are renumbered in this order."""
        number = {cell: new for new, cell in enumerate(cells)}
        self.table = self.table[np.isin(self.cell, list(cells))]
        self.cell[:] = [number[cell] for cell in self.cell.tolist()]
        self._derive()


class RowCache:
    """The caches of the cells that are decoded together."""

    def __init__(self, layers: list[RowLayer], shape: ModelShape, seen: Sequence[int]) -> None:
        self.layers, self.shape = layers, shape
        self.seen = np.array(seen, dtype=np.int64)  # [C] tokens read so far: the next one's position

    @property
    def cells(self) -> int:
        return len(self.seen)

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens, [C, tokens]."""
        new = torch.as_tensor(self.seen, device=self.layers[0].keys.device)
        return new[:, None] + torch.arange(tokens, device=new.device)

    def crop(self, drop: Sequence[int] | np.ndarray) -> None:
        """Takes back the last `drop[cell]` tokens, all of them appended after compaction."""
        drop = np.asarray(drop, dtype=np.int64)
        self.seen -= drop
        for layer in self.layers:
            layer.crop(self.seen) if layer.striped else layer.crop_tail(drop)

    def keep(self, cells: Sequence[int]) -> None:
        self.seen = self.seen[list(cells)]
        for layer in self.layers:
            layer.keep(cells)

    def counts(self) -> list[Counts]:
        """Of each cell. Allocated: its share of the pools, so keys, values, positions, slack and room."""
        entries, allocated = np.zeros(self.cells, np.int64), np.zeros(self.cells, np.int64)
        for layer in self.layers:
            np.add.at(entries, layer.cell, layer.length)
            size = self.shape.entry_bytes() + layer.positions.element_size()
            np.add.at(allocated, layer.cell, layer.capacity * size)
        kept = entries * self.shape.entry_bytes()
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
        pool = tuple(flat[offset : offset + size] for flat in (keys, values, positions))
        layer = RowLayer(pool, prefill.shape, kv.window)  # type: ignore[arg-type]
        layer.table = table
        layer._derive()
        for row, start, length in zip(rows, table[:, 4].tolist(), table[:, 6].tolist(), strict=True):
            _fill(layer, slice(start, start + length), kv, row)
        layers.append(layer)
        offset += size
    return RowCache(layers, prefill.shape, [prefill.tokens] * len(selections))


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
