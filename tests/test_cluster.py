"""A run on workers has the rows of a run in one process; and what a cluster, or a batch system, may do to it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crews import InlineCrew, process_workers, ray_workers
from helpers import call, small

from benchmarks.base import Example
from benchmarks.random_tokens import RandomTokens
from harness.cluster import crews, processes
from harness.cluster.crews import usual_workers
from harness.cluster.drive import Call, Driver
from harness.cluster.nodes import Node, check_same, describe
from harness.cluster.options import ProcessOptions, RayOptions
from harness.cluster.plugins import PluginFile, registry_here
from harness.cost import run as cost
from harness.cost.request import CostRequest, cells_asked
from harness.env import environment, environment_id
from harness.errors import BadRequest
from harness.evaluation.plan import Grid, Unit, grids_of, units
from harness.evaluation.prompts import Protocol
from harness.evaluation.request import RunRequest, Shard
from harness.evaluation.run import run_request
from harness.evaluation.spread import RunJob, RunLedger, carry_out, group_of
from harness.evaluation.unit import load, run_unit
from harness.papers import estimate
from harness.papers.estimate import ImportanceJob, estimate_importance
from harness.papers.importance import ImportanceRequest
from harness.registry import BUILTIN
from results import locks
from results.record import Record
from results.store import Store, read_rows

PLUGIN = """
from methods import METHODS as OURS
METHODS = {"mine": OURS["snapkv"]}
"""


def rows_of(out: Path) -> dict[str, Record]:
    """By key; where a row was made is no part of what it says."""
    return {row.key.id: replace(row, env="") for row in read_rows(out)}


def lines_of(out: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in (out / "rows").glob("**/*.jsonl"))


def request_of(out: Path, **more) -> RunRequest:
    benchmarks = ("random_tokens(length=48,max_new_tokens=4)", "random_tokens(length=64,max_new_tokens=3)")
    asked = {"methods": ("full", "snapkv", "h2o"), "budgets": ("12", "6"), "benchmarks": benchmarks, "limit": 3}
    return RunRequest("smoke", out=out, device="cpu", **(asked | more))


def on_inline_workers(request: RunRequest, crew: InlineCrew | None = None) -> int:
    ledger = RunLedger(request, grids_of(request, BUILTIN), Store(request.out), 2)
    return carry_out(ledger, crew or InlineCrew(RunJob(request))).failed


def test_units_by_name_give_the_rows_of_one_process(tmp_path: Path) -> None:
    """Two models, skipped cells, a resumed run; and a worker that dies of its second unit."""
    models = ("random:tiny-llama", "random:tiny-llama+gqa-2")
    one, two, resumed = (request_of(tmp_path / name, models=models) for name in ("one", "two", "resumed"))
    run_request(one, BUILTIN)
    expected = rows_of(one.out)
    assert {row.status for row in expected.values()} == {"ok", "skipped"}
    seen: list[int] = []

    def dies(worker: int, start: int, asked: object) -> str:
        seen.append(worker)
        return "killed" if len(seen) == 5 else ""

    assert on_inline_workers(two, InlineCrew(RunJob(two), dies=dies)) == 0
    assert rows_of(two.out) == expected and lines_of(two.out) == len(expected)
    run_request(replace(resumed, methods=("full", "h2o")), BUILTIN)
    before = len(read_rows(resumed.out))
    crew = InlineCrew(RunJob(resumed))
    assert on_inline_workers(resumed, crew) == 0
    plain = [{key: replace(row, fidelity={}) for key, row in rows.items()} for rows in (rows_of(resumed.out), expected)]
    assert plain[0] == plain[1] and lines_of(resumed.out) == len(expected)  # fidelity is rounded as neighbours of a batch have it
    times = [json.loads(line) for line in (resumed.out / "units.jsonl").read_text().splitlines()]
    assert sum(line.get("cells", 0) for line in times) == len(expected) - before > 0, "finished cells of a unit were run again"
    before = len(crew.log)
    assert on_inline_workers(resumed, crew) == 0
    assert [asked.what for _, asked in crew.log[before:]] == ["list", "list"], "finished units were sent out again"


def test_a_unit_that_kills_its_workers_is_failed_rows_with_the_reason(tmp_path: Path) -> None:
    request = request_of(tmp_path, benchmarks=("random_tokens(length=48,max_new_tokens=4)",), prompts=("question_in",))

    def dies(worker: int, start: int, asked: object) -> str:
        unit = getattr(asked, "unit", None)
        return "its worker's process ended" if unit is not None and unit.index == 1 else ""

    assert on_inline_workers(request, InlineCrew(RunJob(request), dies=dies)) == 5
    by_status = {status: {row.key.example for row in read_rows(tmp_path) if row.status == status} for status in ("ok", "failed")}
    assert by_status["failed"] == {1} and 0 in by_status["ok"]
    failed = [row for row in read_rows(tmp_path) if row.status == "failed"]
    assert {row.reason for row in failed} == {"tried 3 times: its worker's process ended"}
    assert on_inline_workers(request) == 0, "the same command tries it again"
    assert {row.status for row in read_rows(tmp_path)} <= {"ok", "skipped"}


def test_run_unit_needs_nothing_but_a_request_and_a_unit(tmp_path: Path) -> None:
    request = request_of(tmp_path, benchmarks=("random_tokens(length=48,max_new_tokens=4)",), limit=1)
    ready = load(request, grids_of(request, BUILTIN)["random:tiny-llama"])
    unit = next(units(ready.model, ready.grid))
    assert list(run_unit(request, unit)) == list(run_unit(request, unit, ready))


def test_questions_on_one_document_are_one_group() -> None:
    """Where the context is nearly all of the prompt; a template that all prompts begin with is none."""

    def group(prompt: str, context: str, index: int) -> str:
        example = Example(index, context + prompt, len(context), ("",), 4)
        return group_of(Unit("loogle", RandomTokens(), example, Protocol(), 0, 100, {}))

    texts = ["one " + "word " * 100, "two " + "word " * 100]
    found = [group(question, text, index) for index, text in enumerate(texts) for question in ("Who?", "Why?")]
    assert found[0] == found[1] != found[2] == found[3]
    assert group("A long question of its own", "Read: ", 0) != group("A long question of its own", "Read: ", 1)


def test_head_scores_are_the_same_from_workers_that_die(tmp_path: Path) -> None:
    asked = {"kind": "r", "attempts": 4, "lengths": 2, "depths": 2, "max_length": 256, "teacher_forced": True, "device": "cpu"}
    alone, spread = (ImportanceRequest("reference", out=tmp_path / f"{name}.json", **asked) for name in ("alone", "spread"))
    estimate_importance(alone, BUILTIN)
    died: list[int] = []

    def dies(worker: int, start: int, asked: object) -> str:
        died.append(worker)
        return "killed" if len(died) == 4 else ""

    estimate.carry_out(spread, InlineCrew(ImportanceJob(spread), dies=dies))
    assert spread.path.read_bytes() == alone.path.read_bytes() and not list(tmp_path.glob("*.attempts.jsonl"))


def test_cost_cells_of_a_cluster_are_measured_by_one_worker_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "run_cell", lambda cell: {"status": "ok", "reason": None, "asked": cell.method})
    request = CostRequest("cost-small", methods=("full", "h2o"), budgets=("64",), contexts=(64,), rounds=2, out=tmp_path)
    for again in (False, True):
        ledger, crew = cost.CostLedger(request), InlineCrew(cost.CostJob(request), 1)
        Driver(["cost"], ledger, crew).run()
        measured = [asked for _, asked in crew.log if asked.what == "run"]
        assert bool(measured) != again and ledger.failed == 0
    here = cells_asked(request, BUILTIN, environment_id(environment(torch.device("cpu"))))
    rows = [json.loads(line) for line in (tmp_path / "cost" / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(here), "in the suite's order, with the ids of one process"


@pytest.fixture
def ray_here() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    pytest.importorskip("harness.cluster.ray_crew")  # its settings come before Ray is started
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    settings = {"include_dashboard": False, "object_store_memory": 80_000_000, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, **settings)
    yield
    ray.shutdown()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_two_workers_of_ray_one_of_them_killed_give_the_rows_of_one_process(
    ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the embedded model, with a method of a plugin; a worker is killed as soon as the first rows are there."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    asked = ["--plugin", str(tmp_path / "mine.py"), "--model", "reference", "--methods", "full,mine,h2o", "--budgets", "16,25%"]
    asked += ["--benchmarks", "recall(length=256),recall_many(length=256)", "--limit", "8", "--device", "cpu"]
    assert call("run", "--suite", "smoke", *asked, "--out", str(tmp_path / "one")) == 0
    expected = rows_of(tmp_path / "one")
    killed = []

    def kill() -> None:
        while not list((tmp_path / "two" / "rows").glob("*.jsonl")):
            time.sleep(0.01)
        killed.extend(ray_workers(os.getpid())[:1])
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert call("run", "--suite", "smoke", *asked, "--out", str(tmp_path / "two"), "--ray", "local", "--workers", "2") == 0
    assert killed
    assert rows_of(tmp_path / "two") == expected and lines_of(tmp_path / "two") == len(expected)
    assert any("+" in row.key.method for row in expected.values()), "no method of the plugin"
    assert call("run", "--suite", "smoke", *asked, "--out", str(tmp_path / "x"), "--ray", "local", "--workers", "3") == 2
    assert "--workers 3 is more than 2 cores" in capsys.readouterr().err


def test_two_processes_one_of_them_killed_give_the_rows_of_one(tmp_path: Path) -> None:
    """Without Ray. The unit of the one that was killed is tried again by another. Plugins travel."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    plugins = (tmp_path / "mine.py",)
    registry = registry_here([PluginFile.read(path) for path in plugins])
    asked = {"models": ("reference",), "methods": ("full", "mine"), "budgets": ("16",), "limit": 6, "plugins": plugins}
    asked["benchmarks"] = ("recall(length=256)", "recall_many(length=256)")
    run_request(request_of(tmp_path / "one", **asked), registry)
    expected = rows_of(tmp_path / "one")
    two = request_of(tmp_path / "two", cluster=ProcessOptions(2), **asked)
    killed = []

    def kill() -> None:
        while not list((two.out / "rows").glob("*.jsonl")):
            time.sleep(0.01)
        killed.extend(process_workers(os.getpid())[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert run_request(two, registry).failed == 0
    thread.join()
    assert killed and not process_workers(os.getpid())
    assert rows_of(two.out) == expected and lines_of(two.out) == len(expected)


def test_how_a_workers_process_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # in which a package of the suite's name lies, and breaks
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "__init__.py").write_text("raise RuntimeError('out of luck')")
    monkeypatch.chdir(tmp_path)
    crew = processes.ProcessCrew(RunJob(request_of(tmp_path)), ProcessOptions(1))
    crew.start(0, 1)
    crew.ask(0, Call("list", "reference"))
    event = crew.next(60.0)
    assert event is not None and event.died == "its worker's process ended: RuntimeError: out of luck"
    crew.start(0, 2)
    crew.stop()
    assert crew.next(0) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--workers", "0"), "--workers 0 must be at least 1"),
        (("--workers", "999"), "--workers 999 is more than the"),
        (("--workers", "2", "--device", "cuda"), "--workers 2 without --ray works on the CPU: add --ray local for GPUs"),
        (("--gpus-per-worker", "1"), "--gpus-per-worker is for workers of Ray: add --ray local"),
        (("--ray", "local", "--shard", "1/2"), "--ray gives every worker its share of the examples itself: leave --shard out"),
        (("--ray", "ray://host:10001"), "Ray's client is not used"),
        (("--ray", "local", "--workers", "0"), "--workers 0 must be at least 1"),
        (("--ray", "nonsense"), "--ray nonsense is neither local, auto, nor the host:port"),
        (("--ray", "127.0.0.1:9"), "--ray 127.0.0.1:9: no cluster answers there (Connection refused)"),
    ],
)
def test_bad_requests(options: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*small(tmp_path, *options)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line.replace("[Errno 111] ", "")


def test_a_suite_of_small_models_gets_a_process_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "cores_here", lambda: 8)
    monkeypatch.setattr(crews, "available_bytes", lambda: 10 * 2**30)
    assert usual_workers(3 * 2**30, "cpu") == ProcessOptions(3)
    assert usual_workers(2**30, "cpu") == ProcessOptions(8)
    assert usual_workers(2**30, "cuda") is None and usual_workers(8 * 2**30, "cpu") is None


