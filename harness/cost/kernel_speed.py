"""The suite `kernel-speed`: decode attention over rows by the Triton kernel, beside the bandwidth of a copy and other kernels.

Rows of unequal length sum to about a gigabyte of keys and values. Floor: those bytes over the copy's rate. flash-attn's and
torch's kernels for sequences of unequal length compute the same when each row is a sequence with one head: they check the
kernel's numbers, and are timed on the same rows, laid side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from harness.cost.roofline import copy_bandwidth
from harness.engine import flash, kernels
from harness.engine.measure import seconds_of
from harness.engine.split_plan import plan, split_for

DIM = 128  # of a head
LAPS = 20  # launches between two looks at the clock
Varlen = Callable[[], Tensor]


def kernel_speed(
    device: torch.device, dtype: torch.dtype, size: int = 2**30, rows: int = 256, width: int = 4
) -> dict[str, float]:
    """Milliseconds, and the share of the copy's bandwidth; the peers that are here, and how far their numbers are apart.

    Args:
        size: bytes of all rows' keys and values. rows: as of a layer with 8 KV heads and 32 sequences. width: queries on each.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = np.random.default_rng(0).permutation(1 / np.arange(1, rows + 1) ** 0.5)  # far from equal, as of HeadKV
    length = np.maximum(1, (weight / weight.sum() * size / (2 * DIM * dtype.itemsize)).astype(np.int64))
    start = np.cumsum(length) - length
    keys, values = (torch.randn(int(length.sum()), DIM, generator=generator, device=device, dtype=dtype) for _ in range(2))
    queries = torch.randn(rows * width, DIM, generator=generator, device=device, dtype=dtype)
    widths = np.full(rows, width)
    split = split_for(length, widths, device)
    work = plan(start, length, widths, np.arange(rows * width), rows * width, split).on(device)
    held = torch.as_tensor(length).to(device)

    def ours() -> Tensor:
        return kernels.attend_pieces(queries, keys, values, held, work, DIM**-0.5)

    copied, read = copy_bandwidth(device), 2 * keys.numel() * dtype.itemsize
    found = {"rows_gb": read / 1e9, "copy_gb_s": copied / 1e9, "kernel_ms": 1000 * _lap(ours, device)}
    found["kernel_share_of_copy"] = read / (found["kernel_ms"] / 1000) / copied
    expected = ours().float()
    for name, peer in varlen_peers(queries, keys, values, length, width).items():
        try:
            found[f"{name}_apart"] = float((peer().float().view_as(expected) - expected).abs().max())
        except (RuntimeError, TypeError) as error:  # a version without grouped queries, or not made for this GPU
            print(f"{name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        found[f"{name}_ms"] = 1000 * _lap(peer, device)
    return {name: float(f"{number:.4g}") for name, number in found.items()}


def varlen_peers(queries: Tensor, keys: Tensor, values: Tensor, length: np.ndarray, width: int) -> dict[str, Varlen]:
    """Other kernels over the same rows, those that are here: torch's own and flash-attn's.

    A row is a sequence of one KV head, which the queries read as heads of one token: so they split long sequences.

    Args:
        queries: [R * width, D], row by row; keys, values: [P, D], the rows side by side without room; length: [R].
    """
    if queries.device.type != "cuda" or queries.dtype not in flash.TYPES:
        return {}
    ends = torch.as_tensor(np.concatenate([[0], np.cumsum(length)]), dtype=torch.int32).to(queries.device)
    asked = torch.arange(len(length) + 1, dtype=torch.int32, device=queries.device)
    rows = (queries.view(len(length), width, -1), keys[:, None], values[:, None], asked, ends, 1, int(length.max()))
    found: dict[str, Varlen] = {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        found["torch_varlen"] = lambda: cast(Tensor, varlen_attn(*rows, enable_gqa=True))
    except ImportError:
        pass
    if flash.installed():
        from flash_attn import flash_attn_varlen_func

        found["flash_attn"] = lambda: flash_attn_varlen_func(*rows)
    return found


def _lap(work: Varlen, device: torch.device) -> float:
    """Seconds of one launch, in a row of many: the first ones warm up."""
    laps = LAPS if device.type == "cuda" else 1

    def many() -> None:
        for _ in range(laps):
            work()

    many()
    return min(seconds_of(many, device) for _ in range(3)) / laps
