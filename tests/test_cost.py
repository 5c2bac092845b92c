"""Cost cells: phases by a clock of our own, peaks by a meter of our own, one real cell, and what cannot be measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, call, network, read, tiny, tokens

import harness.cost.cell
from benchmarks import latency, memory
from harness.cache import Budget, Needs, keep_all
from harness.cost.cell import CacheSubject, CostCell, CpuMeter, measure_cell
from harness.cost.forks import forks
from harness.cost.request import ROOT, cells_of, identity, run_cell
from harness.cost.roofline import pairs_of, rooflines, weight_bytes
from harness.engine.model import Model
from harness.engine.rows import compact, compact_and_free
from harness.registry import BUILTIN
from harness.suites import COST_SUITES, SUITES
from methods import METHODS
from reports.cost import costs
from reports.cost_plots import cost_pictures
from reports.cost_tables import cost_sentences, cost_tables
from reports.style import Palette
from results.record import DECODES
from results.store import read_costs

CELL = CostCell("random:tiny-llama", "snapkv", "10%", 200, 1, 4, "float32", "cpu", 1)


class Clock:
    """Time passes only in the work."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class Subject:
    """Takes a known time for everything, ten times as long the first time; holds a known number of bytes."""

    def __init__(self, clock: Clock, meter: Meter) -> None:
        self.clock, self.meter, self.cold, self.steps, self.resets = clock, meter, 10, 0, 0
        self.within = {"observe": 0.5, "column sums": 1.5}

    @property
    def phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        return (("prefill", lambda: self._work(5.0, 100, 40)), ("score", lambda: self._work(0.25, 60, 40)))

    def _work(self, seconds: float, peak: int, held: int) -> None:
        self.clock.time += seconds * self.cold
        self.meter.touch(peak)
        self.meter.now = 1000 + held

    def step(self) -> None:
        self.steps += 1
        self.clock.time += self.cold * (3.0 if self.steps % 8 == 1 else 0.5 + self.steps / 100)
        self.meter.touch(45)

    def reset(self) -> None:
        self.cold, self.steps = 1, 0
        self.resets += 1


class Meter:
    def __init__(self) -> None:
        self.now, self.most = 1000, 1000

    def touch(self, more: int) -> None:
        self.most = max(self.most, 1000 + more)

    def held(self) -> int:
        return self.now

    def forget_peak(self) -> None:
        self.most = self.now

    def peak(self) -> int:
        return self.most


def test_phases_and_tokens_are_timed_apart_and_warm() -> None:
    clock = Clock()
    subject = Subject(clock, Meter())
    found = latency.measure(subject, clock, 6)
    assert found.phases == pytest.approx({"prefill": 3.0, "score": 0.25, "observe": 0.5, "column sums": 1.5})
    assert found.first_token == pytest.approx(3.0) and found.tokens == pytest.approx([0.52, 0.53, 0.54, 0.55, 0.56])
    assert (found.median, found.p10, found.p90) == pytest.approx((0.54, 0.524, 0.556)) and subject.resets == 2


def test_peaks_of_prefill_and_decoding_are_apart() -> None:
    clock, meter = Clock(), Meter()
    found = memory.measure(Subject(clock, meter), meter, 3)
    assert found == memory.Memory(resident=1000, prefill_peak=100, decode_peak=45, held=40)


def test_the_meter_of_a_cpu_sees_what_is_allocated_and_freed() -> None:
    meter = CpuMeter()
    before = meter.held()
    meter.forget_peak()
    block: torch.Tensor | None = torch.ones(2**24)
    assert meter.held() - before > 0.9 * 2**26
    del block
    assert meter.held() - before < 0.2 * 2**26 and meter.peak() - before > 0.9 * 2**26
    meter.forget_peak()
    assert meter.peak() - before < 0.2 * 2**26


@pytest.mark.parametrize("name", ["full", "ada_snapkv"])
def test_a_cell_decodes_what_the_sweep_decodes(name: str, family: str) -> None:
    model, ids = tiny(family), tokens(60)
    method, budget = METHODS[name], None if name == "full" else Budget.parse("12")
    subject = CacheSubject(model, method, budget, ids, 3, 8)
    for _, work in subject.phases:
        work()
    assert subject.prefill is None and set(subject.within) == {"observe", "column sums"}
    said = []
    for _ in range(5):
        assert subject.next is not None
        said.append(subject.next[:, 0].tolist())
        subject.step()
    prefill = model.prefill(ids, Needs(8, column_sums=True))[0]
    subject = CacheSubject(model, method, budget, ids, 1, 8, prefill=prefill)
    subject._score()
    subject._select()
    assert subject.selection is not None
    cache, wanted = compact(prefill, [subject.selection], 8), []
    token = prefill.logits.argmax().view(1, 1)
    for _ in range(5):
        wanted.append([int(token)] * 3)
        token = model.decode(cache, token)[:, -1].argmax(-1, keepdim=True)
    assert said == wanted, "every sequence of the batch has rows of its own, and says what one alone says"


