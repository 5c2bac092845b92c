"""GGUF files: dequantised once into the user's cache, equal to transformers' own reading, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from helpers import call
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness.models.gguf
from harness.models.gguf import INSTALL, BadGguf, converted, file_of
from harness.models.load import check_name, load
from results.store import read_rows

HIDDEN, HEADS, KV_HEADS, LAYERS, MLP = 64, 4, 2, 2, 96
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"


def write(path: Path, family: str = "llama", tokenizer: bool = True, parts: int = 1, pack: bool = True) -> Path:
    """A tiny model with a byte tokenizer, its matrices in Q8_0."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, family)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = [*ALPHABET, "ab", "<s>", "</s>"]
    writer.add_vocab_size(len(tokens))
    if parts > 1:
        writer.add_uint16("split.count", parts)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(len(tokens) - 2)
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        kv = HIDDEN // HEADS * KV_HEADS
        for name, shape in {
            "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP),
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}"] = shape
    for name, shape in shapes.items():
        weights = (np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.15, shape)).astype(np.float32)
        if pack and len(shape) > 1:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", quants.quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: folder / name)
    return folder


def test_a_file_is_read_as_transformers_reads_it_and_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.Q8_0.gguf")
    model = load(str(path), torch.float32, torch.device("cpu"))
    network: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "Hello, wörld </s>"
    ids = tokenizer(text)["input_ids"]
    assert model.tokenizer is not None and model.tokenizer(text)["input_ids"] == ids
    assert model.tokenizer.chat_template == tokenizer.chat_template == TEMPLATE
    for net in (network, model.network):
        net.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (net(torch.tensor([ids])).logits for net in (model.network, network))
    assert torch.equal(ours, theirs)
    monkeypatch.delattr(harness.models.gguf, "_quantisation")  # noted beside the weights: the header is not read again
    assert model.name == "tiny.Q8_0" and model.revision == f"{converted(str(path)).sha256[:16]}-Q8_0"
    assert model.stop_ids == {len(ALPHABET) + 2}
    (folder,) = (cache / "kv-cache-scale" / "gguf").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    load(str(path), torch.bfloat16, torch.device("cpu"))
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_run_names_file_and_quantisation(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    asked = (
        "run",
        "--model",
        str(path),
        "--methods",
        "full,snapkv",
        "--budgets",
        "12",
        "--benchmarks",
        "needle_text(length=200)",
    )
    assert (
        call(
            *asked,
            "--chat",
            "template",
            "--limit",
            "1",
            "--max-new-tokens",
            "4",
            "--prompt",
            "question_in",
            "--out",
            str(tmp_path / "o"),
        )
        == 0
    )
    rows = read_rows(tmp_path / "o")
    assert {row.status for row in rows} == {"ok"} and {row.key.model for row in rows} == {"tiny"}
    assert all(row.key.revision.endswith("-Q8_0") for row in rows)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole.gguf")
    torn, empty = tmp_path / "torn.gguf", tmp_path / "empty.gguf"
    torn.write_bytes(whole.read_bytes()[:-5000])
    empty.write_bytes(b"")
    for path, says in (
        (torn, "is no whole GGUF file"),
        (empty, "is no whole GGUF file"),
        (write(tmp_path / "part.gguf", parts=3), "is one of 3 parts: merge them first"),
        (write(tmp_path / "mute.gguf", tokenizer=False), "holds no tokenizer"),
        (
            write(tmp_path / "other.gguf", family="mamba"),
            "is of the family 'mamba', whose layers hold state outside of keys and values",
        ),
        (tmp_path / "absent.gguf", "no such file"),
    ):
        assert call("run", "--suite", "smoke", "--model", str(path), "--out", str(tmp_path / "o")) == 2
        lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("run_all.py")]
        assert len(lines) == 1 and says in lines[0], lines
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "file" / name)
    with pytest.raises(BadGguf, match="cannot be written to"):
        converted(str(whole))


def test_the_package_of_smollm2_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.models.gguf, "PACKAGE", "no_such_package")
    with pytest.raises(BadGguf, match="not installed"):
        check_name("smollm2+mqa")
    with pytest.raises(BadGguf) as refusal:
        file_of("smollm2")
    assert INSTALL in str(refusal.value)
    monkeypatch.setattr(harness.models.gguf, "PACKAGE", "harness")
    with pytest.raises(BadGguf, match="holds no SmolLM2"):
        file_of("smollm2")
