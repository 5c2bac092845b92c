"""GQA, MQA and mixSGA: exact against dense attention over repeated heads, really smaller, and routed as the paper says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BASE, SCORED, WIDE, call, converted, dense, masked_logits, tokens, wide
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from harness.cache import Budget, ModelShape, Needs, keep_all
from harness.engine.model import Model
from harness.engine.rows import RowCache, compact
from harness.families import CannotConvert, groupings, handles
from harness.models.load import load
from harness.models.shapes import SHAPES
from harness.models.variants import About, BadVariant, bytes_a_token, open_variant, save
from harness.papers.token_importance import perplexity_changes
from harness.registry import BUILTIN, UnknownChoice
from methods.base import Eviction, score_prefill
from methods.mixsga_router import Router, capacities, expert_choice
from results.store import read_rows

T = 48


def pooled_copy(family: str, group: int, how: str) -> Any:
    """An ordinary model whose heads are averaged in place and kept apart: what sharing them must equal."""
    net = wide(family)
    for handle in handles(net):
        for part in handle.key_values():
            for first in range(0, handle.kv_heads, group):
                same = part[first].clone() if how == "first" else part[first : first + group].mean(0)
                part[first : first + group] = same
    return net


def mixed(model: Model, read_first: int) -> None:
    """Has every router choose by experts for the prompt and by argmax behind it, in one dense pass."""

    class Mixed(torch.nn.Module):
        def __init__(self, router: Router) -> None:
            super().__init__()
            self.router, self.assigned = router, None

        def forward(self, hidden: Tensor) -> None:
            self.router.mode = "expert_choice"
            front = self.router(hidden[:, :read_first])
            self.router.mode = "argmax"
            self.assigned = torch.cat([front, self.router(hidden[:, read_first:])], 1)

    for grouping in groupings(model.network):
        if grouping.router is not None:
            grouping.router = Mixed(grouping.router)  # type: ignore[assignment]


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("family", WIDE)
def test_gqa_equals_the_model_with_its_heads_averaged(family: str, how: str) -> None:
    ids = tokens(T)
    model = converted(family, "gqa-2" + ("" if how == "mean" else f"-{how}"))
    assert (dense(model.network, ids) - dense(pooled_copy(family, 2, how), ids)).abs().max() < 1e-4


@pytest.mark.parametrize("text", ["gqa-2", "mqa", "mixsga-0:1:0"])
@pytest.mark.parametrize("family", WIDE)
def test_rows_of_grouped_models_are_fewer_and_exact(family: str, text: str) -> None:
    ids = tokens(T + 6)
    model = converted(family, text)
    whole = dense(copy.deepcopy(model.network), ids)
    model = Model(model.network, None, model.name, "0", model.parent_shape)
    prefill = model.prefill(ids[:T], Needs())[0]
    assert (prefill.logits - whole[T - 1]).abs().max() < 1e-4
    cache = compact(prefill, [keep_all(prefill)], 10)
    logits = model.decode(cache, ids[None, T:], keep=6)[0]
    assert (logits - whole[T:]).abs().max() < 1e-4
    held = cache.counts()[0].entries
    group = {"gqa-2": 2, "mqa": model.parent_shape.kv_heads, "mixsga-0:1:0": 2}[text]
    assert held * group == model.parent_shape.full_entries(T + 6) or family in ("mistral-window", "gemma2")
    assert compact(prefill, [keep_all(prefill)], 10).counts()[0].entries * group == model.parent_shape.full_entries(T)


@pytest.mark.parametrize(
    ("heads", "text"), [(2, "mixsga-1x1:1x2"), (3, "mixsga-1x1:2x3"), (12, "mixsga-1x1:1x3:1x4:2x12"), (4, "mixsga-3:1:6-scaled")]
)
def test_mixsga_of_any_number_of_heads_decodes_over_rows_as_dense_attention(heads: int, text: str) -> None:
    ids = tokens(T + 9)
    given = {**BASE, "model_type": "llama", "hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": heads}
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given), dtype=torch.float32).eval()
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.15)
    plain = dense(net, ids)
    alone = copy.deepcopy(net)
    BUILTIN.conversion("mixsga-1x1").apply(alone)
    assert torch.equal(dense(alone, ids), plain)
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    BUILTIN.conversion(f"mixsga-1x{heads}").apply(ours)
    BUILTIN.conversion("mqa").apply(theirs)
    assert (dense(ours, ids) - dense(theirs, ids)).abs().max() < 1e-4
    model = converted("llama", text, net)
    for grouping in groupings(model.network):
        if grouping.scales is not None:
            grouping.scales.data.uniform_(0.5, 1.5)
    prefill = model.prefill(ids[:T], Needs())[0]
    cache = compact(prefill, [keep_all(prefill)], 20)
    logits = model.decode(cache, ids[None, T:], keep=9)[0]
    twin = copy.deepcopy(model.network)
    mixed(Model(twin, None, "twin", "0", model.parent_shape), T)
    whole = dense(twin, ids)
    assert (prefill.logits - whole[T - 1]).abs().max() < 1e-4 and (logits - whole[T:]).abs().max() < 1e-4
    full = BUILTIN.conversion(text).share(model.parent_shape) * model.parent_shape.full_entries(T)
    held = compact(prefill, [keep_all(prefill)], 0).counts()[0].entries
    assert abs(held - full) <= 3 * model.shape.layers * heads, "shares are rounded up, token by token"


@pytest.mark.parametrize("text", ["mixsga-1x0", "mixsga-1x2:1x1", "mixsga-1x2:1x2", "mixsga-3:1x3", "gqa-1x2", "mixsga-0x1"])
def test_groups_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UnknownChoice):
        BUILTIN.conversion(text)


@pytest.mark.parametrize("family", WIDE)
def test_one_to_nothing_is_the_model_and_nothing_to_one_is_gqa_2(family: str) -> None:
    ids = tokens(T)
    assert torch.equal(dense(converted(family, "mixsga-1:0:0").network, ids), dense(wide(family), ids))
    ours, theirs = (dense(converted(family, text).network, ids) for text in ("mixsga-0:1:0", "gqa-2"))
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("ratios", ["3:1:6", "1:1:2", "1:0:1", "0:1:1"])
@pytest.mark.parametrize("family", WIDE)
def test_decoding_over_mixsga_rows_equals_dense_attention_over_repeated_heads(family: str, ratios: str) -> None:
    ids = tokens(T + 9)
    model = converted(family, f"mixsga-{ratios}")
    prefill = model.prefill(ids[:T], Needs())[0]
    experts = len(model.routers[0].ratios)
    assert [len(expert_groups) for expert_groups in prefill.expert_groups] == [experts] * model.shape.layers
    logits = []
    for pieces in ([9], [1] * 9, [4, 1, 4]):
        cache = compact(prefill, [keep_all(prefill)] * 2, 20)
        parts, at = [], T
        for size in pieces:
            parts.append(model.decode(cache, ids[at : at + size].expand(2, -1), keep=size))
            at += size
        logits.append(torch.cat(parts, 1))
    assert all((other - logits[0]).abs().max() < 1e-4 for other in logits)
    assert torch.allclose(logits[0][0], logits[0][1], atol=1e-5)
    net = copy.deepcopy(model.network)
    twin = Model(net, None, "twin", "0", model.parent_shape)
    mixed(twin, T)
    whole = dense(net, ids)
    assert (prefill.logits - whole[T - 1]).abs().max() < 1e-4
    assert (logits[0][0] - whole[T:]).abs().max() < 1e-4


@pytest.mark.parametrize("family", WIDE)
def test_taking_tokens_back_undoes_them_in_their_experts_rows(family: str) -> None:
    ids = tokens(T + 12)
    model = converted(family, "mixsga-1:1:2")
    prefill = model.prefill(ids[:T], Needs())[0]

    def cache_of(count: int) -> RowCache:
        return compact(prefill, [keep_all(prefill)] * count, 30)

    plain = cache_of(1)
    model.decode(plain, ids[None, T : T + 4])
    wanted = model.decode(plain, ids[None, T + 4 :], keep=8)
    tried = cache_of(3)
    model.decode_ragged(tried, [ids[T : T + 7].tolist(), ids[T : T + 4].tolist(), [5, 6]])
    tried.crop([3, 0, 2])
    tried.keep([1, 0])
    got = model.decode(tried, ids[T + 4 :].expand(2, -1), keep=8)
    assert (got - wanted).abs().max() < 1e-4
    assert len({counts.entries for counts in tried.counts()}) == 1


@pytest.mark.parametrize("method", [name for name, method in SCORED.items() if name != "full" and not method.head_scores])
@pytest.mark.parametrize("text", ["gqa-2", "mixsga-3:1:6"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_every_eviction_runs_on_top_and_equals_masking(family: str, text: str, method: str) -> None:
    ids = tokens(T + 6, seed=3)
    model = converted(family, text)
    eviction = SCORED[method]
    assert isinstance(eviction, Eviction)
    prefill = model.prefill(ids[:T], eviction.needs)[0]
    stored = compact(prefill, [keep_all(prefill)], 0).counts()[0].entries
    scores = score_prefill(eviction.scorer, prefill)
    for budget in ("9", "30%", "95%"):
        total = Budget.parse(budget).entries(model.parent_shape, T, "kv")
        kept = eviction.compress(prefill, total, scores)
        cache = compact(prefill, [kept], 20)
        assert cache.counts()[0].entries == min(total, stored)
        logits = model.decode(cache, ids[None, T:], keep=6)[0]
        net = copy.deepcopy(model.network)
        mixed(Model(net, None, "twin", "0"), T)
        assert (logits - masked_logits(family, ids, T, kept, net)[T:]).abs().max() < 1e-4


def test_head_scores_weigh_a_row_by_its_heads_and_its_share_of_the_tokens() -> None:
    model = converted("llama", "mixsga-1:1:2")
    prefill = model.prefill(tokens(T), SCORED["headkv_r2"].needs)[0]
    from helpers import head_scores

    eviction = SCORED["headkv_r2"]
    assert isinstance(eviction, Eviction)
    eviction = eviction.with_head_scores(head_scores(3, 8))
    total = Budget.parse("30%").entries(model.parent_shape, T, "kv")
    kept = eviction.compress(prefill, total, score_prefill(eviction.scorer, prefill))
    assert compact(prefill, [kept], 0).counts()[0].entries == total
    from methods.base import row_sizes

    rows = row_sizes(prefill, eviction.scorer.protected)
    weights = eviction.allocator.weights(rows)  # type: ignore[attr-defined]
    shares = head_scores(3, 8).values / head_scores(3, 8).values.sum()
    for number in range(len(rows)):
        layer, first, width = rows.layer[number], rows.first[number], rows.width[number]
        wanted = shares[layer, first : first + width].sum() * rows.length[number] / T
        assert weights[number] == pytest.approx(wanted)


def test_under_argmax_a_later_token_changes_nothing_before_it() -> None:
    model = converted("llama", "mixsga-3:1:6")
    ids = tokens(T)
    other = ids.clone()
    other[-1] = (ids[-1] + 7) % 90 + 3

    def logits(mode: str, given: Tensor) -> Tensor:
        for router in model.routers:
            router.mode = mode  # type: ignore[assignment]
        return dense(model.network, given)

    prefill = model.prefill(ids, Needs(), routing="argmax")[0]
    assert torch.equal(logits("argmax", ids)[:-1], logits("argmax", other)[:-1])
    assert (prefill.logits - logits("argmax", ids)[-1]).abs().max() < 1e-4


def test_capacities_are_whole_numbers() -> None:
    assert capacities((3, 1, 6), 10) == [3, 1, 6]
    assert capacities((3, 1, 6), 11) == [4, 2, 5]
    assert [sum(capacities((3, 11, 6), n)) for n in (100, 180, 200)] == [100, 180, 200]
    assert capacities((3, 11, 6), 100) == [15, 55, 30]
    assert capacities((1, 9, 2), 1) == [1, 0, 0] and capacities((1, 9, 2), 3) == [1, 2, 0]
    assert capacities((5,), 7) == [7]


def test_expert_choice_by_hand() -> None:
    """Expert 0 takes its two best; expert 1 the best of the rest by its own column; the last what is left."""
    scores = torch.tensor([[9.0, 9, 0], [8, 1, 0], [7, 8, 9], [1, 2, 0], [0, 7, 0]])
    got = expert_choice(scores, (2, 1, 2), torch.zeros(5, dtype=torch.long))
    assert got.tolist() == [0, 0, 1, 2, 2]
    assert expert_choice(torch.zeros(4, 2), (1, 1), torch.zeros(4, dtype=torch.long)).tolist() == [
        0,
        0,
        1,
        1,
    ]  # ties: the earlier


def test_sequences_are_routed_alone_and_padding_never() -> None:
    rng = torch.Generator().manual_seed(0)
    lengths = (7, 1, 13, 2)
    for ratios in ((3, 1, 6), (1, 9, 2), (1, 1)):
        scores = [torch.randn(n, len(ratios), generator=rng) for n in lengths]
        padded, segments, alone = [], [], []
        for number, (part, size) in enumerate(zip(scores, lengths, strict=True)):
            pad = torch.randn(3, len(ratios), generator=rng) * 100
            padded += [pad, part]
            segments += [torch.full((3,), -1), torch.full((size,), number)]
            alone += [torch.full((3,), -1), expert_choice(part, ratios, torch.zeros(size, dtype=torch.long))]
            assert torch.bincount(alone[-1], minlength=len(ratios)).tolist() == capacities(ratios, size)
        shuffled = torch.randperm(sum(lengths) + 12, generator=rng)
        together, where = torch.cat(padded), torch.cat(segments)
        assert torch.equal(expert_choice(together, ratios, where), torch.cat(alone))
        assert torch.equal(expert_choice(together[shuffled], ratios, where[shuffled]), torch.cat(alone)[shuffled])


def test_the_routers_loss_and_its_gradient() -> None:
    torch.manual_seed(0)
    router = Router(8, (1, 2, 4), (3, 1, 6))
    assert router.score.weight.std() > 0 and not router.score.bias.any()
    hidden = torch.randn(2, 20, 8)
    router(hidden)
    assert router.assigned is not None and router.logits is not None
    for form, scores in (("logits", router.logits), ("sigmoid", router.logits.sigmoid())):
        slow = -scores.log_softmax(-1).gather(-1, router.assigned[..., None]).mean()
        assert float(router.loss(form)) == pytest.approx(float(slow))  # type: ignore[arg-type]
    router.loss("logits").backward()
    assert router.score.weight.grad is not None and router.score.weight.grad.abs().sum() > 0
    agreed, real = router.agreement()
    assert real == 40 and agreed == int((router.logits.argmax(-1) == router.assigned).sum())


def test_experts_by_lot_follow_the_ratios() -> None:
    torch.manual_seed(0)
    router = Router(64, (1, 2, 4), (3, 1, 6), learned=False)
    hidden = torch.randn(1, 5000, 64)
    router.mode = "argmax"
    drawn = torch.bincount(router(hidden)[0], minlength=3) / 5000
    assert (drawn - torch.tensor([0.3, 0.1, 0.6])).abs().max() < 0.03
    assert torch.equal(router(hidden[:, 7:9])[0], router(hidden)[0, 7:9])
    router.mode = "expert_choice"
    assert torch.bincount(router(hidden)[0]).tolist() == [1500, 500, 3000]
    assert not any(weight.requires_grad for weight in router.parameters())
    router.mode = "expert_choice"
    router(hidden)
    assert router.scores is not None
    decoded = torch.bincount(router.scores.argmax(-1)[0], minlength=3) / 5000
    assert (decoded - drawn).abs().max() < 1e-6, "what is reported is what decoding does"


@pytest.mark.parametrize(("shape", "expected"), [("opt-125m", 36_867), ("llama-3.2-1b", 32_772), ("gemma-2-2b", 106_502)])
def test_bytes_a_token_are_those_of_the_papers_table_9(shape: str, expected: int) -> None:
    s = SHAPES[shape]
    heads = s["num_attention_heads"]
    dim = s.get("head_dim") or s["hidden_size"] // heads
    layers = s["num_hidden_layers"]
    model = ModelShape(layers, heads, s.get("num_key_value_heads", heads), dim, (None,) * layers, 4)
    assert int(bytes_a_token(model, "mixsga-3:1:6")) == expected  # of 6.5 bytes of bits the table shows 6
    assert bytes_a_token(model, "gqa-2") == expected - layers * 2 // 8


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_bytes_a_token_are_those_of_the_rows(family: str) -> None:
    for text in ("none", "gqa-2", "mqa", "mixsga-3:1:6", "mixsga-1:1:2", "mixsga-1:1:0"):
        model = converted(family, text)
        prefill = model.prefill(tokens(80), Needs())[0]
        counts = compact(prefill, [keep_all(prefill)], 0).counts()[0]
        assert counts.bytes_kept == np.ceil(80 * bytes_a_token(model.parent_shape, text))
        assert counts.bytes_allocated <= 1.02 * counts.bytes_kept + 4 * counts.entries


@pytest.mark.parametrize("text", ["gqa-2", "mixsga-3:1:6"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gemma2"])
def test_a_saved_variant_comes_back(family: str, text: str, tmp_path: Path) -> None:
    ids = tokens(T)
    model = converted(family, text)
    about = About("parent", "rev", model.parent_shape, text, {"steps": 3})
    model.network.generation_config.eos_token_id = [1, 7]  # named there and nowhere else
    save(model.network, None, about, tmp_path)
    again, said, digest = open_variant(tmp_path, torch.float32)
    assert said == about and len(digest) == 16
    assert again.generation_config.eos_token_id == [1, 7]
    assert torch.equal(dense(again, ids), dense(model.network, ids))
    loaded = load(str(tmp_path), torch.float32, torch.device("cpu"))
    assert loaded.name == f"parent+{text}" and loaded.parent_shape == model.parent_shape
    if text == "gqa-2" and family != "opt":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(dense(plain, ids), dense(model.network, ids)), "an ordinary checkpoint loads without us"
    else:
        with pytest.raises(OSError, match=r"safetensors|model"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_broken_variants_get_one_line(tmp_path: Path) -> None:
    model = converted("llama", "mixsga-1:1:2")
    save(model.network, None, About("p", "r", model.parent_shape, "mixsga-1:1:2"), tmp_path)
    whole = (tmp_path / "variant.json").read_text()
    renamed = [whole.replace(f'"{name}"', '"other"') for name in ("parent", "recipe", "parent_shape")]
    for text in (whole[: len(whole) // 2], "{}", "null", whole.replace("variant/1", "variant/9"), *renamed):
        (tmp_path / "variant.json").write_text(text)
        with pytest.raises(BadVariant, match="missing or torn"):
            open_variant(tmp_path, torch.float32)
    (tmp_path / "variant.json").unlink()
    with pytest.raises(BadVariant, match="missing or torn"):
        load(str(tmp_path), torch.float32, torch.device("cpu"))
    (tmp_path / "variant.json").write_text(whole.replace("mixsga-1:1:2", "mixsga-1:1"))
    with pytest.raises(BadVariant, match=r"not those of|cannot be read"):
        open_variant(tmp_path, torch.float32)
    (tmp_path / "variant.json").write_text(whole)
    (tmp_path / "variant.safetensors").write_bytes(b"torn")
    with pytest.raises(BadVariant, match="cannot be read"):
        open_variant(tmp_path, torch.float32)


@pytest.mark.parametrize(
    "text", ["gqa", "gqa-0", "gqa-x", "gqa-2-last", "mixsga", "mixsga-0:0", "mixsga-3:-1", "cla", "mqa-2-first", ""]
)
def test_conversions_that_make_no_sense(text: str) -> None:
    with pytest.raises(UnknownChoice, match=r"conversion|ratios"):
        BUILTIN.conversion(text)


def test_heads_that_cannot_form_groups_and_second_conversions_are_refused() -> None:
    for text in ("gqa-3", "gqa-16", "mixsga-1:1:1:1"):
        with pytest.raises(CannotConvert, match="do not divide 4 KV heads"):
            converted("llama", text)
    net = wide("opt")
    BUILTIN.conversion("mixsga-1:1").apply(net)
    with pytest.raises(CannotConvert, match="converted already"):
        BUILTIN.conversion("gqa-2").apply(net)


def test_converting_makes_no_second_copy_of_the_weights() -> None:
    net = wide("llama")
    before = {name: weight.data_ptr() for name, weight in net.named_parameters()}
    BUILTIN.conversion("mixsga-3:1:6").apply(net)
    after = {name.replace(".inner", ""): weight.data_ptr() for name, weight in net.named_parameters()}
    assert {name: after[name] for name in before} == before
    net = wide("opt")
    before = {name: weight.data_ptr() for name, weight in net.named_parameters()}
    BUILTIN.conversion("gqa-2").apply(net)
    assert {name.replace(".inner", ""): weight.data_ptr() for name, weight in net.named_parameters()} == before


def test_variants_run_beside_their_parent_on_one_byte_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = "random:tiny-llama,random:tiny-llama+gqa-2,random:tiny-llama+mqa,random:tiny-llama+mixsga-3:1:6"
    asked = ["run", "--model", models, "--methods", "full,snapkv,h2o", "--budgets", "25%,12", "--limit", "1"]
    asked += ["--benchmarks", "random_tokens(length=120,max_new_tokens=6)", "--out", str(tmp_path)]
    assert call(*asked, "--prompt", "question_after") == 0
    rows = read_rows(tmp_path)
    assert {row.status for row in rows} == {"ok"} and len({row.bytes_full for row in rows}) == 1
    shares = {
        row.key.model.split(" (unhealed)")[0]: row.bytes_kept / row.bytes_full
        for row in rows
        if row.key.method.startswith("full")
    }  # type: ignore[operator]
    assert [round(shares[name], 2) for name in models.split(",")] == [1.0, 0.5, 0.25, 0.5]
    for budget in ("25%", "12"):
        entries = {row.entries for row in rows if row.key.budget == budget}
        assert len(entries) == 1, "the same budget is the same number of entries for every variant"
    assert {row.key.routing for row in rows if "mixsga" in row.key.model} == {"expert_choice"}
    assert {row.key.routing for row in rows if "mixsga" not in row.key.model} == {""}
    some = tmp_path / "some"
    assert call(*asked[:-1], str(some), "--model", "random:tiny-llama,random:tiny-llama+gqa-3") == 1, "the others are done"
    assert "gqa-3: skipped, groups of 3 do not divide 4" in capsys.readouterr().err
    assert {row.key.model for row in read_rows(some)} == {"random:tiny-llama"} and (some / "report" / "scores.md").exists()
    assert call(*asked, "--model", "random:tiny-llama+gqa-3") == 2
    assert "do not divide 4 KV heads" in capsys.readouterr().err
    assert call(*asked, "--model", "random:tiny-llama+gqa") == 2
    assert "conversion 'gqa': it needs groups" in capsys.readouterr().err


def test_variant_json_says_where_it_came_from(tmp_path: Path) -> None:
    model = converted("llama", "gqa-2")
    save(model.network, None, About("parent", "rev", model.parent_shape, "gqa-2", {"steps": 1}, {"tokens": 9}), tmp_path)
    found = json.loads((tmp_path / "variant.json").read_text())
    assert found["parent"] == "parent" and found["parent_shape"]["kv_heads"] == 4 and found["results"] == {"tokens": 9}


def test_averaging_one_token_is_averaging_its_heads_by_hand(tmp_path: Path) -> None:
    ids = tokens(20, seed=9)
    model = Model(wide("llama"), None, "m", "0")
    plain, changes = perplexity_changes(model, ids, 6, lambda _: None)

    def perplexity(net: Any, averaged: int | None) -> float:
        """With hooks on plain projections."""

        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            heads = out.clone().unflatten(-1, (4, 8))
            if averaged is not None:
                heads[:, averaged] = heads[:, averaged].mean(1, keepdim=True)
            return heads.flatten(-2)

        for handle in handles(net):
            handle.attention.k_proj.register_forward_hook(hook)
            handle.attention.v_proj.register_forward_hook(hook)
        logits = dense(net, ids)[:-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[1:]).exp())

    assert plain == pytest.approx(perplexity(wide("llama"), None), rel=1e-4)
    assert len(changes) == 20 and changes[-1] == pytest.approx(0, abs=plain * 1e-5), "nothing follows the last token"
    for place in (0, 7, 18):
        assert changes[place] == pytest.approx(perplexity(wide("llama"), place) - plain, rel=1e-2, abs=plain * 1e-5)
    text = tmp_path / "t.txt"
    text.write_text("Some words that somebody wrote, and some more of them.")
    out = tmp_path / "tokens"
    assert call("token-importance", "--model", "reference", "--text", str(text), "--tokens", "12", "--out", str(out)) == 0
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 13 and out.with_suffix(".png").stat().st_size > 1000
    assert call("token-importance", "--model", "reference", "--text", str(tmp_path / "no"), "--out", str(out)) == 2
