"""Families by measurement: what the table says is so, what it is measured by notices what is wrong, and refusals are one line."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import call, network, selection, small, tokens, total_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForImageTextToText
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from harness.cache import LayerKV, ModelShape, Needs, keep_all
from harness.cli.listing import listing
from harness.engine.attention import attend, attend_by_kernel, attend_reference, probabilities
from harness.engine.evict import Memory
from harness.engine.model import Model
from harness.engine.observe import AttentionSettings, column_sums, softcapped_attention
from harness.engine.reach import UnsupportedModel
from harness.engine.rows import RowCache, compact
from harness.engine.self_check import self_check
from harness.engine.static_decode import StaticLayer
from harness.errors import BadRequest
from harness.families import CannotConvert
from harness.logits import Chunk
from harness.models.load import load, one_device
from harness.models.tried import PAGE, TABLE, captured, known, network_of, page, tried
from harness.models.variants import About, save
from harness.registry import BUILTIN

CPU = torch.device("cpu")
FELT = (  # a family of each kind: what its attention has that others have not
    "gpt_oss",  # sinks and windows
    "llama4_text",  # chunks, layers without positions, queries scaled by position
    "gemma3_text",
    "gemma3n_text",  # layers that read others' keys and values
    "gemma4_text",  # the same, and head sizes by layer
    "smollm3",
    "cohere2",
    "mixtral",
    "qwen3_moe",
    "olmo2",  # a norm over all heads
    "granite",
    "gpt2",
    "persimmon",
)
SEEN = {one.family: one for one in known()}
READ, SAID = 44, 4


@cache
def felt(family: str) -> Model:
    return Model(network_of(family), None, f"tiny-{family}", "0")


def test_the_table_is_of_at_least_as_many_families_as_are_promised() -> None:
    assert len([one for one in SEEN.values() if not one.refused]) >= 35
    assert set(FELT) <= set(SEEN) and all(one.refused or one.logits_within for one in SEEN.values())
    version = json.loads(TABLE.read_text())["transformers"]
    assert PAGE.read_text() == page(list(SEEN.values()), version), "make it again: python -m harness.models.tried"
    shown = listing("models", BUILTIN)
    assert "MLA" in shown["family deepseek_v3"] and "conversion gqa, mixsga, cla" in shown["family qwen3_moe"]


@pytest.mark.parametrize("family", FELT)
def test_the_table_says_what_is_measured(family: str) -> None:
    found, wanted = tried(family), SEEN[family]
    assert found.logits_within is not None and found.logits_within <= 1e-4
    assert (found.graph, found.conversions, found.refused) == (wanted.graph, wanted.conversions, "")


def masked(family: str, ids: Tensor, read: int, kept: Any) -> Tensor:
    """Logits [T, V] of one dense pass in which tokens behind `read` do not see what was evicted: no rows, no pass of ours."""
    net: Any = network_of(family)
    model = felt(family)
    stored = _cache_layers(net)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **named: Any
    ) -> Any:
        group = query.shape[1] // key.shape[1]
        logits = query[0] @ key[0].repeat_interleave(group, 0).transpose(1, 2) * scaling
        unseen = ~(attention_mask[0, 0] >= 0)[None].repeat(len(logits), 1, 1)  # transformers' own mask: windows and chunks
        place = stored[module.layer_idx]
        hidden = torch.ones(len(logits), read, dtype=torch.bool)
        for row in kept[place]:
            candidates = model.shape.candidates(place, read)
            indices = torch.arange(candidates) if row.kept is None else row.kept
            hidden[row.first : row.first + row.width, read - candidates + indices] = False
        unseen[:, read:, :read] |= hidden[:, None]
        logits = logits.masked_fill(unseen, float("-inf"))
        if named.get("s_aux") is not None:
            top = torch.maximum(logits.amax(-1), named["s_aux"][:, None])
            shares = (logits - top[..., None]).exp()
            weights = shares / (shares.sum(-1) + (named["s_aux"][:, None] - top).exp())[..., None]
        else:
            weights = logits.softmax(-1)
        return (weights @ value[0].repeat_interleave(group, 0)).transpose(0, 1)[None], None

    AttentionInterface.register("masked_in_family_test", attention)
    AttentionMaskInterface.register("masked_in_family_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    net.set_attn_implementation("masked_in_family_test")
    with torch.no_grad():
        return net(ids[None], use_cache=False, logits_to_keep=torch.arange(len(ids))).logits[0]


def _cache_layers(net: Any) -> list[int]:
    """Of each layer that attends, the cache layer that it reads, written out."""
    layers = [module for module in net.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]
    reuse = [getattr(layer, "is_kv_shared_layer", False) for layer in layers]
    if not any(reuse):
        return list(range(net.config.num_hidden_layers))
    kinds = net.config.layer_types
    first = reuse.index(True)
    return [n if n < first else max(m for m in range(first) if kinds[m] == kinds[n]) for n in range(len(layers))]


@pytest.mark.parametrize("family", FELT)
def test_full_is_the_models_own_evictions_are_masked_attention_and_a_batch_is_its_cells_alone(family: str) -> None:
    model, ids = felt(family), tokens(READ + SAID, seed=4)
    prefill, _ = model.prefill(ids[:READ], Needs(8, column_sums=True))
    total = total_of(prefill, "12")
    cells = [keep_all(prefill), *(selection(name, prefill, total) for name in ("snapkv", "h2o", "ada_snapkv"))]
    together = model.decode(compact(prefill, cells, SAID), ids[READ:].expand(len(cells), -1), keep=SAID)
    with torch.no_grad():
        own = network_of(family)(ids[None], use_cache=False).logits[0]
    spread = float(own.std())
    assert (together[0] - own[READ:]).abs().max() < 1e-4 * spread
    for kept, said in zip(cells, together, strict=True):
        assert (said - masked(family, ids, READ, kept)[READ:]).abs().max() < 2e-4 * spread
        alone = model.decode(compact(prefill, [kept], SAID), ids[None, READ:], keep=SAID)[0]
        assert (said - alone).abs().max() < 1e-4 * spread
    assert (together[1] - together[0]).abs().max() > 1e-2 * spread, "nothing was lost: the test would see nothing"


def test_rows_of_a_layer_have_its_own_head_size_and_shared_ones_are_stored_once() -> None:
    model = felt("gemma4_text")
    assert model.depth == 4 and model.shape.layers == 2 and model.shape.head_dims == (16, 32)
    prefill, _ = model.prefill(tokens(READ), Needs())
    held = compact(prefill, [keep_all(prefill)] * 2, SAID)
    assert [layer.keys.shape[1] for layer in held.layers] == [16, 32]
    count = held.counts()[0]
    assert count.bytes_kept == model.parent_shape.full_bytes(READ) == 4 * 2 * 4 * (24 * 16 + READ * 32)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in held.layers
        for t in (layer.keys, layer.values, layer.positions)
    }
    assert sum(one.bytes_allocated for one in held.counts()) == sum(storages.values())


def test_a_chunk_holds_what_its_last_token_sees() -> None:
    shape = ModelShape(2, 4, 2, 16, (Chunk(16), None), 4)
    assert [shape.candidates(0, tokens) for tokens in (1, 15, 16, 17, 40)] == [1, 15, 16, 1, 8]
    assert shape.full_entries(40) == 2 * (8 + 40)


SINKS = torch.tensor([2.0, -1.0, 5.0, 0.3])


def layer_of(window: int | None) -> tuple[RowCache, LayerKV, Any, Tensor]:
    """Rows of unequal length over 46 positions (a chunk of 12 ends at 48), 5 and 3 tokens appended; queries [4, 8, 16]."""
    generator = torch.Generator().manual_seed(5)
    shape = ModelShape(1, 4, 2, 16, (window,), 4)
    count = shape.candidates(0, 46)
    keys, values = torch.randn(2, 2, count, 16, generator=generator)
    kv = LayerKV(0, 46, keys, values, 0.25, 2, window=window, query_heads=4)
    from harness.cache import ExpertGroup, Prefill

    prefill = Prefill(torch.arange(46), torch.zeros(9), (kv,), ((ExpertGroup(2),),), shape)
    full = keep_all(prefill)
    part = tuple(
        tuple(replace(row, kept=torch.arange(number, count, 2 + number)) for number, row in enumerate(rows)) for rows in full
    )
    held = compact(prefill, [full, part], 8)
    step = held.step([5, 3])
    new = torch.randn(2, 2, 8, 16, generator=generator)
    held.layers[0].append(new[0], new[1], step)
    return held, kv, step, torch.randn(4, 8, 16, generator=generator)


@pytest.mark.parametrize("window", [None, 12, Chunk(12)])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_every_attention_over_rows_is_the_reference(window: int | None, sinks: Tensor | None) -> None:
    held, _, step, queries = layer_of(window)
    layer = held.layers[0]
    wanted = attend_reference(layer, queries, step, 0.25, None, sinks)
    assert torch.allclose(attend(layer, queries, step, 0.25, None, sinks), wanted, atol=1e-5)
    pytest.importorskip("triton")
    assert torch.allclose(attend_by_kernel(layer, queries, step, 0.25, None, sinks), wanted, atol=1e-5)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("window", [None, Chunk(12)])
def test_a_static_step_is_the_reference(window: int | None, by_kernel: bool) -> None:
    if by_kernel:
        pytest.importorskip("triton")
    held, _, _, queries = layer_of(window)
    held.seen = np.array([51, 49])
    static = StaticLayer(held.layers[0], 2, 2, by_kernel)
    seen, new = torch.tensor([51, 49]), torch.randn(2, 2, 2, 16, generator=torch.Generator().manual_seed(6))
    static.append(new[0], new[1], seen, None)
    found = static.attend(queries[:, :2], seen, AttentionSettings(0.25, sinks=SINKS))
    other, _, _, _ = layer_of(window)
    other.seen = held.seen
    step = other.step([1, 1])
    other.layers[0].append(new[0], new[1], step)
    assert torch.allclose(found, attend_reference(other.layers[0], queries[:, :2], step, 0.25, None, SINKS), atol=1e-5)


def test_what_is_observed_knows_the_sinks_and_the_chunk() -> None:
    generator = torch.Generator().manual_seed(7)
    queries, keys, values = (torch.randn(heads, 40, 16, generator=generator) for heads in (4, 2, 2))
    for window in (None, Chunk(12)):
        settings = AttentionSettings(0.25, window=window, sinks=SINKS)
        logits = (queries @ keys.repeat_interleave(2, 0).transpose(1, 2)) * 0.25
        at = torch.arange(40)
        unseen = (at > at[:, None]) | (False if window is None else at // window != at[:, None] // window)
        shares = logits.masked_fill(unseen, float("-inf")).exp()
        weights = shares / (shares.sum(-1, keepdim=True) + SINKS.exp()[:, None, None])
        assert torch.allclose(column_sums(queries, keys, settings), weights.sum(1), atol=1e-5)
        wanted = weights @ values.repeat_interleave(2, 0)
        assert torch.allclose(softcapped_attention(queries, keys, values, settings), wanted, atol=1e-5)
        large = torch.where(at[:, None] < 20, values, 1e30)
        assert softcapped_attention(queries, keys, large, settings)[:, :20].abs().max() < 10, "what comes later weighs nothing"
        count = ModelShape(1, 4, 2, 16, (window,), 4).candidates(0, 40)
        kv = LayerKV(
            0, 40, keys[:, -count:], values[:, -count:], 0.25, 2, queries[:, -3:], window=window, query_heads=4, sinks=SINKS
        )
        if window is None:
            assert torch.allclose(kv.window_attention(3), weights[:, -3:], atol=1e-5)
        else:  # what was in the chunk before is no candidate
            assert torch.allclose(kv.window_attention(1), weights[:, -1:, -count:], atol=1e-5)


def test_what_decoding_is_remembered_by_knows_the_sinks() -> None:
    held, kv, step, asked = layer_of(None)
    held.keep([0])
    layer, alone = held.layers[0], replace(held.step([5]), positions=step.positions[:5])
    seen = probabilities(layer, asked[:, :5], alone, 0.25, None, SINKS)  # [4, 5, 51]
    keys = layer.blocks(alone)[0].entries(layer.keys).repeat_interleave(2, 0)  # [4, 51, 16]
    logits = (asked[:, :5] @ keys.transpose(1, 2) * 0.25).masked_fill(
        torch.arange(51) > torch.as_tensor(step.positions[:5])[:, None], float("-inf")
    )
    wanted = logits.exp() / (logits.exp().sum(-1, keepdim=True) + SINKS.exp()[:, None, None])
    assert torch.allclose(seen, wanted, atol=1e-5)
    layer.memory = Memory(kv, None, torch.zeros(len(layer.positions)))
    attend(layer, asked[:, :5], alone, 0.25, None, SINKS)
    mass = layer.blocks(alone)[0].entries(layer.memory.mass[:, None])[..., 0]  # type: ignore[index]
    assert torch.allclose(mass, wanted.unflatten(0, (2, 2)).sum((1, 2)), atol=1e-5)


def refusal(model: Model) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        self_check(model)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_check_notices_each_kind_of_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(network_of("mistral"), None, "m", "0")
    model.attending = replace(model.attending, windows=(24, 24, 25, 24))
    assert "layer 2 has another mask than that of 25 positions" in refusal(model)
    model = Model(network_of("llama4_text"), None, "m", "0")
    model.attending = replace(model.attending, windows=(16, *model.attending.windows[1:]))  # a window that slides
    assert "layer 0 has another mask" in refusal(model)
    with monkeypatch.context() as patched:
        patched.setattr("harness.engine.model._tempered", lambda _, query, *__: query)
        assert "decoding with the full cache differ from its own by" in refusal(Model(network_of("llama4_text"), None, "m", "0"))
    with monkeypatch.context() as patched:
        patched.setattr("harness.engine.model.attend", lambda *given: attend(*given[:5], None))
        assert "decoding with the full cache differ from its own by" in refusal(Model(network_of("gpt_oss"), None, "m", "0"))
    with monkeypatch.context() as patched:
        plain = RowCache.step
        patched.setattr(
            RowCache, "step", lambda cache, counts: replace(plain(cache, counts), positions=plain(cache, counts).positions + 1)
        )
        assert "decoding" in refusal(Model(network_of("llama"), None, "m", "0"))


def test_far_tokens_of_llama_4_are_scaled_by_their_own_place() -> None:
    """Queries of layers without positions: transformers takes the place in the sequence that it is given."""
    ids = tokens(60, seed=2)
    with torch.no_grad():
        own = network_of("llama4_text")(ids[None], use_cache=False).logits[0]
    model = felt("llama4_text")
    prefill, _ = model.prefill(ids[:58], Needs())
    said = model.decode(compact(prefill, [keep_all(prefill)] * 2, 2), ids[58:].expand(2, -1), keep=2)
    assert (said - own[58:]).abs().max() < 1e-4 * own.std()


@pytest.mark.parametrize(
    "family", [name for name, one in SEEN.items() if one.refused and name in ("bert", "deepseek_v3", "lfm2", "doge", "bloom")]
)
def test_families_out_of_reach_are_refused_with_their_reason(family: str) -> None:
    assert tried(family).refused == SEEN[family].refused


def test_conversions_that_would_mix_what_differs_are_refused() -> None:
    for family, text, why in (
        ("olmo2", "gqa-2", "k_norm"),
        ("smollm3", "cla-50", "some turn them by position"),
        ("gemma4_text", "gqa-2", "share keys and values already"),
        ("gpt2", "gqa-2", "no attention handles for the family 'gpt2'"),
    ):
        with pytest.raises(CannotConvert, match=why):
            BUILTIN.conversion(text).apply(network_of(family))


def test_a_saved_variant_of_a_model_with_chunks_comes_back(tmp_path: Path) -> None:
    parent = felt("llama4_text").parent_shape
    net = network_of("llama4_text")
    BUILTIN.conversion("gqa-2").apply(net)
    save(net, None, About("parent", "rev", parent, "gqa-2"), tmp_path)
    model = load(str(tmp_path), torch.float32, CPU)
    assert model.parent_shape == parent and all(isinstance(size, Chunk) for size in model.parent_shape.windows[::2])


def saved(folder: Path, family: str = "llama") -> Path:
    network(family).save_pretrained(folder)
    return folder


def test_layers_lie_where_a_map_puts_them(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    where = {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    where |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu") | {"lm_head": "disk"}
    plain = load(str(tmp_path / "m"), torch.float32, CPU)
    spread = load(str(tmp_path / "m"), torch.float32, CPU, spread=where)
    assert spread.checked["devices"] == ["cpu", "disk"] and "devices" not in plain.checked
    assert next(spread.network.model.layers[1].parameters()).is_meta and spread.device == CPU
    said = []
    for model in (plain, spread):
        prefill, _ = model.prefill(tokens(READ), Needs(8, column_sums=True))
        held = compact(prefill, [selection("snapkv", prefill, total_of(prefill, "12"))], 8)
        said.append(model.decode(held, tokens(3)[None], keep=3))
    assert torch.equal(*said)
    assert load(str(tmp_path / "m"), torch.float32, CPU, spread="auto").device == CPU
    with pytest.raises(BadRequest, match="one device"):
        one_device("auto", "training")


def test_bad_models_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "m")
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    def told(changes: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        save_file(weights if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
        assert call(*small(tmp_path / "out", "--model", str(folder))) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run_all.py")]
        return line

    nan = weights | {"model.norm.weight": torch.full_like(weights["model.norm.weight"], torch.nan)}
    assert "weights that are no numbers: model.norm.weight" in told({}, nan)
    assert "its weights do not fit its configuration" in told({"num_hidden_layers": 4})
    headless = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    assert "no model that writes text" in told({"architectures": ["LlamaModel"], "tie_word_embeddings": True}, headless)
    assert "missing: lm_head.weight" in told({"architectures": ["LlamaModel"]}, headless)
    assert "reads by an encoder" in told(
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    )
    assert "T5" not in told({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Net"}})
    assert "hold state outside of keys and values: conv" in told(
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]}
    )


TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def test_the_text_part_of_a_checkpoint_that_sees_is_run_and_named(tmp_path: Path) -> None:
    text = TEXT | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 24, "max_position_embeddings": 512}
    seen = {"mm_tokens_per_image": 1, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=SIGHT | {"model_type": "siglip_vision_model"}, **seen)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    model = load(str(tmp_path / "m"), torch.float32, CPU)
    assert model.checked["text_part_of"] == "Gemma3ForConditionalGeneration" and model.vocabulary == 97
    ids = tokens(30)
    with torch.no_grad():
        own = model.network(input_ids=ids[None], use_cache=False).logits[0]
    prefill, _ = model.prefill(ids[:28], Needs())
    said = model.decode(compact(prefill, [keep_all(prefill)], 2), ids[None, 28:], keep=2)[0]
    assert (said - own[28:]).abs().max() < 1e-4 * own.std()


def test_a_row_names_what_was_measured_of_its_model(tmp_path: Path) -> None:
    assert call(*small(tmp_path / "out", "--model", "random:tiny-llama", "--methods", "full")) == 0
    (env,) = (tmp_path / "out" / "env").glob("*.json")
    found = json.loads(env.read_text())["attention"]
    assert found["model"] == "random:tiny-llama" and 0 < found["logits_within"] <= 1e-4


def test_experts_that_are_looped_over_cannot_be_captured() -> None:
    net: Any = network_of("mixtral")
    net.set_experts_implementation("eager")
    assert captured(Model(net, None, "m", "0")) == "no: nonzero on the host"


@pytest.mark.parametrize("family", ["phimoe", "gpt_oss", "cohere2", "llama4_text"])
def test_a_sweeps_prefill_is_the_models_own_beyond_its_windows(family: str) -> None:
    """Phimoe tells its window by the mask alone."""
    model, ids = felt(family), tokens(READ)
    assert any(window is not None and window < READ for window in model.shape.windows)
    with torch.inference_mode():
        own = model.network(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]
    assert torch.allclose(model.prefill(ids, Needs(column_sums=True), joined=True)[0].logits, own, atol=1e-4)
