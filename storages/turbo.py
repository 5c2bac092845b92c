"""TurboQuant as it is served: keys rotated and put on the best levels for a normal distribution, values uniform by token.

Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", 2025. arxiv.org/abs/2504.19874
A key's norm is kept apart; the coordinates of its direction, rotated by a Hadamard matrix, are nearly normal with variance 1 / D,
so one table of Lloyd-Max levels serves all of them. Served without the paper's second stage on the residual, with the rounded
direction made a unit vector again, and with the first and the last two layers in 16 bits: as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt
from typing import TYPE_CHECKING

from harness.storage import LARGEST_HALF, Codec, Field, KernelFormat
from storages.bits import at_once, cannot_pack, code_bytes, pack_bits, packed_width, together
from storages.integers import ByToken, check_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_FLOAT8 = 448.0  # e4m3
CLOSE = 1e-12  # levels that move by less have arrived


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2**bits levels of least mean squared error for a standard normal distribution, ascending.

    Each level is the mean of what lies nearer to it than to its neighbours (Lloyd, 1957; Max, 1960), by repetition.
    """
    count = 2**bits
    levels = [(2 * number + 1 - count) * 3 / count for number in range(count)]
    while True:
        edges = [-inf, *((low + high) / 2 for low, high in pairwise(levels)), inf]
        moved = [_mean(low, high) for low, high in pairwise(edges)]
        done = max(abs(new - old) for new, old in zip(moved, levels, strict=True)) < CLOSE
        levels = moved
        if done:
            return tuple(
                (high - low) / 2 for high, low in zip(levels, reversed(levels), strict=True)
            )  # symmetric to the last bit


def _mean(low: float, high: float) -> float:
    """Of a standard normal number between the two."""
    density = [0.0 if abs(at) == inf else exp(-at * at / 2) / sqrt(2 * pi) for at in (low, high)]
    mass = (erf(high / sqrt(2)) - erf(low / sqrt(2))) / 2
    return (density[0] - density[1]) / mass


@lru_cache(maxsize=16)
def hadamard(dim: int, device: torch.device) -> Tensor:
    """[D, D] float32, Sylvester's, scaled to be orthogonal; symmetric, so its own inverse. D a power of two."""
    import torch

    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / sqrt(dim)).to(device)


@dataclass(frozen=True)
class Rotated(Codec):
    """A direction on Lloyd-Max levels in a rotated basis, and a factor: the norm over that of the rounded direction.

    The quotient is held instead of the norm: the same vector for the same bytes, and reading takes no norms.
    """

    bits: int = 4

    @property
    def kernel(self) -> KernelFormat:  # type: ignore[override]
        return KernelFormat("levels", self.bits, levels=lloyd_max(self.bits))

    def fields(self, dim: int) -> tuple[Field, ...]:
        return Field("codes", packed_width(dim, self.bits), "uint8"), Field("factor", 1, "float16")

    def cannot_hold(self, dim: int) -> str | None:
        if dim & (dim - 1):
            return f"the Hadamard rotation needs heads of a power of two, this model's are of size {dim}"
        return cannot_pack(dim, self.bits)

    def _table(self, device: torch.device) -> Tensor:
        import torch

        return torch.tensor(lloyd_max(self.bits), device=device)

    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        norm = vectors[:, 0].norm(dim=-1, keepdim=True)  # [m, 1]
        dim = vectors.shape[-1]
        direction = self.turn(vectors[:, 0] / norm.clamp(min=1e-30)) * sqrt(dim)
        table = self._table(vectors.device)
        codes = nearest(direction, table)
        factor = (norm / looked_up(table, codes).norm(dim=-1, keepdim=True)).clamp(max=LARGEST_HALF).half()
        return pack_bits(codes, self.bits), factor

    def _rotated(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The levels of each token, [..., D]: its vector in the rotated basis but for the factor."""
        return looked_up(self._table(parts[0].device), code_bytes(parts[0], dim, self.bits))

    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        return self.turn(self._rotated(parts, dim) * parts[1].float())

    def turn(self, queries: Tensor) -> Tensor:
        return queries @ hadamard(queries.shape[-1], queries.device)

    def dot(self, turned: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Of the levels as they are looked up, so it is the query's coordinates that change places."""
        levels, many = at_once(parts[0], self.bits, lloyd_max(self.bits))
        return (together(turned, many) @ levels.mT).mul_(parts[1].float().mT)


def nearest(numbers: Tensor, levels: Tensor) -> Tensor:
    """Which of the levels, sorted and symmetric about 0, each number is nearest to, uint8.

    On a CPU the edges between positive levels are counted that lie below a number's size: passes over all numbers are several
    times as fast there as a search for each.
    """
    import torch

    edges, half = (levels[1:] + levels[:-1]) / 2, len(levels) // 2
    if numbers.device.type != "cpu":
        return torch.bucketize(numbers, edges, out_int32=True).to(torch.uint8)
    size, above = numbers.abs(), torch.empty(numbers.shape, dtype=torch.bool)
    count = torch.zeros(numbers.shape, dtype=torch.uint8)
    for edge in edges[half:].tolist():
        count += torch.gt(size, edge, out=above).view(torch.uint8)
    return torch.where(torch.gt(numbers, 0, out=above), count.add(half), count.neg().add_(half - 1))


def looked_up(table: Tensor, numbers: Tensor) -> Tensor:
    """`table[numbers]` of bytes: asked for in this way it is several times as fast on a CPU."""
    return table.index_select(0, numbers.int().flatten()).view(numbers.shape)


@lru_cache(maxsize=8)
def _float8s(device: torch.device) -> Tensor:
    """What each of the 256 bytes stands for."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@dataclass(frozen=True)
class Float8(Codec):
    """Each number in 8 bits, 4 of exponent and 3 of mantissa (e4m3), unscaled; what is larger than it can say is its largest."""

    kernel = KernelFormat("float8", 8)

    def fields(self, dim: int) -> tuple[Field, ...]:
        return (Field("codes", dim, "uint8"),)

    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        import torch

        return (vectors[:, 0].clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).view(torch.uint8),)

    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        return looked_up(_float8s(parts[0].device), parts[0])


@dataclass(frozen=True)
class Turbo:
    key_bits: int = 4  # 8: float8, not rotated
    value_bits: int = 4
    spared: int = 2  # first layers, and last ones, in 16 bits
    version: int = 1
    residual = 0

    def __post_init__(self) -> None:
        check_bits(self.key_bits, (2, 3, 4, 8))
        check_bits(self.value_bits)
        if self.spared < 0:
            raise ValueError("spared is a number of layers")

    @property
    def keys(self) -> Codec:
        return Float8() if self.key_bits == 8 else Rotated(self.key_bits)

    @property
    def values(self) -> Codec:
        return ByToken(self.value_bits)
