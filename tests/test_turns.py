"""Many questions on one context: it is read once, every answer is what the question alone gets, and every answer is a row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DATA

from benchmarks.base import Example, Turn, context_of
from benchmarks.facts import RecallEach
from benchmarks.longbench import LongBench
from benchmarks.loogle import LooGLE
from harness.cache import Budget
from harness.engine.model import Model
from harness.evaluation.plan import Grid, opened, unit_of
from harness.evaluation.prompts import CannotPrompt, Prompt, Protocol
from harness.evaluation.request import RunRequest, Shard
from harness.evaluation.run import plans_of, run_request
from harness.evaluation.sweep import Cell, Outcome, Sweep
from harness.evaluation.turns import SHARING, prompt_of
from harness.models.load import byte_tokenizer, load_model
from harness.registry import BUILTIN
from methods import METHODS
from reports.by_question import by_question_table
from reports.statistics import clustered, estimate
from results.store import read_rows

BYTES = byte_tokenizer()
CONTEXT = "".join(
    f"{word} lies {where}. " for word, where in zip("abcdefgh", "north south east west up down left right".split(), strict=True)
)
TURNS = tuple(Turn(f"Where is {word}? ", f"{where}.\n") for word, where in (("a", "north"), ("bb", "south"), ("c", "east")))
ASKED: tuple[Any, ...] = ("question_after", *SHARING)


def example(turn: int, **more: Any) -> Example:
    text = CONTEXT + TURNS[turn].question
    return Example(turn, text, len(CONTEXT), (TURNS[turn].answer,), 6, turns=TURNS, turn=turn, **more)


def prompt(turn: int, asked: Any, limit: int = 4096) -> Prompt:
    return prompt_of(BYTES, example(turn), Protocol(asked), limit)


def text(ids: Any) -> str:
    return BYTES.decode(list(ids))


@pytest.fixture(scope="module")
def model() -> Model:
    """Random weights that read bytes."""
    return load_model("random:tiny-llama", RunRequest(device="cpu"), BUILTIN)


def cells(*names: str) -> list[Cell]:
    found = [Cell(name, METHODS[name], Budget.parse("48")) for name in names]
    return [Cell("full", METHODS["full"], None), *found]


def test_what_is_read_and_what_is_asked() -> None:
    q0, q1, q2 = (turn.question for turn in TURNS)
    first = prompt(2, "first_question")
    assert (text(first.ids[: first.context]), text(first.looked), text(first.ids[first.context :])) == (CONTEXT, q0, q2)
    turns = prompt(2, "turns")
    assert text(turns.ids[: turns.context]) == CONTEXT + q0
    assert text(turns.ids[turns.context :]) == TURNS[0].answer + q1 + TURNS[1].answer + q2
    after = prompt(2, "turns_after")
    assert (text(after.ids[: after.context]), after.ids) == (CONTEXT, turns.ids)
    assert prompt(0, "turns").context == len(prompt(0, "turns").ids), "the first turn is question_in's"


@pytest.mark.parametrize("asked", SHARING)
def test_a_context_is_cut_alike_for_all_its_questions(asked: Any) -> None:
    limit = 110
    found = [prompt(turn, asked, limit) for turn in range(3)]
    assert max(len(one.ids) for one in found) in (limit - 1, limit)
    assert len({tuple(one.ids[: one.context]) for one in found}) == 1
    assert text(found[0].ids).startswith("a lies")


def test_what_cannot_be_asked() -> None:
    with pytest.raises(CannotPrompt, match="leave"):
        prompt(0, "turns", 20)
    with pytest.raises(CannotPrompt, match="mean"):
        prompt_of(BYTES, example(0, cut="never"), Protocol("turns"), 100)
    with pytest.raises(CannotPrompt, match="only one question"):
        prompt_of(BYTES, replace(example(0), turns=()), Protocol("first_question"), 100)


def run(sweep: Sweep, asked: Prompt, which: list[Cell]) -> dict[str, Outcome]:
    return {cell.name: outcome for cell, outcome in sweep.example(asked, which, 6)}


@pytest.mark.parametrize("asked", ASKED)
def test_shared_rows_answer_as_rows_of_their_own(model: Model, asked: Any) -> None:
    which = cells("snapkv", "keydiff")
    shared = Sweep(model, Protocol(asked))
    run(shared, prompt(0, asked), which)
    together = run(shared, prompt(2, asked), which)
    assert shared.read == 1
    anew = run(Sweep(model, Protocol(asked)), prompt(2, asked), which)
    alone = run(Sweep(model, Protocol(asked)), prompt(2, asked), which[:2])  # beside full, which fidelity needs
    for name, its in (*anew.items(), *alone.items()):
        mine = together[name]
        assert mine.failed is its.failed is None
        assert mine.answer.tokens == its.answer.tokens, name  # type: ignore[union-attr]
        assert mine.counts == its.counts
        assert mine.fidelity == pytest.approx(its.fidelity, abs=1e-4)


def test_another_context_or_need_is_read_anew(model: Model) -> None:
    sweep = Sweep(model, Protocol("question_after"), with_fidelity=False)
    run(sweep, prompt(0, "question_after"), cells("knorm"))
    run(sweep, prompt(1, "question_after"), cells("snapkv"))
    assert sweep.read == 2, "the queries of a window were not observed"
    other = prompt(1, "question_after")
    run(sweep, replace(other, ids=[*other.ids[:3], 9, *other.ids[4:]]), cells("snapkv"))
    assert sweep.read == 3
    neighbour = Sweep(model, Protocol("question_in"), with_fidelity=False, arena=sweep.arena)
    run(neighbour, prompt(0, "question_in"), cells("snapkv"))
    assert sweep.reading is None, "its memory was another's since"


def test_the_first_question_is_looked_at_and_taken_back(model: Model) -> None:
    """What is left are the entries of the context that the first question's own prompt would keep."""
    sweep = Sweep(model, Protocol("first_question"), with_fidelity=False)
    inside = Sweep(model, Protocol("question_in"), with_fidelity=False)
    first = run(sweep, prompt(1, "first_question"), cells("snapkv"))
    run(inside, prompt(0, "question_in"), cells("snapkv"))
    mine, whole = sweep.reading, inside.reading
    assert mine is not None and whole is not None
    (snap,) = (cell for cell in whole.selections if cell.name == "snapkv")
    context = len(CONTEXT)
    for rows, others in zip(mine.selections[snap], whole.selections[snap], strict=True):
        for row, other in zip(rows, others, strict=True):
            assert torch.equal(row.kept, other.kept[other.kept < context])  # type: ignore[index, arg-type]
            assert len(row.kept) < len(other.kept)  # type: ignore[arg-type]
    # a full cache from which a question was taken back is one that has not seen it
    plain = run(Sweep(model, Protocol("question_after"), with_fidelity=False), prompt(1, "question_after"), cells())
    assert first["full"].answer.tokens == plain["full"].answer.tokens  # type: ignore[union-attr]
    assert first["full"].counts == plain["full"].counts
    assert not first["full"].compressed


