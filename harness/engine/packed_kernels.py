"""Decode attention over packed rows as a Triton kernel: codes are unpacked in registers, so what is read are their bytes.

The same work items, partial softmaxes and merging as `kernels`, which see no difference. Keys are read by their codec's format
(`harness.storage.KernelFormat`), values as codes with a scale and a least number; what is in 16 bits is read from the tails. A
query that found m entries in a row reads the first of them packed, by the same rule as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from harness.engine import kernels
from harness.engine.packed import PackedEntries
from harness.engine.split_plan import BLOCK, TILE, DevicePlan
from harness.logits import Chunk
from harness.storage import Codec, Storage

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

KINDS = {"nothing": 0, "affine": 1, "channels": 2, "levels": 3, "float8": 4}
SMALLER = 2  # than the unpacked kernel's steps: codes, scales and what they become lie in registers beside each other


def can_read(storage: Storage) -> bool:
    """Is there a kernel for these rows? Without one they are read in plain torch."""
    keys, values = (_kind(codec) for codec in (storage.keys, storage.values))
    return keys is not None and values in ("affine", "nothing")


def _kind(codec: Codec) -> str | None:
    if not codec.fields(8):
        return "nothing"
    return None if codec.kernel is None else codec.kernel.kind


@dataclass(frozen=True)
class Constants:
    """What the kernel is built for."""

    kind: int  # of keys
    key_bits: int
    key_group: int  # numbers that share a scale, or tokens
    has_values: bool
    value_bits: int
    value_group: int
    residual: int  # 0: everything is packed

    @classmethod
    def of(cls, storage: Storage, dim: int) -> Constants:
        keys, values = storage.keys.kernel, storage.values.kernel
        kind = KINDS[str(_kind(storage.keys))]
        ours = (kind, keys.bits, keys.group or dim) if keys else (kind, 8, dim)
        theirs = (True, values.bits, values.group or dim) if values else (False, 8, dim)
        return cls(*ours, *theirs, storage.residual)


def attend_packed(
    queries: Tensor,
    packed: PackedEntries,
    places: Tensor,
    length: Tensor,
    before: Tensor,
    work: DevicePlan,
    scaling: float,
    softcap: float | None = None,
    positions: Tensor | None = None,
    asking: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `kernels.attend_split`, over packed rows.

    Args:
        places: [4, R] int64, as `packed.Places`. before: [M], entries that each reader found in its row.
    """
    held = positions if positions is not None else length
    at = asking if asking is not None else length
    storage = packed.storage
    constants = Constants.of(storage, packed.dim)
    turned = storage.keys.turn(queries.float()).to(queries.dtype) if packed.keys else queries
    levels = storage.keys.kernel.levels if storage.keys.kernel else ()
    table = torch.tensor(levels or (0.0,), dtype=torch.float32, device=queries.device) if levels else held
    fields = ([field.contiguous() for field in side] for side in (packed.keys, packed.values))  # on a GPU they are
    keys, values = ([*side, *[held] * (3 - len(side))] for side in fields)
    tables = (work.row, work.item, work.reader, work.parts, work.span)
    numbers = [constants.kind, constants.key_bits, constants.key_group, int(constants.has_values), constants.value_bits]
    numbers += [constants.value_group, constants.residual]
    hide = (held, at, scaling, softcap or 0.0, positions is not None, window or 0, isinstance(window, Chunk))
    tails = (packed.key_tail, packed.value_tail)
    beside = (queries.new_empty(0, dtype=torch.float32), False) if sinks is None else (sinks, True)
    found: Tensor = packed_attention(
        queries, turned, keys, values, *tails, table, places, before, length, *tables, *hide, *beside, numbers
    )
    return found


