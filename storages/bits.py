"""Numbers of 1, 2, 3, 4 or 8 bits in bytes, by planes.

A plane holds w bits of every code. Its byte k has those of the codes k, k + m, k + 2m, ... for m = n * w / 8, the first in the
lowest bits: so unpacking writes 8 / w stretches, each with one shift and one mask. Three bits are a plane of the lower two and a
plane of the upper one.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
KNOWN = tuple(PLANES)
EVERY_SECOND = 0b01010101


def packed_width(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return count * bits // 8


def cannot_pack(count: int, bits: int) -> str | None:
    """Why so many codes do not fill bytes, or None."""
    least = max(8 // width for width in PLANES[bits])
    return f"{count} codes of {bits} bits do not fill whole bytes: {least} at a time do" if count % least else None


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """[..., n] uint8 below 2**bits -> [..., n * bits / 8] uint8."""
    import torch

    parts, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        stretches = plane.unflatten(-1, (8 // width, -1)).unbind(-2)
        packed = stretches[0].clone()
        for number, stretch in enumerate(stretches[1:], 1):
            packed |= stretch << (number * width)
        parts.append(packed)
        shift += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def stretches_of(packed: Tensor, bits: int) -> list[Tensor]:
    """The codes [..., n] of one plane as float32 in stretches, side by side."""
    return [stretch.float() for stretch in _stretches(packed, bits)]


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """[..., n * bits / 8] uint8 -> [..., n] float32. One pass of bytes and one conversion: it stays in a processor's cache."""
    import torch

    if len(PLANES[bits]) > 1:
        return code_bytes(packed, count, bits).float()
    out = torch.empty((*packed.shape[:-1], count), dtype=torch.float32, device=packed.device)
    for stretch, part in zip(out.unflatten(-1, (8 // bits, -1)).unbind(-2), _stretches(packed, bits), strict=True):
        stretch.copy_(part)
    return out


def at_once(packed: Tensor, bits: int, levels: tuple[float, ...]) -> tuple[Tensor, int]:
    """What codes of 2, 3 or 4 bits stand for, float32 [..., n], several looked up as one number of 64 or 128 bits; and how many.

    They come as `together` puts n numbers: 0, m, 2m, ..., then 1, 1 + m, ... for m = n / many. A byte of 4 or 2 bits holds just
    the codes that are looked up at once. Of 3 bits byte k of the lower plane holds the lower bits of four; their upper ones are
    every second bit of byte k of the upper plane, which is half as wide: even ones for its first half, odd ones behind.
    """
    import torch

    if bits == 3:
        lower, upper = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], -1)
        asked = lower.int() | ((torch.cat([upper, upper >> 1], -1) & EVERY_SECOND).int() << 8)
    else:
        asked = packed.int()
    table, many = _table(bits, levels, packed.device)
    return table.index_select(0, asked.flatten()).view(torch.float32).view(*asked.shape[:-1], -1), many


def together(numbers: Tensor, many: int) -> Tensor:
    """[..., n] in the order of what `at_once` gives."""
    return numbers.unflatten(-1, (many, -1)).transpose(-1, -2).flatten(-2)


def apart(numbers: Tensor, many: int) -> Tensor:
    """[..., n] out of that order again."""
    return numbers.unflatten(-1, (-1, many)).transpose(-1, -2).flatten(-2)


@lru_cache(maxsize=16)
def _table(bits: int, levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, int]:
    """By what bytes hold, the levels of their codes as one number of as many bytes; and how many these are."""
    import torch

    many = 2 if bits == 4 else 4
    asked = torch.arange(2 ** (16 if bits == 3 else 8))
    if bits == 3:
        codes = [((asked >> 2 * number) & 3) | ((asked >> (8 + 2 * number) & 1) << 2) for number in range(many)]
    else:
        codes = [(asked >> bits * number) & (2**bits - 1) for number in range(many)]
    found = torch.tensor(levels)[torch.stack(codes, -1)].view(torch.int64 if many == 2 else torch.complex128)
    return found[:, 0].to(device), many


def code_bytes(packed: Tensor, count: int, bits: int) -> Tensor:
    """[..., n * bits / 8] uint8 -> [..., n] uint8, a code each."""
    import torch

    edges = [0]
    for width in PLANES[bits]:
        edges.append(edges[-1] + packed_width(count, width))
    codes, shift = None, 0
    for width, (low, high) in zip(PLANES[bits], pairwise(edges), strict=True):
        plane = torch.cat(_stretches(packed[..., low:high], width), -1)
        codes = plane if codes is None else codes.bitwise_or_(plane << shift)
        shift += width
    assert codes is not None
    return codes


def _stretches(plane: Tensor, width: int) -> list[Tensor]:
    """The codes of one plane, 8 / width stretches of them."""
    if width == 8:
        return [plane]
    last = 8 // width - 1
    between = [(plane >> (number * width)) & (2**width - 1) for number in range(1, last)]
    return [plane & (2**width - 1), *between, plane >> (last * width)]  # each with no more passes than it needs
