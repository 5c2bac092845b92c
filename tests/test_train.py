"""Healing: documents that cannot see each other, losses by hand, resume after a kill, and the command."""

from __future__ import annotations

import copy
import json
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAST, batches, call, converted, trainable
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from harness.families import routers
from harness.models.load import load
from harness.models.variants import read_about
from harness.training.checkpoint import CannotTrain, forget
from harness.training.data import HELD_OUT, BadText, ReferenceBatches, instruct_batches, text_batches
from harness.training.loop import IGNORED, Batch, Course, choose_trained, heal, loss_of, routing_of
from harness.training.recipes import Recipe
from harness.training.reference_data import Documents


@pytest.mark.parametrize("text", ["none", "mixsga-3:1:6", "gqa-2"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gpt_neox", "phi3", "qwen3", "mistral-window"])
def test_packed_documents_do_not_see_each_other(family: str, text: str) -> None:
    """The loss of a packed batch is that of its documents, each alone."""
    net = trainable(family, text).eval()
    batch = batches(2)(0)
    total, _ = loss_of(net, batch, Recipe(bf16=False, alpha=0.0))
    losses, count = 0.0, 0
    for row, labels, places in zip(batch.ids, batch.labels, batch.positions, strict=True):
        starts = [*(places == 0).nonzero()[:, 0].tolist(), len(row)]
        for start, stop in pairwise(starts):
            for router in routers(net):
                router.mode, router.segments = "expert_choice", None
            logits = net(input_ids=row[None, start:stop], use_cache=False).logits[0]
            mine = labels[start:stop]
            losses += float(cross_entropy(logits, mine, ignore_index=IGNORED, reduction="sum"))
            count += int((mine != IGNORED).sum())
    assert float(total) == pytest.approx(losses / count, abs=1e-4)


def test_the_loss_is_the_tasks_and_alpha_times_the_routers() -> None:
    net = trainable("llama", "mixsga-3:1:6")
    batch = batches()(1)
    total, parts = loss_of(net, batch, Recipe(bf16=False, alpha=0.5))
    assert float(total) == pytest.approx(parts["lm"] + 0.5 * parts["router"], abs=1e-5)
    mean = sum(float(router.loss("logits")) for router in routers(net)) / 3
    assert parts["router"] == pytest.approx(mean)
    weights = torch.rand(batch.ids.shape)
    weighted, _ = loss_of(net, Batch(batch.ids, batch.labels, batch.positions, weights), Recipe(bf16=False, alpha=0.0))
    logits = net(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    slow = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
    assert float(weighted) == pytest.approx(float((slow * weights.flatten()).sum()), rel=1e-4)


def test_distillation_is_0_to_oneself_and_the_router_gets_no_gradient_from_the_task() -> None:
    net, plain = trainable("llama", "mixsga-1:1:2"), trainable("llama", "none")
    recipe = Recipe(bf16=False, loss="distill", alpha=0.0)
    assert abs(loss_of(copy.deepcopy(plain), batches()(0), recipe, plain)[1]["distill"]) < 1e-5
    total, parts = loss_of(net, batches()(0), recipe, plain)
    assert parts["distill"] > 1e-3
    total.backward()
    assert all(router.score.weight.grad is None or not router.score.weight.grad.any() for router in routers(net))


def test_checkpointed_layers_do_not_count_the_routers_loss_twice() -> None:
    batch, found = batches()(0), {}
    for checkpointing in (False, True):
        net = trainable("llama", "mixsga-3:1:6")
        if checkpointing:
            net.gradient_checkpointing_enable()
        total, parts = loss_of(net, batch, Recipe(bf16=False, alpha=1.0))
        total.backward()
        grad = routers(net)[0].score.weight.grad
        assert grad is not None
        found[checkpointing] = (parts["router"], grad.clone())
    assert found[True][0] == pytest.approx(found[False][0])
    assert torch.allclose(found[True][1], found[False][1], atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("text", ["mixsga-3:1:6", "gqa-2", "none"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(text: str, optimizer: str, tmp_path: Path) -> None:
    fast = replace(FAST, optimizer=optimizer)  # type: ignore[arg-type]
    whole = trainable("llama", text)
    heal(whole, Course(fast, batches()), tmp_path / "whole")
    assert (tmp_path / "whole" / "checkpoint.pt").exists(), "a kill before the variant is saved loses nothing"
    forget(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*.pt*"))
    killed, made = trainable("llama", text), batches()

    def until(number: int) -> Batch:
        if number == 5:
            raise KeyboardInterrupt
        return made(number)

    with pytest.raises(KeyboardInterrupt):
        heal(killed, Course(fast, until), tmp_path / "two")
    assert (tmp_path / "two" / "checkpoint.pt").exists()
    for other in ((Recipe(steps=7), ""), (fast, "another text")):
        with pytest.raises(CannotTrain, match="another training"):
            heal(trainable("llama", text), Course(other[0], batches(), about=other[1]), tmp_path / "two")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "checkpoint.pt").write_bytes((tmp_path / "two" / "checkpoint.pt").read_bytes()[:999])
    with pytest.raises(CannotTrain, match="is torn"):
        heal(trainable("llama", text), Course(fast, batches()), tmp_path / "torn")
    resumed = trainable("llama", text)
    progress = heal(resumed, Course(fast, batches()), tmp_path / "two")
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
    assert progress.tokens == 6 * 3 * 40 and progress.losses[-1]["step"] == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_keeps_every_step(number: int, tmp_path: Path) -> None:
    stopped, made = trainable("llama", "gqa-2"), batches()

    def until(step: int) -> Batch:
        if step == 4:
            os.kill(os.getpid(), number)
        return made(step)

    before = signal.getsignal(number)
    recipe = replace(FAST, save_every=100)
    with pytest.raises(KeyboardInterrupt):
        heal(stopped, Course(recipe, until), tmp_path)
    assert signal.getsignal(number) is before
    seen: list[int] = []
    resumed = trainable("llama", "gqa-2")
    heal(resumed, Course(recipe, lambda step: (seen.append(step), made(step))[1]), tmp_path)
    assert seen == [5], "the step under way was finished and stored"


def test_training_learns_and_only_what_it_is_told_to(tmp_path: Path) -> None:
    net = trainable("llama", "mixsga-3:1:6")
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    made = batches()

    def one(number: int) -> Batch:
        return made(0)

    recipe = Recipe(steps=12, bf16=False, lr=5e-3, trains="kv")
    progress = heal(net, Course(recipe, one), tmp_path)
    assert progress.losses[-1]["lm"] < progress.losses[0]["lm"]
    moved = {name for name, weight in net.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if any(kind in name for kind in ("k_proj", "v_proj", "router"))}
    with pytest.raises(CannotTrain, match="--trains kv is not possible"):
        choose_trained(converted("phi3", "mixsga-3:1:6").network, recipe)
    lot = converted("llama", "mixsga-3:1:6-random").network
    choose_trained(lot, recipe)
    assert not any(weight.requires_grad for router in routers(lot) for weight in router.parameters())


def test_a_loss_that_is_no_number_stops_with_the_reason(tmp_path: Path) -> None:
    net = trainable("llama", "none")
    with torch.no_grad():
        net.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(CannotTrain, match="lower --lr"):
        heal(net, Course(FAST, batches()), tmp_path)


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [Recipe(steps=100, warmup=0.1).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[99] == pytest.approx(0.1, abs=0.01)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))


def test_agreement_and_shares_are_counted_over_all_layers() -> None:
    net = trainable("llama", "mixsga-1:1:2").eval()
    for router in routers(net):
        router.score.weight.data.zero_()
        router.score.bias.data.copy_(torch.tensor([0.0, 0.0, 1.0]))
    found = routing_of(net, iter([batches()(HELD_OUT)]))
    assert found["decode_shares"] == [0.0, 0.0, 1.0] and len(found["agreement_by_layer"]) == 3
    assert 0.4 < found["agreement"] < 0.6, "a half of the tokens belongs to the last expert"


def test_packing_loses_nothing_and_holds_some_rows_out() -> None:
    made = batches(1, 40)
    assert made.available >= 20
    flat = torch.cat([made.ids[n * 40 : n * 40 + 40] for n in range(made.available)])
    rows = {tuple(made(number).ids[0].tolist()) for number in range(3 * made.available)}
    held = {tuple(made(HELD_OUT + number).ids[0].tolist()) for number in range(10)}
    assert not rows & held and len(rows) + len(held) == made.available
    assert sorted(token for row in rows | held for token in row) == sorted(flat.tolist())
    batch = made(0)
    starts = batch.positions[:, 1:] == 0
    assert (batch.labels[:, :-1][starts] == IGNORED).all(), "no document predicts the next one's first token"


def test_only_outputs_of_instructions_are_trained_on(tmp_path: Path) -> None:
    tokenizer: Any = load("reference", torch.float32, torch.device("cpu")).tokenizer
    path = tmp_path / "i.jsonl"
    rows = [{"prompt": f"Question {n}:", "output": [f" answer {n}"] if n % 2 else f" answer {n}"} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    batch = instruct_batches(tokenizer, path, 64, 1, 0)(0)
    said = tokenizer.decode(batch.labels[batch.labels != IGNORED])
    assert "answer" in said and "Question" not in said
    path.write_text('{"prompt": "x"}')
    with pytest.raises(BadText, match="line 1: a record with prompt and output"):
        instruct_batches(tokenizer, path, 64, 1, 0)
    for text, says in (("", "no text there"), ("short", "less than one sequence of 64")):
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(BadText, match=says):
            text_batches(tokenizer, tmp_path / "t.txt", 64, 1, 0)


def test_instructions_of_other_hands_are_read_right_or_refused_by_line(tmp_path: Path) -> None:
    tokenizer: Any = load("reference", torch.float32, torch.device("cpu")).tokenizer
    path = tmp_path / "own.jsonl"
    row = {"prompt": "ask", "output": "one\u2028two"}
    forms = {"prompt": [{"role": "user", "content": "ask"}], "output": [["one\u2028two"], None]}
    digests = set()
    for one in (row, forms):
        path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(one, ensure_ascii=False) + "\r\n\r\n").encode() * 20)
        digests.add(instruct_batches(tokenizer, path, 8, 1, 0).digest)
    assert len(digests) == 1
    for broken in ({"output": None}, {"prompt": None}, {"output": {"text": "a"}}):
        path.write_text(json.dumps(row) + "\n" + json.dumps({**row, **broken}) + "\n")
        with pytest.raises(BadText, match="line 2"):
            instruct_batches(tokenizer, path, 8, 1, 0)


def test_the_command_makes_a_variant_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "books"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text("Some sentences that say little. And others, no better. " * 60)
    asked = ["train", "--model", "reference", "--conversion", "mixsga", "--ratios", "3:1:6", "--steps", "3"]
    asked += ["--text", str(text), "--length", "64", "--rows", "2", "--out", str(tmp_path / "v")]
    assert call(*asked) == 0
    assert "argmax agrees with expert choice on" in capsys.readouterr().out
    about = read_about(tmp_path / "v")
    assert about.name == "reference+mixsga-3:1:6" and about.recipe["steps"] == 3 and about.results["tokens"] == 3 * 128
    assert (tmp_path / "v" / "loss.png").stat().st_size > 1000
    assert call(*asked) == 2 and "holds a finished variant" in capsys.readouterr().err
    run = ["run", "--model", str(tmp_path / "v"), "--methods", "full,snapkv", "--budgets", "16", "--limit", "1"]
    assert call(*run, "--benchmarks", "recall(length=300)", "--out", str(tmp_path / "o")) == 0
    again = ["train", "--model", str(tmp_path / "v"), *asked[3:-1], str(tmp_path / "w")]
    assert call(*again) == 2 and "convert its parent" in capsys.readouterr().err
    further = [*asked[:-1], str(tmp_path / "w"), "--from-variant", str(tmp_path / "v"), "--lr", "1e-9", "--router-lr", "1e-9"]
    assert call(*further) == 0
    before, after = (load_file(tmp_path / name / "variant.safetensors") for name in "vw")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)  # went on from there, by next to nothing
    assert read_about(tmp_path / "w").recipe["from_variant"]["tokens"] == 3 * 128
    other = ["train", "--model", "reference", "--conversion", "mqa", *asked[7:-1], str(tmp_path / "x")]
    assert call(*other, "--from-variant", str(tmp_path / "v")) == 2 and "not reference+mqa" in capsys.readouterr().err
    assert call(*further, "--align") == 2 and "a parent's heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--conversion", "mixsga"), "needs --ratios"),
        (("--conversion", "gqa"), "needs --groups"),
        (("--conversion", "mixsga", "--ratios", "0:0:0"), "must not be negative, nor all 0"),
        (("--conversion", "mixsga", "--ratios", "3:-1:6"), "must not be negative"),
        (("--conversion", "gqa", "--groups", "3"), "do not divide 4 KV heads"),
        (("--conversion", "mqa", "--steps", "0"), "--steps 0 must be at least 1"),
        (("--conversion", "mqa", "--lr", "0"), "must be above 0"),
        (("--conversion", "mqa", "--text", "EMPTY"), "no text there"),
        (("--conversion", "mqa", "--length", "0"), "--length 0 must be above 0"),
        (("--conversion", "mqa", "--length", "9999"), "is over the 4096 positions"),
        (("--conversion", "mixsga", "--ratios", "1:1", "--router-lr", "-1"), "--router-lr must be above 0"),
        (("--conversion", "mqa", "--model", "random:tiny-llama"), "needs --recipe, --text or --instruct"),
        (("--conversion", "mqa", "--data-dir", "EMPTY"), "no books"),
    ],
)
def test_bad_trainings_get_one_line(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path) if text == "EMPTY" else text for text in arguments]
    assert call("train", "--model", "reference", "--out", str(tmp_path / "v"), *given) == 2
    said = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("run_all.py:")]
    assert len(said) == 1 and says in said[0]


def test_the_embedded_models_documents_follow_from_their_number() -> None:
    tokenizer: Any = load("reference", torch.float32, torch.device("cpu")).tokenizer
    made = ReferenceBatches(Documents(tokenizer, [], 0), seed=1, batches=10, tokens=512)
    first, second = made(3), made(4)
    again = made(3)
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids[0, :50], second.ids[0, :50])
    assert made(0).ids.shape[1] <= 128 < max(made(number).ids.shape[1] for number in range(5, 10))
    assert first.weights is not None and float(first.weights.sum()) == pytest.approx(2.4, abs=1.1)
