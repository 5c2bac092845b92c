"""The papers' numbers as data, and their tables beside ours."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DATA, FAMILIES, call, head_scores, network
from test_report import KEY, _row
from transformers import AutoTokenizer

from benchmarks import BENCHMARKS
from harness.cache import ModelShape
from harness.cost.cell import CostCell
from harness.errors import BadRequest
from harness.models.load import REFERENCE
from harness.models.shapes import SHAPES
from harness.models.variants import bytes_a_token
from harness.papers.needs import FLOPS, needs
from harness.papers.tables import HUB, TABLES, asked_for, paper, paper_models, rows_of, table_of
from harness.registry import choose
from methods import METHODS
from methods.headkv import HeadScores
from reports.paper import paper_table, side_by_side
from reports.paper_figure import paper_figure
from reports.paper_points import Drawing, PaperPoint, PaperRow, Setting, Side
from reports.statistics import Estimate
from reports.tables import lines
from results.store import read_costs, read_rows

PAPERS = ("headkv", "mixsga")
RESTATED = DATA.parent / "papers"
DOES_NOT_RECOMPUTE = {("mixsga", "table6", "random router", "mean"): 17.6075}  # printed as 17.68


def test_every_printed_mean_recomputes_but_those_that_are_listed() -> None:
    wrong = {}
    for name in PAPERS:
        for number, table in paper(name)["tables"].items():
            for row in table["rows"]:
                for mean, columns in table["averages"].items():
                    tasks = [c for c in row["values"] if c not in table["averages"]] if columns == "all" else columns
                    found = sum(row["values"][column] for column in tasks) / len(tasks)
                    if abs(found - row["values"][mean]) > 0.0101:
                        wrong[name, number, row["method"], mean] = pytest.approx(found)
    assert wrong == DOES_NOT_RECOMPUTE


def test_tables_that_share_cells_agree() -> None:
    tables = paper("headkv")["tables"]
    for row in tables["table3"]["rows"]:
        cells = [r for r in tables["figure13"]["rows"] if (r["model"], r["method"]) == (row["model"], row["method"])]
        assert len(cells) == 5
        for length, value in row["values"].items():
            if length != "mean":
                assert sum(cell["values"][length] for cell in cells) / 5 == pytest.approx(value)
    whole = {(r["model"], r["method"], r["budget"]): r["values"] for r in tables["table4"]["rows"]}
    assert len(whole) == 52
    for row in tables["table1"]["rows"]:
        assert whole[row["model"], row["method"], row["budget"]] == row["values"]
    for row in tables["table2"]["rows"]:
        if row["method"] != "HeadKV-ER":
            assert {k: whole[row["model"], row["method"], "128"][k] for k in row["values"]} == row["values"]


def test_cache_bytes_of_mixsgas_table_9_are_those_of_our_formula() -> None:
    for row in paper("mixsga")["tables"]["table9"]["rows"]:
        s = SHAPES[{"OPT-125m": "opt-125m", "Llama3.2-1B": "llama-3.2-1b", "Gemma2-2B": "gemma-2-2b"}[row["model"]]]
        heads, layers = s["num_attention_heads"], s["num_hidden_layers"]
        dim = s.get("head_dim") or s["hidden_size"] // heads
        shape = ModelShape(layers, heads, s.get("num_key_value_heads", heads), dim, (None,) * layers, 4)
        conversion = "gqa-2" if row["method"] == "GQA" else "mixsga-3:1:6"
        assert int(bytes_a_token(shape, conversion)) == row["values"]["cache bytes a token"]


@pytest.mark.data
def test_numbers_are_those_of_the_papers() -> None:
    for name in PAPERS:
        text = (RESTATED / f"{name}.md").read_text()
        printed = set(map(float, re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text.replace(",", ""))))
        for number, table in paper(name)["tables"].items():
            for row in table["rows"]:
                for column, value in row["values"].items():
                    if column not in ("parameters", "kFLOPs") and value is not None:
                        assert value in printed, (name, number, row, column)


def test_every_cell_of_a_table_has_something_of_ours_that_stands_for_it() -> None:
    for table in TABLES.values():
        for row in table.numbers["rows"]:
            for name in (name for column in row["values"] for name in table.benchmarks(row, column, False)):
                assert choose("benchmark", name, BENCHMARKS)[0] == name, "as rows will name it"
        for model in paper_models(table):
            assert model in HUB
            for row in rows_of(table, model):
                for fair in (False, True):
                    asked = asked_for(table, row, "reference", fair)
                    assert asked.train or asked.model == "reference"
                    if table.kind == "scores":
                        assert choose("method", asked.method, METHODS)[0] == asked.method, "as rows will name it"
    assert asked_for(table_of("mixsga:table3"), rows_of(table_of("mixsga:table3"), "Gemma2-2B")[0], "m", False).budget == "40%"


def test_what_was_not_measured_is_never_filled() -> None:
    table = table_of("headkv:table2")
    rows = rows_of(table, "Llama-3-8B-Instruct")
    asked = [asked_for(table, row, "m", False) for row in rows]
    paper_rows = [
        PaperRow(
            row["method"],
            Setting(budget="128"),
            row["values"],
            {c: table.benchmarks(row, c, False) for c in row["values"]},
            one.method,
            "",
        )
        for row, one in zip(rows, asked, strict=True)
    ]
    side = Side("headkv:table2", "", (), table.numbers["averages"], {}, ())
    found = paper_table(side.name, side_by_side(side, paper_rows, [()] * len(rows)))
    assert len(found.rows) == 3 * 7 and {row[4].text for row in found.rows} == {row[5].text for row in found.rows} == {"-"}
    assert found.rows[0][3].value == 23.49


def test_of_two_routings_the_papers_stands_beside_its_number() -> None:
    """It says of none that it was causal: what it gives is taken for expert choice."""
    key = replace(KEY, benchmark="perplexity_windows@1", model="reference+mixsga-3:1:6")
    rows = [_row(replace(key, routing=routing), nats, 0.5) for routing, nats in (("expert_choice", 2.0), ("argmax", 3.0))]
    row = PaperRow("mixSGA", Setting(), {"WT": 20.46}, {"WT": ("perplexity_windows",)}, "full", "")
    (point,) = side_by_side(Side("mixsga:table2", "", (), {}, {}, ("WT",)), [row], [lines(rows)])
    assert point.ours is not None and point.ours.mean == pytest.approx(math.exp(2.0))


def test_settings_are_told_as_the_papers_do() -> None:
    rows = {"50% (3:1:6)": {"size": "50%", "ratios": "3:1:6"}, "128, qa1": {"budget": "128", "task": "qa1"}, "-": {"budget": ""}}
    rows["0:1:0, H2O keeps 80%"] = {"ratios": "0:1:0", "h2o keeps": "80%"}
    assert {str(Setting.of(row)): row for row in rows.values()} == rows
    assert [Setting.of(row).amount for row in rows.values()] == [50.0, 128.0, None, None]


def test_a_figure_is_drawn_of_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Estimate(2.0, 1.5, 2.5, 4)
    lengths = {"1 token": 1.0, "512 tokens": 512.0}
    points = [PaperPoint(m, Setting(budget="128"), c, None, ours) for m in ("SnapKV", "FullKV") for c in (*lengths, "peak GB")]
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    drawing = Drawing("seconds", "tokens", lengths, apart=("peak GB",))
    assert paper_figure(points, drawing, "", tmp_path / "a.png")
    times, peaks = figures[0].axes
    assert [line.get_xdata().tolist() for line in times.lines] == [[1, 512]] * 2 and times.get_ylabel() == "seconds"
    assert [text.get_text() for text in times.get_xticklabels()] == ["1", "512"] and times.get_xlabel() == "tokens"
    assert [text.get_text() for text in peaks.get_xticklabels()] == ["SnapKV", "FullKV"], "another unit stands apart"
    sizes = [PaperPoint("mixSGA", Setting(size=size), "perplexity", 10.0, None) for size in ("50%", "25%")]
    assert paper_figure(sizes, Drawing("perplexity"), "", tmp_path / "b.png")
    assert [line.get_xdata().tolist() for line in figures[1].axes[0].lines] == [[25, 50]]
    assert not paper_figure([PaperPoint("a", Setting(), "b", None, None)], drawing, "", tmp_path / "c.png")


@pytest.mark.data
def test_a_table_of_headkv_on_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (
        "reproduce",
        "headkv:table3",
        "--model",
        "reference",
        "--limit",
        "1",
        "--data-dir",
        str(DATA),
        "--out",
        str(tmp_path),
    )
    assert call(*asked) == 0
    text = (tmp_path / "report" / "paper_headkv_table3.md").read_text()
    assert "the numbers are not comparable, the path is" in text and "A row a query head" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "| 1k |" in line]
    assert len(lines) == 6 and all(line[3] != "-" and line[4] != "-" and line[6] == "5" for line in lines), "five tasks each"
    mean = next(line.split(" | ") for line in text.splitlines() if line.startswith("| HeadKV-R2 | 128 | mean"))
    assert mean[4] == "-", "8k is not in the data folder: a mean with a hole is no mean"
    before = {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}
    assert call(*asked) == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "rows").iterdir()}, "a finished cell ran again"
    capsys.readouterr()


@pytest.mark.data
def test_a_table_of_mixsga_on_the_embedded_model(tmp_path: Path) -> None:
    asked = ("--model", "reference", "--limit", "1", "--data-dir", str(DATA), "--out", str(tmp_path))
    assert call("reproduce", "mixsga:table6", *asked) == 0
    text = (tmp_path / "report" / "paper_mixsga_table6.md").read_text()
    measured = [line for line in text.splitlines() if line.startswith("| mixSGA | 3:1:6 |")]
    assert len(measured) == 5 and not any(" | - | - | 0 |" in line for line in measured)
    missing = [line for line in text.splitlines() if line.startswith("| random router")]
    assert all(
        "run_all.py train --model reference --conversion mixsga --ratios 3:1:6 --ablation random" in line for line in missing
    )


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny random model with the embedded model's tokenizer, as a user's folder."""
    saved = FAMILIES[request.param]
    FAMILIES[request.param] = {**saved, "num_attention_heads": 8, "num_key_value_heads": 8 if request.param == "opt" else 4}
    words = AutoTokenizer.from_pretrained(REFERENCE)
    FAMILIES[request.param] |= {"vocab_size": len(words), "max_position_embeddings": 1024, "eos_token_id": words.eos_token_id}
    try:
        net = network(request.param)
    finally:
        FAMILIES[request.param] = saved
    net.generation_config.eos_token_id = list(range(0, len(words), 8))  # random answers end soon
    net.save_pretrained(tmp_path / request.param)
    words.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.data
