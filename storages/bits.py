"""Numbers of 1, 2, 3, 4 or 8 bits in bytes, by planes.

A plane holds w bits of every code. Its byte k has those of the codes k, k + m, k + 2m, ... for m = n * w / 8, the first in the
lowest bits: so unpacking writes 8 / w stretches, each with one shift and one mask. Three bits are a plane of the lower two and a
plane of the upper one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
KNOWN = tuple(PLANES)


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


def stretches_of(packed: Tensor, count: int, bits: int) -> list[Tensor]:
    """The codes [..., n] as float32 in stretches, side by side. One where they lie in several planes."""
    if len(PLANES[bits]) > 1:
        return [unpack_bits(packed, count, bits)]
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
