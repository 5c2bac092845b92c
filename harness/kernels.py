"""Decode attention over rows as one Triton kernel: rows of unequal length, of several widths, split by length, merged exactly.

A program takes one piece of one row: at most 16 of the queries that read it (a tensor core's least number of rows; fewer are
padded) against at most `SPLIT` of its entries, and leaves a partial softmax with its log-sum-exp. A second kernel merges the
pieces of each query. So a row of 100,000 entries is worked on by many programs at once, and one of 10 by a single one; entries
outside of a row's length are never read. Flash-Decoding (Dao et al., 2023) splits a dense cache in the same way.

On a machine without a GPU the same code runs under TRITON_INTERPRET=1, which is how the tests run it.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # attention then takes the path in plain torch
    triton = tl = None

TILE = 16  # queries of a program
BLOCK = 64  # entries of a step of its loop
SPLIT = 512  # entries of a program
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


@dataclass(frozen=True)
class Work:
    """Who reads what: one line a row, and one a piece. All on the host."""

    start: np.ndarray  # [R] first entry of each row in the pool
    first: np.ndarray  # [R] its first query
    queries: np.ndarray  # [R] how many read it
    row: np.ndarray  # [I] of each piece
    tile: np.ndarray  # [I] which of the row's queries, in tiles
    begin: np.ndarray  # [I] entries of the row
    end: np.ndarray  # [I]
    piece: np.ndarray  # [M] first piece of each query
    pieces: np.ndarray  # [M] and how many: `tiles` apart
    stride: np.ndarray  # [M]
    within: np.ndarray  # [M] which line of its tile


def plan(start: np.ndarray, length: np.ndarray, queries: np.ndarray, split: int = SPLIT) -> Work:
    """Cuts rows into pieces. A row without entries has one piece, which is empty: its queries get a log-sum-exp of -inf.

    Args:
        start, length: [R] where a row lies in the pool. queries: [R] how many read it, side by side in the order of rows.
    """
    splits = np.maximum(1, -(-length // split))
    tiles = np.maximum(1, -(-queries // TILE))
    count = splits * tiles
    row = np.repeat(np.arange(len(start)), count)
    within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    part, tile = np.divmod(within, tiles[row])  # the tiles of one split lie side by side
    begin = part * split
    end = np.minimum(begin + split, length[row])
    reader = np.repeat(np.arange(len(start)), queries)
    mine = np.arange(len(reader)) - np.repeat(np.cumsum(queries) - queries, queries)
    piece = (np.cumsum(count) - count)[reader] + mine // TILE
    first = np.cumsum(queries) - queries
    return Work(start, first, queries, row, tile, begin, end, piece, splits[reader], tiles[reader], mine % TILE)


def attend_pieces(
    asked: Tensor,
    keys: Tensor,
    values: Tensor,
    work: Work,
    softcap: float | None = None,
    positions: Tensor | None = None,
    asking: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries over the rows that they read.

    Args:
        asked: [M, D], in the order of rows. keys, values: [P, D], the pool.
        positions: [P] int32 and asking: [M] int32, where something is to be hidden: entries behind the query's own position,
            and those that have left the `window`.

    Returns:
        [M, D] and the log-sum-exp [M] float32
    """
    device = asked.device
    row = _table(np.stack([work.start, work.first, work.queries]), device)
    item = _table(np.stack([work.row, work.tile, work.begin, work.end]), device)
    merge = _table(np.stack([work.piece, work.pieces, work.stride, work.within]), device)
    held = positions if positions is not None else torch.zeros(1, dtype=torch.int32, device=device)
    at = asking if asking is not None else held
    found: tuple[Tensor, Tensor] = row_attention(
        asked, keys, values, row, item, merge, held, at, softcap or 0.0, positions is not None, window or 0
    )
    return found


