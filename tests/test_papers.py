"""The papers' numbers as data, and their tables beside ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import DATA
from test_cli import call

from benchmarks import BENCHMARKS
from harness.cache import ModelShape
from harness.choices import choose
from harness.papers import HUB, TABLES, asked_for, paper, paper_models, rows_of, table_of
from harness.plan import BadRequest
from harness.shapes import SHAPES
from harness.variants import bytes_a_token
from methods import METHODS
from reports.paper import Side, side_by_side

PAPERS = ("headkv", "mixsga")
RESTATED = DATA.parent / "papers"
DOES_NOT_RECOMPUTE = {("mixsga", "table6", "random router", "mean"): 17.6075}  # printed as 17.68
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data folder is not here")


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


@pytest.mark.skipif(not RESTATED.is_dir(), reason="the papers' restated numbers are not here")
def test_numbers_are_those_of_the_papers() -> None:
    for name in PAPERS:
        text = (RESTATED / f"{name}.md").read_text()
        printed = set(map(float, re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text.replace(",", ""))))
        for number, table in paper(name)["tables"].items():
            for row in table["rows"]:
                for column, value in row["values"].items():
                    if column not in ("parameters", "kFLOPs"):
                        assert value in printed, (name, number, row, column)


def test_every_cell_of_a_table_has_something_of_ours_that_stands_for_it() -> None:
    for table in TABLES.values():
        for benchmark in table.columns.values():
            choose("benchmark", benchmark, BENCHMARKS)
        for model in paper_models(table):
            assert model in HUB
            for row in rows_of(table, model):
                for fair in (False, True):
                    asked = asked_for(table, row, "reference", fair)
                    assert asked.train or asked.model == "reference"
                    assert choose("method", asked.method, METHODS)[0] == asked.method, "as rows will name it"
    assert asked_for(table_of("mixsga:table3"), rows_of(table_of("mixsga:table3"), "Gemma2-2B")[0], "m", False).budget == "40%"


def test_what_was_not_measured_is_never_filled() -> None:
    table = table_of("headkv:table2")
    rows = rows_of(table, "Llama-3-8B-Instruct")
    asked = [asked_for(table, row, "m", False) for row in rows]
    found = side_by_side({}, table, rows, Side("headkv:table2", "Llama-3", "m", 1, False, (), asked, {}))
    assert len(found.rows) == 3 * 7 and {row[4].text for row in found.rows} == {row[5].text for row in found.rows} == {"-"}
    assert found.rows[0][3].value == 23.49


@needs_data
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


@needs_data
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


def test_bad_requests_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert call("reproduce", *arguments, "--out", str(tmp_path)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "no table 'headkv:table9'; known: headkv:table1" in refused("headkv:table9")
    assert "kept as data" in refused("mixsga:table10")
    assert "none of Llama-3-8B-Instruct, Mistral" in refused("headkv:table2", "--paper-model", "gpt")
    assert "no row of it can be run on random:tiny-llama: first python run_all.py train" in refused(
        "mixsga:table1", "--model", "random:tiny-llama"
    )
    assert "on the hub is not reachable" in refused("headkv:table2"), "neither data nor weights are here"
    assert call("list", "papers", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == set(TABLES)
    with pytest.raises(BadRequest):
        table_of("nosuch:table1")