@torch.library.custom_op("rows::packed_attention", mutates_args=())
def packed_attention(
    queries: Tensor,
    turned: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    levels: Tensor,
    places: Tensor,
    before: Tensor,
    length: Tensor,
    row: Tensor,
    item: Tensor,
    reader: Tensor,
    parts: Tensor,
    span: Tensor,
    positions: Tensor,
    asking: Tensor,
    scaling: float,
    softcap: float,
    masked: bool,
    window: int,
    chunked: bool,
    sinks: Tensor,
    sunk: bool,
    numbers: list[int],
) -> Tensor:
    """The work items, then the merging of their partial results. `numbers`: the fields of `Constants`."""
    count, dim = queries.shape
    items, padded = item.shape[1], kernels._power_of_two(dim)
    part = torch.empty((items * TILE, padded), dtype=torch.float32, device=queries.device)
    weight = torch.empty(items * TILE, dtype=torch.float32, device=queries.device)
    out = torch.empty_like(queries)
    if not count:
        return out
    _, merged, _ = kernels._kernels()
    kind, key_bits, key_group, has_values, value_bits, value_group, residual = numbers
    with kernels._on(queries.device):
        _kernel()[(items,)](
            queries, turned, *keys, *values, key_tail, value_tail, levels, places, before, length, positions, asking,
            row, item, reader, part, weight, row.shape[1], items, scaling, softcap, window, residual,
            D=dim, DP=padded, TILE=TILE, BLOCK=block_of(padded), KIND=kind, KEY_BITS=key_bits, KEY_GROUP=key_group,
            HAS_VALUES=bool(has_values), VALUE_BITS=value_bits, VALUE_GROUP=value_group, TAILED=residual > 0,
            CAP=softcap > 0, MASKED=masked, WINDOWED=window > 0, CHUNKED=chunked, WIDE=kernels.INTERPRETED, num_stages=1,
        )  # fmt: skip
        merged[(count,)](part, weight, parts, span, sinks, out, D=dim, DP=padded, PARTS=kernels.PARTS, SUNK=sunk)
    return out


@packed_attention.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(queries)


