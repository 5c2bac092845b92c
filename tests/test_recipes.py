"""The papers' recipes: their data, their lengths, and training by several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import DATA, call, trainable
from safetensors.torch import load_file
from transformers import AutoTokenizer

from harness.models.load import REFERENCE
from harness.models.variants import read_about
from harness.training.corpora import dolly, minipile, template_of
from harness.training.data import HELD_OUT, BadText, ExampleBatches
from harness.training.loop import IGNORED, loss_of
from harness.training.recipes import RECIPES, Recipe
from harness.training.request import TrainRequest

ROOT = Path(__file__).parent.parent


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCE)


def asked(instruction: str, text: str = "") -> dict[str, str]:
    prompt = f"Please do it.\n> {instruction}\n" + (f"With: {text}\n" if text else "") + "Answer:"
    return {"instruction": instruction, "input": text, "prompt": prompt, "output": "it is done"}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """DollyEval with four records, and Dolly with those and 40 more."""
    evaluated = [asked("name a bird"), asked("name a fish"), asked("sum up", "a long text"), asked("copy", "another text")]
    write(tmp_path / "instruct" / "dolly_eval.jsonl", evaluated)
    rows = [{"instruction": row["instruction"], "context": row["input"], "response": "x", "category": ""} for row in evaluated]
    rows += [{"instruction": f"say {n}", "context": "it" * (n % 2), "response": f"{n} it is", "category": ""} for n in range(40)]
    write(tmp_path / "instruct" / "databricks-dolly-15k.jsonl", rows)
    return tmp_path


def test_training_prompts_are_worded_as_the_evaluated_ones() -> None:
    prompt = template_of([asked("name a bird"), asked("name a fish"), asked("sum up", "a text"), asked("copy", "that")])
    assert prompt("jump", "") == asked("jump")["prompt"]
    assert prompt("jump", "over the dog") == asked("jump", "over the dog")["prompt"]


@pytest.mark.data
def test_the_real_records_have_one_wording() -> None:
    rows = [json.loads(line) for line in (DATA / "instruct" / "dolly_eval.jsonl").read_text().splitlines()]
    prompt = template_of(rows)
    made = [prompt(row["instruction"].strip(), row["input"].strip()) == row["prompt"] for row in rows]
    assert sum(made) > 0.95 * len(rows)  # some have blanks at the ends


@pytest.mark.parametrize(
    "rows",
    [[asked("a")], [asked("a"), {**asked("b"), "prompt": "b, else"}, asked("c", "d")], [{**asked("a", "b"), "prompt": "?"}]],
)
def test_prompts_without_one_wording_are_refused(rows: list[dict[str, str]]) -> None:
    with pytest.raises(BadText, match="DollyEval"):
        template_of([*rows, {**asked("z"), "prompt": "none of it"}])


def test_no_evaluated_record_is_trained_on(data_dir: Path) -> None:
    words = tokenizer()
    found = dolly(words, data_dir, 128, 4, seed=0)
    said = [words.decode(ids) for part in (found.examples, found.held_out) for ids, _ in part]
    assert len(found.examples) + len(found.held_out) == 40 and len(found.held_out) == 2
    assert not any(text in one for one in said for text in ("bird", "fish", "sum up", "copy"))
    assert not {tuple(ids) for ids, _ in found.examples} & {tuple(ids) for ids, _ in found.held_out}


def test_a_padded_batch_has_the_loss_of_its_examples() -> None:
    """Each alone: padding is seen by none, routed by none, and has no label."""
    words = tokenizer()
    rows = [{"prompt": "a bird " * n, "output": "flies away " * n} for n in range(1, 5)]
    batches = ExampleBatches.of(words, rows, rows[:1], 200, 4, seed=0)
    for conversion in ("none", "mixsga-3:1:6"):
        net = trainable("llama", conversion).eval()
        batch = batches(0)
        assert batch.real is not None and not batch.real.all()
        ids = batch.ids % 97  # the tiny model's vocabulary
        labels = torch.where(batch.labels == IGNORED, IGNORED, batch.labels % 97)
        batch = type(batch)(ids, labels, batch.positions, real=batch.real)
        together, parts = loss_of(net, batch, Recipe(bf16=False, alpha=0.5))
        losses, routed, count = 0.0, 0.0, 0
        for row in range(4):
            size = int(batch.real[row].sum())  # type: ignore[index]
            alone = type(batch)(ids[row : row + 1, :size], labels[row : row + 1, :size], batch.positions[row : row + 1, :size])
            scored = int((alone.labels != IGNORED).sum())
            _, its = loss_of(net, alone, Recipe(bf16=False, alpha=0.5))
            losses, count = losses + its["lm"] * scored, count + scored
            routed += its.get("router", 0.0) * size
        assert parts["lm"] == pytest.approx(losses / count, abs=1e-5)
        assert parts.get("router", 0.0) == pytest.approx(routed / int(batch.real.sum()), abs=1e-5)  # type: ignore[union-attr]
        assert torch.isfinite(together)


def test_every_example_once_an_epoch_and_the_held_out_apart() -> None:
    rows = [{"prompt": f"{n} and", "output": f"{n}"} for n in range(9)]
    batches = ExampleBatches.of(tokenizer(), rows[:8], rows[8:], 64, 2, seed=3)

    def said(numbers: range) -> list[tuple[int, ...]]:
        found = [batches(number) for number in numbers]
        return [tuple(row[kept].tolist()) for one in found for row, kept in zip(one.ids, one.real, strict=True)]  # type: ignore[arg-type]

    seen, again = said(range(4)), said(range(4, 8))
    assert len(set(seen)) == 8
    assert set(again) == set(seen) and again != seen
    assert tuple(batches(HELD_OUT).ids[0].tolist()) not in set(seen)


def test_minipile_is_read_from_any_form_and_tokenised_once(tmp_path: Path) -> None:
    words, folder = tokenizer(), tmp_path / "minipile"
    texts = [f"the {n} birds were in the garden and sang. " * 20 for n in range(30)]
    folder.mkdir()
    (folder / "a.txt").write_text(texts[0])
    write(folder / "b.jsonl", [{"text": text} for text in texts[1:15]])
    pd.DataFrame({"text": texts[15:]}).to_parquet(folder / "c.parquet")
    found = minipile(words, tmp_path, 64, 3, 0, tmp_path / "tokens")
    end = [] if words.eos_token_id is None else [words.eos_token_id]
    wanted = [token for text in texts for token in [*words(text)["input_ids"], *end]]
    assert found.ids.tolist() == wanted and int(found.starts.sum()) == 30
    batch = found(0)
    assert batch.ids.shape == (3, 64) and batch.ids.dtype == torch.int64
    (tmp_path / "tokens").rename(tmp_path / "kept")
    again = minipile(words, tmp_path, 64, 3, 0, tmp_path / "kept")
    assert torch.equal(again(7).ids, found(7).ids) and again.digest == found.digest


def test_an_epoch_is_what_the_paper_says() -> None:
    assert RECIPES["mixsga-sft"].steps(14_000) == 17_500  # 40 epochs at batch 32
    assert RECIPES["mixsga-pretrain"].batch * RECIPES["mixsga-pretrain"].length == 262_144


def test_mixsga_plus_is_a_start_on_whatever_data(tmp_path: Path) -> None:
    out = tmp_path / "plus"
    asked = [
        "train",
        "--model",
        "reference",
        "--recipe",
        "mixsga-plus",
        "--conversion",
        "mixsga",
        "--ratios",
        "3:1:6",
        "--out",
        str(out),
    ]
    assert call(*asked, "--steps", "1", "--length", "64", "--rows", "1") == 0
    said = read_about(out).recipe
    assert (said["recipe"], said["align"], said["agree"], said["lr"]) == ("mixsga-plus", True, 1.0, 3e-3)
    plain = TrainRequest("reference", "mixsga-3:1:6", recipe="mixsga-plus", agree=0.5).settings()
    assert (plain.agree, plain.align, plain.steps) == (0.5, True, 600), "an option changes it"


def test_the_command_trains_by_a_recipe(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data_dir / "variant"
    command = ["train", "--model", "reference", "--recipe", "mixsga-sft", "--conversion", "cla", "--percent", "50"]
    assert call(*command, "--data-dir", str(data_dir), "--epochs", "2", "--out", str(out)) == 0
    assert "50.0% of the parent's cache" in capsys.readouterr().out
    said = read_about(out).recipe
    assert (said["recipe"], said["steps"], said["accumulate"], said["lr"]) == ("mixsga-sft", 2, 4, 5e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "sft"], "no recipe 'sft'; known: mixsga-sft"),
        (["--recipe", "mixsga-sft"], "hub"),
        (["--recipe", "mixsga-sft", "--epochs", "0"], "--epochs 0 must be above 0"),
        (["--recipe", "mixsga-pretrain"], "no folder minipile in --data-dir"),
        (["--shard-weights", "--steps", "1"], "--shard-weights needs several processes"),
    ],
)
def test_recipes_that_cannot_be_followed_get_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    command = ["train", "--model", "reference", "--conversion", "mqa", *arguments, "--out", str(tmp_path / "v")]
    assert call(*command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def train(out: Path, processes: int, *more: str) -> dict[str, Any]:
    text = ["--instruct", str(out.parent / "text.jsonl"), "--length", "64", "--rows", "2", "--steps", "4", "--lr", "1e-4"]
    asks = ["train", "--model", "reference", "--conversion", "mixsga", "--ratios", "3:1:6", *text, "--save-dtype", "float32"]
    asks += ["--out", str(out), *more]
    if processes == 1:
        assert call(*asks) == 0
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "run_all.py", *asks]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
    return load_file(out / "variant.safetensors")


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """The same batches, averaged over processes or accumulated: DDP to the bit, sharded weights but for rounding."""
    write(tmp_path / "text.jsonl", [asked(f"say the number {n}", "aloud " * (n % 5)) for n in range(60)])
    one = train(tmp_path / "one", 1, "--accumulate", "2")
    two = train(tmp_path / "two", 2)
    parts = train(tmp_path / "parts", 2, "--shard-weights", "--save-every", "2")
    assert set(one) == set(two) == set(parts)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    assert max(float((one[name] - parts[name]).abs().max()) for name in one) < 1e-3  # ten times a step
    losses = [read_about(tmp_path / name).results["losses"][-1]["lm"] for name in ("one", "two", "parts")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[2] == pytest.approx(losses[0], abs=5e-3)


SHARDED = """
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path[:0] = ["tests", "."]
from helpers import FAST, batches, trainable

from harness.training.checkpoint import whole_weights
from harness.training.loop import Course, heal

PartialState(cpu=True)
root, data = Path(sys.argv[1]), batches()

def healed(name, folder, stop):
    # the trained weights, or None if the training was stopped at that batch
    def given(number):
        if number >= stop:
            raise KeyboardInterrupt
        return data(number)

    net = trainable("llama", "cla-50" if name == "cla" else "mixsga-3:1:6")
    try:
        heal(net, Course(FAST, given, shard=name != "ddp"), root / folder / name)
    except KeyboardInterrupt:
        return None
    return whole_weights(net)

for name in ("mixsga", "cla", "ddp"):
    # stopped in its fifth of six steps, with a checkpoint after the fourth
    assert healed(name, "killed", 8) is None and (root / "killed" / name / "checkpoint.pt").exists()
    found = {"killed": healed(name, "killed", 99), "whole": healed(name, "whole", 99)}
    if PartialState().is_main_process:
        torch.save(found, root / f"{name}.pt")
"""


def test_a_killed_training_of_two_processes_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name in ("mixsga", "cla", "ddp"):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        resumed, whole = found["killed"], found["whole"]
        assert all(torch.equal(resumed[key], whole[key]) for key in whole), name
