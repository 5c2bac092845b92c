"""The embedded model: loads by plain transformers, recalls with the full cache, and fails where a method drops the facts."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import BENCHMARKS
from benchmarks.facts import Facts, Recall
from harness.cache import Budget, keep_all
from harness.engine.model import Model
from harness.engine.rows import compact
from harness.evaluation.plan import token_counter
from harness.evaluation.prompts import Protocol, tokenize
from harness.evaluation.sweep import Cell, Sweep
from harness.models.load import REFERENCE, load
from harness.training.data import HELD_OUT, ReferenceBatches
from harness.training.loop import routing_of
from harness.training.reference_data import Documents
from methods import METHODS

CELLS = (Cell("full", METHODS["full"], None), Cell("streaming_llm", METHODS["streaming_llm"], Budget.parse("64")))


@pytest.fixture(scope="module")
def model() -> Model:
    return load("reference", torch.float32, torch.device("cpu"))


def test_it_is_small_and_of_a_shape_that_every_method_can_change(model: Model) -> None:
    assert sum(path.stat().st_size for path in REFERENCE.iterdir()) < 8_000_000
    assert model.shape.group >= 2
    assert model.shape.kv_heads % 4 == 0
    assert model.max_tokens >= 2048


def test_plain_transformers_loads_it_and_says_the_same(model: Model) -> None:
    plain = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = " The code of Mira is 37 82. The night was long. Question: the code of Mira is"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        logits = plain(ids).logits[0, -1]
    assert (model.prefill(ids[0], METHODS["full"].needs)[0].logits - logits).abs().max() < 1e-4
    assert tokenizer.decode(logits.argmax()) == " 37"


@pytest.mark.parametrize("name", ["recall", "two_hop", "recall_many", "needle_text"])
def test_it_recalls_with_the_full_cache_and_not_without_the_facts(model: Model, name: str) -> None:
    task = BENCHMARKS[name]
    assert isinstance(task, Facts)
    right: dict[str, list[float]] = {cell.name: [] for cell in CELLS}
    sweep = Sweep(model, Protocol(), with_fidelity=False)
    for index in range(12):
        example = task.example(index, 100, token_counter(model))
        if float(example.columns["depth"]) > 0.85:  # near enough to lie inside the window
            continue
        prompt = tokenize(model.tokenizer, example, Protocol(), 4096)
        for cell, outcome in sweep.example(prompt, CELLS, example.max_new_tokens):
            assert outcome.answer is not None
            right[cell.name].append(task.score(model.words(outcome.answer.tokens), example)["exact"])
    assert sum(right["full"]) >= 0.8 * len(right["full"]) >= 4
    assert sum(right["streaming_llm"]) <= 1


def test_its_training_is_on_record() -> None:
    log = json.loads((REFERENCE / "training.json").read_text())
    assert log["history"][-1]["loss"]


@pytest.mark.parametrize(("name", "share"), [("gqa-2", 0.5), ("mqa", 0.25), ("mixsga-3:1:6", 0.5), ("none", 1.0)])
def test_shipped_variants_are_healed_and_lie_on_their_parents_byte_axis(name: str, share: float) -> None:
    model, parent = (load(text, torch.float32, torch.device("cpu")) for text in (f"reference+{name}", "reference"))
    assert model.name == f"reference+{name}" and model.parent_shape == parent.shape and model.stop_ids == parent.stop_ids
    example = Recall(length=400).example(0, 3, token_counter(model))
    ids = torch.tensor(tokenize(model.tokenizer, example, Protocol(), 2000).ids)
    prefill = model.prefill(ids, METHODS["full"].needs)[0]
    counts = compact(prefill, [keep_all(prefill)], 0).counts()[0]
    assert counts.bytes_kept == pytest.approx(share * parent.shape.full_entries(len(ids)) * parent.shape.entry_bytes(), rel=0.01)


def test_the_shipped_mixsga_routes_alike_in_prefill_and_decoding() -> None:
    """At least 88 % agreement, shares within 5 points of 3:1:6, on documents that it was not trained on."""
    model = load("reference+mixsga-3:1:6", torch.float32, torch.device("cpu"))
    batches = ReferenceBatches(Documents(model.tokenizer, [], 5), 5, 0)  # type: ignore[arg-type]
    model.network.set_attn_implementation("sdpa")
    found = routing_of(model.network, iter([batches(HELD_OUT), batches(HELD_OUT + 1)]))
    assert found["agreement"] >= 0.88
    assert found["decode_shares"] == pytest.approx([0.3, 0.1, 0.6], abs=0.05)
