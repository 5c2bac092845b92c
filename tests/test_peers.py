"""The comparison with kvpress: what is put side by side. kvpress itself runs in an environment of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import tiny

from benchmarks.peers.compare import cells_of, markdown, ours, shared, table
from benchmarks.random_tokens import RandomTokens
from harness.evaluation.prompts import Protocol, tokenize
from harness.evaluation.sweep import Sweep


@pytest.fixture(scope="module")
def here() -> tuple[Any, dict[str, Any]]:
    task = RandomTokens(length=80, question=4, max_new_tokens=4, vocabulary=90)
    protocol = Protocol(prompt="question_after", stop="none")
    prompts = [tokenize(None, task.example(n, 0, len), protocol, 10**6) for n in range(2)]
    cells = cells_of(("snapkv", "streaming_llm", "ada_snapkv"), ("50%", "25%"))
    torch.set_num_threads(1)
    return cells, ours(Sweep(tiny("llama"), protocol, with_fidelity=False), prompts, cells, 4)


def there(cells: Any, mine: dict[str, Any]) -> dict[str, Any]:
    """What the other side would write, had it done the same."""
    rows = []
    for row in mine["rows"]:
        cell = cells[row["cell"]]
        share = float(cell.budget.share) if cell.budget else 1.0
        said = {"prefill_s": 1.0, "total_s": 2.0, "bytes": row["bytes"], "tokens": row["tokens"]}
        rows.append({"prompt": row["prompt"], "method": cell.name, "share": share} | said)
    return {"version": "0", "transformers": "0", "rows": rows, "kept": mine["kept"]}


def test_both_sides_alike_agree_in_everything(here: tuple[Any, dict[str, Any]]) -> None:
    cells, mine = here
    lines = table(cells, mine, there(cells, mine))
    assert [line["answers_equal"] for line in lines] == [2] * 7
    assert all(line["ours_bytes"] == line["kvpress_bytes"] < line["ours_allocated"] for line in lines)
    assert [line["kept_equal"] for line in lines] == [None, 1.0, 1.0, None, 1.0, 1.0, None]
    assert "| snapkv | 50% |" in markdown(lines) and "| 2 of 2 | 100.0000% |" in markdown(lines)


def test_what_differs_is_told(here: tuple[Any, dict[str, Any]]) -> None:
    cells, mine = here
    theirs = copy.deepcopy(there(cells, mine))
    theirs["rows"][1]["tokens"] = [-1]
    theirs["rows"][2] = {**theirs["rows"][2], "failed": "RuntimeError: sizes"}
    theirs["rows"][9] = {**theirs["rows"][9], "failed": "RuntimeError: sizes"}
    theirs["kept"][1][0][0] = [place + 1000 for place in theirs["kept"][1][0][0]]
    lines = table(cells, mine, theirs)
    assert sum(line.get("answers_equal", 0) for line in lines) == 14 - 1 - 2
    assert sum("RuntimeError" in line["failed"] for line in lines) == len(
        {theirs["rows"][n]["method"] + str(theirs["rows"][n]["share"]) for n in (2, 9)}
    )
    assert lines[1]["kept_equal"] == pytest.approx(1 - 1 / len([row for layer in mine["kept"][1] for row in layer]))


def test_kept_positions_are_those_of_the_rows(here: tuple[Any, dict[str, Any]]) -> None:
    cells, mine = here
    for cell, layers in zip(cells, mine["kept"], strict=True):
        assert bool(layers) == (cell.budget is not None)
        if cell.name == "streaming_llm":
            assert all(row[:4] == [0, 1, 2, 3] and row[-1] == 79 for rows in layers for row in rows)
    assert shared([], []) is None
