"""Reasoning sets: records as they are published, prompts with a box, answers compared as integers or by math-verify."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from benchmarks.data import BadData
from benchmarks.reasoning import Reasoning, boxed, same_integer, same_value
from reports.samples import samples_table
from results.record import Key, Record

RECORDS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "Two and three?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"},
    "math500": {
        "problem": "Half?",
        "solution": "...",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "a",
    },
    "aime24": {"id": 60, "problem": "How many?", "solution": "...", "answer": "033", "url": "", "year": "2024"},
    "aime25": {"problem": "How many?", "answer": 70, "id": "0"},
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_of_each_layout_are_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "reasoning").mkdir()
    (tmp_path / "reasoning" / f"{kind}.jsonl").write_text(json.dumps(RECORDS[kind]) + "\n")
    task = Reasoning(kind, data_dir=tmp_path)
    example = task.example(0, 0, len)
    assert task.size == 1
    assert example.prompt.startswith(str(RECORDS[kind].get("problem", "Two and three?")))
    assert "\\boxed{}" in example.prompt[example.context_end :]
    right = {"gsm8k": "1005", "math500": "0.5", "aime24": "33", "aime25": "70"}[kind]
    assert task.score(f"So it is \\boxed{{{right}}}.", example) == {"correct": 1.0}
    assert task.score(f"It is {right}, no: \\boxed{{7}}", example) == {"correct": 0.0}
    assert task.score("", example) == {"correct": 0.0}
    assert repr(task) == f"Reasoning(kind='{kind}', new_tokens=0)"


def test_the_hub_is_asked_where_no_folder_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "snapshots" / "abc" / "test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(RECORDS["math500"]))
    asked = []

    def download(repository: str, name: str, **more: Any) -> str:
        asked.append((repository, name, more["repo_type"]))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Reasoning("math500", data_dir=tmp_path).records().source == "HuggingFaceH4/MATH-500@abc/test.jsonl"
    assert asked == [("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"answer": "5"}, "no field 'problem'"),
        ({"problem": "?", "answer": "so\n####"}, "is empty"),
        ({"problem": "?"}, "no field 'answer'"),
        ({"problem": [1], "answer": "5"}, "where a text is expected"),
    ],
)
def test_broken_records_are_refused_in_a_line(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadData, match=why):
        Reasoning(data_dir=tmp_path).records()


def test_boxes_and_integers() -> None:
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{cut") == r"\frac{1}{2}"
    assert boxed("none") is None
    assert same_integer(r"\boxed{\text{It is } 1,200}", "1200")
    assert same_integer("first 3, then 42.", "42"), "without a box the last number"
    assert not same_integer(r"42 \boxed{}", "42")
    assert not same_integer("no number", "42")


@pytest.mark.parametrize(
    ("answer", "right", "same"),
    [
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", False),
        ("no idea", r"\frac{1}{2}", False),
    ],
)
def test_values_are_compared_as_mathematics(answer: str, right: str, same: bool) -> None:
    assert same_value(answer, right) is same


def test_without_math_verify_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *more: Any) -> Any:
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(BadData, match="pip install math-verify"):
        same_value("1", "1")
    assert same_integer("1", "1")


def test_samples_are_averaged_by_problem() -> None:
    said = ("full@1", "Full()", "", "question_in", "raw", 9, "kv", "", "eos", 9, "float32", 0, 0.6, False)
    key = Key("m", "r", "gsm8k@1", "Reasoning()", "d", 0, *said)
    draws = [
        Record(replace(key, example=n, seed=seed), "ok", "e", stop_reason=end, metrics={"correct": right}, new_tokens=tokens)
        for n, seed, right, end, tokens in ((0, 0, 1.0, "end", 10), (0, 1, 0.0, "length", 30), (1, 0, 0.0, "end", 10))
    ]
    draws.append(replace(draws[2], key=replace(key, example=1, seed=1)))
    (table,) = samples_table(draws)
    ((*_, problems, k, mean, tokens, ended),) = table.rows
    assert (problems.text, k.text, tokens.text, ended.text) == ("2", "2", "15", "75%")
    assert mean.value == 0.25
    assert samples_table([draws[0], draws[2]]) == [], "one sample of each"
    greedy = [replace(draw, key=replace(draw.key, temperature=0.0)) for draw in draws]
    assert samples_table(greedy) == []
