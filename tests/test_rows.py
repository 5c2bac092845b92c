"""Rows of several widths and lengths: appending, cropping, leaving, and attention against its reference."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import read, tiny, tokens

from harness.cache import ExpertGroup, LayerKV, ModelShape, Prefill, Row, keep_all
from harness.engine.attention import attend, attend_reference
from harness.engine.rows import RowCache, compact

HEADS, KV_HEADS, DIM = 8, 4, 16


def random_cache(rng: random.Random, window: int | None, routed: bool, dtype: torch.dtype = torch.float32) -> RowCache:
    """A one-layer cache of three cells with ragged rows; routed: experts of widths 2, 4 and 8, as mixSGA has."""
    torch.manual_seed(rng.randrange(10**6))
    tokens_read = 50
    held = min(tokens_read, window or tokens_read)
    keys, values = torch.randn(2, KV_HEADS, held, DIM, dtype=dtype).unbind(0)
    kv = LayerKV(0, tokens_read, keys, values, DIM**-0.5, 2, window=window, query_heads=HEADS)
    shape = ModelShape(1, HEADS, KV_HEADS, DIM, (window,), dtype.itemsize)
    selections = []
    for _ in range(3):
        owner = torch.tensor([rng.randrange(3) for _ in range(held)])
        rows = []
        for group, width in enumerate((2, 4, 8) if routed else (2,)):
            mine = (owner == group).nonzero()[:, 0] if routed else torch.arange(held)
            for first in range(0, HEADS, width):
                keep = sorted(rng.sample(range(len(mine)), rng.randrange(0 if routed else 1, len(mine) + 1)))
                rows.append(Row(first, width, group, mine[keep]))
        selections.append((tuple(rows),))
    groups = tuple(ExpertGroup(width) for width in ((2, 4, 8) if routed else (2,)))
    prefill = Prefill(torch.zeros(tokens_read), torch.zeros(1), (kv,), (groups,), shape)
    return compact(prefill, selections, 70)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("routed", [False, True])
def test_attention_equals_its_reference(routed: bool, window: int | None, softcap: float | None) -> None:
    for seed in range(5):
        rng = random.Random(f"{routed}/{window}/{softcap}/{seed}")
        cache = random_cache(rng, window, routed)
        layer = cache.layers[0]
        for counts in ((3, 3, 3), (1, 1, 1), (1, 4, 2), (7, 7, 7), (1, 1, 5)):
            step = cache.step(counts)
            new, queries = torch.randn(2, KV_HEADS, sum(counts), DIM), torch.randn(HEADS, sum(counts), DIM)
            experts = np.array([rng.randrange(3) for _ in range(sum(counts))]) if routed else None
            layer.append(new[0], new[1], step, experts)
            cache.seen = cache.seen + step.counts
            ours = attend(layer, queries, step, 0.25, softcap)
            assert torch.allclose(ours, attend_reference(layer, queries, step, 0.25, softcap), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_stays_close(dtype: torch.dtype) -> None:
    cache = random_cache(random.Random(5), None, False, dtype)
    layer = cache.layers[0]
    step = cache.step([4, 1, 4])
    new, queries = torch.randn(2, KV_HEADS, 9, DIM, dtype=dtype), torch.randn(HEADS, 9, DIM, dtype=dtype)
    layer.append(new[0], new[1], step)
    ours = attend(layer, queries, step, 0.25)
    assert torch.allclose(ours.float(), attend_reference(layer, queries, step, 0.25).float(), atol=3e-2)


def test_slack_is_never_read() -> None:
    cache = random_cache(random.Random(1), None, False)
    layer = cache.layers[0]
    for start, capacity, length in zip(layer.table.start, layer.table.capacity, layer.table.length, strict=True):
        layer.keys[start + length : start + capacity] = float("nan")
        layer.values[start + length : start + capacity] = float("nan")
    step = cache.step([2, 2, 2])
    new = torch.randn(2, KV_HEADS, 6, DIM)
    layer.append(new[0], new[1], step)
    assert not attend(layer, torch.randn(HEADS, 6, DIM), step, 0.25).isnan().any()


def test_the_order_of_a_rows_entries_does_not_matter() -> None:
    cache = random_cache(random.Random(2), None, False)
    layer = cache.layers[0]
    queries, step = torch.randn(HEADS, 3, DIM), cache.step([1, 1, 1])
    before = attend(layer, queries, step, 0.25)
    for start, length in zip(layer.table.start, layer.table.length, strict=True):
        where = torch.arange(start, start + length)
        mixed = where[torch.randperm(length)]
        for pool in (layer.keys, layer.values, layer.positions):
            pool[where] = pool[mixed].clone()
    assert torch.allclose(before, attend(layer, queries, step, 0.25), atol=1e-6)


@pytest.mark.parametrize("routed", [False, True])
def test_cropping_takes_back_exactly_what_was_appended(routed: bool) -> None:
    rng = random.Random(3)
    cache = random_cache(rng, None, routed)
    layer = cache.layers[0]
    experts = np.array([rng.randrange(3) for _ in range(15)]) if routed else None
    new = torch.randn(2, KV_HEADS, 15, DIM)
    before = layer.table.copy()
    layer.append(new[0], new[1], cache.step([5, 5, 5]), experts)
    cache.seen = cache.seen + 5
    cache.crop([5, 0, 2])
    assert cache.seen.tolist() == [50, 55, 53]
    table = layer.table
    for cell, group, length, old in zip(table.cell, table.expert_group, table.length, before.length, strict=True):
        kept = {0: 0, 1: 5, 2: 3}[int(cell)]
        mine = None if experts is None else experts[5 * cell : 5 * cell + kept]
        assert length == old + (kept if mine is None else int((mine == group).sum()))
    again = table.length.copy()
    cache.crop([0, 5, 3])
    assert (table.length == before.length).all()
    assert not (again == before.length).all()


def test_cells_may_leave_and_the_others_go_on_as_before() -> None:
    ids = tokens(60)
    prefill = read("llama", ids[:40])
    everything = keep_all(prefill)
    half = tuple(tuple(replace(row, kept=torch.arange(20, 40)) for row in rows) for rows in everything)
    cache = compact(prefill, [everything, half, everything], 20)
    alone = compact(prefill, [half], 20)
    model = tiny("llama")
    model.decode(cache, ids[40:44].expand(3, -1))
    model.decode(alone, ids[40:44][None])
    cache.keep([1])
    assert cache.counts() == [alone.counts()[0]]
    for token in ids[44:50]:
        assert torch.allclose(model.decode(cache, token[None, None]), model.decode(alone, token[None, None]), atol=1e-5)


def test_a_row_may_bring_merged_entries() -> None:
    prefill = read("llama", tokens(30))
    kept = torch.arange(20, 30)
    merged = tuple(
        tuple(
            Row(row.first, row.width, 0, kept, merged=(kv.keys[n][kept] + 1, 2 * kv.values[n][kept]))
            for n, row in enumerate(rows)
        )
        for kv, rows in zip(prefill.layers, keep_all(prefill), strict=True)
    )
    cache = compact(prefill, [merged], 8)
    for kv, layer in zip(prefill.layers, cache.layers, strict=True):
        for number, start in enumerate(layer.table.start.tolist()):
            where = slice(start, start + 10)
            assert torch.equal(layer.keys[where], kv.keys[number][kept] + 1)
            assert torch.equal(layer.values[where], 2 * kv.values[number][kept])
            assert layer.positions[where].tolist() == kept.tolist()


def test_no_slack_is_said() -> None:
    prefill = read("llama", tokens(10))
    cache = compact(prefill, [keep_all(prefill)], 1)
    with pytest.raises(ValueError, match="no slack for 65"):
        tiny("llama").decode(cache, tokens(65)[None])


def test_cells_at_different_tokens_get_their_own_positions() -> None:
    prefill = read("llama", tokens(10))
    cache = compact(prefill, [keep_all(prefill)] * 2, 20)
    tiny("llama").decode(cache, tokens(4).expand(2, -1))
    cache.crop([1, 3])
    assert cache.step([2, 1]).positions.tolist() == [13, 14, 11]
    together = tiny("llama").decode_ragged(cache, [[7, 8], [9]])
    for cell, (piece, read_before) in enumerate((([7, 8], 3), ([9], 1))):
        alone = compact(prefill, [keep_all(prefill)], 20)
        tiny("llama").decode(alone, tokens(4)[None, :read_before])
        logits = tiny("llama").decode(alone, torch.tensor([piece]), keep=len(piece))[0]
        assert torch.allclose(logits, together[:2] if cell == 0 else together[2:], atol=1e-5)