def test_an_address_that_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = pytest.importorskip("harness.cluster.ray_crew")
    monkeypatch.setattr(crew, "ANSWER_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BadRequest, match=f"--ray {address}: no cluster answers there"), crew.connected(RayOptions(address)):
            pass


def test_without_ray_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "harness.cluster.ray_crew", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call(*small(tmp_path, "--ray", "local")) == 2
    assert "--ray needs Ray, which is not installed: pip install '.[cluster]'" in capsys.readouterr().err


def test_nodes_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    ours = describe([str(tmp_path / "data")])
    assert set(ours.versions) == {"Python", "torch", "transformers", "the suite"} and not ours.lacks
    check_same("10.0.0.2", ours, ours)
    for theirs, says in (
        (Node({**ours.versions, "torch": "1.0"}), f"node 10.0.0.2 has torch 1.0, this one {ours.versions['torch']}"),
        (Node({**ours.versions, "the suite": "00"}), "node 10.0.0.2 has the suite 00"),
        (Node({**ours.versions, "Python": "3.9.1"}), "node 10.0.0.2 has Python 3.9.1"),
        (Node(ours.versions, {"theirs": "12"}), "node 10.0.0.2 has plugin theirs 12, this one none"),
        (Node(ours.versions, {}, ("data",)), "node 10.0.0.2 lacks data: put it there"),
    ):
        with pytest.raises(BadRequest, match=says):
            check_same("10.0.0.2", theirs, ours)


def test_a_plugin_reaches_nodes_that_do_not_have_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    sent, here = PluginFile.read(path), registry_here([PluginFile.read(path)])
    path.write_text("METHODS = {}")
    there = registry_here([sent])
    path.unlink()
    for registry in (there, registry_here([sent])):
        assert registry.mark("METHODS", "mine") == here.mark("METHODS", "mine") != ""


def test_shards_divide_the_examples_that_are_asked_for() -> None:
    """Of 40 examples the held-out ones are 0 to 2 and 20 to 22: a stride of four over all of them left a shard empty."""
    task = RandomTokens(length=40)
    grid = Grid({"t": task}, {}, (), (Protocol(),), 40, (0,), part="held_out")
    shares = [replace(grid, shard=Shard(number, 4)).examples(task) for number in (1, 2, 3, 4)]
    assert sorted(number for share in shares for number in share) == grid.examples(task) == [0, 1, 2, 20, 21, 22]
    assert [len(share) for share in shares] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("", Shard()),
        ("0 4 0 1", Shard(1, 4)),
        ("4 4 1 1", Shard(4, 4)),
        ("7 3 3 2", Shard(3, 3)),
        ("5 1 5 1", Shard()),
        ("6 3 3 2", None),  # of 3, 5, 7 none
        ("90 3 1 1", None),  # of a list such as 1,7,90
    ],
)
def test_the_shard_of_a_slurm_array(task: str, expected: Shard | None) -> None:
    names = ("ID", "COUNT", "MIN", "STEP")
    environment = {f"SLURM_ARRAY_TASK_{name}": text for name, text in zip(names, task.split(), strict=False)}
    if expected is None:
        with pytest.raises(BadRequest, match="say --shard i/3"):
            Shard.of_array(environment)
    else:
        assert Shard.of_array(environment) == expected