def test_a_window_that_has_moved_on_and_methods_that_remember_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    task = RecallEach(length=1000, facts=2, links=0, questions=2)
    asked = {"tasks": {"recall_each": task}, "budgets": (Budget.parse("64"),), "protocols": (), "limit": 4, "seeds": (0,)}
    methods = dict(map(BUILTIN.method, ("full", "snapkv", "snapkv(every=4)")))
    grid = Grid(methods=methods, **asked)  # type: ignore[arg-type]
    for window, skipped in ((None, 1), (64, 3)):
        monkeypatch.setattr(model, "parent_shape", replace(model.shape, windows=(None, window)))
        unit = unit_of(model, grid, "recall_each", Protocol("first_question"), 0, 1, grid.cells())
        assert unit is not None
        found = opened(model, unit).skipped
        assert len(found) == skipped, found
        assert all("use" in why for why in found.values())


def test_questions_on_one_context_stay_together() -> None:
    class Shuffled(RecallEach):
        def context_of(self, index: int) -> int:
            return index % 3

    grid = Grid({}, {}, (), (), 8, (0,))
    assert grid.examples(Shuffled()) == [0, 3, 6, 1, 4, 7, 2, 5]
    assert replace(grid, shard=Shard(2, 2)).examples(Shuffled()) == [1, 4, 7]
    assert [replace(grid, shard=Shard(n, 2)).examples(RecallEach()) for n in (1, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_each_question_is_an_example_of_its_context() -> None:
    task = RecallEach(length=200)
    made = [task.example(index, 0, lambda text: len(text.split())) for index in range(8)]
    assert len({one.prompt[: one.context_end] for one in made}) == 2
    for index, one in enumerate(made):
        assert one.turns[one.turn].question == one.prompt[one.context_end :]
        assert one.answers[0] == one.turns[one.turn].answer.strip(" .")
        assert f"{one.prompt.rsplit('the code of ', 1)[1]} {one.answers[0]}." in one.prompt
        assert (one.turn, context_of(task, index)) == (index % 4, index - index % 4)
        whole = one.prompt[: one.context_end] + "".join(turn.question + turn.answer for turn in one.turns)
        assert len(whole.split()) <= 200
    assert len({turn.question for turn in made[0].turns}) == 4


@pytest.mark.data
def test_records_that_share_a_document_are_told_so() -> None:
    task = LongBench("multifieldqa_zh", data_dir=DATA)
    count = lambda text: len(text)  # noqa: E731
    made = [task.example(index, 0, count) for index in range(task.size)]
    shared = [one for one in made if one.turns]
    assert len(shared) == 6
    for one in shared:
        first = made[context_of(task, one.index)]
        assert first.prompt[: first.context_end] == one.prompt[: one.context_end]
        assert one.turns[one.turn].question == one.prompt[one.context_end :]
    loogle = LooGLE("short_qa", data_dir=DATA)
    asked = [loogle.example(index, 0, count) for index in range(loogle.size)]
    assert {context_of(loogle, one.index) for one in asked} == {one.index for one in asked if one.turn == 0}
    assert all(one.turns[one.turn].question == one.prompt[one.context_end :] for one in asked)


def test_a_run_goes_on_and_its_table_tells_the_questions_apart(tmp_path: Path) -> None:
    asked: Any = ("first_question", "turns_after")
    request = RunRequest(
        models=("random:tiny-llama",), methods=("full", "snapkv"), budgets=("48",), prompts=asked, limit=4, max_new_tokens=2,
        benchmarks=("recall_each(length=600,facts=4,links=0)",), fidelity=False, device="cpu", out=tmp_path,
    )  # fmt: skip
    (plan,) = plans_of(request, BUILTIN)
    assert (plan.cells, plan.prefills) == (16, 2)
    run_request(request, BUILTIN)
    whole = {record.key.id: record for record in read_rows(tmp_path)}
    assert {(r.columns["question"], r.columns["shares"]) for r in whole.values()} == {(n, 0) for n in (1, 2, 3, 4)}
    for path in (tmp_path / "rows").rglob("*.jsonl"):  # killed within a row, and some are left
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["key"]["example"] in (0, 2)) + lines[1][:40])
    run_request(request, BUILTIN)
    again = {record.key.id: record for record in read_rows(tmp_path)}
    said = [{key: (one.answer, one.entries, one.metrics) for key, one in rows.items()} for rows in (whole, again)]
    assert said[0] == said[1]
    (table,) = by_question_table(list(again.values()))
    assert table.header[5:] == ("question 1", "question 2", "question 3", "4 and later", "all")
    assert len(table.rows) == 4
    assert by_question_table([replace(one, columns={}) for one in again.values()]) == []


def test_clusters_widen_an_interval() -> None:
    rng = np.random.default_rng(1)
    alike = [np.full(8, float(rng.random() < 0.5)) for _ in range(12)]
    apart = np.concatenate(alike)
    found, naive = clustered(alike), estimate(apart)
    assert found.mean == pytest.approx(naive.mean)
    assert found.n == 12
    assert found.high - found.low > 2 * (naive.high - naive.low)
    single = clustered([np.array([value]) for value in apart])
    assert (single.low, single.high) == pytest.approx((naive.low, naive.high), abs=0.02)
    same_problems = [np.array([0.0, 1.0] * 4) for _ in range(12)]  # problems do not differ, draws do
    assert clustered(same_problems).high - clustered(same_problems).low == pytest.approx(naive.high - naive.low, abs=0.05)
    ragged = clustered([np.array([1.0]), np.array([0.0, 0.0, 0.0]), np.array([1.0, 0.0])])
    assert ragged.mean == pytest.approx(2 / 6)
    assert ragged.low < 2 / 6 < ragged.high
