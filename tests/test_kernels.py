"""The Triton kernels under their interpreter, against softmax written out: rows of any length and width, and what is hidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read, tokens
from torch import Tensor

from harness.cache import Needs, keep_all
from harness.engine import kernels
from harness.engine.attention import attend, attend_by_kernel
from harness.engine.rows import compact
from harness.engine.split_plan import LONGEST, TILE, plan_split

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def plain(asked: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, softcap: float | None) -> Tensor:
    """One row, in float64. hidden: [queries, n]."""
    logits = asked.double() @ keys.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ values.double()


class Pool:
    """Rows with poisoned slack between them."""

    def __init__(self, lengths: list[int], widths: list[int], dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + dim)
        self.length, self.width = np.array(lengths), np.array(widths)
        capacity = self.length + 7
        self.start = np.cumsum(capacity) - capacity + 3
        total = int(capacity.sum()) + 3
        self.keys = torch.full((total, dim), float("nan"), dtype=dtype)
        self.values = torch.full((total, dim), float("nan"), dtype=dtype)
        self.positions = torch.full((total,), -(2**30), dtype=torch.int32)
        for start, length in zip(self.start, self.length, strict=True):
            rows = slice(start, start + length)
            self.keys[rows] = torch.randn(length, dim, generator=generator).to(dtype)
            self.values[rows] = torch.randn(length, dim, generator=generator).to(dtype)
            self.positions[rows] = torch.randperm(2 * length + 1, generator=generator)[:length].sort().values.int()
        self.query = np.random.default_rng(len(lengths)).permutation(int(self.width.sum()))  # who reads, in any order
        self.asked = torch.randn(int(self.width.sum()), dim, generator=generator).to(dtype)

    def check(self, softcap: float | None = None, window: int | None = None, masked: bool = False, split: int = 128) -> None:
        """Planned for longer rows than there are: how long they are stands on the device."""
        scaling = self.keys.shape[1] ** -0.5
        work = plan_split(self.start, self.length + 3, self.width, self.query, len(self.query), split).on(self.keys.device)
        asking = torch.randint(0, 2 * max(1, int(self.length.max())), (len(self.asked),))
        hide = (self.positions, asking, window) if masked else ()
        length = torch.as_tensor(self.length)
        out = kernels.attend_split(self.asked, self.keys, self.values, length, work, scaling, softcap, *hide)
        assert out.dtype == self.asked.dtype
        done = 0
        for start, length, width in zip(self.start, self.length, self.width, strict=True):
            mine, rows = self.query[done : done + width], slice(start, start + length)
            hidden = None
            if masked:
                held, at = self.positions[rows][None], asking[mine][:, None]
                hidden = (held > at) | (held <= at - (window or 2**29))
            wanted = plain(self.asked[mine].double() * scaling, self.keys[rows], self.values[rows], hidden, softcap)
            assert torch.allclose(out[mine].double(), wanted, atol=TOLERANCE[self.asked.dtype]), (length, width)
            done += width


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_of_every_length_and_width(softcap: float | None) -> None:
    Pool([0, 1, 63, 64, 65, 300, 5, 128], [1, 4, 32, 2, 8, 16, 17, 1], 64, torch.float32).check(softcap)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_sizes_and_types(dim: int, dtype: torch.dtype) -> None:
    Pool([70, 0, 129], [4, 2, 3], dim, dtype).check(softcap=20.0 if dim == 96 else None)


def test_a_long_row_is_merged_from_many_pieces() -> None:
    Pool([10_000, 3], [4, 4], 64, torch.float32).check(split=LONGEST)


@pytest.mark.parametrize("window", [None, 9])
def test_what_lies_behind_a_query_or_has_left_its_window_is_hidden(window: int | None) -> None:
    Pool([0, 40, 65, 130, 1], [3, 8, 20, 4, 2], 64, torch.float32).check(window=window, masked=True, softcap=4.0)


def test_pieces_cover_every_entry_of_every_query_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        length, readers = rng.integers(0, 2000, 6), rng.integers(1, 40, 6)
        start, queries = np.cumsum(length) - length, 50
        query = np.concatenate([rng.permutation(queries)[:many] for many in readers])  # a query reads several rows, or none
        work = plan_split(start, length, readers, query, queries, 256)
        (first, begin), (of, tile, low, high) = work.row[:2], work.item
        assert (first == start).all() and (high - low).max() <= 256
        for number in range(queries):
            covered: dict[int, list[int]] = {}
            for part in work.parts[work.span[number] : work.span[number + 1]]:
                piece, line = divmod(part, TILE)
                assert work.reader[begin[of[piece]] + tile[piece] * TILE + line] == number
                covered.setdefault(of[piece], []).extend(range(low[piece], high[piece]))
            reads = [row for row in range(6) if number in query[begin[row] : begin[row] + readers[row]]]
            assert covered == {row: list(range(length[row])) for row in reads}


def test_a_layer_of_a_cache_is_read_as_by_the_path_in_plain_torch(family: str) -> None:
    """Ragged rows, several cells with several tokens each, windows and softcap."""
    prefill = read(family, tokens(60))
    kept = [[30, 41, 59][: 1 + layer.index % 3] for layer in prefill.layers]
    from dataclasses import replace

    ragged = tuple(
        tuple(
            replace(row, kept=torch.arange(0, layer.keys.shape[1], 1 + number)[: 7 + kept[layer.index][0]])
            for number, row in enumerate(rows)
        )
        for layer, rows in zip(prefill.layers, keep_all(prefill), strict=True)
    )
    cache = compact(prefill, [ragged, keep_all(prefill)], 20)
    for counts in ([1, 1], [3, 5]):
        step = cache.step(counts)
        for layer, kv in zip(cache.layers, prefill.layers, strict=True):
            new = torch.randn(2, prefill.shape.kv_heads, sum(counts), prefill.shape.head_dim)
            layer.append(new[0], new[1], step)
            queries = torch.randn(prefill.shape.query_heads, sum(counts), prefill.shape.head_dim)
            wanted = attend(layer, queries, step, kv.scaling, kv.softcap)
            found = attend_by_kernel(layer, queries, step, kv.scaling, kv.softcap)
            assert torch.allclose(found, wanted, atol=1e-5)
        cache.seen = cache.seen + step.counts


def test_experts_rows_are_merged_by_their_weights() -> None:
    """mixSGA's expert_groups: a head's entries lie in rows of several widths."""
    from helpers import converted

    model = converted("llama", "mixsga-3:1:6")
    prefill = model.prefill(tokens(60), Needs())[0]
    cache = compact(prefill, [keep_all(prefill)], 8)
    step = cache.step([1])
    layer, kv = cache.layers[1], prefill.layers[1]
    new = torch.randn(2, kv.keys.shape[0], 1, kv.keys.shape[2])
    layer.append(new[0], new[1], step, np.array([2]))
    queries = torch.randn(prefill.shape.query_heads, 1, prefill.shape.head_dim)
    wanted = attend(layer, queries, step, kv.scaling)
    assert layer.routed and torch.allclose(attend_by_kernel(layer, queries, step, kv.scaling, None), wanted, atol=1e-5)


def test_they_are_built_for_a_gpu_that_is_not_here() -> None:
    """By triton's own compiler and assembler: within a program's shared memory, keys and values fetched ahead of their use."""
    root = Path(__file__).parent
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root.parent)}
    ran = subprocess.run([sys.executable, root / "build_kernels.py"], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    built = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [found["kernel"] for found in built] == ["_partial"] * 10 + ["_merge"] * 2 + ["_append"] * 2
    assert all(found["bytes"] and found["shared"] <= 227 * 1024 for found in built)
    half = [found for found in built if found["numbers"] != "fp32"]
    assert all(found["asynchronous"] for found in half if found["kernel"] == "_partial")
    assert not any(found["stack"] for found in half), "registers are spilled"


def test_what_has_no_kernel_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "heads of size 512" in str(kernels.unsupported(torch.float16, 512))
    assert "float64" in str(kernels.unsupported(torch.float64, 64)) and kernels.unsupported(torch.bfloat16, 80) is None
    kernels.can_run.cache_clear()
    assert not kernels.can_run(torch.float16, 512) and not kernels.can_run(torch.float16, 512)
    assert capsys.readouterr().err.count("plain torch") == 1
