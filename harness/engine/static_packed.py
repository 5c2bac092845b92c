"""Packed rows in static buffers: a step packs and reads without the host deciding anything.

Where an entry belongs follows from the lengths on the device. A value leaves the residual with every token; a block of keys is
packed anew with every token that falls into it, and is whole, and read, once it is complete. What is packed too early lies behind
what is read, and is overwritten.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harness.engine.packed import PackedEntries
from harness.engine.packed_attention import BlockOfPacked
from harness.engine.rows import RowBlock, RowTable
from harness.storage import Codec, packed_keys, packed_values


class StaticPacked:
    """The memory of one layer's packed rows, for one token of each cell a step."""

    def __init__(self, packed: PackedEntries, table: RowTable) -> None:
        self.packed, self.storage = packed, packed.storage
        self.places = packed.on_device()
        first = packed.bases(table.capacity - packed.slack)
        if self.storage.residual:
            self.base = torch.as_tensor(first[1], device=self.places.device)  # [R] first value in 16 bits
            blocks = np.stack([first[0], packed_keys(self.storage, table.capacity)]) // self.storage.residual
            filling = np.flatnonzero(blocks[1] > blocks[0])  # rows in which a block can be completed
            self.filling = torch.as_tensor(filling, device=self.places.device)
            self.last = torch.as_tensor(blocks[1][filling] - 1, device=self.places.device)  # number of their last block
            self.leaving = torch.as_tensor(
                np.flatnonzero(packed_values(self.storage, table.capacity) > 0), device=self.places.device
            )
        for tensor in packed.tensors:  # weights of 0 must not meet what is no number
            if tensor.is_floating_point():
                tensor.nan_to_num_()

    def write(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        """keys, values: [R, D], behind the `length` [R] entries of each row."""
        packed, storage = self.packed, self.storage
        start, group, key_tail, value_tail = self.places
        if not storage.residual:
            self._put(storage.keys, packed.keys, start + length, keys[:, None])
            self._put(storage.values, packed.values, start + length, values[:, None])
            return
        packed.key_tail.index_copy_(0, key_tail + length, keys.to(packed.key_tail.dtype))
        packed.value_tail.index_copy_(0, value_tail + length, values.to(packed.value_tail.dtype))
        if not storage.values.fields(packed.dim):
            return
        row = self.leaving
        oldest = torch.maximum(length[row] - storage.residual, self.base[row])
        self._put(storage.values, packed.values, start[row] + oldest, packed.value_tail[value_tail[row] + oldest][:, None])
        row, tokens = self.filling, storage.keys.tokens
        block = torch.minimum(length[row] // storage.residual, self.last) * storage.residual  # [F] its first entry
        entries = block[:, None] + torch.arange(storage.residual, device=block.device)  # [F, residual]
        vectors = packed.key_tail[key_tail[row, None] + entries].unflatten(1, (-1, tokens)).flatten(0, 1)
        groups = (group[row, None] + entries[:, ::tokens] // tokens).flatten()
        self._put(storage.keys, packed.keys, groups, vectors)

    def _put(self, codec: Codec, fields: list[Tensor], where: Tensor, vectors: Tensor) -> None:
        for field, part in zip(fields, codec.pack(vectors.float()), strict=True):
            field.index_copy_(0, where, part)

    def logits(self, block: RowBlock, asked: Tensor, before: Tensor) -> Tensor:
        """Of queries [rows, M, D] with all entries and slack, [rows, M, capacity]. before: [R] entries that they found."""
        view, codec = BlockOfPacked(self.packed, block), self.storage.keys
        found = codec.dot(codec.turn(asked), view.keys())[..., : block.capacity] if view.packs else None
        if not self.storage.residual:
            assert found is not None
            return found
        whole, base = view.whole_tail(True)
        tail = asked @ whole.mT
        if found is None:
            return tail
        until = packed_keys(self.storage, before[block.rows])[:, None, None]
        place = torch.arange(base, block.capacity, device=asked.device)
        return torch.cat([found[..., :base], torch.where(place < until, found[..., base:], tail)], -1)

    def mix(self, block: RowBlock, weights: Tensor, before: Tensor) -> Tensor:
        """[rows, M, capacity] weights of the values: [rows, M, D]."""
        view, codec = BlockOfPacked(self.packed, block), self.storage.values
        until = packed_values(self.storage, before[block.rows])[:, None, None]
        older = torch.arange(block.capacity, device=weights.device) < until
        out = weights.new_zeros(*weights.shape[:2], self.packed.dim)
        if view.packs:
            mine = weights * older if self.storage.residual else weights
            out = codec.turn(codec.mix(mine, view.values(), self.packed.dim))
        if self.storage.residual:
            whole, base = view.whole_tail(False)
            out = out + (weights * ~older)[..., base:] @ whole
        return out