def _table(columns: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(columns, dtype=torch.int64).to(device)


@torch.library.custom_op("rows::attention", mutates_args=())
def row_attention(
    asked: Tensor,
    keys: Tensor,
    values: Tensor,
    row: Tensor,
    item: Tensor,
    merge: Tensor,
    positions: Tensor,
    asking: Tensor,
    softcap: float,
    masked: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The two kernels. Tables as in `Work`: row [3, R], item [4, I], merge [4, M]."""
    count, dim = asked.shape
    items = item.shape[1]
    padded = _power_of_two(dim)
    part = torch.empty((items * TILE, padded), dtype=torch.float32, device=asked.device)
    weight = torch.empty(items * TILE, dtype=torch.float32, device=asked.device)
    out, lse = torch.empty_like(asked), torch.empty(count, dtype=torch.float32, device=asked.device)
    if not count:
        return out, lse
    partial, merged = _kernels()
    wide = asked.dtype == torch.float32  # in shared memory twice as large: then fewer entries at once, and no second stage
    with torch.cuda.device(asked.device) if asked.is_cuda else nullcontext():  # triton launches on the current device
        partial[(items,)](
            asked, keys, values, positions, asking, row, item, part, weight, row.shape[1], items, softcap, window,
            D=dim, DP=padded, TILE=TILE, BLOCK=BLOCK // 2 if padded > 128 else BLOCK,
            CAP=softcap > 0, MASKED=masked, WINDOWED=window > 0, WIDE=INTERPRETED, num_stages=1 if wide else 2,
        )  # fmt: skip
        merged[(count,)](part, weight, merge, out, lse, count, D=dim, DP=padded, TILE=TILE)
    return out, lse


@row_attention.register_fake
def _(asked: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(asked), asked.new_empty(asked.shape[0], dtype=torch.float32)


def _power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    """Made when first asked for: an interpreter or a GPU must be there."""
    return triton.jit(_partial), triton.jit(_merge)


def _partial(  # type: ignore[no-untyped-def]
    Q, K, V, POSITIONS, ASKING, ROW, ITEM, PART, WEIGHT, rows, items, softcap, window,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, WIDE: tl.constexpr,
):  # type: ignore[no-untyped-def] # fmt: skip
    """One piece: an online softmax over its entries, in float32."""
    item = tl.program_id(0).to(tl.int64)
    row = tl.load(ITEM + item)
    tile = tl.load(ITEM + items + item)
    begin = tl.load(ITEM + 2 * items + item)
    end = tl.load(ITEM + 3 * items + item)
    start = tl.load(ROW + row)
    first = tl.load(ROW + rows + row)
    count = tl.load(ROW + 2 * rows + row)
    mine = tile * TILE + tl.arange(0, TILE)
    there = mine < count
    d = tl.arange(0, DP)
    inside = d < D
    q = tl.load(Q + (first + mine)[:, None] * D + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    if MASKED:
        asking = tl.load(ASKING + first + mine, mask=there, other=0)
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
        logits = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32)
        if CAP:
            logits = softcap * (2 / (1 + tl.exp(-2 * logits / softcap)) - 1)
        shown = held[None, :] & there[:, None]
        if MASKED:
            position = tl.load(POSITIONS + start + t, mask=held, other=0)
            shown = shown & (position[None, :] <= asking[:, None])
            if WINDOWED:
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
    tl.store(PART + place[:, None] * DP + d[None, :], sums / safe[:, None])
    tl.store(WEIGHT + place, tl.where(some, top + tl.log(safe), float("-inf")))


def _merge(PART, WEIGHT, MERGE, OUT, LSE, count, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One query: its pieces weighed by their log-sum-exps."""
    query = tl.program_id(0)
    piece = tl.load(MERGE + query)
    pieces = tl.load(MERGE + count + query)
    stride = tl.load(MERGE + 2 * count + query)
    within = tl.load(MERGE + 3 * count + query)
    d = tl.arange(0, DP)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([DP], tl.float32)
    for number in range(0, pieces):
        place = (piece + number * stride) * TILE + within
        lse = tl.load(WEIGHT + place + tl.arange(0, 1))
        higher = tl.maximum(top, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - base)
        weight = tl.exp(lse - base)
        sums = sums * shrink + weight * tl.load(PART + place * DP + d)
        total = total * shrink + weight
        top = higher
    some = total > 0
    safe = tl.where(some, total, 1.0)
    tl.store(OUT + query * D + d, (sums / safe).to(OUT.dtype.element_ty), mask=d < D)
    tl.store(LSE + query + tl.arange(0, 1), tl.where(some, top + tl.log(safe), float("-inf")))
