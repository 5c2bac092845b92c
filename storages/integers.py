"""Whole numbers between a token's least and greatest: the plain way to fewer bits, by token and head.

code = round((x - least) / scale), scale = (greatest - least) / (2**bits - 1); scale and least are held in float16, and codes are
counted from what is held. `ByToken` shares them along a head (or groups of it), `ByChannel` along a group of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from harness.storage import HALF, LARGEST_HALF, Codec, Field, KernelFormat
from storages.bits import KNOWN, apart, at_once, cannot_pack, pack_bits, packed_width, stretches_of, together, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

COUNTING = tuple(map(float, range(2**4)))  # what codes of so few bits stand for by themselves
FEW = 3  # queries of a row for which the bags are faster than unpacking once: they unpack for each query


def check_bits(bits: int, known: Sequence[int] = KNOWN) -> None:
    """
    Raises:
        ValueError: codes of so many bits are not made.
    """
    if bits not in known:
        raise ValueError(f"there are no codes of {bits} bits here: {', '.join(map(str, known))}")


def quantised(vectors: Tensor, along: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scale and least (float16, size 1 along `along`) of float32 vectors."""
    import torch

    least, greatest = vectors.aminmax(dim=along, keepdim=True)
    scale = ((greatest - least) / (2**bits - 1)).clamp(max=LARGEST_HALF).half()
    least = least.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    step = torch.where(scale > 0, scale, 1.0).float()  # all numbers alike: the codes are 0
    codes = ((vectors - least.float()) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, least


@dataclass(frozen=True)
class ByToken(Codec):
    """A scale and a least number for each token, or for each `group` numbers of it."""

    bits: int = 4
    group: int = 0  # 0: the whole head

    @property
    def kernel(self) -> KernelFormat:  # type: ignore[override]
        return KernelFormat("affine", self.bits, self.group)

    def groups(self, dim: int) -> int:
        return dim // (self.group or dim)

    def beside(self, dim: int) -> bool:
        return self.bits == 4 and self.groups(dim) == 1 and dim % 4 == 0  # halves at even bytes

    def fields(self, dim: int) -> tuple[Field, ...]:
        shared = self.groups(dim)
        codes = Field("codes", packed_width(dim, self.bits), "uint8")
        return codes, Field("scale", shared, "float16"), Field("least", shared, "float16")

    def cannot_hold(self, dim: int) -> str | None:
        if dim % (self.group or dim):
            return f"groups of {self.group} do not divide a head of size {dim}"
        return cannot_pack(dim, self.bits)

    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        dim = vectors.shape[-1]
        codes, scale, least = quantised(vectors[:, 0].unflatten(-1, (self.groups(dim), -1)), -1, self.bits)
        return pack_bits(codes.flatten(-2), self.bits), scale[..., 0], least[..., 0]

    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        codes, scale, least = parts
        grouped = unpack_bits(codes, dim, self.bits).unflatten(-1, (self.groups(dim), -1))
        return (grouped * scale.float()[..., None] + least.float()[..., None]).flatten(-2)

    def dot(self, turned: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The scales meet the products instead of the codes: they are 1 of `group` as many."""
        if self.groups(turned.shape[-1]) > 1:
            return super().dot(turned, parts)
        codes, scale, least = parts
        if self.bits == 3:  # in two planes: put together by a table
            numbers, many = at_once(codes, self.bits, COUNTING[: 2**self.bits])
            products = together(turned, many) @ numbers.mT
            return products.mul_(scale.float().mT).addcmul_(turned.sum(-1, keepdim=True), least.float().mT)
        stretches = stretches_of(codes, self.bits)
        asked = turned.chunk(len(stretches), -1)
        products = asked[0] @ stretches[0].mT
        for part, stretch in zip(asked[1:], stretches[1:], strict=True):
            products.baddbmm_(part, stretch.mT)
        return products.mul_(scale.float().mT).addcmul_(turned.sum(-1, keepdim=True), least.float().mT)

    def mix(self, weights: Tensor, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The scales meet the weights."""
        codes, scale, least = parts
        if weights.shape[1] <= FEW and self.beside(dim) and lie_beside(parts):
            return weighted_bags(weights, parts)
        if self.groups(dim) == 1:
            scaled, shift = weights * scale.float().mT, weights @ least.float()
            if self.bits == 3:  # in two planes: put together by a table
                numbers, many = at_once(codes, self.bits, COUNTING[: 2**self.bits])
                return apart(scaled @ numbers, many).add_(shift)
            return _side_by_side([scaled @ stretch for stretch in stretches_of(codes, self.bits)]).add_(shift)
        numbers = unpack_bits(codes, dim, self.bits).unflatten(-1, (self.groups(dim), -1))
        shifts = weights @ least.float()  # [r, M, groups]
        sums = [(weights * s.float()[..., None, :]) @ numbers[..., g, :] for g, s in enumerate(scale.unbind(-1))]
        return _side_by_side(sums).unflatten(-1, (self.groups(dim), -1)).add_(shifts[..., None]).flatten(-2)


def lie_beside(parts: Sequence[Tensor]) -> bool:
    """Are codes, scale and least of a token neighbours in memory, as `PackedEntries` lays them where a codec asks for it?"""
    codes, scale, least = parts
    width = codes.shape[-1] + 2 * HALF
    found = tuple(part.data_ptr() - codes.data_ptr() for part in (scale, least))
    return codes.stride(-2) == width and found == (codes.shape[-1], codes.shape[-1] + HALF)


def weighted_bags(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Sums of tokens of 4 bits by torch's kernel for quantised embedding bags, which unpacks in registers.

    Its rows are ours: codes, scale and bias of 16 bits. The two codes of a byte it takes for neighbours.

    Args:
        weights: [r, M, n]. parts: each [r, n, width], neighbours in memory.
    """
    import torch

    (rows, queries, tokens), codes = weights.shape, parts[0]
    width = codes.stride(1)
    apart = codes.stride(0) // width if rows > 1 else tokens  # from one row's first token to the next's
    table = codes.as_strided((apart * (rows - 1) + tokens, width), (width, 1))
    first = torch.arange(rows, dtype=torch.int32)[:, None, None] * apart
    index = (first + torch.arange(tokens, dtype=torch.int32)).expand(rows, queries, tokens).contiguous().flatten()
    bags = torch.arange(0, rows * queries * tokens + 1, tokens, dtype=torch.int32)
    sums = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(
        table, index, bags, False, 0, False, weights.contiguous().flatten(), None, True
    )
    return cast("Tensor", sums).view(rows, queries, -1, 2).transpose(-1, -2).flatten(-2)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(parts), -1)


@dataclass(frozen=True)
class ByChannel(Codec):
    """A scale and a least number for each channel of a group of neighbouring tokens."""

    bits: int = 4
    tokens: int = 32

    @property
    def kernel(self) -> KernelFormat:  # type: ignore[override]
        return KernelFormat("channels", self.bits, self.tokens)

    def fields(self, dim: int) -> tuple[Field, ...]:
        codes = Field("codes", self.tokens * packed_width(dim, self.bits), "uint8")
        return codes, Field("scale", dim, "float16"), Field("least", dim, "float16")

    def cannot_hold(self, dim: int) -> str | None:
        return cannot_pack(dim, self.bits)

    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        codes, scale, least = quantised(vectors, 1, self.bits)
        return pack_bits(codes, self.bits).flatten(1), scale[:, 0], least[:, 0]

    def _codes(self, codes: Tensor, dim: int) -> Tensor:
        """[..., groups, tokens, D]"""
        return unpack_bits(codes.unflatten(-1, (self.tokens, -1)), dim, self.bits)

    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        codes, scale, least = parts
        numbers = self._codes(codes, dim) * scale.float()[..., None, :] + least.float()[..., None, :]
        return numbers.flatten(-3, -2)

    def dot(self, turned: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The scales meet the codes in one pass: many small products, one a group, cost more. The least meet the queries."""
        codes, scale, least = parts
        numbers = self._codes(codes, turned.shape[-1]).mul_(scale.float()[..., None, :])
        products = (turned @ numbers.flatten(-3, -2).mT).unflatten(-1, (-1, self.tokens))  # [r, M, groups, tokens]
        return products.add_((turned @ least.float().mT)[..., None]).flatten(2)


@dataclass(frozen=True)
class Integers:
    """Keys and values of every token by its own scales: int8 and int4."""

    bits: int = 4
    group: int = 0  # numbers of a head that share a scale; 0: all of them
    spared: int = 0
    version: int = 1
    residual = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def keys(self) -> Codec:
        return ByToken(self.bits, self.group)

    @property
    def values(self) -> Codec:
        return ByToken(self.bits, self.group)
