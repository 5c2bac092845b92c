"""Decode attention over rows as Triton kernels: rows of unequal length, of several widths, split by length, merged exactly.

One kernel writes a new token behind its rows; one computes a split-KV work item a program (`split_plan`) and leaves a partial
softmax with its log-sum-exp; one merges the partial results of each query, of one row or of several. How long a row is stands
on the device, so a captured graph of them is right at every length; entries outside of a row's length are never read. Flash-
Decoding (Dao et al., 2023) splits a dense cache in the same way.

On a machine without a GPU the same code runs under TRITON_INTERPRET=1, which is how the tests run it.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from harness.engine.split_plan import BLOCK, TILE, DevicePlan
from harness.logits import Chunk

try:
    import triton
    import triton.language as tl
except ImportError:  # attention then takes the path in plain torch
    triton = tl = None

PARTS = 32  # partial results that are merged at once
LARGEST_HEAD = 256
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # its products of bfloat16 are wrong: there they are made in float32
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernel cannot run, or None."""
    if triton is None:
        return "triton is not installed"
    if dtype not in TYPES:
        return f"there is no kernel for {dtype}"
    if dim > LARGEST_HEAD:
        return f"there is no kernel for heads of size {dim}, over {LARGEST_HEAD}"
    return None


@lru_cache(maxsize=8)
def can_run(dtype: torch.dtype, dim: int) -> bool:
    """Says once why not."""
    reason = unsupported(dtype, dim)
    if reason:
        print(f"decode attention runs in plain torch: {reason}", file=sys.stderr)
    return reason is None


