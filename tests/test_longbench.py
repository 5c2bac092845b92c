"""LongBench: official prompts, official scores to two decimals, and metrics by hand, quirks included."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DATA, call

from benchmarks import BENCHMARKS, longbench_metrics
from benchmarks.data import BadData, Source, load
from benchmarks.instruct import SETS, Instruct
from benchmarks.longbench import CHINESE, ENGLISH, HEADKV, KINDS, LongBench, official_prompt, score, score_files
from benchmarks.wording import english_f1, rouge
from harness.evaluation.prompts import Protocol, tokenize
from harness.models.load import load as load_model
from results.store import read_rows

PREDICTIONS = DATA / "longbench_scored_predictions" / "llama2-7b-chat"
needs_predictions = pytest.mark.skipif(not PREDICTIONS.is_dir(), reason="scored predictions are not in ../shared/data")


@pytest.mark.data
@pytest.mark.parametrize("task", KINDS)
def test_prompts_and_lengths_are_the_official_ones(task: str) -> None:
    config = DATA / "longbench" / "config"
    prompt = official_prompt(task)
    assert prompt.template == json.loads((config / "dataset2prompt.json").read_text())[task]
    assert prompt.max_new_tokens == json.loads((config / "dataset2maxlen.json").read_text())[task]


def test_there_are_21_tasks_and_13_extended_ones() -> None:
    assert (len(KINDS), sum(kind.extended for kind in KINDS.values())) == (21, 13)
    assert (len(ENGLISH), len(CHINESE), len(HEADKV)) == (16, 5, 6)
    assert {name for name in BENCHMARKS if name.startswith("longbench_")} >= {f"longbench_{task}" for task in KINDS}


@needs_predictions
def test_official_scores_come_out_to_two_decimals() -> None:
    official = json.loads((PREDICTIONS / "result.json").read_text())
    assert set(official) == set(KINDS)
    assert score_files(sorted(PREDICTIONS.glob("*.jsonl.xz")), extended=False, workers=2) == official


@pytest.mark.parametrize(
    ("task", "said", "wanted", "classes", "expected"),
    [
        ("qasper", "The Cat, sat!", ("a cat sat",), (), 1.0),
        ("qasper", "", ("a cat",), (), 0.0),
        ("qasper", "...", ("x",), (), 0.0),
        ("qasper", "the cat", ("a dog", "cat dog"), (), 2 / 3),  # the best of several
        ("qasper", "cat cat", ("cat",), (), 2 / 3),  # a bag, not a set
        ("multifieldqa_zh", "北京大学。", ("北京大学",), (), 1.0),
        ("multifieldqa_zh", "，。！", ("北京",), (), 0.0),
        ("multifieldqa_zh", "", ("北京",), (), 0.0),
        ("gov_report", "hello world", ("HELLO, WORLD!",), (), 0.0),  # nothing is lowered
        ("gov_report", "", ("x",), (), 0.0),
        ("gov_report", ".", ("x",), (), 0.0),
        ("dureader", "你好世界", ("你好世界",), (), pytest.approx(1.0)),
        ("trec", "\n\nWeather\nThe rest", ("Weather",), ("Weather", "Food"), 1.0),
        ("trec", "Weather or Food", ("Weather",), ("Weather", "Food"), 0.5),
        ("trec", "Sport", ("Weather",), ("Weather", "Food"), 0.0),
        ("trec", "", ("Weather",), ("Weather",), 0.0),
        ("lsht", "体育新闻", ("体育新闻",), ("体育", "体育新闻"), 1.0),  # a part of the right name does not count
        ("trec", "abc", ("abc",), ("a", "b", "abc"), 0.5),  # but the official loop skips every second part
        ("triviaqa", "\nParis\nLondon", ("Paris",), (), 1.0),
        ("triviaqa", "Question: who\nParis", ("Paris",), (), 0.0),
        ("passage_count", "5 or 5 or 7", ("5",), (), 2 / 3),
        ("passage_count", "none", ("5",), (), 0.0),
        ("passage_count", "15", ("5",), (), 0.0),
        ("passage_retrieval_en", "Paragraph 3", ("Paragraph 3",), (), 1.0),
        ("passage_retrieval_en", "3 of 30", ("Paragraph 3",), (), 0.5),
        ("passage_retrieval_zh", "段落12", ("段落12",), (), 1.0),
        ("lcc", "\n\n`code`\n# note\n    x = 1\n", ("    x = 1",), (), 1.0),
        ("lcc", "   \n    x = 1", ("    x = 1",), (), 0.5),  # blank lines count: ECOSYSTEM has the pair
        ("lcc", "# c\n\n    x = 1", ("    x = 1",), (), 0.0),
        ("lcc", "", ("x",), (), 0.0),
        ("lcc", "// only", ("x",), (), 0.0),
    ],
)
def test_metrics_by_hand(task: str, said: str, wanted: tuple[str, ...], classes: tuple[str, ...], expected: float) -> None:
    assert score(task, said, wanted, classes) == expected


def test_the_two_rouges_are_never_mixed_up() -> None:
    said, wanted = "The cats are running.", "the cat is running"
    assert round(longbench_metrics.rouge_l(said, wanted), 3) == 0.25
    assert round(rouge("rougeL", said, wanted)[2], 3) == 0.75
    assert round(longbench_metrics.rouge_l("a b c. d e f.", "d e f. a b c."), 3) == 1.0
    assert rouge("rougeL", "a b c. d e f.", "d e f. a b c.")[2] == 0.5


def test_english_f1_takes_articles_off_after_punctuation() -> None:
    assert english_f1("a.b", "ab") == 1.0
    assert english_f1("an apple a day", "apple day") == 1.0


@pytest.mark.data
def test_every_local_record_makes_a_prompt_and_scores_its_own_answer() -> None:
    for task in KINDS:
        bench = LongBench(task, data_dir=DATA)
        for index in range(bench.size):
            example = bench.example(index, 0, len)
            row = bench.records().rows[index]
            assert example.prompt[: example.context_end].endswith(row["context"])
            assert row["input"] in example.prompt[example.context_end :]
            assert "{context}" not in example.prompt[:500] and example.max_new_tokens == official_prompt(task).max_new_tokens
            best = bench.score(example.answers[0], example)["longbench"]
            assert best > (40 if task in CHINESE else 99.9), (task, index, best)


@pytest.mark.data
def test_both_protocols_read_the_same_ids_and_truncation_keeps_the_two_ends() -> None:
    model = load_model("reference", torch.float32, torch.device("cpu"))
    for task in ("qasper", "triviaqa", "vcsum", "lcc"):
        example = LongBench(task, data_dir=DATA).example(0, 0, len)
        whole = tokenize(model.tokenizer, example, Protocol(), 10**9)
        for limit in (400, len(whole.ids), len(whole.ids) + 1):
            inside = tokenize(model.tokenizer, example, Protocol(), limit)
            after = tokenize(model.tokenizer, example, Protocol(prompt="question_after"), limit)
            assert inside.ids == after.ids and inside.context == len(inside.ids)
            kept = limit if limit < len(whole.ids) else len(whole.ids)
            assert len(inside.ids) == kept
            if limit == 400:
                assert inside.ids == whole.ids[:200] + whole.ids[-200:]
            else:
                assert inside.ids == whole.ids


@pytest.mark.data
def test_a_chat_template_is_never_put_around_few_shot_and_code_tasks() -> None:
    from harness.evaluation.plan import Grid, protocols_of

    grid = Grid({}, {}, (), (Protocol(chat="template"), Protocol()), 1, (0,))
    assert len(protocols_of(LongBench("qasper"), grid)) == 2
    for task in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"):
        assert [protocol.chat for protocol in protocols_of(LongBench(task), grid)] == ["raw"]


def records(folder: Path, text: str | bytes, name: str = "longbench/qasper.jsonl") -> LongBench:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return LongBench("qasper", data_dir=folder)


ROW = {"input": "q", "context": "c", "answers": ["a"], "length": 3, "all_classes": None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n".join([json.dumps(ROW)] * 16 + ["{broken"]), "line 17: not JSON"),
        (json.dumps({**ROW, "answers": []}), "line 1: field 'answers' is empty"),
        (json.dumps({key: value for key, value in ROW.items() if key != "answers"}), "line 1: no field 'answers'"),
        (b"\x00\xff\xfe\x80junk", "line 1: not JSON"),
        ("[1, 2]", "line 1: a JSON object is expected"),
        (json.dumps({**ROW, "answers": "yes"}), "answers is not a list of texts"),
        (json.dumps({**ROW, "length": None}), "length is not a whole number"),
        (json.dumps({**ROW, "input": "\ud800"}), "line 1: not JSON"),
        (json.dumps({**ROW, "context": None}), "line 1: field 'context' is null"),
        (json.dumps({**ROW, "context": ["one passage", "another"]}), "line 1: field 'context' is a list, where a text"),
        (json.dumps({**ROW, "answers": ["a", None]}), "answers is not a list of texts"),
        ("", "holds no record"),
    ],
)
def test_broken_records_are_named_by_file_and_line(text: str | bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=says):
        _ = records(tmp_path, text).size


def test_a_null_input_is_no_input(tmp_path: Path) -> None:
    found, wanted = (records(tmp_path / str(n), json.dumps({**ROW, "input": text})) for n, text in enumerate((None, "")))
    assert found.example(0, 0, len) == wanted.example(0, 0, len)


INSTRUCTION = {"instruction": "say", "prompt": "say it", "output": "it"}


def instructions(folder: Path, **fields: Any) -> Instruct:
    (folder / "instruct").mkdir(parents=True)
    (folder / "instruct" / "dolly_eval.jsonl").write_text(json.dumps({**INSTRUCTION, **fields}) + "\n")
    return Instruct(data_dir=folder)


@pytest.mark.parametrize(
    ("fields", "prompt", "answers"),
    [
        ({"output": ["a", "b"]}, "say it", ("a", "b")),
        ({"output": [["a", "b"], "c"]}, "say it", ("a", "b", "c")),
        ({"output": ["a", None]}, "say it", ("a",)),
        ({"output": 7}, "say it", ("7",)),
        ({"prompt": [{"role": "user", "content": "hello"}], "input": None, "topic": None}, "hello", ("it",)),
    ],
)
def test_instruction_records_as_people_have_them(
    fields: dict[str, Any], prompt: str, answers: tuple[str, ...], tmp_path: Path
) -> None:
    task = instructions(tmp_path, **fields)
    assert (task.example(0, 0, len).prompt, task.example(0, 0, len).answers) == (prompt, answers)
    assert replace(task, template="plain").example(0, 0, len).prompt == "say" and task.example(0, 0, len).columns == {}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"output": None}, "field 'output' is empty"),
        ({"output": [None]}, "field 'output' is empty"),
        ({"output": [{"text": "a"}]}, "field 'output' is a dict"),
        ({"instruction": None}, "field 'instruction' is null"),
        ({"prompt": None}, "field 'prompt' is empty"),
        ({"prompt": [{"role": "system", "content": "be good"}, {"role": "user", "content": "hello"}]}, ".* 2 turns"),
        ({"input": ["a"]}, "field 'input' is a list"),
    ],
)
def test_instruction_records_that_cannot_be_read_are_named(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=f"line 1: {says}"):
        _ = instructions(tmp_path, **fields).size


def test_large_and_packed_records_are_read(tmp_path: Path) -> None:
    row = {**ROW, "context": "word " * 400_000}  # 2 MB
    packed = lzma.compress((json.dumps(row) + "\n\n").encode())
    bench = records(tmp_path, packed, "longbench/qasper.jsonl.xz")
    assert bench.size == 1 and len(bench.example(0, 0, len).prompt) > 2_000_000
    with pytest.raises(BadData, match="cannot be read"):
        load(Source(("x",), (), ""), records(tmp_path / "b", b"not packed", "x.jsonl.gz").data_dir)


def test_missing_data_say_where_they_were_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "o"))
    assert call("run", "--suite", "longbench", "--data-dir", str(tmp_path), *out) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no longbench/narrativeqa.jsonl in" in said and "not reachable" in said
    assert call("run", "--suite", "instruct", "--data-dir", str(tmp_path / "none"), *out) == 2
    assert "no such folder" in capsys.readouterr().err.strip().splitlines()[-1]
    assert call("run", "--benchmarks", "longbench_qaspar", *out) == 2
    assert call("run", "--benchmarks", "longbench_qasper(task=x)", *out) == 2
    assert "no LongBench task 'x'; known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("qasper.jsonl", '{"pred": "a"}', "line 1: no field 'answers'"),
        ("qasper.jsonl", '{"pred": 3, "answers": ["a"]}', "pred is not a text"),
        ("qasper.jsonl", '{"pred": "a", "answers": "a"}', "answers is not a list of texts"),
        ("trec.jsonl", '{"pred": "a", "answers": ["a"], "all_classes": [1]}', "all_classes is neither"),
        ("passage_retrieval_en.jsonl", '{"pred": "a", "answers": ["3"]}', "an answer is not of the form"),
        ("qasper.jsonl", "[" * 200_000, "not JSON"),
        ("nothing.jsonl", '{"pred": "a", "answers": ["a"]}', "is no prediction of a LongBench task"),
        ("qasper.jsonl", "", "holds no prediction"),
        ("qasper.txt", "", "is no prediction"),
    ],
)
def test_bad_predictions_get_one_line(
    name: str, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert call("score", "longbench", str(tmp_path / name)) == 2
    assert says in capsys.readouterr().err
    assert call("score", "longbench", str(tmp_path / "missing")) == 2


def test_scores_of_a_folder_as_json_and_by_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"pred": "x", "answers": ["x"], "length": 100}, {"pred": "y", "answers": ["x"], "length": 5000}]
    (tmp_path / "qasper.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lcc_e.jsonl").write_text(json.dumps({"pred": "x", "answers": ["x"], "all_classes": None, "length": 9000}))
    assert call("score", "longbench", str(tmp_path), "--json", "--workers", "1") == 0
    assert json.loads(capsys.readouterr().out) == {"lcc": 100.0, "qasper": 50.0}
    assert call("score", "longbench", str(tmp_path), "--json", "--extended", "--workers", "2") == 0
    found = json.loads(capsys.readouterr().out)
    (tmp_path / "lcc.jsonl").write_text((tmp_path / "lcc_e.jsonl").read_text())
    assert call("score", "longbench", str(tmp_path)) == 2
    assert "two files of predictions of lcc" in capsys.readouterr().err
    assert found["qasper"] == {"0-4k": 100.0, "4-8k": 0.0, "8k+": None}
    assert found["lcc"] == {"0-4k": None, "4-8k": None, "8k+": 100.0}


@pytest.mark.data
def test_a_run_on_real_records_is_finished_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "--benchmarks", "longbench_trec,longbench_multifieldqa_en,dolly(new_tokens=8)", "--limit", "1"]
    asked += ["--methods", "full,snapkv", "--budgets", "32", "--truncation", "400", "--max-new-tokens", "8"]
    asked += ["--data-dir", str(DATA), "--out", str(tmp_path)]
    assert call(*asked) == 0
    rows = read_rows(tmp_path)
    assert len([row for row in rows if row.status == "ok"]) == 2 * (2 + 2 + 1), "dolly has nothing behind its context"
    skipped = {row.reason for row in rows if row.status == "skipped"}
    assert skipped == {"no text behind the context, so nothing can be asked after it"}
    assert all(row.key.data for row in rows)
    kept = json.loads(next((tmp_path / "data").glob("*.json")).read_text())
    assert kept["licence"] and kept["records"] and kept["sha256"]
    text = (tmp_path / "report" / "scores.md").read_text()
    assert "prove the path, not the methods" in text and "judge" not in text
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "rows").iterdir())
    assert call(*asked) == 0
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "rows").iterdir())


@pytest.mark.data
@pytest.mark.parametrize("name", SETS)
def test_instruction_sets_score_their_own_answers(name: str) -> None:
    bench = Instruct(name, data_dir=DATA)
    for index in (0, bench.size - 1):
        example = bench.example(index, 0, len)
        assert bench.question(index).split("\n")[0][:50] in example.prompt
        assert Instruct(name, "plain", data_dir=DATA).example(index, 0, len).prompt == bench.question(index)
        assert bench.score(example.answers[0], example)["rougeL"] == pytest.approx(100)
        assert bench.score("", example)["rougeL"] == 0


def test_instruct_settings_are_checked() -> None:
    for settings in ({"dataset": "x"}, {"template": "x"}, {"new_tokens": 0}):
        with pytest.raises(ValueError, match=r"x|at least 1"):
            Instruct(**settings)  # type: ignore[arg-type]
