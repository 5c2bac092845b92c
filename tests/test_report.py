"""The report from made rows: golden tables, a page in a real browser, two runs side by side, and folders that are broken.

`PYTHONPATH=. python tests/test_report.py` writes the golden files anew; read what changed before it is committed.
"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from reports import plots
from reports.answers import sentence, verdicts
from reports.beside import beside
from reports.compare import comparison
from reports.evidence import kept_maps
from reports.formats import Table, TableCell, latex, markdown
from reports.keys import Protocol
from reports.more_tables import length_tables
from reports.names import named
from reports.needles import needle_maps
from reports.plots import panels
from reports.present import score_tables
from reports.protection import protection_tables
from reports.summary import families
from reports.tables import frame, lines
from reports.write import write_report
from results.record import Key, Record
from results.store import Store, StoreError, read_rows

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ("scores.md", "scores.tex", "scores.csv")
NASTY = '<script>document.title = "taken"</script> & "quoted" $x_1$'
KEY = Key(
    model="reference",
    revision="r",
    benchmark="recall@1",
    benchmark_params="B()",
    data="",
    example=0,
    method="full@1",
    params="M()",
    budget="",
    prompt="question_in",
    chat="raw",
    truncation=100,
    granularity="kv",
    routing="",
    stop="eos",
    max_new_tokens=8,
    dtype="float32",
    seed=0,
    temperature=0.0,
    fidelity=True,
)
RIGHT = {  # how many of eight examples each method gets right, by task and budget
    "recall": {"full": 8, "snapkv": {"32": 3, "50%": 7}, "h2o": {"32": 0, "50%": 6}, "headkv_r2": {"32": 8, "50%": 8}},
    "two_hop": {"full": 8, "snapkv": {"32": 2, "50%": 8}, "h2o": {"32": 0, "50%": 5}, "headkv_r2": {"32": 8, "50%": 8}},
}


def made_rows(examples: int = 8) -> list[Record]:
    """Two tasks, three methods at two budgets, one variant; a cell that was skipped and one that failed."""
    rows = []
    for task, methods in RIGHT.items():
        for method, budgets in methods.items():
            for budget, right in ({"": budgets} if isinstance(budgets, int) else budgets).items():
                share = {"": 1.0, "32": 0.0625, "50%": 0.5}[budget]
                for example in range(examples):
                    key = replace(KEY, benchmark=f"{task}@1", method=f"{method}@1", budget=budget, example=example)
                    rows.append(_row(key, float(example < right), share))
    variant = replace(KEY, model="reference+gqa-2", revision="v")
    rows += [_row(replace(variant, example=example), float(example < 7), 0.5) for example in range(examples)]
    skipped, failed = (replace(KEY, method="pyramidkv@1", budget=budget) for budget in ("32", "50%"))
    rows.append(Record(skipped, "skipped", "env", reason="2 entries a head cannot hold the 8 protected ones", embedded_can=True))
    rows.append(Record(failed, "failed", "env", reason="out of memory: 3 <GiB> & more", embedded_can=True))
    return rows


def _row(key: Key, score: float, share: float) -> Record:
    size = 100_000
    fidelity = {} if not key.budget else {"kl": (1 - share) * (2 - score), "top1": 0.5 + score / 2, "loss": 1.0}
    return Record(
        key,
        "ok",
        "env",
        answer=NASTY if key.example == 1 else f"answer {score:g}",
        stop_reason="end",
        metrics={"exact": score},
        right_or_wrong=["exact"],
        embedded_can=True,
        fidelity=fidelity,
        columns={"length": 1024},
        prompt_tokens=1000,
        new_tokens=4,
        compressed=share < 1 and bool(key.budget),
        entries_asked=int(share * 4000),
        entries=int(share * 4000),
        bytes_kept=int(share * size),
        bytes_allocated=int(share * size * 1.1),
        bytes_full=size,
        kept=[[int(share * 1000 * (1 + head * (key.method == "headkv_r2@1"))) for head in range(2)] for _ in range(2)]
        if key.example == 0
        else None,
    )


SINCE = {"kept": 3, "lower_is_better": 4, "right_or_wrong": 4, "embedded_can": 4}  # the schema that brought a field


def as_stored(row: Record, schema: int) -> str:
    """The row's line as an older version of the suite wrote it."""
    fields = json.loads(row.to_json())
    return json.dumps({name: value for name, value in fields.items() if SINCE.get(name, 0) <= schema} | {"schema": schema}) + "\n"