def test_layers_are_freed_as_they_are_copied(family: str) -> None:
    prefill = read(family, tokens(40))
    held = list(prefill.layers)
    one = compact_and_free(held, prefill.expert_groups, prefill.shape, [keep_all(prefill)] * 2, 5)  # type: ignore[arg-type]
    assert held == [None] * len(prefill.layers)
    other = compact(prefill, [keep_all(prefill)] * 2, 5)
    assert [asdict(count) for count in one.counts()] == [asdict(count) for count in other.counts()]
    for a, b in zip(one.layers, other.layers, strict=True):
        assert all((getattr(a.table, column.name) == getattr(b.table, column.name)).all() for column in fields(a.table))
        for row in range(len(a.table)):
            where = slice(a.table.start[row], a.table.start[row] + a.table.length[row])
            assert torch.equal(a.keys[where], b.keys[where]) and torch.equal(a.positions[where], b.positions[where])


def test_rooflines_by_hand() -> None:
    assert pairs_of(4, None) == 10 and pairs_of(4, 9) == 10 and pairs_of(5, 2) == 1 + 2 * 4
    net = network("llama")
    model = Model(net, None, "tiny", "0")
    every = sum(weight.numel() for weight in net.parameters()) * 4
    assert weight_bytes(model) == every - net.get_input_embeddings().weight.numel() * 4
    found = rooflines({"weights": 4000, "bytes_kept": 1000}, {"bandwidth": 100.0, "flops": 10.0}, model, context=10, batch=2)
    head = net.get_output_embeddings().weight.numel()
    products = 2 * ((1000 - head) * 10 + head) + 4 * 3 * 55 * 4 * 16
    assert found == pytest.approx({"token_floor": 50.0, "prefill_floor": 2 * products / 10})


