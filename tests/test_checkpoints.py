"""Checkpoints as people have them: weights that do not fit, heads of their own, odd tokenizers; read right, or refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASE, FAMILIES, dense
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.base import Example
from harness.cache import Needs
from harness.cli.main import main
from harness.cost.request import CostRequest
from harness.cost.run import run_cost
from harness.engine.generate import Answer, Stop
from harness.engine.model import Model
from harness.engine.scoring import Likelihood
from harness.errors import BadRequest
from harness.evaluation.prompts import Protocol, tokenize
from harness.evaluation.request import RunRequest
from harness.evaluation.run import run_request
from harness.evaluation.sweep import Cell, Outcome, Sweep
from harness.evaluation.unit import said
from harness.families import CannotConvert
from harness.models.load import REFERENCE, UnknownModel, byte_tokenizer, check_name, load, parted, shipped_variant, source_of
from harness.models.pretrained import digest_of
from harness.models.variants import About, BadVariant, convert, open_variant, save
from harness.registry import BUILTIN
from methods import METHODS
from results.record import Record
from results.store import read_costs, read_rows

CPU = torch.device("cpu")
Weights = dict[str, Tensor]


def checkpoint(folder: Path, family: str = "llama", **changes: Any) -> Any:
    """A tiny model of random weights in `folder`, with a byte tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**BASE, **FAMILIES[family], "vocab_size": 260, "tie_word_embeddings": False, **changes})
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.15)
    net.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return net