def attend_split(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    work: DevicePlan,
    scaling: float,
    softcap: float | None = None,
    positions: Tensor | None = None,
    asking: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries over the rows that they read; zeros for a query that sees nothing.

    Args:
        queries: [N, D]. keys, values: [P, D], the pool. length: [R], of the rows, at most what `work` was planned for.
        positions: [P] int32 and asking: [N], where something is to be hidden: entries behind the query's own position, and those
            that have left the `window`.
        sinks: [N] float32, of each query's head: one more part of its softmax, whose value is 0.

    Returns:
        [N, D]
    """
    held = positions if positions is not None else length
    at = asking if asking is not None else length
    tables = (work.row, work.item, work.reader, work.parts, work.span)
    masked = positions is not None
    beside = (queries.new_empty(0, dtype=torch.float32), False) if sinks is None else (sinks, True)
    reach = (window or 0, isinstance(window, Chunk))
    found: Tensor = row_attention(
        queries, keys, values, length, *tables, held, at, scaling, softcap or 0.0, masked, *reach, *beside
    )
    return found


@torch.library.custom_op("rows::attention", mutates_args=())
def row_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
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
) -> Tensor:
    """The work items, then the merging of their partial results. Tables as in `split_plan.SplitPlan`."""
    count, dim = queries.shape
    items = item.shape[1]
    padded = _power_of_two(dim)
    part = torch.empty((items * TILE, padded), dtype=torch.float32, device=queries.device)
    weight = torch.empty(items * TILE, dtype=torch.float32, device=queries.device)
    out = torch.empty_like(queries)
    if not count:
        return out
    partial, merged, _ = _kernels()
    wide = queries.dtype == torch.float32  # in shared memory twice as large: then fewer entries at once, and no second stage
    with _on(queries.device):
        partial[(items,)](
            queries, keys, values, length, positions, asking, row, item, reader, part, weight,
            row.shape[1], items, scaling, softcap, window,
            D=dim, DP=padded, TILE=TILE, BLOCK=BLOCK // 2 if padded > 128 else BLOCK,
            CAP=softcap > 0, MASKED=masked, WINDOWED=window > 0, CHUNKED=chunked, WIDE=INTERPRETED, num_stages=1 if wide else 2,
        )  # fmt: skip
        merged[(count,)](part, weight, parts, span, sinks, out, D=dim, DP=padded, PARTS=PARTS, SUNK=sunk)
    return out


@row_attention.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(queries)


@torch.library.custom_op("rows::append", mutates_args=("keys", "values", "positions", "length"))
def append_rows(
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    length: Tensor,
    row: Tensor,
    seen: Tensor,
    experts: Tensor,
    routed: bool,
) -> None:
    """Writes one new token of each cell behind all of the cell's rows, and makes those longer that it belongs to.

    Behind the others it lies in the room, where nobody reads it and the next token overwrites it.

    Args:
        new_keys, new_values: [C * H, D], heads of a cell side by side. keys, values: [P, D] and positions: [P], the pool.
        length: [R]. row: [4, R] first entry in the pool, line of the new keys, cell, expert group. seen: [C], positions.
        experts: [C], the expert group that takes each token, if `routed`.
    """
    dim, rows = keys.shape[1], length.shape[0]
    if not rows:
        return
    _, _, append = _kernels()
    with _on(keys.device):
        # one warp: all of its lanes have read the length before it is changed
        append[(rows,)](
            new_keys, new_values, keys, values, positions, length, row, seen, experts, rows,
            D=dim, DP=_power_of_two(dim), STRIPED=routed, num_warps=1,
        )  # fmt: skip


@append_rows.register_fake
def _(*_: Any) -> None:
    return None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any, Any]:
    """Made when first asked for: an interpreter or a GPU must be there."""
    return triton.jit(_partial), triton.jit(_merge), triton.jit(_append)


def _partial(  # type: ignore[no-untyped-def]
    Q, K, V, LENGTH, POSITIONS, ASKING, ROW, ITEM, READER, PART, WEIGHT, rows, items, scaling, softcap, window,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, WIDE: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """One piece: an online softmax over its entries, in float32."""
    item = tl.program_id(0).to(tl.int64)
    row = tl.load(ITEM + item)
    tile = tl.load(ITEM + items + item)
    begin = tl.load(ITEM + 2 * items + item)
    end = tl.minimum(tl.load(ITEM + 3 * items + item), tl.load(LENGTH + row))
    start = tl.load(ROW + row)
    first = tl.load(ROW + rows + row)
    count = tl.load(ROW + 2 * rows + row)
    mine = tile * TILE + tl.arange(0, TILE)
    there = mine < count
    line = tl.load(READER + first + mine, mask=there, other=0)
    d = tl.arange(0, DP)
    inside = d < D
    q = tl.load(Q + line[:, None] * D + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    if MASKED:
        asking = tl.load(ASKING + line, mask=there, other=0)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, DP], tl.float32)
    for at in range(begin, end, BLOCK):
        t = at + tl.arange(0, BLOCK)
        held = t < end
        where = (start + t)[:, None] * D + d[None, :]
        seen = held[:, None] & inside[None, :]
        k = tl.load(K + where, mask=seen, other=0.0)
        if WIDE:
            k = k.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scaling
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
        v = tl.load(V + where, mask=seen, other=0.0)
        if WIDE:
            v = v.to(tl.float32)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee").to(tl.float32)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    some = total > 0
    safe = tl.where(some, total, 1.0)
    place = item * TILE + tl.arange(0, TILE)
    tl.store(PART + place[:, None] * DP + d[None, :], sums / safe[:, None], mask=there[:, None] & inside[None, :])
    tl.store(WEIGHT + place, tl.where(some, top + tl.log(safe), float("-inf")), mask=there)


def _merge(  # type: ignore[no-untyped-def]
    PART, WEIGHT, PARTS_OF, SPAN, SINK, OUT, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, SUNK: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """One query: its parts weighed by their log-sum-exps, many at once: of a long row there are hundreds. A sink is a part."""
    query = tl.program_id(0).to(tl.int64)
    begin = tl.load(SPAN + query)
    end = tl.load(SPAN + query + 1)
    d = tl.arange(0, DP)
    inside = d < D
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if SUNK:
        top = tl.zeros([1], tl.float32) + tl.load(SINK + query)
        total = tl.full([1], 1.0, tl.float32)
    sums = tl.zeros([DP], tl.float32)
    for at in range(begin, end, PARTS):
        number = at + tl.arange(0, PARTS)
        there = number < end
        place = tl.load(PARTS_OF + number, mask=there, other=0)
        lse = tl.load(WEIGHT + place, mask=there, other=float("-inf"))
        higher = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - base)
        weights = tl.exp(lse - base)
        part = tl.load(PART + place[:, None] * DP + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        sums = sums * shrink + tl.sum(weights[:, None] * part, 0)
        total = total * shrink + tl.sum(weights, 0)
        top = higher
    safe = tl.where(total > 0, total, 1.0)
    tl.store(OUT + query * D + d, (sums / safe).to(OUT.dtype.element_ty), mask=inside)


def _append(  # type: ignore[no-untyped-def]
    NEW_K, NEW_V, K, V, POSITIONS, LENGTH, ROW, SEEN, EXPERTS, rows,
    D: tl.constexpr, DP: tl.constexpr, STRIPED: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """One row, one token."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ROW + rows + row)
    cell = tl.load(ROW + 2 * rows + row)
    length = tl.load(LENGTH + row)
    where = tl.load(ROW + row) + length
    d = tl.arange(0, DP)
    inside = d < D
    tl.store(K + where * D + d, tl.load(NEW_K + source * D + d, mask=inside), mask=inside)
    tl.store(V + where * D + d, tl.load(NEW_V + source * D + d, mask=inside), mask=inside)
    tl.store(POSITIONS + where, tl.load(SEEN + cell).to(tl.int32))
    if STRIPED:
        taken = tl.load(EXPERTS + cell) == tl.load(ROW + 3 * rows + row)
        tl.store(LENGTH + row, length + taken.to(tl.int64))
    else:
        tl.store(LENGTH + row, length + 1)
