"""How a row holds its entries, where that is not the model's own type: what a storage is, and the bytes that it takes.

A storage has a codec for keys and one for values. The newest entries of a row may stay in 16 bits (KIVI's residual): keys until
a block of `residual` of them is complete, values while they are among the newest `residual`. What is held of which entry follows
from the number of entries alone, so it is the same however they came: all at once, one by one, or after drafts were taken back.

torch is imported where tensors are made: storages are listed and bytes are counted without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

HALF = 2  # bytes of a number in 16 bits
LARGEST_HALF = 65504.0  # of float16
Number = TypeVar("Number", int, "np.ndarray", "Tensor")


@dataclass(frozen=True)
class Field:
    """One tensor of a codec: so many numbers for each group of tokens."""

    name: str
    width: int
    dtype: Literal["uint8", "float16"]

    @property
    def bytes(self) -> int:
        return self.width * (1 if self.dtype == "uint8" else HALF)


@dataclass(frozen=True)
class KernelFormat:
    """How the Triton kernel reads a codec's fields; a codec without one is read in plain torch.

    kind: `affine` (codes, scale, least; by token), `channels` (the same, scale and least by channel of a group of tokens),
        `levels` (codes that number `levels`, and a factor by token) or `float8` (e4m3 as bytes).
    """

    kind: Literal["affine", "channels", "levels", "float8"]
    bits: int
    group: int = 0  # numbers that share a scale along the head; 0: all
    levels: tuple[float, ...] = ()


class Codec(ABC):
    """Vectors of one head as fewer bits, in groups of `tokens` that are packed together. Frozen: its repr is on record.

    `dot` and `mix` are what attention asks for. Their definitions here dequantise; a codec may override them with the same sums
    in another order, and `turn`, if its vectors lie in another basis.
    """

    tokens: int = 1
    kernel: KernelFormat | None = None

    @abstractmethod
    def fields(self, dim: int) -> tuple[Field, ...]:
        """What is held of one group of tokens."""

    @abstractmethod
    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """[m, tokens, D] float32 -> each field, [m, width]."""

    @abstractmethod
    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Each field, [..., groups, width] -> [..., groups * tokens, D] float32."""

    def cannot_hold(self, dim: int) -> str | None:
        """Why heads of this size cannot be packed, or None."""
        return None

    def beside(self, dim: int) -> bool:
        """Should the fields of one token be neighbours in a processor's memory? Asked of values; `mix` may count on nothing."""
        return False

    def turn(self, queries: Tensor) -> Tensor:
        """[..., D] queries as `dot` wants them, or what `mix` gives in its basis turned into the model's; its own inverse."""
        return queries

    def dot(self, turned: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Products of turned queries [r, M, D] with the vectors of each field [r, groups, width]: [r, M, groups * tokens]."""
        return turned @ self.turn(self.unpack(parts, turned.shape[-1])).transpose(-1, -2)

    def mix(self, weights: Tensor, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Weighted sums, in the codec's basis: [r, M, groups * tokens] x each field [r, groups, width] -> [r, M, D]."""
        return weights @ self.turn(self.unpack(parts, dim))


class Storage(Protocol):
    """How a row holds its entries. Frozen: its repr is part of a row's key, and equal storages lie in one pool."""

    @property
    def version(self) -> int:
        """Raised when the same settings hold other numbers."""
        ...

    @property
    def keys(self) -> Codec: ...

    @property
    def values(self) -> Codec: ...

    @property
    def residual(self) -> int:
        """Newest entries of a row in 16 bits, a multiple of both codecs' tokens; 0: every entry is packed as it comes."""
        ...

    @property
    def spared(self) -> int:
        """First layers, and as many last ones, that are held in 16 bits."""
        ...


@dataclass(frozen=True)
class Nothing(Codec):
    """Packs nothing."""

    def fields(self, dim: int) -> tuple[Field, ...]:
        return ()

    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return ()

    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        raise AssertionError("nothing was packed")


@dataclass(frozen=True)
class Sixteen:
    """Every entry in 16 bits, the cache that is deployed: how layers are held that a storage spares."""

    version: int = 1
    residual: int = 2**40  # never complete
    spared: int = 0

    @property
    def keys(self) -> Codec:
        return Nothing()

    @property
    def values(self) -> Codec:
        return Nothing()


def of_layer(storage: Storage, layer: int, layers: int) -> Storage:
    """The storage of one of so many cache layers."""
    return Sixteen() if min(layer, layers - 1 - layer) < storage.spared else storage


def packed_keys(storage: Storage, before: Number) -> Number:
    """Of a row that holds so many entries, how many of the oldest keys are read packed."""
    return before // storage.residual * storage.residual if storage.residual else before


def packed_values(storage: Storage, before: Number) -> Number:
    """The same of values."""
    older = before - storage.residual
    return older * (older > 0)


def codec_bytes(codec: Codec, dim: int) -> int:
    """Of one group of tokens."""
    return sum(field.bytes for field in codec.fields(dim))


def entry_bytes(storage: Storage, dim: int) -> float:
    """Bytes of one packed entry; a group's scales are shared evenly."""
    return codec_bytes(storage.keys, dim) / storage.keys.tokens + codec_bytes(storage.values, dim) / storage.values.tokens


def as_many_packed(entries: int, storage: Storage, dim: int) -> int:
    """Packed entries that lie in the bytes of so many in 16 bits, residual and spared layers aside."""
    return int(entries * 2 * HALF * dim / entry_bytes(storage, dim))


def storage_of(method: object) -> Storage | None:
    """What packs the rows of a method; None: nothing, they are of the model's own type."""
    found: Storage | None = getattr(method, "storage", None)
    return found


def row_bytes(storage: Storage, entries: Number, dim: int) -> Number:
    """What a row of so many entries takes: codes, scales, and what is still in 16 bits."""
    total = entries * 0
    for codec, packed in ((storage.keys, packed_keys(storage, entries)), (storage.values, packed_values(storage, entries))):
        total = total + packed // codec.tokens * codec_bytes(codec, dim) + (entries - packed) * (HALF * dim)
    return total


def cannot_hold(storage: Storage, dim: int) -> str | None:
    """Why heads of this size cannot be held so, or None."""
    for codec in (storage.keys, storage.values):
        if reason := codec.cannot_hold(dim):
            return reason
    return None


def wrong_with(storage: Storage) -> str | None:
    """What makes no sense about a storage's settings, whatever the head; or None."""
    tokens = max(storage.keys.tokens, storage.values.tokens)
    if storage.residual < 0 or storage.spared < 0:
        return "residual and spared are whole numbers from 0 on"
    if storage.values.tokens > 1:
        return "values are packed token by token: they leave the residual one by one"
    if storage.residual % tokens or (tokens > 1 and not storage.residual):
        return f"residual {storage.residual} is no multiple of the {tokens} tokens that are packed together"
    return None
