"""Eviction while decoding, against full attention with masks from the same decisions and against its own one-shot self."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers import converted, head_scores, masked_logits, network, tiny, tokens, wide
from test_conversions import mixed
from torch import Tensor

from harness.cache import Budget, HeldRows, Keeper, ModelShape, Needs, Selection
from harness.engine.evict import Turns, remember
from harness.engine.model import Model
from harness.engine.rows import RowCache, compact
from harness.engine.scoring import forced
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.sweep import Cell, Outcome, Sweep
from harness.registry import BUILTIN
from harness.storage import Codec, Field, Storage, entry_bytes
from methods import METHODS
from methods.allocators import Uniform
from methods.base import Eviction, score_prefill
from methods.h2o import HeavyHitters
from storages import STORAGES

T, MORE = 60, 40


@dataclass
class Logged:
    """A keeper whose decisions are written down: tokens read, layer, query heads, positions kept."""

    of: Keeper
    log: list[tuple[int, int, range, list[int]]]

    @property
    def every(self) -> int:
        return self.of.every

    @property
    def needs(self) -> Needs:
        return self.of.needs

    @property
    def ordered(self) -> bool:
        return self.of.ordered

    def keep(self, held: Sequence[HeldRows], tokens: int) -> list[Tensor]:
        masks = self.of.keep(held, tokens)
        for rows, mask in zip(held, masks, strict=True):
            for first, row, positions in zip(rows.first.tolist(), mask, rows.kv.positions.expand_as(mask), strict=True):
                self.log.append((tokens, rows.kv.index, range(first, first + rows.width), positions[row].tolist()))
        return masks


class Exact(Codec):
    """float32 as its bytes: packed rows that lose nothing, so that what is left to be seen is which entries they hold."""

    def fields(self, dim: int) -> tuple[Field, ...]:
        return Field("low", 2 * dim, "uint8"), Field("high", dim, "float16")

    def pack(self, vectors: Tensor) -> tuple[Tensor, ...]:
        bits = vectors[:, 0].contiguous().view(torch.int16).unflatten(-1, (-1, 2))  # the lower half of each number first
        low, high = bits.unbind(-1)
        return low.contiguous().view(torch.uint8), high.contiguous().view(torch.float16)

    def unpack(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        low, high = (part.contiguous().view(torch.int16) for part in parts)
        return torch.stack([low, high], -1).flatten(-2).view(torch.float32)


@dataclass(frozen=True)
class Lossless:
    version: int = 1
    residual: int = 0
    spared: int = 0
    keys: Exact = field(default_factory=Exact, repr=False)
    values: Exact = field(default_factory=Exact, repr=False)


def prepared(
    model: Model, given: str | Eviction, every: int, cap: Callable[[int], int], storage: Storage | None = None
) -> tuple[RowCache, Logged, Selection]:
    """A cell that has read a prompt of T tokens and evicts while decoding."""
    method: Any = replace(METHODS[given] if isinstance(given, str) else given, every=every)  # type: ignore[type-var]
    method = method.with_head_scores(head_scores(model.depth, model.shape.query_heads))
    prefill, _ = model.prefill(tokens(T), Needs(8, column_sums=True))
    kept = method.compress(prefill, cap(T), score_prefill(method.scorer, prefill))
    keeper = method.while_decoding(cap)
    assert keeper is not None
    logged = Logged(keeper, [])
    kept = tuple(tuple(replace(row, storage=storage) for row in layer) for layer in kept)
    cache = compact(prefill, [kept], every)
    remember(cache, prefill.layers, [logged])
    return cache, logged, kept


def hidden_after(decisions: Sequence[tuple[int, int, range, list[int]]], layer: int, heads: int, count: int) -> Tensor:
    """[Hq, query, key]: what queries may not see, since it was evicted before they came."""
    hidden = torch.zeros(heads, count, count, dtype=torch.bool)
    for when in sorted({seen for seen, *_ in decisions}):
        mine = [(readers, held) for seen, index, readers, held in decisions if (seen, index) == (when, layer)]
        gone = torch.zeros(heads, count, dtype=torch.bool)
        gone[:, :when] = True
        for readers, held in mine:
            gone[readers.start : readers.stop, held] = False  # rows of a head add up
        hidden[:, when:] |= gone[:, None]
    return hidden


@pytest.mark.parametrize("name", ["snapkv", "h2o", "ada_snapkv", "tova", "headkv_r2", "h2o packed", "ada_snapkv packed"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "opt", "llama+mixsga-1:1:2"])
def test_decoding_over_a_cache_that_evicts_is_full_attention_with_the_same_masks(family: str, name: str) -> None:
    name, _, packed = name.partition(" ")
    plain, _, conversion = family.partition("+")
    net: Any = wide(plain) if conversion else network(plain)
    model = converted(plain, conversion, net) if conversion else tiny(plain)
    size = model.parent_shape.full_entries(T) // 3
    cache, logged, kept = prepared(model, name, 8, lambda _: size, Lossless() if packed else None)
    said = tokens(MORE, seed=5)
    turns = Turns(cache, [logged])
    found = torch.cat([part[0] for _, part in forced(model, cache, said.tolist(), turns)])
    assert len({seen for seen, *_ in logged.log}) == MORE // 8
    ids = torch.cat([tokens(T), said])
    gone = [hidden_after(logged.log, layer, model.shape.query_heads, len(ids)) for layer in range(model.depth)]
    if conversion:
        net = copy.deepcopy(model.network)
        mixed(Model(net, None, "twin", "0"), T)
    wanted = masked_logits(plain, ids, T, kept, net, gone).log_softmax(-1)[T:]
    assert (found - wanted).abs().max() < 2e-4


class Both(HeavyHitters):
    """Ranks as H2O, and looks at the last queries too."""

    needs = Needs(8, column_sums=True)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "llama+mixsga-1:1:2"])
def test_what_is_remembered_is_what_full_attention_with_the_same_masks_has(family: str) -> None:
    """The attention that each entry received, and the newest queries: both from the prefill on."""
    plain, _, conversion = family.partition("+")
    net: Any = wide(plain) if conversion else network(plain)
    model = converted(plain, conversion, net) if conversion else tiny(plain)
    size = model.parent_shape.full_entries(T) // 3
    cache, logged, kept = prepared(model, Eviction(Both(), Uniform()), 8, lambda _: size)
    said = tokens(21, seed=5)
    for _ in forced(model, cache, said.tolist(), Turns(cache, [logged])):
        pass
    ids = torch.cat([tokens(T), said])
    gone = [hidden_after(logged.log, layer, model.shape.query_heads, len(ids)) for layer in range(model.depth)]
    if conversion:
        net = copy.deepcopy(model.network)
        mixed(Model(net, None, "twin", "0"), T)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    masked_logits(plain, ids, T, kept, net, gone, seen)
    for layer, (queries, weights) in zip(cache.layers, seen.values(), strict=True):
        memory, table = layer.memory, layer.table
        assert memory is not None and memory.queries is not None and memory.mass is not None
        assert (memory.queries[0] - queries[:, -8:]).abs().max() < 1e-4
        for start, length, first, width in zip(table.start, table.length, table.first, table.width, strict=True):
            held = layer.positions[start : start + length].long()
            received = weights[first : first + width].sum((0, 1))[held]
            assert (memory.mass[start : start + length] - received).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["h2o", "tova", "streaming_llm"])
def test_what_is_evicted_at_every_step_is_what_the_papers_say(name: str) -> None:
    """H2O, TOVA and StreamingLLM on sets of positions, from the attention of the dense pass with the same masks."""
    model, size = tiny("llama"), 20
    rows = model.shape.layers * model.shape.kv_heads
    cache, logged, kept = prepared(model, name, 1, lambda _: size * rows)
    said = tokens(12, seed=5)
    for _ in forced(model, cache, said.tolist(), Turns(cache, [logged])):
        pass
    ids = torch.cat([tokens(T), said])
    gone = [hidden_after(logged.log, layer, model.shape.query_heads, len(ids)) for layer in range(model.depth)]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    masked_logits("llama", ids, T, kept, network("llama"), gone, seen)
    for layer, (_, weights) in enumerate(seen.values()):
        for row in kept[layer]:
            readers = range(row.first, row.first + row.width)
            assert row.kept is not None
            held = row.kept.tolist()
            for read in range(T + 1, len(ids) + 1):
                held.append(read - 1)
                received = weights[row.first : row.first + row.width, :read].sum((0, 1))
                newest = weights[:, read - 1].mean(0)  # of all heads of the layer
                if name == "h2o":
                    candidates = sorted(held)[: -(size // 2)]
                    held.remove(min(candidates, key=lambda position: float(received[position])))
                elif name == "tova":
                    held.remove(min(held[:-1], key=lambda position: float(newest[position])))
                else:
                    held.remove(sorted(held)[4])
                (ours,) = [set(kept_then) for at, index, of, kept_then in logged.log if (at, index, of) == (read, layer, readers)]
                assert ours == set(held)


def answers(model: Model, *names: str, budget: str = "45%", most: int = 30, **protocol: Any) -> dict[str, Outcome]:
    """What the cells of one prompt say; every one gets an answer."""
    sweep = Sweep(model, Protocol(stop="none", **protocol))
    cells = [
        Cell(name, method, Budget.parse(budget) if method.takes_budget else None) for name, method in map(BUILTIN.method, names)
    ]
    ids = tokens(T).tolist()
    prompt = Prompt(ids, T if sweep.protocol.prompt == "question_in" else T - 12)
    found = {cell.name: outcome for cell, outcome in sweep.example(prompt, cells, most)}
    assert not [outcome for outcome in found.values() if outcome.answer is None]
    return found


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
@pytest.mark.parametrize("asked", ["question_in", "question_after"])
def test_with_a_long_interval_a_method_is_its_one_shot_self_and_at_100_percent_the_full_cache(family: str, asked: str) -> None:
    model = tiny(family)
    found = answers(model, "full", "snapkv", "snapkv(every=64)", "h2o", "h2o(every=64)", prompt=asked)
    for name in ("snapkv", "h2o"):
        once, again = found[name], found[f"{name}(every=64)"]
        assert once.answer is not None and again.answer is not None
        assert once.answer.tokens == again.answer.tokens and once.counts == again.counts
        assert once.fidelity == pytest.approx(again.fidelity, abs=1e-4)
        held, end = again.answer.held, again.answer.end
        assert held is not None and end is not None and end == once.answer.end
        added = model.shape.layers * model.shape.kv_heads  # entries a token
        assert held.tokens == 29 and held.entries_peak == end.entries and held.bytes_peak == end.bytes_kept
        assert held.entries_mean == end.entries - added * 14, "the middle of 29 tokens"
        assert held.bytes_mean == end.bytes_kept - added * model.shape.entry_bytes() * 14
    whole = answers(model, "full", "snapkv(every=3)", "h2o(every=1)", budget="100%", prompt=asked)
    assert len({tuple(outcome.answer.tokens) for outcome in whole.values() if outcome.answer}) == 1


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_cells_that_evict_answer_beside_others_as_alone(family: str) -> None:
    names = ("snapkv(every=4)", "h2o(every=1)", "ada_snapkv(every=7)", "tova(every=1)")
    names += ("h2o(every=5)+int4", "snapkv(every=4)+int8")
    together = answers(tiny(family), "full", "snapkv", *names, most=20)
    for name in names:
        alone = answers(tiny(family), "full", name, most=20)[name].answer
        beside = together[name].answer
        assert alone is not None and beside is not None and alone.tokens == beside.tokens
        assert alone.held == beside.held


def test_what_a_cell_held_is_counted_at_every_token() -> None:
    model, most, every = tiny("llama"), 30, 8
    outcome = answers(model, "full", f"snapkv(every={every})", budget="20", most=most)[f"snapkv(every={every})"]
    answer, counts = outcome.answer, outcome.counts
    assert answer is not None and answer.held is not None and counts is not None and answer.end is not None
    rows = model.shape.layers * model.shape.kv_heads
    held, size = [], 20
    for _ in range(most - 1):  # the last token of an answer is not read
        size += 1
        held.append(size)
        size = 20 if size == 20 + every else size
    assert counts.entries == 20 * rows and answer.held.entries_peak == (20 + every) * rows
    assert answer.held.entries_mean == pytest.approx(sum(held) / len(held) * rows)
    assert answer.end.entries == size * rows
    assert answer.held.bytes_peak == answer.held.entries_peak * model.shape.entry_bytes()


@pytest.mark.parametrize("name", ["snapkv(every=4)", "streaming_llm(every=1)", "snapkv(every=8)+int4"])
def test_a_cap_that_the_prompt_does_not_fill_is_reached_by_the_answer_and_then_holds(name: str) -> None:
    model, most = tiny("llama"), 150
    answer = answers(model, "full", name, budget=str(T + 20), most=most)[name].answer
    assert answer is not None and answer.held is not None
    rows, every = model.shape.layers * model.shape.kv_heads, int(name.partition("=")[2].partition(")")[0])
    share = entry_bytes(STORAGES["int4"], model.shape.head_dim) / model.shape.deployed_bytes() if "+" in name else 1.0
    cap = int((T + 20) * rows / share)
    assert answer.held.entries_peak == min(cap + every * rows, (T + most - 1) * rows)


def test_a_packed_cell_keeps_to_its_bytes_and_with_a_long_interval_is_its_one_shot_self() -> None:
    model, every = tiny("llama"), 8
    again, long, once = f"snapkv(every={every})+int4", "snapkv(every=64)+int4", "snapkv+int4"
    found = {name: outcome.answer for name, outcome in answers(model, "full", again, long, once, budget="20").items()}
    assert all(found.values())
    rows = model.shape.layers * model.shape.kv_heads
    each = entry_bytes(STORAGES["int4"], model.shape.head_dim)
    held = found[again].held
    most = int(20 * rows * model.shape.deployed_bytes() / each)  # as many entries of 4 bits as lie in the bytes of 20 a head
    assert held.entries_peak == most + every * rows and held.bytes_peak == held.entries_peak * each
    assert found[long].tokens == found[once].tokens and found[long].end.bytes_kept == held.bytes_peak + (29 - every) * rows * each


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("snapkv(every=8)+kivi-4(residual=32)", "keys that share scales"),
        ("snapkv(every=8)+turbo-4", "spared=0"),
        ("snapkv(every=8,renumber=true)+int4", "without a storage"),
    ],
)
def test_what_cannot_leave_packed_rows_one_by_one_is_skipped(name: str, reason: str) -> None:
    shape = ModelShape(8, 4, 2, 64, (None,) * 8, 2)
    said = BUILTIN.method(name)[1].cannot_run(shape, Budget.parse("50%"), 4000, "kv")
    assert said is not None and reason in said


def test_shares_grow_with_the_answer_and_sizes_do_not() -> None:
    found = answers(tiny("llama"), "full", "streaming_llm(every=1)", most=31)["streaming_llm(every=1)"].answer
    assert found is not None and found.end is not None
    assert found.end.entries == int(0.45 * tiny("llama").shape.full_entries(T + 30))


def test_what_only_a_prefill_shows_cannot_be_looked_at_again() -> None:
    with pytest.raises(ValueError, match="every -1 must be 0"):
        BUILTIN.method("snapkv(every=-1)")
    name, method = BUILTIN.method("h2o:adaptive(every=16)")
    assert name == "h2o:adaptive(every=16)" and "every=16" in repr(method)
    assert "every" not in repr(METHODS["snapkv"]), "rows of before keep their key"