def stored_by(schema: int, out: Path, rows: list[Record]) -> Path:
    (out / "rows").mkdir(parents=True)
    (out / "rows" / "rows.jsonl").write_text("".join(as_stored(row, schema) for row in rows))
    return out


def stored(out: Path, rows: list[Record]) -> Path:
    store = Store(out)
    for row in rows:
        store.write(row)
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = stored(tmp_path / "made", made_rows())
    for name, what in (
        ("env/1", {"python": "3.11", "packages": {"torch": "2.13.0"}}),
        ("heads/2", {"variant": "reference", "kind": "r2", "attempts": 9, "successes": 8, "values": [[0.1, 0.9], [0.4, 0.2]]}),
        ("routing/3", {"model": "reference+mixsga-3:1:6", "benchmark": "recall@1", "tokens": 4,
                       "words": ["The", " <b>", " end", "."],
                       "experts": {"expert_choice": [[0, 1, 2, 2]] * 2, "argmax": [[0, 0, 2, 2]] * 2},
                       "shares": {"expert_choice": [[0.25, 0.25, 0.5]] * 2, "argmax": [[0.5, 0.0, 0.5]] * 2}}),
    ):  # fmt: skip
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(what))
    (folder / "commands.jsonl").write_text('{"when": "now", "command": "python run_all.py run <x>"}\n{"torn')
    return folder