def test_one_real_cell() -> None:
    lap = measure_cell(CELL)
    assert lap["status"] == "ok" and lap["token"] > 0 and lap["p10"] <= lap["token"] <= lap["p90"]
    assert set(lap["phases"]) == {"prefill", "observe", "column sums", "score", "select", "compact"}
    assert lap["bytes_kept"] == int(0.1 * lap["bytes_full"]) // 128 * 128, "counted right after compaction"
    peaks = measure_cell(replace(CELL, what="memory", batch=2))
    assert peaks["status"] == "ok" and peaks["bytes_kept"] == 2 * lap["bytes_kept"]
    read = [[tokens, peaks["bytes_full"] // 2 * tokens // 200] for tokens in range(0, 201, 25)]  # one sequence after the other
    assert peaks["footprint"] == [*read, [200, peaks["bytes_kept"]], [204, peaks["bytes_end"]]]
    assert peaks["bytes_end"] - peaks["bytes_kept"] == 2 * 4 * peaks["bytes_full"] // 400, "a token of each sequence a step"
    assert "over the model's 8192 positions" in measure_cell(replace(CELL, context=9000))["reason"]
    assert "cannot hold" in measure_cell(replace(CELL, budget="1"))["reason"]
    assert "head scores" in measure_cell(replace(CELL, method="headkv_r2"))["reason"]


def test_a_process_that_dies_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_cell(replace(CELL, model="random:absent"))
    assert found["status"] == "failed" and "no shape 'absent'" in found["reason"]
    monkeypatch.setattr("harness.cost.request.sys.executable", "/bin/false")
    assert run_cell(CELL) == {"status": "failed", "reason": "its process ended with code 1"}


FORKED = """
import os, sys, time
def main(arguments):
    asked = arguments[0].strip()
    if asked == "die": os.kill(os.getpid(), 9)
    if asked == "hang": time.sleep(600)
    if asked == "raise": raise MemoryError("no room")
    print(asked, os.getpid(), flush=True)
    return 0
from harness.cost import forks
sys.exit(forks.serve(main))
"""


def test_forks_are_processes_of_their_own() -> None:
    """Each cell's exit code, output and last words are its own; one that dies or hangs takes no other with it."""
    with forks([sys.executable, "-c", FORKED], os.environ | {"PYTHONPATH": str(ROOT)}, 60.0) as imported:
        first, second = imported.measure("one"), imported.measure("two")
        assert (first.returncode, second.returncode) == (0, 0)
        assert first.stdout.split()[0] == "one" and second.stdout.split()[0] == "two"
        assert first.stdout.split()[1] != second.stdout.split()[1]
        assert imported.measure("die").returncode == -9
        broken = imported.measure("raise")
        assert broken.returncode == 1 and broken.stderr.splitlines()[-1] == "MemoryError: no room"
        imported._patience = 0.5
        with pytest.raises(subprocess.TimeoutExpired):
            imported.measure("hang")
        imported._patience = 60.0
        assert imported.measure("after").stdout.startswith("after")
        process = imported._process
    assert process is not None and process.poll() is not None


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_the_largest_batch_that_fits_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes first; where that is too many, a tenth fewer at a time."""
    monkeypatch.setattr(harness.cost.cell, "free_bytes", lambda _: 3_000_000)
    cell = CostCell("random:tiny-llama", method, "25%" if method == "snapkv" else "", 200, 0, 4, "float32", "cpu", 1)
    found = measure_cell(cell)
    each = found["bytes_allocated"] / found["batch"] + 12 * 320
    prefill = 2 * found["bytes_full"] / found["batch"]
    assert found["batch"] == int((3_000_000 - prefill) // each) > 1
    plain, tried = harness.cost.cell._rows_of, []

    def too_large(cell: CostCell, subject: CacheSubject, device: torch.device) -> dict[str, Any]:
        tried.append(cell.batch)
        if cell.batch > 3:
            raise MemoryError
        return plain(cell, subject, device)

    monkeypatch.setattr(harness.cost.cell, "_rows_of", too_large)
    assert measure_cell(cell)["batch"] <= 3
    assert tried == sorted(tried, reverse=True) and tried[0] == found["batch"]
    row = {"env": "e" * 12, "cell": asdict(cell), **found}
    assert costs([row])[0].batch == found["batch"]
    texts = [shown.text for table in cost_tables(costs([row]), [row]) for line in table.rows for shown in line]
    assert f"{found['batch']} (largest)" in texts


def test_a_cost_suite_is_planned_and_refused_where_it_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--suite", "cost-small", "--out", str(tmp_path)) == 0
    assert "32 cells to run (8 of memory, 24 of latency)" in capsys.readouterr().out
    assert call("plan", "--suite", "cost-default", "--json", "--out", str(tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["finished"] == 0 and not list(tmp_path.iterdir()), "a plan writes nothing"
    assert call("beta", "--suite", "cost-small", "--out", str(tmp_path)) == 2
    assert "measures cost" in capsys.readouterr().err
    for name in ("sweep", "attention", "kernel"):
        assert call("run", "--suite", f"{name}-speed", "--out", str(tmp_path)) == 2
        assert f"run_all.py bench {name}" in capsys.readouterr().err
    assert call("bench", "kernel", "--device", "cpu") == 2
    assert "measures a GPU, and there is none here" in capsys.readouterr().err


def test_a_cost_suite_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("run", "--suite", "cost-default", "--model", "random:tiny-llama", "--methods", "full,snapkv", "--contexts", "128")
    asked += ("--rounds", "1", "--max-new-tokens", "3", "--out", str(tmp_path))
    assert call(*asked) == 0
    rows = read_costs(tmp_path)
    assert sorted((row["cell"]["what"], row["cell"]["method"], row["cell"]["round"]) for row in rows) == [
        ("latency", "full", 0),
        ("latency", "snapkv", 0),
        ("memory", "full", 0),
        ("memory", "snapkv", 0),
    ]
    before = (tmp_path / "cost" / "rows.jsonl").read_bytes()
    assert call(*asked) == 0 and (tmp_path / "cost" / "rows.jsonl").read_bytes() == before, "a finished cell ran again"
    text = (tmp_path / "report" / "scores.md").read_text()
    assert "## Latency, random:tiny-llama, float32, cpu, " in text and "## Memory, random:tiny-llama" in text
    assert list((tmp_path / "report" / "plots").glob("cost_*.png")) and list((tmp_path / "report" / "plots").glob("footprint_*"))
    for wrong, said in (
        (("--contexts", "x"), "--contexts 'x' must be whole numbers"),
        (("--methods", "nosuch"), "no method 'nosuch'"),
        (("--budgets", "200%"), "over 100 %"),
        (("--rounds", "0"), "--rounds 0 must be at least 1"),
        (("--decode", "eager,fast"), "--decode 'fast' must be some of eager, graph, compiled"),
        (("--model", "random:nosuch"), "no shape 'nosuch'"),
    ):
        assert call("run", "--suite", "cost-default", *wrong, "--out", str(tmp_path / "wrong")) == 2
        assert said in capsys.readouterr().err


def test_memory_is_watched_once_whatever_the_ways_of_decoding() -> None:
    cells = list(cells_of(replace(COST_SUITES["cost-small"], decodes=DECODES, rounds=1), BUILTIN, "float32", "cpu"))
    assert [cell.decode for cell in cells if cell.what == "memory"] == ["eager"] * 8
    assert [cell.decode for cell in cells if cell.what == "latency"] == list(DECODES) * 8
    assert len({identity(cell, "e") for cell in cells}) == 8 * (1 + 3)


def test_every_round_runs_every_cell_once() -> None:
    cells = list(cells_of(COST_SUITES["cost-small"], BUILTIN, "float32", "cpu"))
    assert len(cells) == len({identity(cell, "e") for cell in cells}) == 8 * (1 + 3)
    assert [cell.what for cell in cells[:8]] == ["memory"] * 8 and [cell.round for cell in cells[8:]] == [0] * 8 + [1] * 8 + [
        2
    ] * 8
    assert not set(COST_SUITES) & set(SUITES)


LAP = {"phases": {"prefill": 1.0}, "first_token": 1.0, "p10": 1.0, "p90": 1.0, "token_floor": 0.005, "prefill_floor": 0.5}
LAP |= {"bandwidth": 1e9, "flops": 1e9, "bytes_kept": 2**21, "status": "ok", "reason": None, "env": "e"}


def timed(token: float, number: int = 0, **cell: Any) -> dict[str, Any]:
    """A row of latency; `token` in seconds."""
    return {"id": f"{token}", "cell": asdict(replace(CELL, round=number, **cell)), **LAP, "token": token}


def test_rounds_of_another_environment_or_length_are_no_rounds_of_this() -> None:
    rows = [timed(1.0), timed(1.0, 1), timed(9.0) | {"env": "other"}, timed(9.0, threads=16), timed(9.0, new_tokens=99)]
    rows.append(timed(9.0) | {"sources": ["another text"]})
    assert sorted(cost.token_ms for cost in costs(rows) if cost.token_ms) == [1000, 9000, 9000, 9000, 9000]


def test_faster_means_faster_in_every_round() -> None:
    full = {"method": "full", "budget": ""}
    rows = [timed(seconds, number, **full) for number, seconds in enumerate((0.010, 0.012, 0.020))]
    rows += [timed(seconds, number) for number, seconds in enumerate((0.004, 0.009, 0.005))]
    rows += [timed(seconds, number, method="h2o") for number, seconds in enumerate((0.004, 0.011, 0.004))]
    rows += [timed(0.003, number, model="random:tiny-llama+gqa-2", **full) for number in range(3)]
    rows += [timed(0.001, context=100), timed(0.001, batch=8)]
    rows += [timed(0.004, decode="compiled", **full), timed(0.003, decode="compiled")]
    rows += [timed(0.001, decode="graph", **full) | {"fell_back": "looks at a number"}]
    ((title, (eager, compiled)),) = cost_sentences(costs(rows))
    assert title.startswith("random:tiny-llama, float32, cpu, 1 threads") and title.endswith("200 tokens")
    first, second = eager.split("Faster in some rounds at most: ")
    assert (
        "full takes 12.00 ms a token with 2.0 MiB kept, 2.4 times its floor. Faster in every round: full on gqa-2 (3.00 ms"
        in first
    )
    assert "snapkv 10% (5.00 ms" in first and "h2o" not in first and second.startswith("h2o 10% (4.00 ms")
    assert compiled.startswith("decode compiled: full takes 4.00") and "says nothing of the spread: snapkv 10% (3.00" in compiled
    assert cost_sentences(costs(rows[3:5])) == [], "nothing to compare with"


def test_ways_of_decoding_are_told_apart(tmp_path: Path) -> None:
    rows = [timed(0.010), timed(0.008, decode="compiled"), timed(0.009, decode="graph") | {"fell_back": "looks at a number"}]
    old = timed(0.010, 1)
    del old["cell"]["decode"]  # as rows were before there was a choice
    found = costs([*rows, old])
    assert [(cost.decode, len(cost.laps)) for cost in found] == [("eager", 2), ("graph", 1), ("compiled", 1)]
    (table,) = cost_tables(found, rows)
    assert [row[table.header.index("decode")].text for row in table.rows] == ["eager", "eager, not graph", "compiled"]
    assert any("graph fell back to eager: looks at a number" in note for note in table.notes)
    (plain,) = cost_tables(costs([timed(0.010)]), rows[:1])
    assert "decode" not in plain.header and "capture" not in plain.header, "where nothing else was measured"
    assert len(cost_pictures(found, tmp_path, Palette())) == 2, "eager times are not drawn as a graph's"


def test_tables_say_what_was_not_measured() -> None:
    row = {"id": "1", "cell": asdict(CELL), "env": "e", "status": "failed", "reason": "out of memory: 3 GiB"}
    (table,) = cost_tables(costs([row]), [row])
    assert table.rows[0][-1].text == "out of memory: 3 GiB"
    assert json.dumps(row) and FAMILIES
