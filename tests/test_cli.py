"""The command line as a user meets it: runs, resumes, reports, and one clear line for what makes no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers import call, small

import run_all
from harness.engine.measure import OutOfMemory, memory_errors
from harness.errors import BadRequest
from harness.evaluation.plan import grids_of
from harness.evaluation.request import RunRequest, Shard
from harness.registry import BUILTIN, UnknownChoice, choose, split
from harness.suites import SUITES
from methods import METHODS
from results.store import Store, StoreError, read_rows


def test_the_smoke_suite_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*small(tmp_path, "--budgets", "12,25%,40%")) == 0
    rows = read_rows(tmp_path)
    assert len(rows) == 2 * 2 * (1 + 8 * 3)
    assert {row.status for row in rows} == {"ok"}
    assert all(row.entries == row.entries_asked for row in rows)
    files = {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}
    assert call(*small(tmp_path, "--budgets", "12,25%,40%")) == 0
    assert files == {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}, "a finished cell ran again"
    table = pd.read_csv(tmp_path / "report" / "scores.csv")
    assert len(table) == 2 * (1 + 8 * 3)
    snap = table[(table.method == "snapkv@1") & (table.budget == "25%") & (table.prompt == "question_after")].iloc[0]
    assert snap.byte_share == pytest.approx(0.25)
    assert snap.n == snap.compressed == 2
    assert "| snapkv | 25% | 25.0% |" in (tmp_path / "report" / "scores.md").read_text()
    assert (tmp_path / "report" / "scores.html").stat().st_size > 10_000
    capsys.readouterr()
    assert call("plan", *small(tmp_path, "--budgets", "12,25%,40%,50%")[1:], "--json") == 0
    plan = json.loads(capsys.readouterr().out)[0]
    assert (plan["cells"], plan["prefills"], plan["finished"]) == (2 * 2 * 8, 4, len(rows))


def test_same_request_same_rows(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert call(*small(tmp_path / folder, "--methods", "full,h2o,ada_snapkv", "--budgets", "16")) == 0
    first, second = (sorted(read_rows(tmp_path / folder), key=lambda row: row.key.id) for folder in "ab")
    assert first == second


def test_shards_share_the_examples(tmp_path: Path) -> None:
    for number in (1, 2):
        assert call(*small(tmp_path, "--methods", "full", "--shard", f"{number}/2")) == 0
        assert {row.key.example for row in read_rows(tmp_path)} == set(range(number))


def test_cells_that_cannot_run_are_rows_with_a_reason(tmp_path: Path) -> None:
    assert call(*small(tmp_path, "--methods", "full,snapkv,streaming_llm", "--budgets", "6")) == 0
    skipped = [row for row in read_rows(tmp_path) if row.status == "skipped"]
    assert {row.key.method for row in skipped} == {"snapkv@1"}
    assert {row.reason for row in skipped} == {"6 entries a head cannot hold the 8 protected ones"}
    text = (tmp_path / "report" / "scores.md").read_text()
    assert "| snapkv | 6 | - | - | 0 (2 skipped) | - |" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--suite", "nonsense"), "no suite 'nonsense'; known: default, smollm2"),
        (("--model", "random:nonsense"), "no shape 'nonsense'; known: tiny-llama"),
        (("--model", "./no/such/folder"), "no such folder"),
        (("--model", "surely/not-there"), "neither a folder here nor reachable"),
        (("--methods", "snapkw"), "no method 'snapkw'; known: full, random"),
        (("--methods", "snapkv(kernel=4)"), "kernel 4 odd"),
        (("--methods", "snapkv(colour=4)"), "no setting 'colour'; it has: every, kernel, pooling, renumber, window"),
        (("--methods", "snapkv(pooling=maximum)"), "neither max nor mean"),
        (("--methods", "h2o(recent=-5)"), "recent -5 be 0 or more"),
        (("--methods", "full(version=3)"), "no setting 'version'"),
        (("--benchmarks", "recal"), "no benchmark 'recal'; known:"),
        (("--benchmarks", "recall(facts=60)"), "facts 60 must lie between 2 and 48"),
        (("--benchmarks", "recall(length=64)"), "do not fit into 64 tokens"),
        (("--benchmarks", "two_hop(links=0)"), "links"),
        (("--benchmarks", "recall_many(facts=2)"), "facts 2 must lie between 4 and 48"),
        (("--benchmarks", "random_tokens(vocabulary=0)"), "must be at least 1"),
        (("--benchmarks", "random_tokens(vocabulary=5000)"), "is not one of the 320 of model"),
        (("--budgets", "0"), "budget '0' must be above 0"),
        (("--budgets", "-5"), "budget '-5' must be above 0"),
        (("--budgets", "120%"), "over 100 %"),
        (("--budgets", "1.5"), "neither a whole number of entries (128) nor a share"),
        (("--budgets", "abc"), "budget 'abc' is neither"),
        (("--methods", "snapkv", "--budgets", "4"), "4 entries a head cannot hold the 8 protected ones"),
        (("--prompt", "question_before"), "no prompt protocol 'question_before'"),
        (("--limit", "0"), "--limit 0 must be at least 1"),
        (("--shard", "3/2"), "shard '3/2'"),
        (("--device", "cuda:77"), "device 'cuda:77' is not here"),
        (("--truncation", "1"), "--truncation 1 must be at least 2"),
        (("--methods", ""), "--methods is empty"),
        (("--budgets", " , "), "--budgets is empty"),
        (("--model", ""), "--model is empty"),
        (("--methods", "snapkv,h2o,snapkv"), "--methods names snapkv twice"),
        (("--budgets", "32,32"), "--budgets names 32 twice"),
        (("--seed", "-1"), "--seed -1 must not be negative"),
        (("--seed", "x"), "--seed 'x' must be whole numbers"),
        (("--temperature", "nan"), "--temperature nan must be at least 0"),
        (("--methods", "snapkv:nosuch"), "no allocator 'nosuch'; known: uniform, pyramid"),
        (("--methods", "full:pyramid"), "method 'full' has no allocator"),
        (("--judge-url", "http://127.0.0.1:1/v1"), "needs both --judge-url and --judge-model"),
    ],
)
def test_bad_requests_get_one_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*small(tmp_path)]
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        if option in command:
            command[command.index(option) + 1] = value
        else:
            command += [option, value]
    assert call(*command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not list((tmp_path / "rows").glob("*")) if (tmp_path / "rows").exists() else True


def test_an_out_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert call(*small(tmp_path / "file")) == 2
    assert "choose another folder with --out" in capsys.readouterr().err
    assert call("report", "--out", str(tmp_path)) == 2
    assert "run something first" in capsys.readouterr().err


def test_a_full_disk_stops_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, written = Store.write, []

    def full_after_five(self: Store, record) -> bool:
        if len(written) == 5:
            raise StoreError("cannot write: No space left on device; rows written before are safe")
        written.append(record)
        return plain(self, record)

    monkeypatch.setattr(Store, "write", full_after_five)
    assert call(*small(tmp_path)) == 2
    assert "rows written before are safe" in capsys.readouterr().err.strip().splitlines()[-1]
    assert len(read_rows(tmp_path)) == 5


def test_a_failing_method_is_a_row_and_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, layer):
        raise ValueError("scores went wrong")

    monkeypatch.setattr("methods.tova.LastQuery.score", broken)
    assert call(*small(tmp_path, "--methods", "full,tova,snapkv", "--budgets", "16")) == 1
    rows = read_rows(tmp_path)
    failed = [row for row in rows if row.status == "failed"]
    assert {row.key.method for row in failed} == {"tova@1"}
    assert failed[0].reason == "ValueError: scores went wrong"
    assert sum(row.status == "ok" for row in rows) == 8
    monkeypatch.undo()
    assert call(*small(tmp_path, "--methods", "full,tova,snapkv", "--budgets", "16")) == 0
    assert {row.status for row in read_rows(tmp_path)} == {"ok"}


def test_out_of_memory_is_tried_in_halves_and_then_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import harness.evaluation.sweep

    plain, sizes = harness.evaluation.sweep.compact, []

    def little_memory(prefill, selections, *rest):
        sizes.append(len(selections))
        entries = sum(len(row.kept) for chosen in selections for rows in chosen for row in rows if row.kept is not None)
        if entries > 16 * 16 * 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return plain(prefill, selections, *rest)

    monkeypatch.setattr(harness.evaluation.sweep, "compact", little_memory)
    arguments = ("--methods", "full,snapkv,tova,knorm", "--budgets", "10,16,60", "--prompt", "question_in", "--limit", "1")
    command = (*small(tmp_path)[:-4], *arguments, "--benchmarks", "random_tokens(length=100,max_new_tokens=4)")
    assert call(*command) == 1
    rows = read_rows(tmp_path)
    assert {row.key.budget for row in rows if row.status == "failed"} == {"60"}
    reason = next(row.reason for row in rows if row.status == "failed")
    assert reason.startswith("out of memory: 0.0 GiB more were wanted") and "enforce" not in reason
    assert sum(row.status == "ok" for row in rows) == 1 + 3 * 2
    assert max(sizes) == 9


def test_memory_errors_are_told_from_other_errors() -> None:
    with pytest.raises(OutOfMemory), memory_errors():
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), memory_errors():
        raise RuntimeError("something else")


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, written = Store.write, []

    def interrupted(self: Store, record) -> bool:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(record)
        return plain(self, record)

    for stop in (1, 2):
        monkeypatch.setattr(Store, "write", interrupted)
        assert call(*small(tmp_path)) == 130
        assert len(read_rows(tmp_path)) == 7 * stop
        written.clear()
    monkeypatch.undo()
    assert call(*small(tmp_path)) == 0
    assert len(read_rows(tmp_path)) == 2 * 2 * 17


def test_reports_and_help_need_no_torch(tmp_path: Path) -> None:
    assert call(*small(tmp_path, "--methods", "full")) == 0
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import run_all; "
    for arguments in (["report", "--out", str(tmp_path)],):
        command = [sys.executable, "-c", f"{blocked} sys.exit(run_all.main({arguments!r}))"]
        done = subprocess.run(command, cwd=Path(run_all.__file__).parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_reader_that_closes_the_pipe_sees_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        command = [sys.executable, "run_all.py", "list", "methods"]
        done = subprocess.run(command, cwd=Path(run_all.__file__).parent, stdout=closed, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1 and done.stderr == b""


def test_the_run_path_needs_neither_datasets_nor_lm_eval(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['lm_eval'] = None; import run_all; "
        f"sys.exit(run_all.main({[*small(tmp_path, '--methods', 'full,snapkv')]!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(run_all.__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["methods", "benchmarks", "suites", "models"])
def test_lists(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", what) == 0
    assert len(capsys.readouterr().out.splitlines()) > 0
    assert call("list", what, "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_choices() -> None:
    assert split("a, b(c=1,d=2),e") == ["a", "b(c=1,d=2)", "e"]
    name, method = choose("method", "ada_snapkv( window=4, floor=0.5 )", METHODS)
    assert name == "ada_snapkv(floor=0.5,window=4)"
    assert method.scorer.window == 4  # type: ignore[union-attr]
    assert method.allocator.floor == 0.5  # type: ignore[union-attr]
    assert choose("method", "snapkv", METHODS)[1] is METHODS["snapkv"]
    for text in ("snapkv(kernel)", "snapkv(kernel='x')", "snapkv(kernel=5", "()"):
        with pytest.raises(UnknownChoice):
            choose("method", text, METHODS)


def test_a_broken_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for text, weights in (("not json", b""), ('{"model_type": "llama"}', b"torn"), ('{"model_type": "nonsense"}', b"")):
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_bytes(weights)
        assert call(*small(tmp_path / "out", "--model", str(folder))) == 2
        lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("run_all.py")]
        assert len(lines) == 1
        assert "cannot be read" in lines[0]


def test_shards() -> None:
    assert Shard.parse("2/3") == Shard(2, 3)
    for text in ("0/2", "x", "1/", "-1/2", "2"):
        with pytest.raises(BadRequest):
            Shard.parse(text)


def test_a_suite_asks_some_benchmarks_for_other_numbers_of_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """As it says; what the request narrows has one number for all."""
    suite = SUITES["smollm2-short"]
    asked = RunRequest("smollm2-short", models=("random:tiny-llama",))

    def numbers(request: RunRequest) -> dict[str, int]:
        (grid,) = grids_of(request, BUILTIN).values()
        return {label.partition("(")[0]: len(grid.examples(task)) for label, task in grid.tasks.items()}

    expected = {"needle": 15, "ruler_single": 15, "ruler_multi_key": 15, "perplexity": 30, "manual_questions": 10}
    assert numbers(asked) == expected and set(suite.limits) < set(suite.benchmarks)
    assert numbers(replace(asked, limit=4)) == dict.fromkeys(expected, 4)
    assert numbers(replace(asked, benchmarks=suite.benchmarks[3:])) == {"perplexity": 15, "manual_questions": 15}
