"""Split-KV work items: rows cut into stretches that the kernels work on at once, and who reads what, as tables.

A work item is at most 16 of the queries that read a row (a tensor core's least number of rows; fewer are padded) against a
stretch of its entries. So a row of 100,000 entries is worked on by many programs at once, and one of 10 by a single one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

TILE = 16  # queries of a program
BLOCK = 64  # entries of a step of its loop
LONGEST = 512  # entries of a program
PROGRAMS = 4  # wanted at once on each of a device's processors


@dataclass(frozen=True)
class SplitPlan:
    """R rows, M readers (every query that reads a row, row by row), I work items, P partial results, N queries."""

    row: np.ndarray  # [3, R] first entry in the pool, first reader, how many read it
    item: np.ndarray  # [4, I] the row, which of its readers in tiles, from which of its entries to which
    reader: np.ndarray  # [M] the query
    parts: np.ndarray  # [P] lines of the partial results, query by query
    span: np.ndarray  # [N + 1] where those of each query begin

    def on(self, device: torch.device) -> DevicePlan:
        return DevicePlan(*(torch.as_tensor(getattr(self, field.name)).to(device) for field in fields(self)))


@dataclass(frozen=True)
class DevicePlan:
    """A `SplitPlan` on a device, int64."""

    row: Tensor
    item: Tensor
    reader: Tensor
    parts: Tensor
    span: Tensor


def plan_split(
    start: np.ndarray, length: np.ndarray, readers: np.ndarray, query: np.ndarray, queries: int, split: int
) -> SplitPlan:
    """Cuts rows into stretches of at most `split` entries. A row without entries has one work item, which is empty.

    Rows may turn out shorter than they were planned for, never longer.

    Args:
        start, length: [R] where a row lies in the pool, and for how many entries at most it is planned.
        readers: [R] how many queries read it. query: [M] which ones, row by row, out of `queries`.
    """
    splits = np.maximum(1, -(-length // split))
    tiles = np.maximum(1, -(-readers // TILE))
    count = splits * tiles
    row = np.repeat(np.arange(len(start)), count)
    part, tile = np.divmod(within_runs(count), tiles[row])  # the tiles of one split lie side by side
    begin = part * split
    item = np.stack([row, tile, begin, np.minimum(begin + split, length[row])])
    mine = np.repeat(np.arange(len(start)), readers)  # [M] the row of each reader
    place, line = np.divmod(within_runs(readers), TILE)
    first = ((np.cumsum(count) - count)[mine] + place) * TILE + line  # [M] line of its first partial result
    order = np.argsort(query, kind="stable")
    many = splits[mine][order]
    parts = np.repeat(first[order], many) + within_runs(many) * np.repeat(tiles[mine][order] * TILE, many)
    per_query = np.bincount(query, weights=splits[mine], minlength=queries).astype(np.int64)
    span = np.concatenate([[0], np.cumsum(per_query)])
    return SplitPlan(np.stack([start, np.cumsum(readers) - readers, readers]), item, query.astype(np.int64), parts, span)


def within_runs(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... of each run of `counts[i]`, side by side."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def split_length(length: np.ndarray, readers: np.ndarray, device: torch.device) -> int:
    """Entries of a work item: so few that every processor of the device has its share, and not fewer than a loop's step."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    every = int((length * np.maximum(1, -(-readers // TILE))).sum())
    share = -(-every // (PROGRAMS * processors))
    return min(LONGEST, max(BLOCK, 1 << (share - 1).bit_length() if share > 1 else 1))
