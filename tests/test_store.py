"""Rows survive torn lines, kills, full disks and other processes, and are never doubled."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import tiny

from benchmarks.random_tokens import RandomTokens
from harness.cache import Budget
from harness.evaluation.plan import Grid, units
from harness.evaluation.prompts import Protocol
from harness.evaluation.request import RunRequest
from harness.evaluation.run import in_turn
from harness.evaluation.unit import Loaded, run_unit
from methods import METHODS
from reports.tables import lines
from results.locks import LOCK
from results.record import Key, Record
from results.store import Store, StoreError, read_rows

KEY = Key(
    "m",
    "r",
    "b@1",
    "B()",
    "",
    0,
    "snapkv@1",
    "S()",
    "128",
    "question_in",
    "raw",
    100,
    "kv",
    "",
    "eos",
    8,
    "float32",
    0,
    0.0,
    True,
)


def record(example: int = 0, status: str = "ok", **more) -> Record:
    return Record(replace(KEY, example=example), status, "env", **more)  # type: ignore[arg-type]


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    written = record(answer="line\nbreak \u2028 <b>你</b>", metrics={"a": 0.5}, columns={"length": 5}, entries=3)
    Store(tmp_path).write(written)
    assert read_rows(tmp_path) == [written]
    assert Store(tmp_path).finished(written.key)


def test_draws_of_a_record_are_averaged_and_generated_examples_are_not() -> None:
    sizes = dict.fromkeys(("entries_asked", "entries", "bytes_kept", "bytes_allocated", "bytes_full"), 8)
    drawn = [replace(record(n, metrics={"m": float(value)}, **sizes), key=replace(KEY, example=n, seed=seed, data="sha"))
             for n, seed, value in ((0, 1, 1), (0, 2, 0), (1, 1, 1), (1, 2, 1))]  # fmt: skip
    (line,) = lines(drawn)
    assert line.score is not None and (line.score.mean, line.score.n) == (0.75, 2)
    (line,) = lines([replace(row, key=replace(row.key, data="")) for row in drawn])
    assert line.score is not None and (line.score.mean, line.score.n) == (0.75, 4)
    sampled = str(lines([replace(row, key=replace(row.key, temperature=1.0, routing="argmax")) for row in drawn])[0].protocol)
    assert "sampled at temperature 1" in sampled and sampled.endswith("prefill routed by argmax")


def test_every_setting_is_part_of_the_identity() -> None:
    for field, value in vars(KEY).items():
        other = value + 1 if isinstance(value, int | float) else value + "x"
        assert replace(KEY, **{field: other}).id != KEY.id


def test_a_torn_last_line_is_cut_off_and_not_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(0))
    path = next((tmp_path / "rows").glob("*.jsonl"))
    torn = record(1).to_json()
    for cut in (1, len(torn) // 2, len(torn) - 1):
        with path.open("a") as handle:
            handle.write(torn[:cut])
        again = Store(tmp_path)
        assert again.finished(KEY)
        assert not again.finished(replace(KEY, example=1))
        again.write(record(cut + 10))
    assert [row.key.example for row in read_rows(tmp_path)] == [0, 11, len(torn) // 2 + 10, len(torn) + 9]


def test_failed_is_tried_again_and_skipped_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(record(0, "failed", reason="x"))
    store.write(record(1, "skipped", reason="y"))
    assert not store.finished(KEY)
    assert store.finished(replace(KEY, example=1))
    assert store.write(record(0, answer="now"))
    assert not store.write(record(0, answer="too late"))
    assert [row.answer for row in read_rows(tmp_path)] == ["now", None]


def test_rows_of_another_schema_are_refused_by_name(tmp_path: Path) -> None:
    Store(tmp_path).write(record())
    path = next((tmp_path / "rows").glob("*.jsonl"))
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"schema": 99}) + "\n")
    with pytest.raises(StoreError, match="schema 99"):
        read_rows(tmp_path)
    with pytest.raises(StoreError, match="schema 99"):
        Store(tmp_path).finished(KEY)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--out"):
        Store(tmp_path / "file" / "out")
    with pytest.raises(StoreError, match="no rows in"):
        read_rows(tmp_path)


def _write_until_full(out: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    store = Store(out)
    try:
        for example in range(100):
            store.write(record(example))
    except StoreError as error:
        assert "rows written before are safe" in str(error)
        os._exit(7)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_write_until_full, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 7
    rows = read_rows(tmp_path)
    assert [row.key.example for row in rows] == list(range(len(rows)))
    assert len(rows) >= 4
    assert next((tmp_path / "rows").glob("*.jsonl")).read_bytes().endswith(b"\n")
    Store(tmp_path).write(record(len(rows)))
    assert len(read_rows(tmp_path)) == len(rows) + 1


def _write_all(out: Path) -> None:
    store = Store(out)
    for example in range(200):
        if not store.finished(replace(KEY, example=example)):
            store.write(record(example, answer=str(os.getpid())))


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    children = [multiprocessing.get_context("fork").Process(target=_write_all, args=(tmp_path,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    lines = next((tmp_path / "rows").glob("*.jsonl")).read_text().splitlines()
    assert sorted(json.loads(line)["key"]["example"] for line in lines) == list(range(200))


def test_a_writer_waits_until_no_other_writes(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_write_all, args=(tmp_path,))
    (tmp_path / "rows").mkdir()
    with FileLock(tmp_path / "rows" / LOCK):
        child.start()
        child.join(0.5)
        assert child.is_alive() and not list((tmp_path / "rows").glob("*.jsonl"))
    child.join()
    assert child.exitcode == 0 and len(read_rows(tmp_path)) == 200


GRID = Grid(
    tasks={"random_tokens": RandomTokens(length=40, question=4, max_new_tokens=3, vocabulary=97)},
    methods={name: METHODS[name] for name in ("full", "snapkv", "h2o")},
    budgets=(Budget.parse("10"), Budget.parse("50%")),
    protocols=(Protocol(),),
    limit=30,
    seeds=(0,),
)
CELLS = 30 * 5


@cache
def loaded() -> Loaded:
    return Loaded.of(tiny("llama"), GRID, RunRequest())


def _sweep(out: Path) -> None:
    store = Store(out)
    for unit in units(tiny("llama"), GRID, store):
        for record in run_unit(RunRequest(), unit, loaded()):
            store.write(record)


def finished(out: Path) -> list[str]:
    """Ids of the `ok` rows, one for each line."""
    ids = []
    for path in (out / "rows").glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            try:
                ids.append(Key(**json.loads(line)["key"]).id)
            except ValueError:
                continue
    return ids


@pytest.mark.parametrize("killed", [False, True])
def test_runs_at_once_take_other_prompts(killed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, grid = tiny("llama"), replace(GRID, limit=3)
    first, second = Store(tmp_path), Store(tmp_path)
    ours, theirs = (in_turn(units(model, grid, store), store) for store in (first, second))
    held = next(ours)
    others = [next(theirs), next(theirs)]
    assert held.example.index == 0 and [unit.example.index for unit in others] == [1, 2]
    if not killed:
        for record in run_unit(RunRequest(), held, loaded()):
            first.write(record)
    ours.close()
    (last,) = theirs
    assert last.example.index == 0 and len(last.left) == (5 if killed else 0)
    assert "has 1 of the prompts in hand" in capsys.readouterr().err and not list((tmp_path / ".claims").iterdir())


def test_killed_at_twenty_moments_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    """A little after so many rows were written, however fast the machine is: none, or one or two."""
    rng = random.Random(0)
    loaded()  # made here, so that the children are forks of a warm process
    before: set[str] = set()
    grew = 0
    for kill in range(20):
        child = multiprocessing.get_context("fork").Process(target=_sweep, args=(tmp_path,))
        child.start()
        while child.is_alive() and len(finished(tmp_path)) < len(before) + kill % 3:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        child.join()
        now = finished(tmp_path)
        assert before <= set(now), "a finished row was lost"
        assert len(now) == len(set(now)), "a row was doubled"
        grew += len(now) > len(before)
        before = set(now)
    assert grew >= 3, "the kills came before anything was written: the test saw nothing"
    _sweep(tmp_path)
    assert len(finished(tmp_path)) == len(set(finished(tmp_path))) == CELLS
    assert all(row.status == "ok" for row in read_rows(tmp_path))