def test_reports_are_made_of_stored_rows_alone() -> None:
    drawn_with = {"results", "reports", "numpy", "pandas", "matplotlib", "jinja2", "markupsafe"}
    for path in (Path(__file__).parent.parent / "reports").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in getattr(node, "names", ())]
            roots = {str(name).partition(".")[0] for name in names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert roots <= drawn_with | set(sys.stdlib_module_names), path.name


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_as_they_were(name: str, out: Path) -> None:
    write_report(out, formats=())
    assert (out / "report" / name).read_text() == (GOLDEN / name).read_text(), "see the docstring of this file"


def test_the_summary_says_what_is_shown_and_no_more() -> None:
    (family,) = [family for family in families(lines(made_rows())) if len(family.tasks) == 2]
    said = [sentence(verdict) for verdict in verdicts(family)]
    assert said == [
        "At 32 entries a head (6.25% of the bytes): headkv_r2, 1 [0.771, 1]; no difference to the full cache's 1 is shown; "
        "shown to be better than both others.",
        "At 50% of the bytes: headkv_r2, 1 [0.771, 1]; no difference to the full cache's 1 is shown; "
        "shown to be better than none of the others; snapkv and h2o may be as good.",
    ]


def test_a_tiny_difference_is_no_difference() -> None:
    rng = random.Random(1)
    rows = []
    for example in range(200):
        ours = rng.random() * 65.9
        for method, budget, score in (("full@1", "", 32.90), ("snapkv@1", "128", ours), ("h2o@1", "128", rng.random() * 65.8)):
            rows.append(_row(replace(KEY, method=method, budget=budget, example=example), score, 0.5))
    found = lines(rows)
    assert not any(line.differs for line in found)
    assert not any(verdict.beaten or verdict.differs_from_full for family in families(found) for verdict in verdicts(family))


def test_a_mean_over_tasks_needs_every_task() -> None:
    rows = [row for row in made_rows() if not (row.key.benchmark == "two_hop@1" and row.key.method == "h2o@1")]
    (family,) = [family for family in families(lines(rows)) if len(family.tasks) == 2]
    assert {str(cell.label) for cell in family.cells} == {"full", "snapkv", "headkv_r2"}, "h2o lacks a task, the variant too"
    snap = next(cell for cell in family.cells if (str(cell.label), cell.budget) == ("snapkv", "32"))
    assert snap.score.mean == pytest.approx((3 / 8 + 2 / 8) / 2)


def test_protocols_are_never_mixed() -> None:
    after = [replace(row, key=replace(row.key, prompt="question_after")) for row in made_rows()]
    assert len(families(lines(made_rows() + after))) == 2 * len(families(lines(made_rows())))
    assert comparison(lines(made_rows()), lines(after), ("a", "b")) == []


OTHER = {
    "prompt": "question_after",
    "chat": "template",
    "truncation": 101,
    "granularity": "query",
    "routing": "argmax",
    "stop": "none",
    "dtype": "bfloat16",
    "temperature": 1e-7,
}


@pytest.mark.parametrize("name", [field.name for field in fields(Protocol)])
def test_protocols_that_differ_in_one_field_share_nothing(name: str) -> None:
    variant = {"model": "reference+mixsga-3:1:6", "routing": "expert_choice"}
    rows = [replace(row, key=replace(row.key, **variant)) for row in made_rows() if row.key.model == KEY.model]
    others = [replace(row, key=replace(row.key, **{name: OTHER[name]})) for row in rows]
    one, both = lines(rows), lines([*rows, *others])
    assert len(both) == 2 * len(one) and not any(line.label.mark for line in both)
    assert len({line.panel for line in both}) == len(score_tables(both)) == 2 * len(score_tables(one))
    assert len({str(line.protocol) + line.protocol.prompt for line in both}) == 2, "the words tell them apart, too"
    assert comparison(one, lines(others), ("a", "b")) == []
    drawn = panels(both)
    if name == "routing":  # both routings of a variant stand in one picture, under two names
        assert len(drawn) == len(panels(one)) and {len(panel.labels) for panel in drawn} == {0, 2 * 4}
    else:
        assert len(drawn) == 2 * len(panels(one))
    cells = [cell for family in families(both) for cell in family.cells]
    assert len(cells) == 2 * sum(len(family.cells) for family in families(one)), "nothing is averaged over both"


def test_a_truncation_may_follow_from_the_task() -> None:
    rows = [replace(row, key=replace(row.key, truncation=90 + (row.key.benchmark == "recall@1"))) for row in made_rows()]
    assert any(len(family.tasks) == 2 for family in families(lines(rows))), "answers of other lengths leave other room"


def test_a_task_that_full_lacks_is_in_no_mean() -> None:
    rows = [row for row in made_rows() if not (row.key.benchmark == "two_hop@1" and row.key.method == "full@1")]
    (family,) = families(lines(rows))
    assert [str(task) for task in family.tasks] == ["recall@1 1024"] and len(family.cells) == 8
    snap = next(cell for cell in family.cells if (str(cell.label), cell.budget) == ("snapkv", "32"))
    assert snap.score.mean == 3 / 8 and len(verdicts(family)) == 2


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    rows = made_rows()
    worse = [replace(row, metrics={"exact": 0.0}) if row.key.budget == "50%" and row.status == "ok" else row for row in rows]
    tables = comparison(lines(rows), lines(worse), ("a", "b"))
    assert len(tables) == 2
    row = next(row for row in tables[0].rows if [cell.text for cell in row[:2]] == ["headkv_r2", "50%"])
    assert (row[4].value, row[5].value, row[6].value, row[7].text) == (1.0, 0.0, -1.0, "8") and "*" in row[6].text
    same = next(row for row in tables[0].rows if [cell.text for cell in row[:2]] == ["snapkv", "32"])
    assert same[6].value == 0 and "*" not in same[6].text
    from helpers import call

    first, second = stored(tmp_path / "a", rows), stored(tmp_path / "b", worse)
    assert call("report", "--out", str(first), "--out", str(second)) == 0
    assert "headkv_r2" in (first / "report" / "side_by_side.html").read_text()
    other = stored(tmp_path / "c", [replace(row, key=replace(row.key, benchmark="other@1")) for row in rows])
    assert call("report", "--out", str(first), "--out", str(other)) == 2
    assert call("report", "--out", str(first), "--out", str(first), "--out", str(first)) == 2


def test_broken_folders_get_one_line_or_a_report_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no rows"):
        write_report(tmp_path / "empty")
    failed = stored(tmp_path / "failed", [row for row in made_rows() if row.status != "ok"])
    write_report(failed, formats=())
    assert "nothing to choose from" in (failed / "report" / "scores.html").read_text()
    assert "out of memory" in (failed / "report" / "scores.md").read_text()
    one = stored(tmp_path / "one", made_rows(examples=1))
    write_report(one, formats=())
    assert "| snapkv | 32 | 6.2% | 6.9% | 1 | 1 [1, 1] |" in (one / "report" / "scores.md").read_text()
    rows = [replace(row, metrics={"exact": math.nan}) if row.key.method == "h2o@1" else row for row in made_rows()]
    found = lines(rows)
    assert all(line.score is None for line in found if line.label.method == "h2o"), "what is not a number is not a score"
    write_report(stored(tmp_path / "nan", rows), formats=())
    path = next((tmp_path / "one" / "rows").glob("*snapkv*"))
    path.write_text(as_stored(made_rows(1)[0], 1) + '{"torn')
    with pytest.raises(StoreError, match="schema 1"):
        write_report(one)


def test_what_is_no_number_is_told_and_not_counted(tmp_path: Path) -> None:
    rows = [replace(row, metrics={"exact": math.nan}) if row.key.example == 2 else row for row in made_rows() if row.metrics]
    found = lines(rows)
    assert {line.n for line in found if line.score} == {7} == {line.score.n for line in found if line.score}
    stored(tmp_path, rows)
    assert {row.status for row in read_rows(tmp_path) if row.key.example == 2} == {"failed"}, "as a run of today would say"
    said = _said(tmp_path)
    assert "exact is no number (nan)" in said and "| 7 (1 failed) |" in said


WRONG: dict[str, Any] = {
    "metrics": {"exact": "right"},
    "bytes_full": 0,
    "kept": [[1, 2], [3]],
    "columns": {"length": [1]},
    "status": "fine",
    "fidelity": None,
    "entries": 10**400,
    "answer": ["a"],
}


def test_a_row_that_is_wrong_is_told_with_file_and_line_and_the_others_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, made_rows())
    good = len(read_rows(tmp_path))
    row = json.loads(made_rows()[0].to_json())
    wrong = [json.dumps({**row, name: value}) for name, value in WRONG.items()]
    wrong += [json.dumps({**row, "key": {**row["key"], "budget": "many"}}), "[1, 2]", "no JSON}", "[" * 100_000, '{"key": {}}']
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join([*wrong, '{"key": {"torn']) + "\n")
    (tmp_path / "rows" / "folder.jsonl").mkdir()
    (tmp_path / "rows" / "link.jsonl").symlink_to(tmp_path / "nowhere")
    write_report(tmp_path, formats=())
    assert len(read_rows(tmp_path)) == good
    said = capsys.readouterr().err
    assert len(said.splitlines()) == len(wrong) + 2 and "torn" not in said
    assert all(f"a.jsonl, line {number}: " in said for number in range(1, len(wrong) + 1))
    assert (
        all(f"field '{name}'" in said for name in WRONG) and "folder.jsonl cannot be read" in said and "a link to nothing" in said
    )
    Store(tmp_path).write(replace(made_rows()[0], key=replace(KEY, example=99)))
    assert len(read_rows(tmp_path)) == good + 1, "a run goes on in such a folder"