def block_of(padded: int) -> int:
    """Entries of a step of the kernel's loop."""
    return max(16, (BLOCK // 2 if padded > 128 else BLOCK) // SMALLER)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Made when first asked for: an interpreter or a GPU must be there."""
    return triton.jit(_packed)


def _packed(  # type: ignore[no-untyped-def]
    Q, TURNED, KC, KS, KL, VC, VS, VL, KEY_TAIL, VALUE_TAIL, LEVELS, PLACES, BEFORE, LENGTH, POSITIONS, ASKING,
    ROW, ITEM, READER, PART, WEIGHT, rows, items, scaling, softcap, window, residual,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr, KEY_BITS: tl.constexpr, KEY_GROUP: tl.constexpr,
    HAS_VALUES: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_GROUP: tl.constexpr, TAILED: tl.constexpr,
    CAP: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """One work item: an online softmax over its entries, in float32."""
    item = tl.program_id(0).to(tl.int64)
    row = tl.load(ITEM + item)
    tile = tl.load(ITEM + items + item)
    begin = tl.load(ITEM + 2 * items + item)
    end = tl.minimum(tl.load(ITEM + 3 * items + item), tl.load(LENGTH + row))
    start = tl.load(ROW + row)
    first = tl.load(ROW + rows + row)
    count = tl.load(ROW + 2 * rows + row)
    packed = tl.load(PLACES + row)
    group = tl.load(PLACES + rows + row)
    mine = tile * TILE + tl.arange(0, TILE)
    there = mine < count
    line = tl.load(READER + first + mine, mask=there, other=0)
    d = tl.arange(0, DP)
    inside = d < D
    q = tl.load(TURNED + line[:, None] * D + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    if TAILED:
        plain = tl.load(Q + line[:, None] * D + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        key_tail = tl.load(PLACES + 2 * rows + row)
        value_tail = tl.load(PLACES + 3 * rows + row)
        if WIDE:
            plain = plain.to(tl.float32)
        before = tl.load(BEFORE + first + mine, mask=there, other=0)
        key_bound = before // residual * residual
        value_bound = tl.maximum(before - residual, 0)
        most = tl.max(tl.where(there, before, 0), 0)
        least = tl.min(tl.where(there, before, most), 0)
        keys_until = most // residual * residual
        keys_from = least // residual * residual
        values_until = tl.maximum(most - residual, 0)
        values_from = tl.maximum(least - residual, 0)
    if MASKED:
        asking = tl.load(ASKING + line, mask=there, other=0)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, DP], tl.float32)
    for at in range(begin, end, BLOCK):
        t = at + tl.arange(0, BLOCK)
        held = t < end
        logits = tl.zeros([TILE, BLOCK], tl.float32)
        if KIND != 0:
            read = held
            if TAILED:
                read = held & (t < keys_until)
            seen = read[:, None] & inside[None, :]
            entry = (group * KEY_GROUP if KIND == 2 else packed) + t
            codes = KC + (entry * (D * KEY_BITS // 8))[:, None]
            if KEY_BITS == 3:
                low = tl.load(codes + (d % (D // 4))[None, :], mask=seen, other=0).to(tl.int32)
                high = tl.load(codes + (D // 4 + d % (D // 8))[None, :], mask=seen, other=0).to(tl.int32)
                code = (low >> (2 * (d // (D // 4)))[None, :]) & 3
                code = code | (((high >> (d // (D // 8))[None, :]) & 1) << 2)
            else:
                width: tl.constexpr = D * KEY_BITS // 8
                code = tl.load(codes + (d % width)[None, :], mask=seen, other=0).to(tl.int32)
                code = (code >> (KEY_BITS * (d // width))[None, :]) & (2**KEY_BITS - 1)
            if KIND == 3:
                k = tl.load(LEVELS + code)
                factor = tl.load(KS + entry, mask=read, other=0.0).to(tl.float32)
            elif KIND == 4:
                exponent = (code >> 3) & 15
                share = (code & 7).to(tl.float32) / 8
                size = tl.where(exponent == 0, share * 0.015625, (1 + share) * tl.exp2((exponent - 7).to(tl.float32)))
                k = tl.where(code > 127, -size, size)
            else:
                if KIND == 2:
                    scales = ((entry // KEY_GROUP) * D)[:, None] + d[None, :]
                else:
                    scales = (entry * (D // KEY_GROUP))[:, None] + (d // KEY_GROUP)[None, :]
                scale = tl.load(KS + scales, mask=seen, other=0.0).to(tl.float32)
                k = code.to(tl.float32) * scale + tl.load(KL + scales, mask=seen, other=0.0).to(tl.float32)
            k = tl.where(seen, k, 0.0).to(q.dtype)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32)
            if KIND == 3:
                logits = logits * factor[None, :]
        if TAILED:
            late = held & (t >= keys_from)
            k = tl.load(KEY_TAIL + (key_tail + t)[:, None] * D + d[None, :], mask=late[:, None] & inside[None, :], other=0.0)
            whole = tl.dot(plain, tl.trans(k.to(plain.dtype)), input_precision="ieee").to(tl.float32)
            logits = tl.where(t[None, :] < key_bound[:, None], logits, whole)
        logits = logits * scaling
        if CAP:
            logits = softcap * (2 / (1 + tl.exp(-2 * logits / softcap)) - 1)
        shown = held[None, :] & there[:, None]
        if MASKED:
            position = tl.load(POSITIONS + start + t, mask=held, other=0)
            shown = shown & (position[None, :] <= asking[:, None])
            if CHUNKED:
                shown = shown & (position[None, :] >= asking[:, None] - asking[:, None] % window)
            elif WINDOWED:
                shown = shown & (position[None, :] > asking[:, None] - window)
        logits = tl.where(shown, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf less -inf is no number
        shrink = tl.exp(top - base)
        weights = tl.exp(logits - base[:, None])
        sums = sums * shrink[:, None]
        if HAS_VALUES:
            read = held
            own = weights
            if TAILED:
                read = held & (t < values_until)
                own = tl.where(t[None, :] < value_bound[:, None], weights, 0.0)
            seen = read[:, None] & inside[None, :]
            codes = VC + ((packed + t) * (D * VALUE_BITS // 8))[:, None]
            if VALUE_BITS == 3:
                low = tl.load(codes + (d % (D // 4))[None, :], mask=seen, other=0).to(tl.int32)
                high = tl.load(codes + (D // 4 + d % (D // 8))[None, :], mask=seen, other=0).to(tl.int32)
                code = (low >> (2 * (d // (D // 4)))[None, :]) & 3
                code = code | (((high >> (d // (D // 8))[None, :]) & 1) << 2)
            else:
                narrow: tl.constexpr = D * VALUE_BITS // 8
                code = tl.load(codes + (d % narrow)[None, :], mask=seen, other=0).to(tl.int32)
                code = (code >> (VALUE_BITS * (d // narrow))[None, :]) & (2**VALUE_BITS - 1)
            scales = ((packed + t) * (D // VALUE_GROUP))[:, None] + (d // VALUE_GROUP)[None, :]
            scale = tl.load(VS + scales, mask=seen, other=0.0).to(tl.float32)
            v = code.to(tl.float32) * scale + tl.load(VL + scales, mask=seen, other=0.0).to(tl.float32)
            v = tl.where(seen, v, 0.0).to(q.dtype)
            sums += tl.dot(own.to(q.dtype), v, input_precision="ieee").to(tl.float32)
        if TAILED:
            late = held & (t >= values_from)
            v = tl.load(VALUE_TAIL + (value_tail + t)[:, None] * D + d[None, :], mask=late[:, None] & inside[None, :], other=0.0)
            rest = tl.where(t[None, :] < value_bound[:, None], 0.0, weights)
            sums += tl.dot(rest.to(q.dtype), v.to(q.dtype), input_precision="ieee").to(tl.float32)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    some = total > 0
    safe = tl.where(some, total, 1.0)
    place = item * TILE + tl.arange(0, TILE)
    tl.store(PART + place[:, None] * DP + d[None, :], sums / safe[:, None], mask=there[:, None] & inside[None, :])
    tl.store(WEIGHT + place, tl.where(some, top + tl.log(safe), float("-inf")), mask=there)
