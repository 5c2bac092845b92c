"""signs_and_means: a key as the signs of its numbers and their mean size, a value in four bits.

A storage says how a row holds its entries. This file brings a codec of its own for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.storage import Codec, Field
from storages.bits import cannot_pack, pack_bits, unpack_bits
from storages.integers import ByToken


@dataclass(frozen=True)
class Signs(Codec):
    def fields(self, dim: int) -> tuple[Field, ...]:
        """What is held of one token."""
        return Field("signs", dim // 8, "uint8"), Field("size", 1, "float16")

    def cannot_hold(self, dim: int) -> str | None:
        return cannot_pack(dim, 1)

    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """[m, 1, D] float32 -> each field, [m, width]. Constant time, no look at the host: a captured step packs too."""
        token = vectors[:, 0]
        return pack_bits((token > 0).to(torch.uint8), 1), token.abs().mean(-1, keepdim=True).half()

    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Each field, [..., width] -> [..., D] float32."""
        return (2 * unpack_bits(parts[0], dim, 1) - 1) * parts[1].float()


@dataclass(frozen=True)  # its repr is part of every row, so every setting is on record
class SignsAndMeans:
    value_bits: int = 4  # `signs_and_means(value_bits=8)` on the command line changes it
    spared: int = 0  # first layers, and last ones, in 16 bits
    residual: int = 0  # newest entries of a row in 16 bits
    version: int = 1  # raised when the same settings hold other numbers

    @property
    def keys(self) -> Codec:
        return Signs()

    @property
    def values(self) -> Codec:
        return ByToken(self.value_bits)


STORAGES = {"signs_and_means": SignsAndMeans()}
