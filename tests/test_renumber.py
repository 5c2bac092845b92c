"""Positions inside the cache, against full recomputation: every query with its own ranks, its own masks and its own rotation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import call, masked_logits, network, tiny, tokens
from test_evict import MORE, Logged, T, answers, hidden_after, prepared
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from harness.cache import Budget, HeldRows, Needs, Selection
from harness.engine.evict import Turns, evict
from harness.engine.renumber import cannot_renumber, renumber
from harness.engine.rows import RowCache
from harness.engine.scoring import forced
from harness.evaluation.plan import _why_not
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.sweep import Cell, Sweep
from harness.registry import BUILTIN, UnknownChoice
from reports.distance import distance_tables
from results.record import Record
from results.store import read_rows


def renumbered_logits(net: Any, ids: Tensor, kept: Selection, gone: Sequence[Tensor]) -> Tensor:
    """Logits [T + n, V], a query at a time: what it sees is turned to 0, 1, 2, ..., and itself to the last of these.

    The prompt's queries see all before them, so that their ranks are their positions.
    """
    rotary, turn = net.get_decoder().rotary_emb, sys.modules[type(net).__module__].apply_rotary_pos_emb

    def attention(module, query, key, value, mask, scaling, **_):
        heads, group, count = query.shape[1], query.shape[1] // key.shape[1], query.shape[2]
        out = torch.zeros_like(query[0])
        evicted = torch.zeros(heads, count, dtype=torch.bool)
        evicted[:, :T] = True
        for row in kept[module.layer_idx]:
            evicted[row.first : row.first + row.width, torch.arange(T) if row.kept is None else row.kept] = False
        for head in range(heads):
            for place in range(count):
                unseen = gone[module.layer_idx][head, place] | (evicted[head] if place >= T else False)
                seen = (~unseen[: place + 1]).nonzero()[:, 0]
                cos, sin = rotary(query, torch.arange(len(seen))[None])
                keys = key[:, head // group : head // group + 1, seen]
                asking = torch.zeros_like(keys)
                asking[:, :, -1] = query[:, head : head + 1, place]
                asked, met = turn(asking, keys, cos, sin)
                weights = (met[0, 0] @ asked[0, 0, -1] * scaling).softmax(-1)
                out[head, place] = weights @ value[0, head // group, seen]
        return out.transpose(0, 1)[None].contiguous(), None

    AttentionInterface.register("renumbered_in_test", attention)
    AttentionMaskInterface.register("renumbered_in_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    net.set_attn_implementation("renumbered_in_test")
    with torch.no_grad():
        found: Tensor = net(ids[None], position_ids=torch.zeros(1, len(ids), dtype=torch.long), use_cache=False).logits[0]
    return found


@pytest.mark.parametrize(
    ("family", "name", "every"),
    [("llama", "streaming_llm", 1), ("phi3", "streaming_llm", 1), ("gpt_neox", "snapkv", 8), ("qwen3", "ada_snapkv", 8)],
)
def test_decoding_with_renumbered_positions_is_recomputation_with_ranks(family: str, name: str, every: int) -> None:
    """What is chosen is logged, so the choice itself may be any scorer's; rows of a layer may differ in length."""
    model = tiny(family)
    size = model.shape.full_entries(T) // 3
    cache, logged, kept = prepared(model, name, every, lambda _: size)
    renumber(model, cache)
    said = tokens(MORE // 2, seed=5)
    found = torch.cat([part[0] for _, part in forced(model, cache, said.tolist(), Turns(cache, [logged]))])
    ids = torch.cat([tokens(T), said])
    gone = [hidden_after(logged.log, layer, model.shape.query_heads, len(ids)) for layer in range(model.depth)]
    wanted = renumbered_logits(network(family), ids, kept, gone).log_softmax(-1)[T:]
    assert (found - wanted).abs().max() < 2e-4
    far = masked_logits(family, ids, T, kept, network(family), gone).log_softmax(-1)[T:]
    assert (found - far).abs().max() > 0.01, "with original positions it is something else"


def shown(cache: RowCache, logged: Logged) -> list[Tensor]:
    """The window's attention that a scorer would see of each layer's rows now."""
    found: list[Tensor] = []

    def keep(held: Sequence[HeldRows], count: int) -> list[Tensor]:
        found.extend(rows.kv.window_attention(8) for rows in held)
        return [torch.ones(rows.kv.query_heads // rows.kv.width, rows.kv.keys.shape[1], dtype=torch.bool) for rows in held]

    logged.keep = keep  # type: ignore[method-assign]
    evict(cache, 0, logged)
    return found


def test_scorers_see_keys_and_queries_at_their_ranks() -> None:
    """Attention of the oldest remembered query, one of the prompt's, where the newest stands at the last rank."""
    model, size, more = tiny("llama"), 3 * 2 * 20, 3
    cache, logged, _ = prepared(model, "snapkv", 8, lambda _: size)
    renumber(model, cache)
    layer = cache.parts[0]
    for _ in forced(model, cache, tokens(more, seed=5).tolist(), Turns(cache, [logged])):
        pass
    weights = shown(cache, logged)[0][0, 0]  # [n]
    queries = model.prefill(tokens(T), Needs(8))[0].layers[0].queries
    assert queries is not None
    length, start = int(layer.table.length[0]), int(layer.table.start[0])
    by_rank = layer.positions[start : start + length].argsort()
    turn = sys.modules[type(model.network).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    cos, sin = network("llama").get_decoder().rotary_emb(layer.keys, torch.arange(T)[None])
    met = layer.keys[start : start + length][by_rank][None, None]  # [1, 1, n, D]
    keys = turn(met, met, cos[:, :length], sin[:, :length])[0][0, 0]
    back = T - 8 + more - (length - 8)  # from its position to its rank
    asked = queries[:1, more][None, :, None]  # [1, 1, 1, D]
    query = turn(asked, asked, cos[:, back : back + 1], -sin[:, back : back + 1])[0]
    logits = (keys @ query[0, 0, 0] * queries.shape[-1] ** -0.5)[: length - 7]  # those behind it are not seen
    assert (weights[: length - 7] - logits.softmax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("asked", ["question_in", "question_after"])
def test_a_cell_with_renumbered_positions_answers_beside_others_as_alone(asked: str) -> None:
    names = ("streaming_llm(every=1,renumber=true)", "snapkv(every=4,renumber=True)")
    labels = [BUILTIN.method(name)[0] for name in names]
    together = answers(tiny("llama"), "full", "snapkv(every=4)", *names, most=12, prompt=asked)
    for name, label in zip(names, labels, strict=True):
        alone, beside = answers(tiny("llama"), "full", name, most=12, prompt=asked)[label], together[label]
        assert alone.answer is not None and beside.answer is not None and alone.answer.tokens == beside.answer.tokens
        assert alone.counts == beside.counts and alone.fidelity == pytest.approx(beside.fidelity, abs=1e-5)
    whole = answers(tiny("llama"), "full", *names, budget="100%", most=12, prompt=asked)
    assert len({tuple(outcome.answer.tokens) for outcome in whole.values() if outcome.answer}) == 1
    assert all(outcome.fidelity["kl"] < 1e-5 for outcome in whole.values())


def test_what_has_no_ranks_is_refused() -> None:
    for family, word in (("opt", "not known"), ("mistral-window", "window"), ("gemma2", "window")):
        assert word in (cannot_renumber(tiny(family)) or "")
    assert cannot_renumber(tiny("llama")) is None
    with pytest.raises(UnknownChoice, match="name an interval"):
        BUILTIN.method("streaming_llm(renumber=true)")


def streamed(tmp_path: Path, scored: int, *methods: str) -> list[Record]:
    call(
        *("run", "--model", "reference", "--suite", "streaming", "--budgets", "24", "--methods", ",".join(methods)),
        *("--benchmarks", f"streaming(read=32,scored={scored})", "--out", str(tmp_path), "--device", "cpu"),
    )
    return read_rows(tmp_path)


def test_a_streamed_text_is_scored_along_its_length(tmp_path: Path) -> None:
    """The parts average to the whole, the full cache's loss is that of one pass, and reports show the parts."""
    rows = {row.key.method_name: row for row in streamed(tmp_path, 96, "full", "streaming_llm(every=1,renumber=true)")}
    for row in rows.values():
        assert row.by_distance is not None and len(row.by_distance) == 8 and not row.fidelity
        assert sum(row.by_distance) / 8 == pytest.approx(row.metrics["nll"], rel=1e-4)
    evicting = rows["streaming_llm(every=1,renumber=True)"]
    assert evicting.entries_peak is not None and evicting.entries_peak == 25 * 16 and rows["full"].entries_peak is None
    (table,) = distance_tables(list(rows.values()))
    assert table.header[-1] == "to 128" and len(table.rows) == 2


def test_beyond_the_models_positions_only_positions_inside_the_cache_go_on() -> None:
    model = tiny("llama")  # 512 positions
    ids = tokens(900).tolist()
    prompt = Prompt(ids[:40], 40, tuple(ids[40:]), streamed=True)
    names = ("full", "streaming_llm(every=1)", "streaming_llm(every=4,renumber=true)")
    cells = [Cell(name, BUILTIN.method(name)[1], None if name == "full" else Budget.parse("16")) for name in names]
    unit: Any = SimpleNamespace(protocol=Protocol())
    reasons = [_why_not(model, unit, cell, prompt) for cell in cells]
    assert "longer than the 512 positions" in (reasons[0] or "") and reasons[1] == reasons[0] and reasons[2] is None
    wide = replace(cells[2], budget=Budget.parse("510"))
    assert "entries of a row" in (_why_not(model, unit, wide, prompt) or "")
    ((_, outcome),) = Sweep(model, Protocol()).example(prompt, cells[2:], 0)
    assert outcome.by_distance is not None and outcome.answer is not None and outcome.answer.held is not None
    assert outcome.answer.held.entries_peak == (16 + 4) * 6