@pytest.mark.parametrize("checkpoint", ["opt"], indirect=True)
def test_table_1_of_mixsga_from_base_weights_training_included(checkpoint: Path, tmp_path: Path) -> None:
    out, variants = tmp_path / "out", tmp_path / "variants"
    asked = ["reproduce", "mixsga:table1", "--model", str(checkpoint), "--limit", "1", "--data-dir", str(DATA), "--out", str(out)]
    asked += ["--variants", str(variants)]
    assert call(*asked) == 2, "nothing is trained unless asked for"
    some = (DATA / "instruct" / "dolly_eval.jsonl").read_text().splitlines()[:40]
    (tmp_path / "some.jsonl").write_text("\n".join(some))
    asked += ["--train", "--steps", "2", "--instruct", str(tmp_path / "some.jsonl")]
    assert call(*asked) == 0
    assert sorted(path.name.split("+")[1] for path in variants.iterdir()) == ["gqa-2", "mixsga-1-1-2", "mixsga-3-1-6"]
    text = (out / "report" / "paper_mixsga_table1.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| GQA", "| mixSGA"))]
    assert len(lines) == 3 * 10
    for line in lines:
        assert (line[4] == "-") == line[2].endswith("judge"), "a judge was not asked"
    assert "trained with --steps 2, --instruct" in text
    before = {path: path.stat().st_mtime_ns for path in variants.rglob("*")}
    assert call(*asked) == 0
    assert before == {path: path.stat().st_mtime_ns for path in variants.rglob("*")}, "a trained variant was trained again"


