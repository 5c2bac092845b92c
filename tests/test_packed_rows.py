"""Rows that are packed: attention over them against everything dequantised, whatever is appended, taken back or left out."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.cache import ExpertGroup, LayerKV, ModelShape, Prefill, Row
from harness.engine.attention import attend, attend_reference, probabilities
from harness.engine.rows import RowCache, RowLayer, compact
from harness.storage import Sixteen, Storage
from storages.integers import Integers
from storages.kivi import Kivi
from storages.turbo import Turbo

HEADS, KV_HEADS, DIM, READ = 8, 4, 16, 50
PACKED: dict[str, Storage] = {
    "int8": Integers(8),
    "int4": Integers(4),
    "int4 by halves": Integers(4, group=8),
    "turbo-4": Turbo(4, 4),
    "turbo-3": Turbo(3, 3),
    "turbo-k8v4": Turbo(8, 4),
    "kivi-4": Kivi(4, group=4, residual=8),
    "kivi-2": Kivi(2, group=8, residual=16),
    "16 bits": Sixteen(),
}


def cache_of(
    rng: random.Random, storages: list[Storage | None], window: int | None = None, routed: bool = False, room: int = 70
) -> RowCache:
    """One layer; a cell for each storage, with ragged rows; routed: experts of widths 2, 4 and 8, as mixSGA has."""
    torch.manual_seed(rng.randrange(10**6))
    held = min(READ, window or READ)
    keys, values = torch.randn(2, KV_HEADS, held, DIM).unbind(0)
    kv = LayerKV(0, READ, keys, values, DIM**-0.5, 2, window=window, query_heads=HEADS)
    shape = ModelShape(1, HEADS, KV_HEADS, DIM, (window,), 4)
    selections = []
    for storage in storages:
        owner = torch.tensor([rng.randrange(3) for _ in range(held)])
        rows = []
        for group, width in enumerate((2, 4, 8) if routed else (2,)):
            mine = (owner == group).nonzero()[:, 0] if routed else torch.arange(held)
            for first in range(0, HEADS, width):
                keep = sorted(rng.sample(range(len(mine)), rng.randrange(0 if routed else 1, len(mine) + 1)))
                rows.append(Row(first, width, group, mine[keep], storage=storage))
        selections.append((tuple(rows),))
    groups = tuple(ExpertGroup(width) for width in ((2, 4, 8) if routed else (2,)))
    prefill = Prefill(torch.zeros(READ), torch.zeros(1), (kv,), (groups,), shape)
    return compact(prefill, selections, room)


def poison(cache: RowCache) -> None:
    """What is no number, wherever no entry lies: in fields, scales and the 16 bits."""
    for layer in cache.layers:
        for part in layer.parts:
            if part.packed is None:
                continue
            fresh = [tensor.clone() for tensor in part.packed.tensors]
            for tensor in part.packed.tensors:
                tensor.fill_(255 if tensor.dtype == torch.uint8 else float("nan"))
            packed, length = part.packed, part.table.length
            for row, many in enumerate(length.tolist()):
                _restore(packed, fresh, row, many)


def _restore(packed, fresh, row: int, many: int) -> None:
    from harness.storage import packed_keys, packed_values

    storage, places = packed.storage, packed.places
    fields = iter(fresh)
    keys, values = packed_keys(storage, many), packed_values(storage, many)
    base_keys, base_values = packed.bases(length_at_first(packed, row, many))
    spans = [(into, places.group[row], keys // storage.keys.tokens) for into in packed.keys]
    spans += [(into, places.start[row], values) for into in packed.values]
    if storage.residual:
        spans += [(packed.key_tail, places.key_tail[row] + base_keys, many - base_keys)]
        spans += [(packed.value_tail, places.value_tail[row] + base_values, many - base_values)]
    for (into, first, count), old in zip(spans, fields, strict=False):
        into[first : first + count] = old[first : first + count]


def length_at_first(packed, row: int, many: int) -> int:
    return many  # nothing was appended yet


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("routed", "window", "softcap"), [(False, 30, 5.0), (True, None, None)])
def test_attention_equals_that_over_dequantised_entries(
    name: str, routed: bool, window: int | None, softcap: float | None
) -> None:
    rng = random.Random(f"{name}/{routed}/{window}")
    cache = cache_of(rng, [PACKED[name], None, PACKED[name]], window, routed)
    poison(cache)
    (layer,) = cache.layers
    for counts in ((3, 3, 3), (1, 4, 17), (1, 1, 1)):
        step, sinks = cache.step(counts), torch.randn(HEADS) if window else None
        new, queries = torch.randn(2, KV_HEADS, sum(counts), DIM), torch.randn(HEADS, sum(counts), DIM)
        experts = np.array([rng.randrange(3) for _ in range(sum(counts))]) if routed else None
        layer.append(new[0], new[1], step, experts)
        cache.seen = cache.seen + step.counts
        wanted = attend_reference(layer, queries, step, 0.25, softcap, sinks)
        assert not wanted.isnan().any()
        assert torch.allclose(attend(layer, queries, step, 0.25, softcap, sinks), wanted, atol=5e-6)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("routed", [False, True])
def test_several_tokens_at_once_are_as_one_by_one_and_drafts_leave_no_trace(name: str, routed: bool) -> None:
    """Across the boundaries at which blocks are packed, there and back."""
    new, queries = torch.randn(2, KV_HEADS, 40, DIM), torch.randn(HEADS, 40, DIM)
    owner = np.array([random.Random(5).randrange(3) for _ in range(40)])
    found = []
    for pieces in ([(1, 0)] * 40, [(20, 0), (20, 0)], [(17, 9), (30, 21), (23, 0)], [(40, 40), (3, 3), (40, 0)]):
        cache = cache_of(random.Random(name), [PACKED[name]], routed=routed)
        (layer,) = cache.layers
        outs, done = [], 0
        for count, drop in pieces:
            step, mine = cache.step([count]), slice(done, done + count)
            layer.append(new[0][:, mine], new[1][:, mine], step, owner[mine] if routed else None)
            cache.seen = cache.seen + count
            outs.append(attend(layer, queries[:, mine], step, 0.25)[:, : count - drop])
            cache.crop([drop])
            done += count - drop
        found.append((torch.cat(outs, 1), cache.counts()))
    for out, counts in found[1:]:
        assert torch.allclose(out, found[0][0], atol=5e-6) and counts == found[0][1]


def test_a_cell_beside_others_answers_as_alone() -> None:
    """Several storages in one batch, each cell as if it were alone; and those that stay once others have left."""
    storages = list(PACKED.values())
    new, queries = torch.randn(2, KV_HEADS, 30, DIM), torch.randn(HEADS, 30, DIM)
    together = cache_of(random.Random(1), [*storages, None], room=40)
    (layer,) = together.layers

    def grown(cache: RowCache, start: int, count: int) -> torch.Tensor:
        step = cache.step([count] * cache.cells)
        mine = torch.arange(start, start + count).repeat(cache.cells)
        cache.layers[0].append(new[0][:, mine], new[1][:, mine], step)
        cache.seen = cache.seen + count
        return attend(cache.layers[0], queries[:, mine], step, 0.25).unflatten(1, (cache.cells, count))

    first = grown(together, 0, 12)
    together.keep([6, 0, 9])
    second = grown(together, 12, 12)
    for place, cell in enumerate([6, 0, 9]):
        alone = cache_of(random.Random(1), [*storages, None], room=40)
        alone.keep([cell])
        assert torch.allclose(grown(alone, 0, 12)[:, 0], first[:, cell], atol=5e-6)
        assert torch.allclose(grown(alone, 12, 12)[:, 0], second[:, place], atol=5e-6)
        assert alone.counts()[0] == together.counts()[place]
    assert len(layer.parts) == 3


@pytest.mark.parametrize(("routed", "window", "softcap"), [(False, 30, None), (True, None, 5.0)])
def test_probabilities_by_position_are_those_that_attention_weighs_values_with(
    routed: bool, window: int | None, softcap: float | None
) -> None:
    """Of unpacked rows, over several expert groups too."""
    rng = random.Random(7)
    cache = cache_of(rng, [None], window, routed)
    (layer,) = cache.layers
    assert isinstance(layer, RowLayer)
    step, queries = cache.step([5]), torch.randn(HEADS, 5, DIM)
    new = torch.randn(2, KV_HEADS, 5, DIM)
    layer.append(new[0], new[1], step, np.array([0, 2, 1, 2, 0]) if routed else None)
    seen, table = probabilities(layer, queries, step, 0.25, softcap), layer.table
    wanted = attend_reference(layer, queries, step, 0.25, softcap)
    found = torch.zeros_like(wanted)
    for first, width, start, length in zip(table.first, table.width, table.start, table.length, strict=True):
        heads, entries = slice(first, first + width), slice(start, start + length)
        found[heads] += seen[heads][:, :, layer.positions[entries].long()] @ layer.values[entries]
    assert torch.allclose(found, wanted, atol=1e-5) and torch.allclose(seen.sum(-1), torch.ones(HEADS, 5))


@pytest.mark.parametrize("name", PACKED)
def test_allocated_bytes_are_those_of_the_storages(name: str) -> None:
    for room in (0, 64):
        cache = cache_of(random.Random(2), [PACKED[name], PACKED[name]], room=room)
        (layer,) = cache.layers
        (part,) = layer.parts
        assert part.packed is not None
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*part.packed.tensors, part.positions]}
        assert sum(count.bytes_allocated for count in cache.counts()) == sum(held.values())
        if not room:
            assert all(c.bytes_allocated <= 1.02 * c.bytes_kept + 4 * c.entries + 8 * 4 * DIM * 2 * 32 for c in cache.counts())


def test_the_prefill_is_copied() -> None:
    cache = cache_of(random.Random(3), [PACKED["kivi-4"]])
    (layer,) = cache.layers
    before = [t.clone() for t in layer.parts[0].packed.tensors]  # type: ignore[union-attr]
    step = cache.step([20])
    layer.append(torch.randn(KV_HEADS, 20, DIM), torch.randn(KV_HEADS, 20, DIM), step)
    assert any(not torch.equal(a, b) for a, b in zip(before, layer.parts[0].packed.tensors, strict=True))  # type: ignore[union-attr]


def test_spared_layers_and_merged_entries_are_held() -> None:
    kv = LayerKV(0, 20, torch.randn(1, 20, DIM), torch.randn(1, 20, DIM), 0.25, 2, query_heads=2)
    shape = ModelShape(1, 2, 1, DIM, (None,), 4)
    kept = torch.arange(4, 20)
    merged = (kv.keys[0][kept] + 1, kv.values[0][kept] * 2)
    prefill = Prefill(torch.zeros(20), torch.zeros(1), (kv,), ((ExpertGroup(2),),), shape)
    row = Row(0, 2, 0, kept, merged, Integers(8))
    layer = compact(prefill, [((row,),), ((replace(row, storage=Sixteen()),),)], 0).layers[0]
    for part, close in zip(layer.parts, (0.02, 0.003), strict=True):
        keys, values = part.packed.seen(0, 16, 16)  # type: ignore[union-attr]
        assert torch.allclose(keys, merged[0], atol=close) and torch.allclose(values, merged[1], atol=2 * close)
