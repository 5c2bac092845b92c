"""CLA: layers that read another layer's keys and values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, WIDE, dense, network, tokens, wide
from torch import Tensor

from harness.cache import Budget, ModelShape, Needs, keep_all
from harness.engine.model import Model
from harness.engine.rows import compact
from harness.families import CannotConvert, handles, shape_of
from harness.layer_sharing import places
from harness.models.variants import About, bytes_a_token, convert, open_variant, save
from harness.registry import BUILTIN, UnknownChoice
from methods import METHODS
from methods.base import Eviction, score_prefill
from methods.cla import SharedLayers

T = 40


def deep(family: str) -> Any:
    """Four layers, so that groups of two and runs of unequal length can be formed."""
    saved = FAMILIES[family]
    FAMILIES[family] = {**saved, "num_hidden_layers": 4}
    try:
        return wide(family)
    finally:
        FAMILIES[family] = saved


def variant(family: str, text: str) -> Model:
    net = deep(family)
    parent = shape_of(net)
    BUILTIN.conversion(text).apply(net)
    return Model(net, None, f"{family}+{text}", "0", parent)


def handed_on(net: Any, groups: list[list[int]], initial: str) -> Any:
    """The same by hooks: whatever a layer projects is replaced by what the first of its group projected."""
    found, held = handles(net), {}
    for group in groups:
        for layer in group:
            first = layer == group[0]
            if first and initial == "mean":
                for parts in zip(*(found[other].key_values() for other in group), strict=True):
                    parts[0].copy_(torch.stack(parts).mean(0))
            handle, attention = found[layer], found[layer].attention
            if handle.layout == "apart":
                for name in ("k_proj", "v_proj"):

                    def swap(_: Any, __: Any, out: Tensor, key: Any = (group[0], name), first: bool = first) -> Tensor:
                        held[key] = out if first else held[key]
                        return held[key]

                    getattr(attention, name).register_forward_hook(swap)
                if hasattr(attention, "k_norm"):
                    attention.k_norm = found[group[0]].attention.k_norm
            else:

                def mix(_: Any, __: Any, out: Tensor, key: int = group[0], handle: Any = handle, first: bool = first) -> Tensor:
                    queries, keys, values = handle.split(out)
                    held[key] = (keys, values) if first else held[key]
                    return handle.join(queries, *held[key])

                handle.fused.register_forward_hook(mix)
    return net


@pytest.mark.parametrize("text", ["cla-50", "cla-25", "cla-75-first"])
@pytest.mark.parametrize("family", WIDE)
def test_layers_read_what_the_first_of_their_group_projects(family: str, text: str) -> None:
    ids = tokens(T)
    net = deep(family)
    conversion = BUILTIN.conversion(text)
    assert isinstance(conversion, SharedLayers)
    wanted = dense(handed_on(net, conversion.groups(shape_of(net)), conversion.initial), ids)
    assert (dense(variant(family, text).network, ids) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", WIDE)
def test_rows_are_stored_once_and_exact(family: str) -> None:
    ids = tokens(T + 6)
    model = variant(family, "cla-50")
    whole = dense(copy.deepcopy(model.network), ids)
    model = Model(model.network, None, model.name, "0", model.parent_shape)
    assert (model.depth, model.shape.layers) == (4, 2)
    prefill = model.prefill(ids[:T], Needs())[0]
    assert (prefill.logits - whole[T - 1]).abs().max() < 1e-4
    cache = compact(prefill, [keep_all(prefill)], 10)
    assert cache.counts()[0].bytes_kept * 2 == model.parent_shape.full_entries(T) * model.parent_shape.entry_bytes()
    logits = model.decode(cache, ids[None, T:], keep=6)[0]
    assert (logits - whole[T:]).abs().max() < 1e-4
    cache.crop([6])
    again = torch.cat([model.decode(cache, ids[None, place : place + 1])[0] for place in range(T, T + 6)])
    assert (again - whole[T:]).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_no_layer_shared_is_the_original_model(family: str) -> None:
    ids = tokens(T)
    assert torch.equal(dense(variant(family, "cla-100").network, ids), dense(deep(family), ids))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_gradients_reach_the_shared_projection_from_every_layer_that_reads_it(family: str, checkpointing: bool) -> None:
    ids = tokens(T)[None]
    ours, theirs = variant(family, "cla-50").network, handed_on(deep(family), [[0, 1], [2, 3]], "mean")
    for net in (ours, theirs):
        net.train()
        net.set_attn_implementation("eager")
    if checkpointing:
        ours.gradient_checkpointing_enable()
    for _ in range(2):  # two batches of one step: what the first handed on must not reach into the second
        for net in (ours, theirs):
            net(ids, use_cache=False).logits.float().log_softmax(-1)[0, :, 7].sum().backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    compared = 0
    for name, weight in ours.named_parameters():
        expected = wanted[name.replace(".inner", "")]
        if expected is not None and expected.shape == weight.shape:
            assert torch.allclose(weight.grad, expected, atol=1e-4, rtol=1e-3), name  # type: ignore[arg-type]
            compared += "k_proj" in name or "query_key_value" in name
    assert compared >= 2


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "streaming_llm", "knorm", "ada_snapkv", "pyramidkv"])
def test_evictions_run_on_top_and_hold_their_budget(name: str) -> None:
    model, method, ids = variant("llama", "cla-50"), METHODS[name], tokens(T)
    assert isinstance(method, Eviction)
    prefill = model.prefill(ids, method.needs)[0]
    total = Budget.parse("30%").entries(model.parent_shape, T, "kv")
    cache = compact(prefill, [method.compress(prefill, total, score_prefill(method.scorer, prefill))], 8)
    assert cache.counts()[0].entries == total
    assert torch.isfinite(model.decode(cache, ids[None, :3])).all()


def test_a_stored_head_is_scored_by_all_query_heads_that_read_it() -> None:
    """By hand: the mean, over both layers and their heads, of what each layer alone would see."""
    model, ids = variant("llama", "cla-50"), tokens(T)
    seen: list[Tensor] = []

    def watch(module: Any, _: Any, options: dict[str, Any], __: Any) -> None:
        hidden, (cos, sin) = options["hidden_states"], options["position_embeddings"]
        queries = module.q_proj(hidden)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
        half = torch.cat([-queries.chunk(2, -1)[1], queries.chunk(2, -1)[0]], -1)
        seen.append(queries * cos[0] + half * sin[0])

    for layer in model.network.model.layers:
        layer.self_attn.register_forward_hook(watch, with_kwargs=True)
    prefill = model.prefill(ids, Needs(window=8, column_sums=True))[0]
    for stored, layer in enumerate(prefill.layers):
        heads = layer.keys.shape[0]
        probabilities = []
        for queries in seen[2 * stored : 2 * stored + 2]:  # [Hq, T, D]
            logits = queries @ layer.keys.repeat_interleave(queries.shape[0] // heads, 0).transpose(1, 2) * layer.scaling
            probabilities.append(logits.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1))
        by_layer = torch.stack(probabilities)  # [2, Hq, T, T]
        grouped = by_layer.unflatten(1, (heads, -1))  # [2, H, G, T, T]
        window = layer.mean_over_group(layer.window_attention(8)).mean(1)
        assert torch.allclose(window, grouped[..., -8:, :].mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(layer.mean_over_group(layer.column_sums), grouped.sum(-2).mean((0, 2)), atol=1e-4)  # type: ignore[arg-type]


def test_the_share_is_the_nearest_that_whole_layers_allow() -> None:
    tiny = ModelShape(22, 32, 4, 64, (None,) * 22, 2)
    counts = [len(SharedLayers(percent).groups(tiny)) for percent in (25, 35, 50, 75, 100, 1)]
    assert counts == [6, 8, 11, 17, 22, 1]
    groups = SharedLayers(35).groups(tiny)
    assert sorted(layer for group in groups for layer in group) == list(range(22))
    assert all(group == list(range(group[0], group[-1] + 1)) for group in groups)
    assert {len(group) for group in groups} == {2, 3}
    assert bytes_a_token(tiny, "cla-35") == 8 * 4 * 2 * 64 * 2


def test_layers_of_different_windows_share_nothing() -> None:
    model = variant("gemma2", "cla-50")
    windows = model.parent_shape.windows
    by_cache_layer: dict[int, set[Any]] = {}
    for window, place in zip(windows, places(model.network), strict=True):
        by_cache_layer.setdefault(place.cache_layer, set()).add(window)
    assert len(set(windows)) == 2 and all(len(kinds) == 1 for kinds in by_cache_layer.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt"])
def test_a_saved_variant_answers_as_before(family: str, tmp_path: Path) -> None:
    model, ids = variant(family, "cla-50"), tokens(T)
    save(model.network, None, About("tiny", "0", model.parent_shape, "cla-50"), tmp_path)
    again, about, _ = open_variant(tmp_path, torch.float32)
    assert about.conversion == "cla-50"
    assert torch.equal(dense(again, ids), dense(model.network, ids))


@pytest.mark.parametrize("text", ["cla", "cla-0", "cla-101", "cla-50:50", "cla-50-random"])
def test_shares_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UnknownChoice):
        BUILTIN.conversion(text)


def test_a_variant_is_not_converted_again() -> None:
    model = Model(network("llama"), None, "tiny", "0")
    once = convert(model, "cla-50")
    with pytest.raises(CannotConvert):
        BUILTIN.conversion("gqa-2").apply(once.network)