@pytest.mark.data
@pytest.mark.parametrize("checkpoint", ["llama", "opt"], indirect=True)
def test_table_1_of_headkv_on_a_users_own_model(checkpoint: Path, tmp_path: Path) -> None:
    runs = head_scores(3, 8).runs
    for kind in ("r", "r2"):
        HeadScores(checkpoint.name, "", kind, runs, 2).save(tmp_path / "scores" / f"{kind}.json")  # type: ignore[arg-type]
    asked = ["reproduce", "headkv:table1", "--model", str(checkpoint), "--limit", "1", "--data-dir", str(DATA)]
    assert call(*asked, "--head-scores", str(tmp_path / "scores"), "--out", str(tmp_path / "out")) == 0
    text = (tmp_path / "out" / "report" / "paper_headkv_table1.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if re.match(r"\| (FullKV|SnapKV|PyramidKV|Ada|HeadKV)", line)]
    assert len(lines) == 11 * 12 and all(line[4] != "-" for line in lines)


def test_sizes_of_mixsgas_table_9_come_from_shapes(tmp_path: Path) -> None:
    asked = ("--paper-model", "Llama3.2-1B", "--out", str(tmp_path))
    assert call("reproduce", "mixsga:table9", *asked) == 0
    text = (tmp_path / "report" / "paper_mixsga_table9.md").read_text()
    assert "| GQA | - | cache bytes a token | 32,768 | 32,768 | +0 |" in text
    assert "| mixSGA | - | cache bytes a token | 32,772 | 32,772 | +0 |" in text
    assert "| mixSGA | - | parameters | 1,240,000,000 | 1,235,912," in text
    assert "| GQA | - | kFLOPs | 113 | - | - | 0 |" in text, "what is not measured stays empty"


def test_times_of_the_papers_come_from_cost_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells themselves, each in a process of its own, are tested with the cost suites."""

    def measured(cell: CostCell, _: object) -> dict[str, Any]:
        if cell.what == "memory":
            return {"status": "ok", "prefill_peak": 3e9}
        token = {"random:tiny-llama+gqa-2": 0.1, "random:tiny-llama+mixsga-3:1:6": 0.125}.get(cell.model, 0.2)
        return {
            "status": "ok",
            "phases": {"prefill": 1.0, "compact": 0.5},
            "first_token": 0.25,
            "token": token + 0.01 * cell.round,
        }

    monkeypatch.setattr("harness.cost.request.run_cell", measured)
    asked = ("--model", "random:tiny-llama", "--context", "96", "--out", str(tmp_path))
    assert call("reproduce", "mixsga:table10", *asked) == 0
    text = (tmp_path / "report" / "paper_mixsga_table10.md").read_text()
    values = [float(line.split(" | ")[4].replace(",", "")) for line in text.splitlines() if line.startswith("| GQA and")]
    assert values == pytest.approx([1 / 0.12, 1 / 0.145, 100 * (1 - 0.12 / 0.145)], rel=1e-3)
    assert sum(row["cell"]["what"] == "latency" for row in read_costs(tmp_path)) == 2 * 5, "five trials each"
    assert call("reproduce", "headkv:figure6", *asked) == 0
    text = (tmp_path / "report" / "paper_headkv_figure6.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| SnapKV")]
    assert len(lines) == 6 and all(line[3] == "not printed" and line[5] == "-" for line in lines)
    assert [float(line[4]) for line in lines] == pytest.approx(
        [1.75 + n * 0.21 for n in (0, 511, 1023, 2047, 4095)] + [3.0], rel=1e-3
    )


@pytest.mark.data
def test_figures_are_asked_for_by_name(tmp_path: Path) -> None:
    asked = ("--model", "reference", "--limit", "1", "--data-dir", str(DATA), "--out", str(tmp_path))
    assert call("reproduce", "mixsga:figure3", *asked) == 0
    text = (tmp_path / "report" / "paper_mixsga_figure3.md").read_text()
    rows = {tuple(line.strip("| ").split(" | ")[:2]): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert float(rows["GQA", "50% (0:1:0)"][4].split()[0]) > 100 and rows["CLA", "35%"][4] == "-"
    assert "--conversion cla --percent 35 --recipe mixsga-pretrain" in text
    nll = [row.metrics["nll"] for row in read_rows(tmp_path) if row.key.model == "reference+gqa-2"]
    assert float(rows["GQA", "50% (0:1:0)"][4].split()[0]) == pytest.approx(math.exp(nll[0]), rel=1e-3)
    assert (tmp_path / "report" / "paper_mixsga_figure3.png").stat().st_size > 5000
    assert call("reproduce", "headkv:figure5", *asked) == 0
    assert "| FullKV | - | needle | not printed | " in (tmp_path / "report" / "paper_headkv_figure5.md").read_text()
    assert call("reproduce", "mixsga:figure1", *asked) == 0
    assert (tmp_path / "report" / "paper_mixsga_figure1.png").stat().st_size > 5000


def test_needs_follow_from_shapes_and_from_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "longbench").mkdir()
    table = table_of("headkv:table2")
    need = needs(table, "Llama-3-8B-Instruct", tmp_path)
    assert need.data == {"longbench": True, "headkv": False} and not need.weights_here
    tokens = 2 * 8.0e9 * 1150 * 7900 / FLOPS  # reading the prompts
    budgets = len({row["budget"] for row in rows_of(table, "Llama-3-8B-Instruct")})
    assert budgets * tokens / 3600 < need.hours < 3 * budgets * tokens / 3600
    assert need.gigabytes > 16 and "too small" not in need.text
    trained = needs(table_of("mixsga:table2"), "TinyLlama-1.1B", None, tmp_path)
    assert trained.variants == 3 and trained.hours > 3 * 6 * 1.1e9 * 1.6e9 / FLOPS / 3600
    assert "no weights" in needs(table_of("mixsga:table9"), "OPT-125m", None).text


def test_the_costs_in_the_guide_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "reproducing.md").read_text()
    lines = []
    for name, table in TABLES.items():
        for model in paper_models(table) if table.kind != "sizes" else ():
            need = needs(table, model, None, tmp_path)
            lines.append(f"| `{name}` | {model} | {need.variants or '-'} | {max(need.hours, 0.1):.1f} | {need.gigabytes:.0f} |")
    assert "\n".join(lines) in guide


def test_a_gpu_that_is_too_small_is_told_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.papers.needs._gpu", lambda: ("a small one", 16.0))
    monkeypatch.setattr("harness.papers.reproduce.device_of", lambda _: torch.device("cuda"))
    assert call("reproduce", "headkv:table2", "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "needs about 23 GB, a small one has 16 GB: 7 GB too small" in error
    assert "7 GB too small" in needs(table_of("headkv:table2"), "Llama-3-8B-Instruct", None).text


def test_bad_requests_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert call("reproduce", *arguments, "--out", str(tmp_path)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "no table 'headkv:table9'; known: headkv:table1" in refused("headkv:table9")
    assert "none of Llama-3-8B-Instruct, Mistral" in refused("headkv:table2", "--paper-model", "gpt")
    assert "no row of it can be run on random:tiny-llama: add --train, or first python run_all.py train" in refused(
        "mixsga:table1", "--model", "random:tiny-llama"
    )
    assert "on the hub is not reachable" in refused("headkv:table2"), "neither data nor weights are here"
    assert call("list", "papers", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == set(TABLES)
    with pytest.raises(BadRequest):
        table_of("nosuch:table1")