def test_artefacts_that_are_wrong_are_told_and_left_out(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (
        ("heads/2", '{"variant": "m", "kind": "r2", "attempts": 9, "successes": 8, "values": [[1], [2, 3]]}'),
        ("routing/3", '{"model": "m"}'),
        ("lm_eval/4", '{"model": "m", "results": []}'),
        ("env/5", "[" * 100_000),
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / f"{name}.json").write_text(text)
    (out / "commands.jsonl").write_text('{"when": 3, "command": "x"}\n{"when": "now"}\n')
    (out / "judge").mkdir()
    (out / "judge" / "j.jsonl").write_text('{"row": "1", "content": "c", "status": "ok", "rating": "high", "text": ""}\n')
    (out / "cost").mkdir()
    (out / "cost" / "rows.jsonl").write_text('{"id": "1", "status": "ok", "cell": {"what": "latency"}}\n{"id": 1}\n')
    write_report(out)
    said = capsys.readouterr().err
    for name in ("heads/2.json", "routing/3.json", "lm_eval/4.json", "env/5.json", "commands.jsonl, line 1", "j.jsonl, line 1"):
        assert name in said
    assert "row 1: no field 'model'" in said and "rows.jsonl, line 2" in said and "Traceback" not in said


def test_a_report_takes_the_place_of_another_as_a_whole(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(out)
    folder = out / "report"
    (folder / "paper_x.md").write_text("another command's")
    (folder / "plots" / "old.png").write_text("no longer drawn")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    real = plots.save

    def at_the_worst_moment(*_: Any) -> list[Path]:
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "readers see the old one"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save", at_the_worst_moment)
    from helpers import call

    assert call("report", "--out", str(out)) == 1, "a full disk is no fault of the request"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    inside: list[Path] = []

    def with_another_beside(*given: Any) -> list[Path]:
        if not inside:
            inside.append(folder)
            monkeypatch.setattr(plots, "save", real)
            write_report(out)
            monkeypatch.setattr(plots, "save", with_another_beside)
        return real(*given)

    monkeypatch.setattr(plots, "save", with_another_beside)
    write_report(out)
    assert (folder / "paper_x.md").exists() and not (folder / "plots" / "old.png").exists()
    assert len(list((folder / "plots").glob("*.svg"))) == 5 and sorted(path.name for path in out.glob(".draft*")) == []


def test_rows_of_older_schemas_read_as_before(tmp_path: Path) -> None:
    rows = made_rows()
    assert read_rows(stored_by(3, tmp_path / "3", rows)) == [
        replace(row, right_or_wrong=["exact"] * bool(row.metrics)) for row in rows
    ]
    assert read_rows(stored_by(2, tmp_path / "2", rows))[0].kept is None
    write_report(tmp_path / "3")
    assert (tmp_path / "3" / "report" / "scores.csv").read_text() == (GOLDEN / "scores.csv").read_text()
    others = [
        replace(row, key=replace(row.key, benchmark="perplexity@1"), metrics={"nll": row.metrics["exact"]})
        for row in rows
        if row.metrics
    ]
    found = lines(read_rows(stored_by(3, tmp_path / "other", others)))
    assert all(line.lower_is_better and not line.own for line in found), "it was told by names"


def test_longbench_e_is_told_by_length() -> None:
    rows = []
    for task, scores in (("qasper", (10.0, 30.0, 50.0)), ("hotpotqa", (20.0, 40.0, 60.0))):
        for example, (words, score) in enumerate(zip((100, 3999, 8000), scores, strict=True)):
            key = replace(KEY, benchmark=f"longbench_{task}_e@1", example=example, data="sha")
            rows.append(replace(_row(key, score, 1.0), columns={"words": words}))
    (table,) = length_tables(rows)
    model, *rest = [cell.text for cell in table.rows[0]]
    assert model.startswith("reference, raw prompt") and rest == ["question_in", "full", "-", "25.00", "-", "55.00"]
    assert length_tables(made_rows()) == []


def test_what_bears_a_name_but_is_not_the_same_is_told_apart() -> None:
    rows = made_rows()
    for mark, score in (("aaaa", 1.0), ("bbbb", 0.0)):
        for task in RIGHT:
            key = replace(KEY, benchmark=f"{task}@1", method=f"mine@1+{mark}", budget="32")
            rows += [_row(replace(key, example=example), score, 0.0625) for example in range(8)]
    found = lines(rows)
    mine = {line.label.name: line.score.mean for line in found if line.label.method == "mine" and line.score}
    assert sorted(mine.values()) == [0.0, 1.0] and all("#" in name for name in mine)
    (family,) = [family for family in families(found) if len(family.tasks) == 2]
    assert sorted(cell.score.mean for cell in family.cells if cell.label.method == "mine") == [0.0, 1.0]
    assert not any(line.label.mark for line in lines(made_rows()))


BEHIND = {  # fields of a key that no name, label or protocol shows: another value, and how it is told
    "revision": ("s", "reference@r", "reference@s"),
    "data": ("d1f0a9b7", "recall@1 1024 (records of no file)", "recall@1 1024 (records d1f0a9)"),
    "benchmark_params": ("B(length=7)", "recall@1 1024 (settings", "recall@1 1024 (settings"),
    "max_new_tokens": (12, "recall@1 1024 (answers of at most 8 tokens)", "recall@1 1024 (answers of at most 12 tokens)"),
    "fidelity": (False, "recall@1 1024 (with fidelity)", "recall@1 1024 (without fidelity)"),
    "params": ("M(kernel=3)", "full#", "full#"),
    "method": ("full@2", "full#", "full#"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_rows_whose_keys_differ_are_never_averaged_and_have_names_of_their_own(name: str, tmp_path: Path) -> None:
    rows = [row for row in made_rows() if row.key.model == KEY.model and row.status == "ok"]
    other, *told = BEHIND[name]
    if name == "method":
        rows = [row for row in rows if row.key.method == "full@1"]
    apart = [replace(row, key=replace(row.key, **{name: other}), metrics={"exact": 1 - row.metrics["exact"]}) for row in rows]
    found = lines([*rows, *apart])
    assert len({(line.panel, line.label, line.budget) for line in found}) == len(found) == 2 * len(lines(rows))
    shown = [f"{line.label.name} {line.model} {line.at.task}" for line in found]
    assert all(any(words in text for text in shown) for words in told), shown[:4]
    csv = frame(found)[["model", "benchmark", "prompt", "protocol", "method", "budget"]].astype(str)
    assert name in ("params", "method") or not csv.duplicated().any()
    means = {cell.score.mean for family in families(found) for cell in family.cells if cell.label.is_full}
    assert means <= {0.0, 1.0} and means, "everything was right before, and nothing is now"
    both = [replace(row, key=replace(row.key, benchmark="longbench_x_e@1"), columns={"words": 9}) for row in (*rows, *apart)]
    only = [row for row in both if row.key.method.startswith("full") and row.key.example == 0]
    assert [row[-3].text for table in length_tables(only) for row in table.rows] in (["1.00", "0.00"], ["0.00", "1.00"])
    write_report(stored(tmp_path / "out", [*rows, *apart]), formats=("svg",))
    assert len(list((tmp_path / "out" / "report" / "plots").glob("score_reference*.svg"))) == len(panels(found))


def test_settings_are_told_in_words_and_hashes_as_far_as_they_differ() -> None:
    rows = [_row(replace(KEY, benchmark_params=f"B(kind='a', length={n})", data=f"{'ab' * 9}{n}+cc"), 1.0, 1.0) for n in (5, 7)]
    assert [str(at.task) for at in named(rows)] == [f"recall@1 1024 (records {'ab' * 9}{n}, length={n})" for n in (5, 7)]
    variants = [replace(KEY, model="m+gqa-2", revision=text) for text in ("aaaaaaaa1", "bbbbbbbb1", "bbbbbbbb1-unhealed")]
    parents = [replace(KEY, model="m", revision=text) for text in ("aaaaaaaa1", "bbbbbbbb1")]
    ats = named([_row(key, 1.0, 1.0) for key in (*variants, *parents)])
    assert [at.model for at in ats] == ["m+gqa-2@aaaaaa", "m+gqa-2@bbbbbb", "m@bbbbbb+gqa-2", "m@aaaaaa", "m@bbbbbb"]
    assert str(ats[0].label) == "full on gqa-2@aaaaaa" and ats[0].label.conversion == "gqa"
    assert [at.model for at in named([_row(variants[0], 1.0, 1.0)])] == ["m+gqa-2"], "nothing is told where nothing differs"


def test_two_runs_of_models_that_share_a_name_are_compared_by_weights() -> None:
    old, new = ([replace(row, key=replace(row.key, revision=text)) for row in made_rows()] for text in ("old", "new"))
    worse = [replace(row, metrics={"exact": 0.0}) for row in new if row.status == "ok"]
    tables = comparison(lines([*old, *worse]), lines(new), ("a", "b"))
    scores = {row[4].value for table in tables for row in table.rows if row[0].text.startswith("full")}
    assert tables and scores == {0.0}, "the second run's weights are the first's worse ones"


def test_needle_maps_and_kept_maps_of_models_that_share_a_name_are_two(tmp_path: Path) -> None:
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
    rows = [replace(row, columns={"context": 100, "depth": row.key.example}) for row in made_rows()]
    rows = [row for row in rows if row.key.model == KEY.model]
    once = [*needle_maps(rows, tmp_path / "once"), *kept_maps(rows, tmp_path / "once")]
    rows += [replace(row, key=replace(row.key, revision="other")) for row in rows]
    twice = [*needle_maps(rows, tmp_path / "twice"), *kept_maps(rows, tmp_path / "twice")]
    assert len(set(twice)) == len(twice) == 2 * len(once) == 2 * 5


def test_pictures_with_long_names_have_files_of_their_own(tmp_path: Path) -> None:
    models = [f"{'a-model-with-a-long-name-' * 5}{n}" for n in range(2)] + ["a b", "a-b", "a/b"]
    rows = [
        replace(row, key=replace(row.key, model=model)) for model in models for row in made_rows() if row.key.model == KEY.model
    ]
    write_report(stored(tmp_path, rows))
    plots = tmp_path / "report" / "plots"
    each = 1 + 2 * 2  # a mean, and of two tasks the scores and the KL
    assert len(list(plots.glob("*.svg"))) == len(models) * each
    assert len(list(plots.glob("kept_*.png"))) == len(models)
    page = (tmp_path / "report" / "scores.html").read_text()
    images = re.findall(r'src="(data:image/png;base64,[^"]*)"', page)
    assert len(set(images)) == len(images) == len(models)


def test_the_direction_of_a_metric_is_its_own(tmp_path: Path) -> None:
    lowest, highest = (f"At 32 entries a head (6.25% of the bytes): {best}" for best in ("h2o, 0 [0, ", "headkv_r2, 1 ["))
    rows = [replace(row, metrics={"errors": row.metrics["exact"]}) if row.metrics else row for row in made_rows()]
    assert highest in _said(stored(tmp_path / "more", rows))
    said = _said(stored(tmp_path / "less", [replace(row, lower_is_better=["errors"]) for row in rows]))
    assert lowest in said and "For errors lower is better, for every other score higher." in said
    old = stored_by(3, tmp_path / "old", rows)
    assert highest in _said(old), "nothing says otherwise"
    (old / "metrics").mkdir()
    (old / "metrics" / "recall.json").write_text('{"metrics": {"errors": false}}')
    assert lowest in _said(old), "runs before schema 4 stored directions in a folder"
    (tmp_path / "more" / "metrics").mkdir()
    (tmp_path / "more" / "metrics" / "recall.json").write_text('{"metrics": {"errors": false}}')
    assert highest in _said(tmp_path / "more"), "newer rows say it themselves"


def _said(out: Path) -> str:
    write_report(out, formats=())
    return (out / "report" / "scores.md").read_text()


def test_a_right_or_wrong_metric_of_any_name_is_a_proportion() -> None:
    named = [replace(row, metrics={"solved": 1.0}, right_or_wrong=["solved"]) for row in made_rows() if row.metrics]
    assert all(line.score is not None and line.score.low < 1 for line in lines(named)), "Wilson's interval has a width"
    plain = [replace(row, right_or_wrong=[]) for row in named]
    assert all(line.score is not None and line.score.low == 1 for line in lines(plain)), "a bootstrap's has none"


def test_scores_that_prove_the_path_alone_say_so(tmp_path: Path) -> None:
    warning = "prove the path, not the methods"
    rows = [replace(row, embedded_can=False) for row in made_rows()]
    assert warning in _said(stored(tmp_path / "cannot", rows))
    assert warning not in _said(stored(tmp_path / "can", made_rows()))
    others = [replace(row, key=replace(row.key, model=f"other-{row.key.model}")) for row in rows]
    assert warning not in _said(stored(tmp_path / "other", others)), "it is said of the embedded model alone"


def test_a_mean_needs_every_example_that_full_has() -> None:
    rows = [row for row in made_rows() if not (row.key.method == "headkv_r2@1" and row.key.example > 1)]
    (family,) = [family for family in families(lines(rows)) if len(family.tasks) == 2]
    assert "headkv_r2" not in {cell.label.method for cell in family.cells}


def test_every_form_escapes() -> None:
    table = Table("a & b_c", ("x_1", "50%"), ((TableCell("<b>|"), TableCell("#{}~^\\", 1.0, best=True)),), ("100 % of $x$",))
    assert r"\textless{}b\textgreater{}|" in latex([table])
    assert r"\textbf{\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}}" in latex([table])
    assert r"\caption{a \& b\_c. 100 \% of \$x\$}" in latex([table]) and r"x\_1 & 50\%" in latex([table])
    assert "| &lt;b>&#124; | **#{}~^\\** |" in markdown([table])
    bracket = Table("t", ("a",), ((TableCell("[x]"),),))
    assert "{}[x]" in latex([bracket]), "no argument of the line before"


def test_names_are_no_markup_of_pictures_and_spreadsheets(tmp_path: Path) -> None:
    name = "=_$x^$"
    rows = [replace(row, key=replace(row.key, model=name)) for row in made_rows() if row.key.model == KEY.model]
    rows += [replace(row, key=replace(row.key, method="_$h^{$@1")) for row in rows if row.key.method == "h2o@1"]
    write_report(stored(tmp_path, rows))
    assert "'=_$x^$," in (tmp_path / "report" / "scores.csv").read_text()
    drawn = [path.read_text() for path in (tmp_path / "report" / "plots").glob("*.svg")]
    assert drawn and all("_$h^{$" in svg and name in svg for svg in drawn), "in the legend and in the title"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        folder = stored(Path(made) / "made", made_rows())
        write_report(folder)
        GOLDEN.mkdir(exist_ok=True)
        for wanted in TEXTS:
            shutil.copy(folder / "report" / wanted, GOLDEN / wanted)
    sys.exit()


def test_methods_in_order_at_their_own_ends_and_at_equal_ones() -> None:
    scores = {("snapkv", ""): (1.0, 0.0), ("h2o", ""): (0.0, 0.0), ("snapkv", "4:8"): (0.5, 0.5), ("h2o", "4:8"): (1.0, 1.0)}
    records = []
    for (name, ends), values in scores.items():
        label = f"{name}(protect={ends})" if ends else name
        for example, value in enumerate(values):
            key = replace(KEY, method=f"{label}@1", params=label, budget="25%", example=example)
            records.append(Record(key, "ok", "e", metrics={"exact": value}))
    records.append(replace(records[0], key=replace(records[0].key, example=9)))  # one that the others did not answer
    (table,) = protection_tables(records)
    assert [cell.text for cell in table.rows[0]][-4:] == ["2", "4, 8", "snapkv 0.5 > h2o 0", "h2o 1 > snapkv 0.5"]
    assert protection_tables(records[:4]) == []


def test_what_is_done_beside_is_done_at_the_end_and_its_errors_are_raised(tmp_path: Path) -> None:
    for pays in (False, True):
        made = tmp_path / str(pays)
        with beside(pays, os.makedirs, str(made)):
            pass
        assert made.is_dir()
        with pytest.raises(FileExistsError), beside(pays, os.makedirs, str(made)):
            pass
    with pytest.raises(RuntimeError, match="ended with code 3"), beside(True, os._exit, 3):
        pass
    with pytest.raises(KeyError), beside(True, time.sleep, 60):
        raise KeyError("of the block")
