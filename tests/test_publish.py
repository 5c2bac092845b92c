"""Published folders, runs side by side, examples added until intervals are narrow, and a quiet terminal."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers import call
from test_report import KEY, _row, made_rows, stored

from harness.cli.main import _quiet
from reports.publish import publish
from reports.sequential import Watched, half_width, looks_of, read_watched, sizes_up_to, write_watched
from reports.tables import lines
from reports.write import write_report
from results.published import merged
from results.record import Record
from results.store import StoreError, read_rows

ROOT = Path(__file__).parent.parent


def _by_id(rows: list[Record]) -> dict[str, Record]:
    return {row.key.id: row for row in rows}


def test_rows_come_back_from_a_published_folder_and_merge_with_others(tmp_path: Path) -> None:
    rows = made_rows()
    first = stored(tmp_path / "first", [row for row in rows if row.key.method != "h2o@1"])
    second = stored(tmp_path / "second", [row for row in rows if row.key.method in ("h2o@1", "full@1")])
    for out, env in ((first, "env"), (second, "other")):
        (out / "env").mkdir()
        (out / "env" / f"{env}.json").write_text('{"device": "<b>chip", "packages": {"torch": "2.13.0"}}')
        write_report(out, formats=())
    publish([first], tmp_path / "one")
    assert _by_id(read_rows(tmp_path / "one")) == _by_id(read_rows(first)), "nothing is lost"
    site = publish([tmp_path / "one", second], tmp_path / "both")[0].parent
    assert _by_id(read_rows(site)) == _by_id(rows)
    table = pd.read_parquet(site / "rows.parquet")
    assert len(table) == len(rows) and set(table["method"]) == {row.key.method for row in rows}
    card = (site / "README.md").read_text()
    assert card.startswith("---\n") and f"{len(rows):,} rows" in card and "- `snapkv@1`" in card
    page = (site / "index.html").read_text()
    assert 'href="runs/second/scores.html"' in page and (site / "runs" / "second" / "scores.html").is_file()
    assert "&lt;b&gt;chip, torch 2.13.0" in page and "<b>chip" not in page and 'src="http' not in page
    header = page[page.index("<thead>") : page.index("</thead>")]
    body = page[page.index("<tbody>") : page.index("</tr>", page.index("<tbody>"))]
    assert header.count("<th>") == body.count("<td"), "a cell a column"
    headkv = next(row for row in page.split("<tr>") if ">headkv_r2<" in row and "6.25%" in row)
    assert ">1<" in headkv and "1 [0.771, 1]" in headkv and ">16<" in headkv, "first place, the score, the answers"
    assert {path.name for path in (site / "env").iterdir()} == {"env.json", "other.json"}


def test_of_equal_keys_what_is_done_counts() -> None:
    done, failed = made_rows()[0], replace(made_rows()[0], status="failed", metrics={}, reason="x")
    assert merged([[failed], [done]]) == merged([[done], [failed]]) == [done]


def test_what_cannot_be_published_is_refused(tmp_path: Path) -> None:
    out = stored(tmp_path / "out", made_rows())
    with pytest.raises(StoreError, match="is one of the folders"):
        publish([out], out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match="holds other files"):
        publish([out], tmp_path / "mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "rows.parquet").write_text("no parquet")
    assert call("report", "--out", str(tmp_path / "broken")) == 2
    assert call("report", "--out", str(out), "--pictures", "gif") == 2


def test_several_runs_stand_beside_the_first(tmp_path: Path) -> None:
    rows = [row for row in made_rows() if row.key.budget == "32" and row.key.benchmark == "recall@1" and row.metrics]
    worse = [replace(row, metrics={"exact": 0.0}) for row in rows]
    elsewhere = [replace(row, key=replace(row.key, benchmark="other@1")) for row in rows]
    outs = [stored(tmp_path / name, found) for name, found in zip("abcd", (rows, worse, rows, elsewhere), strict=True)]
    assert call("report", *[part for out in outs for part in ("--out", str(out))], "--pictures", "svg") == 0
    said = (outs[0] / "report" / "side_by_side.md").read_text()
    assert "## b against a: recall@1" in said and "## c against a: recall@1" in said and "d against a: " not in said
    assert sorted(path.suffix for path in (outs[0] / "report" / "plots").glob("score_*")) == [".svg"]


@pytest.mark.parametrize(("limit", "sizes"), [(4, [4]), (10, [10]), (35, [10, 20, 35]), (80, [10, 20, 40, 80])])
def test_looks_are_fixed_before(limit: int, sizes: list[int]) -> None:
    assert sizes_up_to(limit) == sizes


def test_half_widths_are_of_a_range_and_never_none_where_answers_are_alike() -> None:
    of_scores = ((1.0, 1.0), (0.0, 1.0))
    right, half = ([_row(replace(KEY, example=n), scores[n % 2], 1.0) for n in range(20)] for scores in of_scores)
    plain = [replace(row, right_or_wrong=[], metrics={"exact": 100 * row.metrics["exact"]}) for row in right]
    assert half_width(lines(half)[0], "share") == pytest.approx(0.2, abs=0.02)
    assert half_width(lines(plain)[0], "percent") == half_width(lines(right)[0], "share") == pytest.approx(0.08, abs=0.01)
    assert half_width(lines(plain)[0], "nats") == half_width(lines(right[:1])[0], "share") == float("inf")


def test_looks_widen_what_is_reported_and_are_said(tmp_path: Path) -> None:
    out = stored(tmp_path, made_rows())
    write_watched(out, [Watched("reference", "recall@1", 0.1, (10, 20, 40, 80), 8, 0.3)])
    (out / "precision" / "broken.json").write_text('{"model": 3}')
    assert looks_of(out) == {("reference", "recall@1"): 4} and read_watched(out)[0].narrow is False
    plain, looked = ({line.at: line for line in lines(made_rows(), looks=looks)} for looks in ({}, looks_of(out)))
    for at, line in plain.items():
        if line.score and at.asked.budget:
            wider = at.asked.benchmark == "recall@1"
            assert (looked[at].score.low < line.score.low or line.score.low == 0) is wider or line.score.low == 0
            assert looked[at].score_difference.p == pytest.approx(min(1.0, line.score_difference.p * (4 if wider else 1)))
    assert call("report", "--out", str(out), "--pictures", "svg") == 0
    assert "up to 4 looks" in (out / "report" / "scores.md").read_text()


def test_examples_are_added_until_intervals_are_narrow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--benchmarks", "recall(length=128)", "--methods", "full", "--prompt", "question_in", "--no-fidelity"]
    request = ["run", "--model", "reference", *asked, "--out", str(tmp_path / "out"), "--limit", "40"]
    assert call(*request, "--precision", "0.15") == 0
    assert len(read_rows(tmp_path / "out")) == 20 and "20 examples" in (said := capsys.readouterr().err)
    assert "10 examples" in said and "narrow enough" in said
    (watched,) = read_watched(tmp_path / "out")
    assert watched.sizes == (10, 20, 40) and watched.examples == 20 and watched.narrow
    assert call(*request, "--precision", "0") == 2 and call(*request, "--precision", "0.1", "--shard", "1/2") == 2


def test_what_libraries_warn_of_reaches_nobody() -> None:
    code = "import logging, warnings; from harness.cli.main import main; main(['list', 'suites'])"
    code += "; warnings.warn('heard'); logging.getLogger('matplotlib').warning('heard')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "" and "smoke" in done.stdout
    with warnings.catch_warnings(record=True) as caught:
        _quiet()
        warnings.warn("heard", stacklevel=1)
    assert not caught or sys.warnoptions


def test_a_report_of_one_cell_warns_of_nothing(tmp_path: Path) -> None:
    out = stored(tmp_path / "out", [row for row in made_rows() if row.key.method == "snapkv@1"][:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call("report", "--out", str(out)) == 0
