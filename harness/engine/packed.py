"""The memory of rows whose entries are packed by a storage: codes, scales, and the newest entries in 16 bits.

What of an entry is read packed follows from how many entries its row held before the query's token (`harness.storage`). So an
entry may lie here twice, packed and in 16 bits: queries of one step may see it either way, and drafts may be taken back behind a
block that was complete. The 16 bits lie in the slack of tokens to come, which is allocated anyway and counted as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from harness.engine.split_plan import within_runs
from harness.storage import HALF, Field, Number, Storage, codec_bytes, packed_keys, packed_values, row_bytes


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The type of 16 bits in which a model of this type is deployed."""
    return dtype if dtype.itemsize == HALF else torch.float16


@dataclass(frozen=True)
class Places:
    """Where the rows lie, [R] each. Entry i of row r: values at `start[r] + i`, in 16 bits at `key_tail[r] + i` and
    `value_tail[r] + i`; its key's group at `group[r] + i // tokens`.
    """

    start: np.ndarray
    group: np.ndarray
    key_tail: np.ndarray
    value_tail: np.ndarray

    def of(self, rows: np.ndarray) -> Places:
        return Places(self.start[rows], self.group[rows], self.key_tail[rows], self.value_tail[rows])


@dataclass(frozen=True)
class Codes:
    """Packed vectors, token by token: each field [T, width]."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]


class PackedEntries:
    """Keys and values of the rows of one layer.

    Args:
        length: [R] entries at first. slack: [R] for tokens to come, behind each row.
        like: a tensor of the model's type on its device.
    """

    def __init__(self, storage: Storage, dim: int, length: np.ndarray, slack: np.ndarray, like: Tensor) -> None:
        self.storage, self.dim, self.slack = storage, dim, slack
        self._on_device: Tensor | None = None
        capacity = length + slack
        packed = self.packs(capacity)
        groups = -(-packed // storage.keys.tokens)
        base_keys, base_values = self.bases(length)
        key_room, value_room = (capacity - base_keys), (capacity - base_values)
        if not storage.residual:
            key_room = value_room = np.zeros_like(length)
        self.places = Places(_starts(packed), _starts(groups), _starts(key_room) - base_keys, _starts(value_room) - base_values)
        device, half = like.device, half_of(like.dtype)
        self.keys = _fields(storage.keys.fields(dim), int(groups.sum()), device)
        together = device.type == "cpu" and storage.values.beside(dim)
        self.values = _fields(storage.values.fields(dim), int(packed.sum()), device, together)
        self.key_tail, self.value_tail = (
            torch.empty(int(room.sum()), dim, dtype=half, device=device) for room in (key_room, value_room)
        )

    def packs(self, capacity: Number) -> Number:
        """Entries that rows of this capacity have room for, packed: none where the residual can never be filled."""
        storage = self.storage
        return capacity * (packed_keys(storage, capacity) + packed_values(storage, capacity) > 0)

    def bases(self, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first entries of rows of this length at first that lie in 16 bits: of keys, and of values."""
        return packed_keys(self.storage, length), packed_values(self.storage, length)

    @property
    def by_entry(self) -> list[Tensor]:
        """Everything that is held of an entry, [P, width] each, at its position's place: of storages that pack token by token."""
        assert not self.storage.residual and self.storage.keys.tokens == 1
        return [*self.keys, *self.values]

    def vectors(self, shown: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of some entries, float32. See `RowLayer.vectors`."""
        storage = self.storage
        return (
            storage.keys.unpack([shown(field) for field in self.keys], self.dim),
            storage.values.unpack([shown(field) for field in self.values], self.dim),
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, self.key_tail, self.value_tail]

    def keep(self, rows: np.ndarray) -> None:
        self.places, self.slack = self.places.of(rows), self.slack[rows]
        self._on_device = None

    def on_device(self) -> Tensor:
        """The places as [4, R] int64 beside the entries."""
        if self._on_device is None:
            columns = [getattr(self.places, column.name) for column in fields(self.places)]
            self._on_device = self._index(np.stack(columns))
        return self._on_device

    def write(self, row: np.ndarray, number: np.ndarray, keys: Tensor, values: Tensor, before: np.ndarray) -> None:
        """New entries [N, D] of these rows, at these places of them, and what they complete.

        Args:
            before: [R] entries of the rows before.
        """
        places, storage = self.places, self.storage
        if not storage.residual:
            where = self._index(places.start[row] + number)
            _put(self.keys, where, storage.keys.pack(keys[:, None].float()))
            _put(self.values, where, storage.values.pack(values[:, None].float()))
            return
        self.key_tail.index_copy_(0, self._index(places.key_tail[row] + number), keys.to(self.key_tail.dtype))
        self.value_tail.index_copy_(0, self._index(places.value_tail[row] + number), values.to(self.value_tail.dtype))
        self._complete(before, before + np.bincount(row, minlength=len(before)))

    def fill(self, row: int, length: int, keys: Tensor, values: Tensor) -> None:
        """The first `length` entries [length, D] of a row that holds none."""
        storage, places = self.storage, self.places
        half = self.key_tail.dtype
        for codec, vectors, parts, first, tail, at, packed in (
            (storage.keys, keys, self.keys, places.group[row], self.key_tail, places.key_tail[row], packed_keys),
            (storage.values, values, self.values, places.start[row], self.value_tail, places.value_tail[row], packed_values),
        ):
            count = packed(storage, length)
            if storage.residual:
                vectors = vectors.to(half)
                tail[at + count : at + length].copy_(vectors[count:])
            if count:
                groups = count // codec.tokens
                for into, part in zip(parts, codec.pack(vectors[:count].float().unflatten(0, (groups, -1))), strict=True):
                    into[first : first + groups].copy_(part)

    def codes(self, keys: Tensor, values: Tensor) -> Codes:
        """What entries [T, D] are packed, for rows to copy from: of storages without a residual."""
        return Codes(*(codec.pack(v[:, None].float()) for codec, v in ((self.storage.keys, keys), (self.storage.values, values))))

    def copy(self, row: int, length: int, codes: Codes, kept: Tensor | None) -> None:
        """The first `length` entries of a row that holds none: all of `codes`, or those kept."""
        for first, into, given in (
            (self.places.group[row], self.keys, codes.keys),
            (self.places.start[row], self.values, codes.values),
        ):
            for field, part in zip(into, given, strict=True):
                field[first : first + length].copy_(part if kept is None else part[kept])

    def _complete(self, before: np.ndarray, after: np.ndarray) -> None:
        """Packs what has left the residual since the rows held `before` entries."""
        storage, places = self.storage, self.places
        for codec, parts, first, tail, at, packed in (
            (storage.keys, self.keys, places.group, self.key_tail, places.key_tail, packed_keys),
            (storage.values, self.values, places.start, self.value_tail, places.value_tail, packed_values),
        ):
            old, new = packed(storage, before) // codec.tokens, packed(storage, after) // codec.tokens
            if not (new > old).any():
                continue
            row = np.repeat(np.arange(len(old)), new - old)
            group = old[row] + within_runs(new - old)
            entries = self._index(at[row] + group * codec.tokens)[:, None] + torch.arange(codec.tokens, device=tail.device)
            _put(parts, self._index(first[row] + group), codec.pack(tail[entries].float()))

    def sizes(self, length: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of rows: of their entries, and of what is allocated for them."""
        storage = self.storage
        packed = self.packs(capacity)
        room = -(-packed // storage.keys.tokens) * codec_bytes(storage.keys, self.dim)
        room = room + packed * codec_bytes(storage.values, self.dim)
        if storage.residual:
            base_keys, base_values = self.bases(capacity - self.slack)
            room = room + (2 * capacity - base_keys - base_values) * HALF * self.dim
        return row_bytes(storage, length, self.dim), room

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, device=self.key_tail.device)

    @property
    def none(self) -> tuple[Tensor, Tensor]:
        """Keys and values of no entry."""
        return (self.key_tail[:0].float(),) * 2

    def seen(self, row: int, length: int, before: int) -> tuple[Tensor, Tensor]:
        """The keys and values [length, D] of one row, float32, as a query reads them that found so many entries before its own.

        The obvious way, for tests and observers: everything is dequantised.
        """
        found = []
        storage, places = self.storage, self.places
        for codec, held, first, tail, at, packed in (
            (storage.keys, self.keys, places.group[row], self.key_tail, places.key_tail[row], packed_keys),
            (storage.values, self.values, places.start[row], self.value_tail, places.value_tail[row], packed_values),
        ):
            count = packed(storage, before) if storage.residual else length
            parts = [tail[at + count : at + length].float()]
            if count:
                groups = slice(first, first + count // codec.tokens)
                parts.insert(0, codec.unpack([field[groups] for field in held], self.dim))
            found.append(torch.cat(parts))
        return found[0], found[1]


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _fields(asked: Sequence[Field], count: int, device: torch.device, together: bool = False) -> list[Tensor]:
    """Each field [count, width], of its own or as columns of one tensor of bytes."""
    if not together:
        return [torch.empty(count, field.width, dtype=getattr(torch, field.dtype), device=device) for field in asked]
    edges = np.cumsum([0, *(field.bytes for field in asked)]).tolist()
    whole = torch.empty(count, edges[-1], dtype=torch.uint8, device=device)
    spans = zip(asked, pairwise(edges), strict=True)
    return [whole[:, start:stop].view(getattr(torch, field.dtype)) for field, (start, stop) in spans]


def _put(into: Sequence[Tensor], where: Tensor, parts: Sequence[Tensor]) -> None:
    for field, part in zip(into, parts, strict=True):
        field.index_copy_(0, where, part)
