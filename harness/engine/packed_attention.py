"""Attention over packed rows in plain torch: dequantised stretch by stretch, so that a processor's cache holds what is unpacked.

A query that found m entries in a row reads its first `packed_keys(m)` keys and `packed_values(m)` values packed, the others in
16 bits. Queries of one step differ in m, so an entry between the least and the greatest of these bounds is read both ways, each
query taking its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.engine.packed import PackedEntries
from harness.engine.rows import RowBlock, RowLayer, Step
from harness.storage import packed_keys, packed_values

STRETCH = 2**20  # numbers that are unpacked at once: some megabytes; of shorter stretches the calls cost more than is saved


@dataclass(frozen=True)
class Bound:
    """How many of the oldest entries are read packed: at least `low`, at most `high`, by each query where these differ."""

    low: int
    high: int
    each: Tensor | None = None  # [rows or 1, M, 1]

    @classmethod
    def of(cls, bounds: np.ndarray, width: int, device: torch.device) -> Bound:
        """bounds: [rows or 1, Q], of each query of one head."""
        low, high = int(bounds.min()), int(bounds.max())
        if low == high:
            return cls(low, high)
        return cls(low, high, torch.as_tensor(np.tile(bounds, (1, width)), device=device)[..., None])

    def packed(self, start: int, stop: int) -> Tensor | None:
        """Of the entries from `start` to `stop`, which are read packed; None: all before `high`. [rows or 1, M, entries]"""
        if self.each is None or stop <= self.low:
            return None
        return torch.arange(start, stop, device=self.each.device) < self.each


def held_before(layer: RowLayer, block: RowBlock) -> np.ndarray:
    """Entries that the rows held before each of their cells' new tokens, [rows or 1, Q]."""
    new = np.arange(block.tokens)
    if not layer.routed:
        return (block.length - block.tokens + new)[None]
    taken = np.zeros((block.count, block.tokens), np.int64)
    for number, row in enumerate(range(block.rows.start, block.rows.stop)):
        cell, group = layer.table.cell[row], layer.table.expert_group[row]
        taken[number] = np.array(layer.taken[cell][-block.tokens :]) == group
    return block.length - taken[:, ::-1].cumsum(1)[:, ::-1]  # less its own token and those behind it


def bounds_of(layer: RowLayer, packed: PackedEntries, block: RowBlock) -> tuple[Bound, Bound]:
    """Of keys and of values."""
    storage = packed.storage
    if not storage.residual:
        return Bound(block.length, block.length), Bound(block.length, block.length)
    before = held_before(layer, block)
    device = packed.key_tail.device
    return (
        Bound.of(packed_keys(storage, before), block.width, device),
        Bound.of(packed_values(storage, before), block.width, device),
    )


def found_by_readers(layer: RowLayer, step: Step) -> np.ndarray:
    """Entries that each query found in the row that it reads, [M] in the order of `RowLayer.readers`."""
    found = []
    for block in layer.blocks(step):
        before = np.broadcast_to(held_before(layer, block), (block.count, block.tokens))
        found.append(np.repeat(before[:, None], block.width, 1).reshape(-1))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


