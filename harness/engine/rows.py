"""The one cache: rows of unequal length in flat pools, extended in place, counted by their storages.

A row is one stored head of one sequence. All rows of a layer, of all the cells that are decoded together, lie in one pool
of keys [P, D], values [P, D] and original positions [P]. Each has slack behind its entries for the tokens to come, so appending
copies nothing. Rows of equal width and length lie side by side, so that attention can read them as one strided batch.
Lengths belong to rows and token counts to cells: cells of one batch may be at different tokens of their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from harness.cache import Arena, ExpertGroup, LayerKV, ModelShape, Prefill, Row, Selection
from harness.engine.packed import Codes, PackedEntries
from harness.engine.split_plan import DevicePlan, plan_split, split_length, within_runs
from harness.storage import Storage

if TYPE_CHECKING:
    from harness.engine.evict import Memory
    from harness.engine.renumber import Ranks

SLACK_STEP = 64  # the slack behind a row is a multiple of this
KEPT_PLANS = 8  # split plans of a layer, of steps that bring other numbers of tokens


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
class RowTable:
    """The rows of one layer in the order of the pool, as columns [R] on the host. Lengths grow and shrink in place."""

    cell: np.ndarray
    expert_group: np.ndarray  # of the layer
    first: np.ndarray  # first query head that reads the row
    width: np.ndarray  # how many read it
    start: np.ndarray  # in the pool
    capacity: np.ndarray  # entries and slack
    length: np.ndarray  # entries

    def __len__(self) -> int:
        return len(self.cell)

    def copy(self) -> RowTable:
        return self.of(np.arange(len(self)))

    def of(self, rows: np.ndarray) -> RowTable:
        """Some of the rows, by number or as a mask; copies."""
        return RowTable(*(getattr(self, column.name)[rows] for column in fields(self)))


@dataclass(frozen=True)
class RowBlock:
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

    def entries(self, pool: Tensor) -> Tensor:
        """[P, D] -> [rows, length, D], a view."""
        return self.whole(pool)[:, : self.length]

    def whole(self, pool: Tensor) -> Tensor:
        """[P, D] -> [rows, capacity, D], with the slack, a view."""
        return pool[self.start : self.start + self.count * self.capacity].view(self.count, self.capacity, -1)

    def slack(self, pool: Tensor) -> Tensor:
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
    """The rows of one layer: their memory, and a table of where each lies.

    Args:
        pool: keys [P, D], values [P, D], positions [P].
        expert_groups: of the layer: 1, or as many as mixSGA has experts.
        cells: that are decoded together.
        packed: where a storage holds the entries, and not `keys` and `values`, which are empty then.
    """

    def __init__(
        self,
        pool: tuple[Tensor, Tensor, Tensor],
        shape: ModelShape,
        window: int | None,
        table: RowTable,
        expert_groups: int = 1,
        cells: int = 0,
        packed: PackedEntries | None = None,
    ) -> None:
        self.packed = packed
        self.keys, self.values, self.positions = pool
        self.shape, self.window, self.table, self.expert_groups = shape, window, table, expert_groups
        self.entry_bytes = 2 * self.keys.shape[1] * self.keys.itemsize  # heads of layers may differ in size
        # the expert group of each token since compaction, by cell, if there are several
        self.taken: list[list[int]] = [[] for _ in range(cells)]
        self._plans: dict[bytes, DevicePlan] = {}
        self.memory: Memory | None = None  # of cells that evict while decoding
        self.ranks: Ranks | None = None  # of rows whose entries' positions are those inside the cache

    @property
    def columns(self) -> list[Tensor]:
        """Everything that the pool holds of an entry, [P, ...] each."""
        mass = [] if self.memory is None or self.memory.mass is None else [self.memory.mass]
        ranks = [] if self.ranks is None else [self.ranks.of]
        held = [self.keys, self.values] if self.packed is None else self.packed.by_entry
        return [*held, self.positions, *mass, *ranks]

    def vectors(self, shown: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [..., D] of some entries, dequantised where they are packed.

        Args:
            shown: these entries out of a tensor that holds something of each, [P, ...].
        """
        if self.packed is None:
            return shown(self.keys), shown(self.values)
        keys, values = self.packed.vectors(shown)
        return keys.to(self.keys.dtype), values.to(self.keys.dtype)

    @property
    def routed(self) -> bool:
        """Does each token go to one of several expert groups?"""
        return self.expert_groups > 1

    @property
    def parts(self) -> tuple[RowLayer, ...]:
        """Rows that are held alike lie together; most layers have one part."""
        return (self,)

    @property
    def apart(self) -> bool:
        """Do the rows of each cell lie in one part?"""
        return True

    @property
    def merges(self) -> bool:
        """May a query head read several rows?"""
        return self.routed or not self.apart

    def append(self, keys: Tensor, values: Tensor, step: Step, experts: np.ndarray | None = None) -> None:
        """Writes the new tokens behind the rows that take them.

        Args:
            keys, values: [H, N, D], the tokens of `step`.
            experts: [N], the expert group that takes each token; None where a layer has only one.
        """
        table = self.table
        row, token = self.pairs(step)
        if self.routed:
            if experts is None:
                raise ValueError("rows of several expert groups need to know which one takes each token")
            takes = experts[token] == table.expert_group[row]
            row, token = row[takes], token[takes]
            for taken, start, count in zip(self.taken, step.starts.tolist(), step.counts.tolist(), strict=True):
                taken += experts[start : start + count].tolist()
        added = np.bincount(row, minlength=len(table))
        if (table.length + added > table.capacity).any():
            raise ValueError(f"no slack for {int(added.max())} more tokens: make the cache with more")
        number = table.length[row] + within_runs(added)  # of the new entry in its row
        where = self._index(table.start[row] + number)
        source = self._index((table.first // self.shape.group)[row] * keys.shape[1] + token)
        new = [part.reshape(-1, part.shape[2])[source] for part in (keys, values)]
        if self.packed is not None:
            self.packed.write(row, number, new[0], new[1], table.length)
        else:
            self.keys.index_copy_(0, where, new[0])
            self.values.index_copy_(0, where, new[1])
        self.positions.index_copy_(0, where, self._index(step.positions[token]).int())
        if self.memory is not None and self.memory.mass is not None:
            self.memory.mass[where] = 0.0
        if self.ranks is not None:
            self.ranks.of.index_copy_(0, where, self._index(number).int())
        table.length[:] += added

    def pairs(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Every row with every new token of its cell, as (row, token), row by row."""
        counts = step.counts[self.table.cell]
        row = np.repeat(np.arange(len(self.table)), counts)
        return row, step.starts[self.table.cell[row]] + within_runs(counts)

    def blocks(self, step: Step) -> list[RowBlock]:
        """Runs of rows of equal width, length and capacity, whose cells bring equally many tokens."""
        table = self.table
        if not len(table):
            return []
        news = step.counts[table.cell]
        follows = table.start[1:] == table.start[:-1] + table.capacity[:-1]
        for column in (news, table.width, table.capacity, table.length):
            follows &= column[1:] == column[:-1]
        edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(table)]
        columns = [column[edges[:-1]].tolist() for column in (table.width, table.start, table.capacity, table.length, news)]
        return [RowBlock(slice(a, b), *sizes) for (a, b), sizes in zip(pairwise(edges), zip(*columns, strict=True), strict=True)]

    def readers(self, step: Step) -> np.ndarray:
        """Which query (head * N + token) reads, row by row: the row's first head's new tokens, its second head's, ..."""
        table = self.table
        news = step.counts[table.cell]
        sizes = table.width * news
        row = np.repeat(np.arange(len(table)), sizes)
        head, token = np.divmod(within_runs(sizes), news[row])
        return (table.first[row] + head) * len(step.positions) + step.starts[table.cell[row]] + token

    def split_plan(self, step: Step, queries: int) -> DevicePlan:
        """The kernel's work items, on the device: for rows as long as they can become, so that it holds until cells leave."""
        asked = step.counts.tobytes()
        if asked not in self._plans:
            if len(self._plans) == KEPT_PLANS:
                self._plans.clear()
            table = self.table
            readers = table.width * step.counts[table.cell]
            split = split_length(table.capacity, readers, self.keys.device)
            plan = plan_split(table.start, table.capacity, readers, self.readers(step), queries, split)
            self._plans[asked] = plan.on(self.keys.device)
        return self._plans[asked]

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, device=self.keys.device)

    def crop(self, drop: np.ndarray) -> None:
        """Forgets each cell's last `drop[cell]` tokens."""
        table = self.table
        if not self.routed:  # every row took every token
            table.length[:] -= drop[table.cell]
            return
        lost = np.zeros((len(drop), self.expert_groups), dtype=np.int64)
        for cell, count in enumerate(drop.tolist()):
            if count:
                np.add.at(lost[cell], self.taken[cell][-count:], 1)
                del self.taken[cell][-count:]
        table.length[:] -= lost[table.cell, table.expert_group]

    def keep(self, cells: Sequence[int]) -> None:
        """Only these cells stay; they are renumbered in this order."""
        number = {cell: new for new, cell in enumerate(cells)}
        if self.packed is not None:
            self.packed.keep(np.isin(self.table.cell, list(cells)))
        self.table = self.table.of(np.isin(self.table.cell, list(cells)))
        self.taken = [self.taken[cell] for cell in cells] if self.routed else []
        self._plans.clear()
        if self.memory is not None:
            self.memory.keep(cells)
        self.table.cell[:] = [number[cell] for cell in self.table.cell.tolist()]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of each row: of its entries' keys and values, and of what is allocated for them; positions apart."""
        if self.packed is not None:
            return self.packed.sizes(self.table.length, self.table.capacity)
        return self.table.length * self.entry_bytes, self.table.capacity * self.entry_bytes


class MixedLayer:
    """A layer whose rows are held in several ways: one part for each. It answers as a `RowLayer` does."""

    memory = None  # cells that evict while decoding are not packed, and go among themselves
    ranks = None

    def __init__(self, parts: Sequence[RowLayer]) -> None:
        self.parts = tuple(parts)
        self.routed, self.expert_groups, self.window = parts[0].routed, parts[0].expert_groups, parts[0].window
        cells = [set(part.table.cell.tolist()) for part in parts]
        self.apart = sum(map(len, cells)) == len(set().union(*cells))
        self.merges = self.routed or not self.apart

    def append(self, keys: Tensor, values: Tensor, step: Step, experts: np.ndarray | None = None) -> None:
        for part in self.parts:
            part.append(keys, values, step, experts)

    def crop(self, drop: np.ndarray) -> None:
        for part in self.parts:
            part.crop(drop)

    def keep(self, cells: Sequence[int]) -> None:
        for part in self.parts:
            part.keep(cells)
        self.parts = tuple(part for part in self.parts if len(part.table)) or self.parts[:1]


AnyLayer = RowLayer | MixedLayer


class RowCache:
    """The caches of the cells that are decoded together."""

    def __init__(self, layers: list[AnyLayer], shape: ModelShape, seen: Sequence[int]) -> None:
        self.layers, self.shape = layers, shape
        self.seen = np.array(seen, dtype=np.int64)  # [C] tokens read so far: the next one's position

    @property
    def cells(self) -> int:
        return len(self.seen)

    @property
    def parts(self) -> list[RowLayer]:
        """The layers, or the parts of those whose rows are held in several ways."""
        return [part for layer in self.layers for part in layer.parts]

    @property
    def renumbered(self) -> bool:
        """Are positions those inside the cache, so that the model itself is to turn nothing?"""
        return any(part.ranks is not None for part in self.parts)

    def step(self, counts: Sequence[int]) -> Step:
        """The next `counts[cell]` tokens of each cell, not yet read."""
        many = np.asarray(counts, dtype=np.int64)
        return Step(many, np.repeat(self.seen, many) + within_runs(many))

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
        """Of each cell. Allocated: its share of the pools, so keys, values, positions and slack.

        Kept: keys and values, and the bits that name each token's expert where a layer has several. Rows do not need them; they
        are counted as mixSGA's paper counts them, for the tokens seen or as many as a layer has entries.
        """
        entries, kept, allocated, bits = (np.zeros(self.cells, np.int64) for _ in range(4))
        for layer in self.layers:
            mine = np.zeros(self.cells, np.int64)
            for part in layer.parts:
                table, (held, room) = part.table, part.sizes()
                np.add.at(mine, table.cell, table.length)
                np.add.at(kept, table.cell, held)
                beside = part.positions.element_size() * (1 if part.ranks is None else 2)
                np.add.at(allocated, table.cell, room + table.capacity * beside)
            entries += mine
            bits += (layer.expert_groups - 1).bit_length() * np.minimum(mine, self.seen)
        kept += -(-bits // 8)
        return [Counts(int(e), int(k), int(a)) for e, k, a in zip(entries, kept, allocated, strict=True)]

    def grown(self, tokens: int) -> list[Counts] | None:
        """What each cell would hold with so many more tokens; None where it depends on which rows take them."""
        if any(part.routed or part.packed is not None for part in self.parts):
            return None
        rows, size = np.zeros(self.cells, np.int64), np.zeros(self.cells, np.int64)
        for part in self.parts:
            mine = np.bincount(part.table.cell, minlength=self.cells)
            rows += mine
            size += mine * part.entry_bytes
        return [
            Counts(now.entries + tokens * int(added), now.bytes_kept + tokens * int(more), now.bytes_allocated)
            for now, added, more in zip(self.counts(), rows, size, strict=True)
        ]


def slack_for(tokens: int) -> int:
    """Entries of slack behind a row for so many tokens to come."""
    return -(-tokens // SLACK_STEP) * SLACK_STEP


def compact(
    prefill: Prefill, selections: Sequence[Selection], tokens: int | Sequence[int], arena: Arena | None = None
) -> RowCache:
    """Copies each cell's entries out of the prefill, one cell a selection, with slack for so many more tokens (of each cell)."""
    arena = arena or Arena()
    slack = [slack_for(tokens)] * len(selections) if isinstance(tokens, int) else [slack_for(some) for some in tokens]
    plans = [_plans(kv, [s[kv.index] for s in selections], slack) for kv in prefill.layers]
    layers: list[AnyLayer] = []
    for kv, found, pool in zip(prefill.layers, plans, _pools(prefill.layers, plans, arena), strict=True):
        layers.append(_layer_of(kv, found, pool, prefill.shape, len(prefill.expert_groups[kv.index]), len(selections)))
    return RowCache(layers, prefill.shape, [prefill.tokens] * len(selections))


def _room(plans: Sequence[_Plan]) -> tuple[int, int]:
    """Entries that lie as the model's own type, and all of them, slack included."""
    sizes = [(int(plan.table.capacity.sum()), plan.storage is None) for plan in plans]
    return sum(size for size, plain in sizes if plain), sum(size for size, _ in sizes)


def _pools(layers: Sequence[LayerKV], plans: Sequence[list[_Plan]], arena: Arena) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and positions of each layer: parts of one pool for each head size and device."""
    kinds = [(kv.keys.shape[2], str(kv.keys.device)) for kv in layers]
    rooms = [_room(found) for found in plans]
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for kind in dict.fromkeys(kinds):
        mine = [number for number, its in enumerate(kinds) if its == kind]
        like, name = layers[mine[0]].keys[0], "" if kind == kinds[0] else f" {kind}"
        plain, every = (sum(rooms[number][which] for number in mine) for which in (0, 1))
        index = torch.zeros(0, dtype=torch.int32, device=like.device)
        wanted = (("keys", plain, like), ("values", plain, like), ("positions", every, index))
        keys, values, positions = (arena.take(part + name, size, its) for part, size, its in wanted)
        offset = place = 0
        for number in mine:
            own, size = rooms[number]
            part = slice(offset, offset + own)
            found[number] = (keys[part], values[part], positions[place : place + size])
            offset, place = part.stop, place + size
    return [found[number] for number in range(len(layers))]


def compact_and_free(
    held: list[LayerKV | None],
    expert_groups: Sequence[tuple[ExpertGroup, ...]],
    shape: ModelShape,
    selections: Sequence[Selection],
    tokens: int,
) -> RowCache:
    """As `compact`, but a layer at a time into pools of their own, and each layer of `held` is dropped once it was copied.

    Nobody else may hold the layers, or nothing is freed: no more than the full cache and one layer lie in memory.
    """
    layers: list[AnyLayer] = []
    seen = 0
    for index, kv in enumerate(held):
        assert kv is not None
        found = _plans(kv, [selection[index] for selection in selections], [slack_for(tokens)] * len(selections))
        (own, size), seen = _room(found), kv.tokens
        keys, values = (kv.keys.new_empty(own, kv.keys.shape[2]) for _ in range(2))
        pool = (keys, values, torch.empty(size, dtype=torch.int32, device=keys.device))
        layers.append(_layer_of(kv, found, pool, shape, len(expert_groups[index]), len(selections)))
        held[index] = kv = None
    return RowCache(layers, shape, [seen] * len(selections))


@dataclass(frozen=True)
class _Plan:
    """Rows of one layer that are held alike: rows of equal width and length side by side, and where each will lie."""

    storage: Storage | None
    table: RowTable
    rows: list[Row]
    slack: np.ndarray  # [R]


def _plans(kv: LayerKV, cells: Sequence[tuple[Row, ...]], slack: Sequence[int]) -> list[_Plan]:
    """One for each storage, the model's own type first."""
    candidates = kv.keys.shape[1]
    by_storage: dict[Storage | None, list[tuple[int, Row, int]]] = {}
    for cell, layer in enumerate(cells):
        for row in layer:
            by_storage.setdefault(row.storage, []).append((cell, row, row.entries(candidates)))
    plans = []
    for storage in sorted(by_storage, key=lambda one: one is not None) or [None]:
        rows = sorted(by_storage.get(storage, []), key=lambda item: (item[1].width, item[2], item[0], item[1].first))
        numbers = [(cell, row.expert_group, row.first, row.width, length) for cell, row, length in rows]
        of_cell, of_group, first, width, length = np.array(numbers, dtype=np.int64).reshape(-1, 5).T.copy()
        behind = np.array(slack, dtype=np.int64)[of_cell]
        capacity = length + behind
        table = RowTable(of_cell, of_group, first, width, np.cumsum(capacity) - capacity, capacity, length)
        plans.append(_Plan(storage, table, [row for _, row, _ in rows], behind))
    return plans


def _layer_of(
    kv: LayerKV, plans: list[_Plan], pool: tuple[Tensor, Tensor, Tensor], shape: ModelShape, groups: int, cells: int
) -> AnyLayer:
    """The rows of one layer, filled. `pool` has room for all positions, and for the entries that no storage holds."""
    parts, done = [], 0
    for plan in plans:
        size = int(plan.table.capacity.sum())
        positions = pool[2][done : done + size]
        done += size
        packed, mine = None, (pool[0], pool[1], positions)
        if plan.storage is not None:
            packed = PackedEntries(plan.storage, kv.keys.shape[2], plan.table.length, plan.slack, kv.keys)
            mine = (kv.keys.new_empty(0, kv.keys.shape[2]), kv.keys.new_empty(0, kv.keys.shape[2]), positions)
        layer = RowLayer(mine, shape, kv.window, plan.table, groups, cells, packed)
        parts.append(_filled(kv, plan.rows, layer))
    return parts[0] if len(parts) == 1 else MixedLayer(parts)


def _filled(kv: LayerKV, rows: list[Row], layer: RowLayer) -> RowLayer:
    table, packed = layer.table, layer.packed
    codes = {} if packed is None else _packed_once(packed, kv, table, layer.shape.group)
    for number, (row, start, length) in enumerate(zip(rows, table.start.tolist(), table.length.tolist(), strict=True)):
        where, head = slice(start, start + length), row.first // layer.shape.group
        kept = None if row.kept is None else row.kept.to(kv.keys.device)  # layers may lie on devices of their own
        if packed is None:
            _fill(layer, where, kv, row, kept)
        elif row.merged is None and head in codes:
            packed.copy(number, length, codes[head], kept)
        else:
            _fill_packed(packed, head, number, length, kv, row, kept)
        layer.positions[where].copy_(kv.positions if kept is None else kv.positions[kept])
    return layer


def _packed_once(packed: PackedEntries, kv: LayerKV, table: RowTable, group: int) -> dict[int, Codes]:
    """Everything that a head holds, packed, for heads whose rows together keep more than that: a token's codes do not depend on
    what is kept beside it. Not where a residual stays: what is packed depends on the row then.
    """
    if packed.storage.residual:
        return {}
    heads = table.first // group
    return {
        head: packed.codes(kv.keys[head], kv.values[head])
        for head in np.unique(heads).tolist()
        if table.length[heads == head].sum() > kv.keys.shape[1]
    }


def _fill(layer: RowLayer, where: slice, kv: LayerKV, row: Row, kept: Tensor | None) -> None:
    head = row.first // layer.shape.group
    if kept is None:
        layer.keys[where].copy_(kv.keys[head])
        layer.values[where].copy_(kv.values[head])
    elif row.merged is None:
        torch.index_select(kv.keys[head], 0, kept, out=layer.keys[where])
        torch.index_select(kv.values[head], 0, kept, out=layer.values[where])
    else:
        for part, into in zip(row.merged, (layer.keys, layer.values), strict=True):
            into[where].copy_(part)


def _fill_packed(packed: PackedEntries, head: int, number: int, length: int, kv: LayerKV, row: Row, kept: Tensor | None) -> None:
    keys, values = row.merged or (kv.keys[head], kv.values[head])
    if kept is not None and row.merged is None:
        keys, values = keys[kept], values[kept]
    packed.fill(number, length, keys, values)
