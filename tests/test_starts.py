"""What is done to heads before they are grouped, and ways of training that are ours."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAST, WIDE, batches, call, converted, dense, tokens, trainable, wide
from torch import Tensor

from harness.engine.model import own_attention
from harness.engine.projections import output_weight
from harness.errors import BadRequest
from harness.families import attention_layers, groupings, handles, routers
from harness.models.variants import ABOUT, About, BadVariant, open_variant, save
from harness.registry import BUILTIN
from harness.training.loop import Course, choose_trained, heal, loss_of, predictions
from harness.training.recipes import Recipe
from harness.training.request import TrainRequest
from harness.training.starts import likeness_order, prepare, reorder


@pytest.mark.parametrize("family", WIDE)
def test_heads_in_another_order_say_the_same(family: str) -> None:
    ids, net = tokens(40), wide(family)
    plain = dense(net, ids)
    before = [part.clone() for part in handles(net)[0].key_values()]
    for handle in handles(net):
        reorder(handle, [2, 0, 3, 1, *range(4, handle.kv_heads)])
    assert (dense(net, ids) - plain).abs().max() < 1e-4
    assert not torch.equal(before[0], handles(net)[0].key_values()[0])


def test_heads_that_are_alike_become_neighbours() -> None:
    net = wide("llama")
    for handle in handles(net):
        for part in handle.key_values():
            part[3] = part[0] + 0.01 * torch.randn_like(part[0])
            part[2] = part[1] + 0.02 * torch.randn_like(part[1])
    assert [likeness_order(handle, [2, 4]) for handle in handles(net)] == [[0, 3, 1, 2]] * len(handles(net))
    assert likeness_order(handles(net)[0], [4])[:2] == [0, 3]
    prepare(net, BUILTIN.conversion("gqa-2"), Recipe(order="likeness"))
    keys = handles(net)[0].key_values()[0]
    assert (keys[0] - keys[1]).abs().max() < 0.1 and (keys[1] - keys[2]).abs().max() > 0.1


@pytest.mark.parametrize("family", WIDE)
def test_experts_of_heads_that_agree_start_as_one_model(family: str) -> None:
    ids, net = tokens(40), wide(family)
    for handle in handles(net):
        for part in (*handle.key_values(), *handle.queries()):
            part += 0.05 * torch.randn_like(part)  # biases are 0 in new models
    one, parent = copy.deepcopy(net), copy.deepcopy(net)
    BUILTIN.conversion("gqa-4").apply(one)
    prepare(net, BUILTIN.conversion("mixsga-3:1:6"), Recipe(agree=1.0))
    mixed = converted(family, "mixsga-3:1:6", net).network
    assert (dense(mixed, ids) - dense(one, ids)).abs().max() < 1e-4
    for agreed, share in ((copy.deepcopy(parent), 0.25), (copy.deepcopy(parent), 1.0)):
        prepare(agreed, BUILTIN.conversion("mixsga-3:1:6"), Recipe(agree=share, agree_on="k"))
        for ours, theirs in zip(handles(agreed), handles(parent), strict=True):
            moved, keys = ours.key_values(values=False), theirs.key_values(values=False)
            for part, was in zip(moved, keys, strict=True):
                mean = was.unflatten(0, (-1, 4)).mean(1).repeat_interleave(4, 0)
                assert torch.allclose(part, was + share * (mean - was), atol=1e-6)
            both = zip(ours.key_values(), theirs.key_values(), strict=True)
            assert sum(not torch.equal(part, was) for part, was in both) == len(keys), "values stay"


def test_a_family_whose_heads_cannot_be_aligned_is_refused() -> None:
    net = wide("llama")
    net.set_attn_implementation(own_attention(net))
    for layer in net.model.layers:  # as BitNet's, between attention and the output projection
        scale = 1 + torch.rand(layer.self_attn.o_proj.in_features)
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given, scale=scale: (given[0] * scale,))
    for recipe in (Recipe(align=True), Recipe(order="likeness")):
        with pytest.raises(BadRequest, match="logits moved by"):
            for handle in handles(net):
                for part in handle.key_values():
                    part[3] = part[0] + 0.01 * torch.randn_like(part[0])
            prepare(net, BUILTIN.conversion("mqa" if recipe.align else "gqa-2"), recipe, batches())


def test_starts_are_for_conversions_that_group_heads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadRequest, match="that group heads"):
        prepare(wide("llama"), BUILTIN.conversion("cla-50"), Recipe(agree=1.0))
    assert call("train", "--model", "random:tiny-llama", "--conversion", "none", "--agree", "2") == 2
    assert "--agree, --ramp and --soft are shares" in capsys.readouterr().err
    assert call("train", "--model", "reference", "--conversion", "gqa", "--groups", "2", "--soft", "0.5", "--steps", "1") == 2
    assert "--ramp and --soft are for experts, and gqa-2 has none" in capsys.readouterr().err


def test_a_ramp_begins_with_the_model_as_it_was_and_ends_at_the_ratios(tmp_path: Path) -> None:
    net = trainable("llama", "mixsga-3:1:6")
    router, seen = routers(net)[0], list[tuple[int, ...]]()
    plain, batch = trainable("llama", "none"), batches()(0)
    router.approach(0.0)
    assert router.current == (1000, 0, 0)
    for other in routers(net):
        other.approach(0.0)
    first, _ = loss_of(net, batch, Recipe(bf16=False, alpha=0.0))
    assert float(first) == pytest.approx(float(loss_of(plain, batch, Recipe(bf16=False))[0]), abs=1e-5)
    router.approach(0.5)
    assert router.current == (650, 50, 300)

    def look(number: int) -> object:
        seen.append(router.current)
        return batches()(number)

    heal(net, Course(replace(FAST, ramp=0.5), look), tmp_path)  # type: ignore[arg-type]
    assert seen[0] == (1000, 0, 0) and seen[-1] == (3, 1, 6) == router.current and len(set(seen)) == 4


def test_soft_routing_lets_the_task_reach_the_router_and_ends_hard(tmp_path: Path) -> None:
    net, batch = trainable("llama", "mixsga-3:1:6"), batches()(0)
    hard = float(loss_of(net, batch, Recipe(bf16=False, alpha=0.0))[0])
    for router in routers(net):
        router.softness = 1.0
    soft = loss_of(net, batch, Recipe(bf16=False, alpha=0.0))[0]
    soft.backward()
    assert abs(float(soft) - hard) > 1e-4
    assert all(router.score.weight.grad is not None and router.score.weight.grad.any() for router in routers(net))
    attention: Any = attention_layers(net)[0]
    router, inner = routers(net)[0], attention.k_proj.inner
    hidden = torch.randn(2, 9, attention.k_proj.in_features)
    router.segments = None
    heads = inner(hidden).view(2, 9, 4, -1)
    shares = router.score(hidden).softmax(-1)
    for softness in (1.0, 0.25):
        router.softness = softness
        found = attention.k_proj(hidden).view(2, 9, 4, -1)
        assert router.assigned is not None
        for row, token in ((0, 0), (1, 8), (0, 4)):
            mine = heads[row, token]  # [4, D]
            ways = [mine, mine.view(2, 2, -1).mean(1).repeat_interleave(2, 0), mine.mean(0).expand(4, -1)]
            one = ways[int(router.assigned[row, token])]
            mixture = sum(share * way for share, way in zip(shares[row, token], ways, strict=True))
            assert torch.allclose(found[row, token], softness * mixture + (1 - softness) * one, atol=1e-6)
    net.eval()  # whoever asks a model in between asks it as it decodes
    attention.k_proj(hidden)
    assert router.mixed is None
    seen: list[float] = []

    def look(number: int) -> object:
        seen.append(router.softness)
        return batches()(number)

    heal(net, Course(replace(FAST, soft=0.5), look), tmp_path)  # type: ignore[arg-type]
    assert seen[0] == 1 and seen[-1] == 0 == router.softness and seen == sorted(seen, reverse=True) and len(set(seen)) == 4


def test_trained_on_argmax_routers_still_learn_what_expert_choice_says() -> None:
    net, batch = trainable("llama", "mixsga-3:1:6"), batches()(0)
    _, chosen = loss_of(net, batch, Recipe(bf16=False))
    wanted = routers(net)[0].assigned
    _, parts = loss_of(net, batch, Recipe(bf16=False, routing="argmax"))
    router = routers(net)[0]
    assert router.scores is not None and torch.equal(router.assigned, router.scores.argmax(-1))
    assert torch.equal(router.wanted, wanted) and not torch.equal(router.assigned, wanted)
    slow = -router.logits.log_softmax(-1).gather(-1, wanted[..., None]).mean()
    assert float(router.loss("logits")) == pytest.approx(float(slow)) and parts["lm"] != chosen["lm"]


def test_attention_outputs_of_the_parent_are_learned() -> None:
    parent, batch = trainable("llama", "none"), batches()(0)
    recipe = Recipe(bf16=False, layers=2.0, alpha=0.0)
    total, parts = loss_of(copy.deepcopy(parent), batch, recipe, parent)
    assert parts["layers"] == 0.0 and float(total) == pytest.approx(parts["lm"])
    net = trainable("llama", "mixsga-1:1:2")
    total, parts = loss_of(net, batch, recipe, parent)
    assert parts["layers"] > 0.01 and float(total) == pytest.approx(parts["lm"] + 2 * parts["layers"], abs=1e-5)
    assert not any(module._forward_hooks for one in (net, parent) for module in attention_layers(one))


def test_scales_are_learned_with_keys_and_values() -> None:
    net = trainable("llama", "mixsga-3:1:6-scaled")
    choose_trained(net, Recipe(trains="kv"))
    loss_of(net, batches()(0), Recipe(bf16=False))[0].backward()
    for grouping in groupings(net):
        assert grouping.scales is not None and grouping.scales.grad is not None
        assert grouping.scales.grad[0] == 0 and grouping.scales.grad[1:].all(), "the finest expert has no mean to scale"
    attention: Any = attention_layers(net)[0]
    hidden = torch.randn(2, 9, attention.k_proj.in_features)
    attention.kv_grouping.router.segments = None
    before = attention.k_proj(hidden), attention.v_proj(hidden)
    attention.kv_grouping.scales.data.fill_(2.0)
    keys, coarse = attention.k_proj(hidden), (attention.kv_grouping.assigned > 0)[..., None]
    assert torch.allclose(keys, torch.where(coarse, 2 * before[0], before[0])) and coarse.any()
    assert torch.equal(attention.v_proj(hidden), before[1])


def test_trainings_multiply_bfloat16_where_the_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, cpu = TrainRequest(model="reference", conversion="none"), torch.device("cpu")
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert asked.arithmetic(cpu).settings().bf16 is able
        assert replace(asked, bf16=not able).arithmetic(cpu).settings().bf16 is not able
    assert asked.arithmetic(torch.device("cuda")).settings().bf16


def test_a_touchy_variant_is_known_again_in_another_dtype(tmp_path: Path) -> None:
    """Another dtype changed its logits by so much when it was saved: that is no reason to refuse it."""
    model = converted("llama", "mixsga-3:1:6")
    save(model.network, None, About("p", "0", model.parent_shape, "mixsga-3:1:6"), tmp_path)
    open_variant(tmp_path, torch.float32)
    open_variant(tmp_path, torch.bfloat16)
    said = json.loads((tmp_path / ABOUT).read_text())
    assert 0 < said["moved"] < 0.2
    said["logits"] = [value + (2 if number % 2 else 0) for number, value in enumerate(said["logits"])]
    (tmp_path / ABOUT).write_text(json.dumps(said))
    with pytest.raises(BadVariant, match="differ by"):
        open_variant(tmp_path, torch.float32)
    (tmp_path / ABOUT).write_text(json.dumps({**said, "moved": 2.0}))
    open_variant(tmp_path, torch.float32)


@pytest.mark.parametrize("family", WIDE)
def test_aligned_heads_say_the_same_and_are_nearer_to_their_mean(family: str) -> None:
    net, ids = wide(family), tokens(40)
    net.set_attn_implementation(own_attention(net))
    for handle in handles(net):
        for part in (*handle.key_values(), *handle.queries()):
            part += 0.05 * torch.randn_like(part)  # biases are 0 in new models
    before, plain = copy.deepcopy(net), dense(net, ids)
    prepare(net, BUILTIN.conversion("mqa"), Recipe(align=True), batches())
    assert (dense(net, ids) - plain).abs().max() < 1e-4
    (was_k, was_v), (keys, values) = spread(before), spread(net)
    assert values < was_v - 0.05
    assert (keys == was_k) if family == "qwen3" else (keys < was_k - 0.02), "the norm of Qwen3's keys stands in the way"


def spread(net: Any) -> tuple[float, float]:
    """Share of the squared length of keys and values that is not in the mean of the heads, over layers and trained tokens."""
    seen: list[list[Tensor]] = [[], []]
    batch = batches()(0)
    for handle in handles(net):
        modules = handle.projections
        for number in (0, 1):

            def keep(_: Any, __: Any, out: Tensor, number: int = number, handle: Any = handle) -> None:
                fused = handle.layout != "apart"
                seen[number].append(handle.split(out)[1 + number] if fused else out.unflatten(-1, (-1, handle.head_dim)))

            modules[number % len(modules)].register_forward_hook(keep)
    with torch.no_grad():
        predictions(net, batch)
    shares = [1 - heads.mean(2).square().sum() * heads.shape[2] / heads.square().sum() for part in seen for heads in part]
    half = len(shares) // 2
    return float(sum(shares[:half]) / half), float(sum(shares[half:]) / half)


def test_heads_that_are_one_in_other_coordinates_are_found() -> None:
    net = wide("llama")
    net.set_attn_implementation(own_attention(net))
    for handle in handles(net):
        for part in handle.key_values():
            part[1:] = part[:1]
    once = dense(net, ids := tokens(40))
    for handle in handles(net):
        output = output_weight(handle.attention, handle.query_heads * handle.head_dim)
        assert output is not None
        by = torch.stack([torch.linalg.qr(torch.randn(handle.head_dim, handle.head_dim))[0] for _ in range(4)])
        columns = output.data.unflatten(1, (handle.query_heads, handle.head_dim))
        columns.copy_(torch.einsum("xhd,hed->xhe", columns, by.repeat_interleave(2, 0)))
        values = handle.key_values()[-1]
        values.copy_(by @ values)
    assert (dense(net, ids) - once).abs().max() < 1e-4, "the same model"
    prepare(net, BUILTIN.conversion("mqa"), Recipe(align=True), batches())
    BUILTIN.conversion("mqa").apply(net)
    assert (dense(net, ids) - once).abs().max() < 1e-3, "averaging lost nothing"
