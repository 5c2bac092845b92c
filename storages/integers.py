"""Whole numbers between a token's least and greatest: the plain way to fewer bits, by token and head.

code = round((x - least) / scale), scale = (greatest - least) / (2**bits - 1); scale and least are held in float16, and codes are
counted from what is held. `ByToken` shares them along a head (or groups of it), `ByChannel` along a group of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.storage import LARGEST_HALF, Codec, Field, KernelFormat
from storages.bits import KNOWN, cannot_pack, pack_bits, packed_width, stretches_of, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor


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
        stretches = stretches_of(codes, turned.shape[-1], self.bits)
        asked = turned.chunk(len(stretches), -1)
        products = asked[0] @ stretches[0].mT
        for part, stretch in zip(asked[1:], stretches[1:], strict=True):
            products.baddbmm_(part, stretch.mT)
        return products.mul_(scale.float().mT).addcmul_(turned.sum(-1, keepdim=True), least.float().mT)

    def mix(self, weights: Tensor, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The scales meet the weights."""
        codes, scale, least = parts
        if self.groups(dim) == 1:
            scaled, shift = weights * scale.float().mT, weights @ least.float()
            return _side_by_side([scaled @ stretch for stretch in stretches_of(codes, dim, self.bits)]).add_(shift)
        numbers = unpack_bits(codes, dim, self.bits).unflatten(-1, (self.groups(dim), -1))
        shifts = weights @ least.float()  # [r, M, groups]
        sums = [(weights * s.float()[..., None, :]) @ numbers[..., g, :] for g, s in enumerate(scale.unbind(-1))]
        return _side_by_side(sums).unflatten(-1, (self.groups(dim), -1)).add_(shifts[..., None]).flatten(-2)


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
        """The scales meet the queries, once a group."""
        codes, scale, least = parts
        scaled = turned[:, None] * scale.float()[:, :, None]  # [r, groups, M, D]
        products = scaled @ self._codes(codes, turned.shape[-1]).mT  # [r, groups, M, tokens]
        products += (least.float() @ turned.mT)[..., None]
        return products.transpose(1, 2).flatten(2)


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