def test_a_slurm_array_shares_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"COUNT": 2, "MIN": 3, "STEP": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for task in (3, 4):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert call(*small(tmp_path, "--methods", "full")) == 0
        assert {row.key.example for row in read_rows(tmp_path)} == set(range(task - 2))
    assert "shard 2/2, as the task of a Slurm array" in capsys.readouterr().err
    assert call(*small(tmp_path, "--ray", "local")) == 2
    assert "--ray in a Slurm array" in capsys.readouterr().err


def test_without_locks_every_process_has_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two of them both did counts once; a run with locks finds all of it finished."""
    request = request_of(tmp_path, benchmarks=("random_tokens(length=48,max_new_tokens=4)",))

    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", no_locks)
        locks.can_lock.cache_clear()
        first, second = Store(tmp_path), Store(tmp_path)
        run_request(replace(request, limit=2), BUILTIN)
        row = read_rows(tmp_path)[0]
        assert first.write(row) and second.write(row), "neither reads what the other wrote since"
    locks.can_lock.cache_clear()
    folders = [path for path in (tmp_path / "rows").iterdir() if path.is_dir()]
    assert len(folders) == 3 and not list((tmp_path / "rows").glob("*.jsonl"))
    ran = run_request(request, BUILTIN)
    assert len(read_rows(tmp_path)) == len(ran.keys) and ran.failed == 0
    assert lines_of(tmp_path) == len(ran.keys) + 2
    assert not Store(tmp_path).own and Store(tmp_path, own_rows=True).own