def rewritten(folder: Path, change: Callable[[Weights], Weights], file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    save_file(change(weights), folder / file, metadata={"format": "pt"})


def opened(folder: Path) -> Any:
    return load(str(folder), torch.float32, CPU)


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        return net(input_ids=torch.arange(5, 25)[None], use_cache=False).logits[0]


MISFITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "no head": (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "missing: lm_head.weight$"),
    "a layer short": (lambda w: {k: v for k, v in w.items() if ".layers.1." not in k}, "missing: model.layers.1.* and 6 more$"),
    "a prefix": (lambda w: {f"module.{k}": v for k, v in w.items()}, "missing: lm_head.weight, .*; not the model's: module."),
    "a layer too many": (lambda w: w | {"model.layers.7.x": torch.ones(2)}, "not the model's: model.layers.7.x$"),
    "another shape": (lambda w: w | {"model.norm.weight": torch.ones(3)}, r"shape: model.norm.weight \[3\] for \[64\]$"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_name(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, said = MISFITS[name]
    checkpoint(tmp_path / "m")
    rewritten(tmp_path / "m", change)
    with pytest.raises(UnknownModel, match=said):
        opened(tmp_path / "m")
    assert not capfd.readouterr().err, "the refusal is one line"


def test_tied_heads_and_buffers_of_old_are_not_missed(tmp_path: Path) -> None:
    tied = checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(logits(opened(tmp_path / "tied").network), logits(tied))
    plain = checkpoint(tmp_path / "old")
    rewritten(tmp_path / "old", lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(logits(opened(tmp_path / "old").network), logits(plain))


@pytest.mark.parametrize("text", ["gqa-2", "mixsga-1:1"])
def test_variants_whose_weights_do_not_fit_are_refused_by_name(text: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    parent = opened(tmp_path / "m")
    BUILTIN.conversion(text).apply(parent.network)
    save(parent.network, None, About("m", "0", parent.parent_shape, text), tmp_path / "v")
    (file,) = (path.name for path in (tmp_path / "v").glob("*.safetensors"))
    rewritten(tmp_path / "v", lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, file)
    with pytest.raises(BadVariant, match=r"missing: lm_head.weight$"):
        open_variant(tmp_path / "v", torch.float32)


def test_a_quantised_checkpoint_without_its_package_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
    with pytest.raises(UnknownModel, match=r"cannot be read from .*compressed-tensors"):
        opened(tmp_path / "m")


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an adapter beside": (lambda at: (at / "adapter_config.json").write_text("{}"), "holds an adapter .*: merge it"),
    "a pointer": (lambda at: (at / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "a pickle": (
        lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"),
        "a pickle can run code",
    ),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), r"no config.json with \*.safetensors$"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_people_name_for_a_checkpoint_is_refused_in_words(name: str, tmp_path: Path) -> None:
    change, said = NO_CHECKPOINTS[name]
    checkpoint(tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(UnknownModel, match=said):
        opened(tmp_path / "m")


def test_folders_of_a_training_and_files_are_refused_in_words(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint-20")
    with pytest.raises(UnknownModel, match="name one of them, such as checkpoint-20"):
        opened(tmp_path)
    with pytest.raises(UnknownModel, match="is a file: name the folder"):
        opened(tmp_path / "checkpoint-20" / "config.json")


def test_tokens_without_an_embedding_are_never_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "m", vocab_size=90)  # a byte tokenizer has 256
    asked = {"benchmarks": ("needle_text(length=200)",), "methods": ("full",), "limit": 1, "out": tmp_path / "out"}
    with pytest.raises(BadRequest, match="is beyond the model's 90 embeddings: its tokenizer is another model's"):
        run_request(RunRequest(models=(str(tmp_path / "m"),), **asked), BUILTIN)
    (tmp_path / "text.txt").write_text("some words " * 500)
    asked_for = ["train", "--model", str(tmp_path / "m"), "--conversion", "mqa", "--text", str(tmp_path / "text.txt"), "--out"]
    assert main([*asked_for, str(tmp_path / "v"), "--length", "32", "--steps", "1"]) == 2
    assert "is beyond the model's 90 embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", '{"version": "1.0", "model": {"type": "BPE2"}}', "{"])
def test_a_tokenizer_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(text)
    with pytest.raises(UnknownModel, match="its tokenizer cannot be read"):
        opened(tmp_path / "m")


def test_a_hub_ids_revision_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--own--tiny"
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        checkpoint(cache / "snapshots" / commit, num_hidden_layers=1 + number)
    (cache / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for layers, commit in ((1, "a" * 40), (2, "b" * 40)):
        (cache / "refs" / "main").write_text(commit)
        model = load("own/tiny", torch.float32, CPU)
        assert (model.revision, model.depth) == (commit, layers), "whatever main is today"
    assert load("own/tiny", torch.float32, CPU, revision="a" * 40).depth == 1


def rows_of(folder: Path, task: str, **more: Any) -> list[Record]:
    """Records of full and snapkv on the checkpoint `folder`/m and on data beside it."""
    asked: dict[str, Any] = {"methods": ("full", "snapkv"), "budgets": ("16",), "limit": 1, "device": "cpu", **more}
    run_request(
        RunRequest(models=(str(folder / "m"),), benchmarks=(task,), data_dir=folder, out=folder / "out", **asked), BUILTIN
    )
    return list(read_rows(folder / "out"))


@pytest.mark.parametrize("fidelity", [True, False])
@pytest.mark.parametrize("task", ["random_tokens(length=48,max_new_tokens=4)", "perplexity:text.txt(read=40,scored=8)"])
def test_what_is_no_number_is_a_failed_cell(task: str, fidelity: bool, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a dog " * 4)
    rewritten(tmp_path / "m", lambda w: w | {"lm_head.weight": w["lm_head.weight"].index_fill(0, torch.tensor([9]), 3e38)})
    found = rows_of(tmp_path, task, fidelity=fidelity)
    assert found and {row.status for row in found} == {"failed"}
    assert all("not a number" in (row.reason or "") and not row.metrics and not row.fidelity for row in found)


def test_an_outcome_is_checked_for_what_is_no_number() -> None:
    fine = Outcome(Answer([1]), {"kl": 0.0, "top1": 1.0, "loss": 0.1})
    assert fine.checked() is fine
    for wrong in (math.nan, math.inf):
        assert Outcome(Answer([1]), {"kl": wrong, "loss": 0.1}).checked().failed == f"not a number: kl is {wrong}"
    impossible, unknown = Likelihood(-math.inf, False, 1), Likelihood(math.nan, False, 1)
    assert Outcome(Answer([], likelihoods={0: impossible})).checked().failed is None, "a token may be impossible"
    assert Outcome(Answer([], likelihoods={0: impossible, 3: unknown})).checked().failed == "not a number: likelihood 3 is nan"


def merged(folder: Path) -> Any:
    """A checkpoint with a head of its own whose configuration calls it tied, as merged fine-tunes have it."""
    net = checkpoint(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    return net


@pytest.mark.parametrize("text", ["none", "gqa-2", "mixsga-1:1", "cla-50"])
def test_a_variant_keeps_the_head_of_its_parent(text: str, tmp_path: Path) -> None:
    net = merged(tmp_path / "m")
    converted = load(f"{tmp_path / 'm'}+{text}", torch.float32, CPU)
    save(converted.network, None, About("m", "0", converted.parent_shape, text), tmp_path / "v")
    again, _, _ = open_variant(tmp_path / "v", torch.float32)
    now, before = again.state_dict(), net.state_dict()
    kept = [name for name in before if not any(part in name for part in ("k_proj", "v_proj"))]
    assert "lm_head.weight" in kept and all(torch.equal(now[name], before[name]) for name in kept)
    if text == "none":
        ids = torch.arange(5, 25)
        assert torch.equal(dense(again, ids), dense(net, ids))


@pytest.mark.parametrize("text", ["gqa-2", "mixsga-1:1"])
def test_a_variant_that_says_something_else_than_it_did_is_refused(text: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    converted = load(f"{tmp_path / 'm'}+{text}", torch.float32, CPU)
    save(converted.network, None, About("m", "0", converted.parent_shape, text), tmp_path / "v")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        open_variant(tmp_path / "v", dtype)
    (file,) = (path.name for path in (tmp_path / "v").glob("*.safetensors"))
    rewritten(tmp_path / "v", lambda w: w | {"lm_head.weight": w["lm_head.weight"].roll(1, 0)}, file)
    with pytest.raises(BadVariant, match=r"logits differ by up to \d"):
        open_variant(tmp_path / "v", torch.float32)


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"rope_type": "default"}, 256),
    "yarn, as model cards say": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
    "yarn over less than the positions": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}, 800),
    "yarn, counted already": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "linear": ({"rope_type": "linear", "factor": 2.5}, 640),
    "llama3, counted already": (LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 64}, 256),
    "llama3": (LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 256}, 2048),
}


@pytest.mark.parametrize("name", ROPES)
def test_positions_count_what_the_rope_is_scaled_by(name: str, tmp_path: Path) -> None:
    rope, positions = ROPES[name]
    checkpoint(tmp_path / "m", max_position_embeddings=256, rope_parameters={"rope_theta": 10000.0, **rope})
    assert opened(tmp_path / "m").max_tokens == positions
    if name.startswith("yarn, as"):
        (row,) = rows_of(tmp_path, "random_tokens(length=700,max_new_tokens=4)", methods=("full",), prompts=("question_in",))
        assert row.status == "ok" and row.prompt_tokens is not None and row.prompt_tokens >= 700, "not cut at 256"


def chain(folder: Path, then: dict[int, int], tokenizer: Any) -> Model:
    """A checkpoint that says token b behind token a, whatever stands before it: `then` is {a: b}."""
    checkpoint(folder)
    seen = sorted({*then, *then.values()})

    def change(weights: Weights) -> Weights:
        new = {name: weight if "norm" in name else torch.zeros_like(weight) for name, weight in weights.items()}
        for place, token in enumerate(seen):
            new["model.embed_tokens.weight"][token, place] = 1.0
        for a, b in then.items():
            new["lm_head.weight"][b, seen.index(a)] = 1.0
        return new

    rewritten(folder, change)
    tokenizer.save_pretrained(folder)
    return load(str(folder), torch.float32, CPU)


def answer_of(model: Model, text: str, until: tuple[str, ...]) -> tuple[str | None, str | None]:
    """What the full cache answers, in words, and why it stops."""
    example = Example(0, text, len(text), (), 30, until=until)
    prompt = tokenize(model.tokenizer, example, Protocol(prompt="question_in"), 100)
    ((_, outcome),) = Sweep(model, Protocol(), with_fidelity=False).example(prompt, [Cell("full", METHODS["full"], None)], 30)
    assert outcome.answer is not None
    return said(model, prompt, outcome.answer), outcome.answer.stop_reason


def test_answers_end_at_texts_that_are_special_tokens(tmp_path: Path) -> None:
    """As lm-eval's do: an answer goes to the first of them, whether or not a special token is a part of words."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]})
    a, b, z, end = (tokenizer.convert_tokens_to_ids(text) for text in ("a", "b", "z", "<|im_end|>"))
    model = chain(tmp_path / "m", {a: b, b: end, end: z, z: z}, tokenizer)
    assert answer_of(model, "say a", ("\n\n", "<|im_end|>")) == ("b", "text")
    assert answer_of(model, "say a", ("zz",)) == ("b", "text"), "special tokens are no part of an answer"
    assert answer_of(model, "say a", ()) == ("b" + 28 * "z", "length")
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ab</s>z"]
    spelled = chain(tmp_path / "s", dict(itertools.pairwise(letters)), tokenizer)
    assert answer_of(spelled, "say a", ("##",))[0] == "b", "the end token's text, spelled"


def test_answers_end_at_texts_of_many_tokens() -> None:
    text = "日本語日本語"  # three tokens a letter
    tokenizer = byte_tokenizer()
    said = tokenizer(f"so: {text}").input_ids
    stop = Stop(frozenset(), 99, (text,), tokenizer.decode)
    assert stop.reason(said) == "text" and stop.reason(said[:-1]) is None


READ = (
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
)


def test_whatever_changes_what_a_model_reads_or_says_changes_its_revision(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    seen = {digest_of(tmp_path)}
    for file in READ:
        for text in ("{}", "{ }"):
            (tmp_path / file).write_text(text)
            seen.add(digest_of(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "vocab.txt")
    seen.add(digest_of(tmp_path))
    assert len(seen) == 2 * len(READ) + 2
    (tmp_path / "README.md").write_text("nobody reads this")
    assert digest_of(tmp_path) in seen
    rewritten(tmp_path, lambda w: w | {"model.norm.weight": w["model.norm.weight"] + 1})
    assert digest_of(tmp_path) not in seen


def test_digests_of_what_is_shipped_are_those_of_its_rows() -> None:
    rows = Path(__file__).parent.parent / "results" / "reference" / "rows"
    keys = [json.loads(path.open().readline())["key"] for path in rows.glob("*.jsonl")]
    for model in {key["model"] for key in keys} - {"smollm2"}:  # which is not shipped
        _, conversion = parted(model)
        folder = REFERENCE if conversion is None else shipped_variant(conversion)
        assert {key["revision"] for key in keys if key["model"] == model} == {digest_of(folder, conversion or "")}, model


def test_a_folder_may_have_a_plus_in_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "c++" / "llama+dpo"
    checkpoint(folder)
    assert opened(folder).name == "llama_dpo", "a plus would name a conversion in the rows"
    converted = load(f"{folder}+gqa-2", torch.float32, CPU)
    assert converted.name == "llama_dpo+gqa-2 (unhealed)" and converted.shape.kv_heads == 1
    with pytest.raises(CannotConvert, match="already"):
        convert(converted, "none")
    with pytest.raises(UnknownModel, match=r"c\+\+/nothing'?: no such folder"):
        check_name(f"{tmp_path}/c++/nothing+gqa-2")
    monkeypatch.chdir(folder)
    assert load(".", torch.float32, CPU).name == "llama_dpo", "every model has a name"


def test_costs_of_a_checkpoint_that_was_replaced_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {
        "methods": ("full",),
        "contexts": (64,),
        "new_tokens": 4,
        "rounds": 1,
        "device": "cpu",
        "out": tmp_path,
    }
    monkeypatch.setattr("harness.cost.request.run_cell", lambda *_: {"status": "ok", "reason": None})
    for layers in (2, 2, 3):
        checkpoint(tmp_path / "m", num_hidden_layers=layers)
        run_cost(CostRequest("cost-small", (str(tmp_path / "m"),), **asked), BUILTIN)
    cells = read_costs(tmp_path)
    assert len(cells) == len({row["id"] for row in cells}) == 4, "one of memory and one of latency each"
    assert source_of("reference") == source_of("random:tiny-llama+gqa-2") == "", "their rows keep their ids"


def test_gemma2_without_its_softcap_is_gemma2_without_its_softcap(tmp_path: Path) -> None:
    """People set it to null for the sake of faster attention."""
    net = checkpoint(tmp_path / "m", "gemma2", attn_logit_softcapping=None)
    ids = torch.arange(5, 45)
    prefill = opened(tmp_path / "m").prefill(ids, Needs(8))[0]
    assert (prefill.logits - dense(net, ids)[-1]).abs().max() < 1e-4
    rows = rows_of(tmp_path, "random_tokens(length=64,max_new_tokens=4)")
    assert {row.status for row in rows} == {"ok"} and len(rows) == 4


ELSEWHERE: dict[str, dict[str, Any]] = {
    "flash-attn is not here": {"attn_implementation": "flash_attention_2"},
    "code of its own beside a known family": {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}},
    "another head": {"architectures": ["LlamaForSequenceClassification"]},
    "a rope of old": {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": None},
    "no cache": {"use_cache": False},
    "a padding of none": {"pad_token_id": -1},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_configurations_of_other_machines_are_the_same_model(name: str, tmp_path: Path) -> None:
    net = checkpoint(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **ELSEWHERE[name]}))
    ids = torch.arange(5, 45)
    assert (opened(tmp_path).prefill(ids, Needs(8))[0].logits - dense(net, ids)[-1]).abs().max() < 1e-4