@dataclass(frozen=True)
class BlockOfPacked:
    """The entries of a block of rows, as strided views."""

    packed: PackedEntries
    block: RowBlock

    def keys(self) -> list[Tensor]:
        """Each field, [rows, groups, width]."""
        groups = -(-self.block.capacity // self.packed.storage.keys.tokens)
        return [self._view(field, self.packed.places.group, groups) for field in self.packed.keys]

    def values(self) -> list[Tensor]:
        """Each field, [rows, capacity, width]."""
        return [self._view(field, self.packed.places.start, self.block.capacity) for field in self.packed.values]

    def tail(self, of_keys: bool, start: int) -> Tensor:
        """The entries from `start` on in 16 bits, [rows, length - start, D] float32."""
        return self.whole_tail(of_keys, start, self.block.length)[0]

    def whole_tail(self, of_keys: bool, start: int | None = None, stop: int | None = None) -> tuple[Tensor, int]:
        """What lies in 16 bits, slack too, or some of it, [rows, entries, D] float32; and the first entry that does."""
        packed, capacity = self.packed, self.block.capacity
        base = packed.bases(np.array([capacity - packed.slack[self.block.rows.start]]))[0 if of_keys else 1].item()
        tail, at = (packed.key_tail, packed.places.key_tail) if of_keys else (packed.value_tail, packed.places.value_tail)
        whole = self._view(tail, at + base, capacity - base)
        return whole[:, (start or base) - base : (stop or capacity) - base].float(), base

    @property
    def packs(self) -> bool:
        """Is there room for packed entries in these rows?"""
        return self.packed.packs(self.block.capacity) > 0

    def _view(self, field: Tensor, starts: np.ndarray, capacity: int) -> Tensor:
        first = int(starts[self.block.rows.start])
        return field[first : first + self.block.count * capacity].view(self.block.count, capacity, -1)

    def stretch(self, groups: int, tokens: int) -> int:
        """Of so many groups of tokens, how many are unpacked at once: equal shares."""
        shares = -(-groups * tokens * self.block.count * self.packed.dim // STRETCH)
        return -(-groups // max(1, shares))


def logits_of(layer: RowLayer, block: RowBlock, asked: Tensor, bound: Bound) -> Tensor:
    """Products of queries [rows, M, D] float32 with the keys that each of them sees, [rows, M, length]."""
    packed = _packed(layer)
    view, codec = BlockOfPacked(packed, block), packed.storage.keys
    logits = asked.new_empty(block.count, asked.shape[1], block.length)
    if bound.high:
        fields, turned, step = view.keys(), codec.turn(asked), view.stretch(bound.high // codec.tokens, codec.tokens)
        for start in range(0, bound.high // codec.tokens, step):
            stop = min(start + step, bound.high // codec.tokens)
            parts = [field[:, start:stop] for field in fields]
            logits[..., start * codec.tokens : stop * codec.tokens] = codec.dot(turned, parts)
    if bound.low < block.length:
        tail = asked @ view.tail(True, bound.low).mT
        here = bound.packed(bound.low, block.length)
        into = logits[..., bound.low :]
        into.copy_(tail if here is None else torch.where(here, into, tail))
    return logits


def mix_of(layer: RowLayer, block: RowBlock, weights: Tensor, bound: Bound) -> Tensor:
    """Values weighted by [rows, M, length] float32, each as its query sees it: [rows, M, D]."""
    packed = _packed(layer)
    view, codec = BlockOfPacked(packed, block), packed.storage.values
    out = weights.new_zeros(block.count, weights.shape[1], packed.dim)
    if bound.high:
        fields, step = view.values(), view.stretch(bound.high, 1)
        for start in range(0, bound.high, step):
            stop = min(start + step, bound.high)
            mine, here = weights[..., start:stop], bound.packed(start, stop)
            parts = [field[:, start:stop] for field in fields]
            out += codec.mix(mine if here is None else mine * here, parts, packed.dim)
        out = codec.turn(out)
    if bound.low < block.length:
        mine, here = weights[..., bound.low :], bound.packed(bound.low, block.length)
        out += (mine if here is None else mine * ~here) @ view.tail(False, bound.low)
    return out


def seen_by(layer: RowLayer, row: int, step: Step, token: int) -> tuple[Tensor, Tensor]:
    """Keys and values [length, D] of one row as one new token reads them: everything dequantised, for tests."""
    table = layer.table
    cell = int(table.cell[row])
    behind = int(step.starts[cell] + step.counts[cell] - token)  # this token and those behind it
    if layer.routed:
        behind = sum(one == table.expert_group[row] for one in layer.taken[cell][-behind:])
    length = int(table.length[row])
    return _packed(layer).seen(row, length, length - behind)


def _packed(layer: RowLayer) -> PackedEntries:
    assert layer.packed is not None
    return layer.packed
