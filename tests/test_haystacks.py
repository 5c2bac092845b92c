"""Tasks that hide something, tasks of real long texts, and perplexity: what they ask, and how an answer is scored."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import zipfile
from collections import Counter
from pathlib import Path
from statistics import mean

import huggingface_hub
import pytest
import torch
from helpers import DATA, call

from benchmarks import BENCHMARKS, GROUPS, data
from benchmarks.babilong import LABELS, BabiLong, instruction, right
from benchmarks.data import BadData
from benchmarks.haystack import Haystack, place, weave
from benchmarks.loogle import KINDS, LooGLE
from benchmarks.manual import manual
from benchmarks.manual_questions import ManualQuestions, sections
from benchmarks.needle import NeedleInHaystack
from benchmarks.perplexity import Perplexity, PerplexityWindows
from benchmarks.ruler import RulerMultiKey, RulerSingle, RulerVariables
from benchmarks.write_out import WriteOut
from harness.engine.model import Model
from harness.evaluation.plan import token_counter
from harness.evaluation.prompts import CannotPrompt, Protocol, has_example, tokenize
from harness.models.load import load
from harness.registry import expand
from reports.more_tables import ahead_table
from reports.tables import lines
from results.store import read_rows

MADE = ("needle", "needle_facts", "ruler_single", "ruler_multi_key", "ruler_variables", "write_out")


@pytest.fixture(scope="module")
def reference() -> Model:
    return load("reference", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", MADE)
def test_an_example_is_the_same_whether_or_not_others_were_made(name: str, reference: Model) -> None:
    count = token_counter(reference)
    alone = BENCHMARKS[name].example(7, 3, count)
    for number in range(7):
        assert BENCHMARKS[name].example(number, 3, count).prompt != alone.prompt
    assert BENCHMARKS[name].example(7, 3, count) == alone != BENCHMARKS[name].example(7, 4, count)
    length = alone.columns.get("length", alone.columns.get("context"))
    ids = tokenize(reference.tokenizer, alone, Protocol(), 4096).ids
    assert int(length) - 40 < len(ids) <= int(length)  # type: ignore[arg-type]
    with pytest.raises(CannotPrompt, match="ask for a shorter one"):
        tokenize(reference.tokenizer, alone, Protocol(), len(ids) - 1)


def test_a_needle_lies_where_its_columns_say(reference: Model) -> None:
    task = NeedleInHaystack(lengths=3, depths=4)
    cells = [task.cell(number, 5) for number in range(24)]
    assert sorted(cells[:12]) == sorted(cells[12:]) == [(n, d / 3) for n in (512, 1024, 1536) for d in range(4)]
    assert cells[:12] != cells[12:], "every turn in an order of its own"
    for number in range(12):
        example = task.example(number, 5, token_counter(reference))
        at = example.prompt.index(example.answers[0]) / example.context_end
        assert at == pytest.approx(float(example.columns["depth"]) / 100, abs=0.12)
        assert example.columns["context"] == cells[number][0]
    assert task.score("It is: smoked EEL.", replaced(example, "the smoked eel"))["words"] == 100  # type: ignore[arg-type]
    assert task.score("smoked", replaced(example, "the smoked eel")) == {"words": 50.0, "rouge1": pytest.approx(50.0)}


def replaced(example: object, answer: str) -> object:
    from dataclasses import replace

    return replace(example, answers=(answer,))  # type: ignore[type-var]


def test_statements_are_put_where_they_were_told() -> None:
    text, depths = place(["a", "b", "c"], ["X", "Y"], [0, 2])
    assert text == " X a b Y c" and depths[0] == 0 and text[round(depths[1] * len(text)) :].startswith(" Y")
    text, depths = weave(random.Random(1), ["a"] * 50, ["X", "Y"])
    assert text.count("a") == 50 and text.index("X") < text.index("Y") and depths == sorted(depths)


def test_haystacks_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "one.txt").write_text("First things first. " * 3 + "Then\nthe second! " * 60)
    task = RulerSingle(length=150, haystack="essays", data_dir=tmp_path)
    example = task.example(0, 0, lambda text: len(text.split()))
    assert "Then the second!" in example.prompt and len(task.data) == 16 and task.records().source == "essays"
    with pytest.raises(BadData, match=r"haystack essays holds \d+ tokens; 9\d\d are asked for|haystack essays holds"):
        RulerSingle(length=900, haystack="essays", data_dir=tmp_path).example(0, 0, lambda text: len(text.split()))
    asked = ("run", "--model", "reference", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"))
    assert call(*asked, "--benchmarks", "needle(haystack=essays)") == 2
    assert "haystack essays holds" in capsys.readouterr().err
    assert call(*asked, "--benchmarks", "needle(haystack=absent)") == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(BadData, match="no text"):
        (tmp_path / "empty").mkdir()
        Haystack.of(tmp_path / "empty")


def count_words(text: str) -> int:
    return len(text.split())


def test_a_haystack_is_as_long_as_its_row_says_or_refused(tmp_path: Path) -> None:
    for name, text in (("giant", "word " * 5000 + "."), ("short", "A few words are here. " * 500)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text)
    assert sum(len(line.split()) for line in Haystack.of(tmp_path / "short").fill(900, "s", count_words)) == 900
    with pytest.raises(BadData, match="a sentence of 5001 tokens does not fit into the 900"):
        Haystack.of(tmp_path / "giant").fill(900, "s", count_words)
    lengths = [sum(len(text.split()) for text in Haystack.of(Path("python")).fill(700, f"{n}", count_words)) for n in range(100)]
    assert min(lengths) >= 630 and max(lengths) <= 700, "the manual's long sentences are cut"


def test_questions_on_the_manual_hide_what_they_are_scored_by() -> None:
    task = ManualQuestions(length=100)
    assert task.size >= 30 and task.data == hashlib.sha256(manual().encode()).hexdigest()
    found = [task.example(number, 0, count_words) for number in range(task.size)]
    assert len({example.answers for example in found}) == task.size, "each section once"
    for example, section in zip(found, sections(), strict=True):
        (first,) = example.answers
        assert first not in example.prompt and first.endswith(".") and 8 <= len(first.split()) <= 40
        assert " ".join(first.split()) in " ".join(manual().split()) and section.title in example.prompt[example.context_end :]
        assert 40 < count_words(example.prompt[: example.context_end]) <= 103
        assert task.score(first, example) == {"rougeL": 100} and task.score("", example) == {"rougeL": 0}
    assert found[3] == task.example(3, 9, count_words)
    with pytest.raises(ValueError, match="at least 1 token"):
        ManualQuestions(new_tokens=0)


def test_variables_that_hold_the_value_are_those_of_its_chain(reference: Model) -> None:
    task = RulerVariables(chains=3, hops=2)
    for number in range(20):
        riddle = task.riddle(random.Random(number))
        value = next(word for word in riddle.question.replace("?", "").split() if word.isdecimal() and len(word) == 5)
        holds: dict[str, str] = {}
        for line in riddle.statements:  # in this order every value is known before it is passed on
            _, name, *_, source = line.rstrip(".").split()
            holds[name] = source if source.isdecimal() else holds[source]
        assert {name for name, held in holds.items() if held == value} == set(riddle.expected)
        assert len(holds) == 9 and len(riddle.expected) == 3
    assert task.score("abcde, KLMNO", replaced(BENCHMARKS["needle"].example(0, 0, len), "")) == {"found": 100.0}  # type: ignore[arg-type]
    many = RulerMultiKey(keys=5).riddle(random.Random(2))
    assert len(set(many.statements)) == 5 and sum(many.expected[0] in line for line in many.statements) == 1


def test_a_register_is_scored_by_the_lines_that_come_whole_and_in_order(reference: Model) -> None:
    task = WriteOut(lines=8)
    example = task.example(3, 0, token_counter(reference))
    lines = list(example.answers)
    assert "Register\n" + "\n".join(lines) in example.prompt[: example.context_end]
    assert example.max_new_tokens == 8 * 16 > token_counter(reference)("\n".join(lines))
    with pytest.raises(BadData, match="ask for more line_tokens"):
        WriteOut(lines=8, line_tokens=4).example(3, 0, token_counter(reference))
    for said, score in (
        (lines, 100.0),
        (["Of course:", *lines, "Thank you"], 100.0),
        (lines[:3] + lines[4:], 87.5),
        ([lines[1], lines[0], *lines[2:]], 87.5),
        ([line.replace(":", ": 9") for line in lines], 0.0),
        (lines[:4] * 2, 50.0),
        (lines[::-1], 12.5),
    ):
        assert task.score("\n".join(said), example) == {"lines": score}
    with pytest.raises(ValueError, match="lines 1 must lie between 2"):
        WriteOut(lines=1)
    with pytest.raises(BadData, match="do not fit into 100 tokens"):
        WriteOut(length=100, lines=40).example(0, 0, token_counter(reference))


@pytest.mark.parametrize(
    ("task", "answer", "question", "target", "correct"),
    [
        (1, "The most recent location of Mary is Garden.", "Where is Mary?", "garden", True),
        (1, "garden", "Where is Mary?", "kitchen", False),
        (1, "garden or kitchen", "Where is Mary?", "garden", False),
        (1, "I do not know.\nThe garden.", "Where is Mary?", "garden", False),  # only the first sentence counts
        (1, "garden <context> kitchen", "Where is Mary?", "garden", True),
        (1, "garden <example> kitchen", "Where is Mary?", "garden", True),
        (3, "Before the garden the football was in the kitchen.", "Where was the football before the garden?", "kitchen", True),
        (3, "It was in the garden.", "Where was the football before the garden?", "kitchen", False),
        (4, "The bathroom is east of the office", "What is the bathroom east of?", "office", True),
        (5, "bill", "Who did Fred give the football to?", "Bill", True),
        (5, "Fred gave the football to Bill", "Who did Fred give the football to?", "Bill", True),
        (5, "Fred gave the milk to Bill", "Who did Fred give the football to?", "Bill", False),
        (5, "", "Who gave the milk?", "Bill", False),
    ],
)
def test_babilong_is_scored_as_officially(task: int, answer: str, question: str, target: str, correct: bool) -> None:
    assert right(task, answer, question, target) is correct


def test_babilong_instructions_say_how_to_answer() -> None:
    for number in LABELS:
        told = instruction(number)
        assert told.before.count("<example>") == told.before.count("</example>") >= 2
        assert told.before.endswith("<context>\n") and told.after.startswith("\n</context>")
        assert told.before.index("</example>") < max(told.before.find("Always return"), told.before.find("Your answer should"))


@pytest.mark.data
@pytest.mark.parametrize("length", ["0k", "1k", "2k", "4k"])
def test_babilong_records(length: str) -> None:
    for number in LABELS:
        task = BabiLong(number, length, data_dir=DATA)
        for index in range(task.size):
            example = task.example(index, 0, len)
            assert example.answers[0].lower() in LABELS[number] or number == 5
            assert task.score(f"It is {example.answers[0]}.", example)["accuracy"] == 100
            assert example.prompt[: example.context_end].endswith(str(task.records().rows[index]["input"]).strip())


@pytest.mark.data
def test_loogle_asks_every_question_of_its_kind() -> None:
    lines = (DATA / "loogle" / "longdep_qa.jsonl").read_text().splitlines()
    types = Counter(pair["type"] for line in lines for pair in ast.literal_eval(json.loads(line)["qa_pairs"]))
    assert {kind: LooGLE(kind, data_dir=DATA).size for kind in KINDS if kind != "short_qa"} == {
        kind: types[str(found)] for kind, (_, found, _) in KINDS.items() if kind != "short_qa"
    }
    assert LooGLE("short_qa", data_dir=DATA).size == 39
    prompts = json.loads((DATA / "loogle" / "config" / "task2prompt.json").read_text())
    task = LooGLE("computation", data_dir=DATA)
    example = task.example(1, 0, len)
    document = next(str(row["input"]) for row in task.records().rows if str(row["input"]) in example.prompt)
    assert example.prompt.startswith(prompts["longdep_qa"].split("{input}")[0] + document)
    assert example.max_new_tokens == 32 and task.score(example.answers[0], example) == {"f1": 100.0}


def test_loogle_records_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "loogle").mkdir()
    path = tmp_path / "loogle" / "longdep_qa.jsonl"
    for pairs, said in (("[{'Q': 1}]", "no list of questions"), ("[{'Q'", "no Python literal"), ([], "no question of type")):
        path.write_text(json.dumps({"input": "text", "qa_pairs": pairs}) + "\n")
        from benchmarks import data, loogle

        data.load.cache_clear()
        loogle._questions.cache_clear()
        with pytest.raises(BadData, match=said):
            LooGLE("timeline", data_dir=tmp_path).size  # noqa: B018


def test_loogle_as_the_hub_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"doc_id": "d", "task": "shortdep_qa", "context": "A document.", "question": "How many?", "answer": "a few"}
    rows = [row, {**row, "question": "Who?", "answer": "nobody"}]
    for name in ("shortdep_qa.jsonl", "shortdep_qa/test-00000-of-00001.jsonl"):
        path = tmp_path / name.replace("/", "-") / "loogle" / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        task = LooGLE("short_qa", data_dir=tmp_path / name.replace("/", "-"))
        examples = [task.example(number, 0, len) for number in range(task.size)]
        assert [example.answers for example in examples] == [("a few",), ("nobody",)]
        assert all("A document." in example.prompt[: example.context_end] for example in examples)
        assert "Question: Who?" in examples[1].prompt[examples[1].context_end :]
    old = {"input": "A document.", "qa_pairs": [{"Q": "How many?", "A": "a few"}, {"Q": "Who?", "A": "nobody"}]}
    archive = tmp_path / "models--x" / "snapshots" / "commit" / "data.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("data/shortdep_qa.json", json.dumps(old) + "\n")
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, file, **__: asked.append(file) or str(archive))
    (tmp_path / "empty").mkdir()
    from_hub = LooGLE("short_qa", data_dir=tmp_path / "empty")
    assert [from_hub.example(n, 0, len).prompt for n in range(from_hub.size)] == [example.prompt for example in examples]
    assert asked == ["data.zip"]
    for broken, says in (({"question": None}, "'question' is empty"), ({"context": ["a"]}, "'context' is a list")):
        folder = tmp_path / says.split("'")[1] / "loogle"
        folder.mkdir(parents=True)
        (folder / "shortdep_qa.jsonl").write_text(json.dumps({**row, **broken}) + "\n")
        with pytest.raises(BadData, match=f"line 1: field {says}"):
            _ = LooGLE("short_qa", data_dir=folder.parent).size


def test_pieces_of_a_text_are_read_in_order_and_end_with_it(tmp_path: Path, reference: Model) -> None:
    (tmp_path / "own.txt").write_text("The captain walked slowly along the frozen river. " * 40)
    ids = reference.tokenizer((tmp_path / "own.txt").read_text(), add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    start = list(reference.tokenizer("")["input_ids"])[:1]  # type: ignore[misc]
    task = Perplexity("own.txt", data_dir=tmp_path, read=40, scored=10)
    for number in range(len(ids) // 50):
        prompt = tokenize(reference.tokenizer, task.example(number, 0, len), Protocol(), 4096, forced=True)
        assert prompt.ids + list(prompt.forced) == [*start, *ids[50 * number : 50 * (number + 1) - len(start)]]
        assert len(prompt.forced) == 10
        assert has_example(reference.tokenizer, task.example(number, 0, len))
    assert not has_example(reference.tokenizer, task.example(len(ids) // 50, 0, len))
    asked = ("run", "--model", "reference,reference+mixsga-3:1:6", "--data-dir", str(tmp_path), "--prompt", "question_in")
    asked += ("--benchmarks", "perplexity:own.txt(read=40,scored=10),perplexity_windows:own.txt(window=50)")
    asked += ("--methods", "full,snapkv", "--budgets", "12", "--limit", "1000")
    assert call(*asked, "--out", str(tmp_path / "out")) == 0
    rows = read_rows(tmp_path / "out")
    plain = [row for row in rows if row.key.model == "reference"]
    assert {row.key.example for row in plain} == set(range(len(ids) // 50)), "as many as the text holds"
    assert {row.key.routing for row in plain} == {""}
    routed = {(row.key.benchmark.split(":")[0], row.key.routing) for row in rows if row.key.routing}
    both = {("perplexity_windows", "expert_choice"), ("perplexity_windows", "argmax")}
    assert routed == {("perplexity", "expert_choice"), *both}, "where expert choice sees what is scored, argmax stands beside it"
    nats = {(row.key.routing, row.key.example): row.metrics["nll"] for row in rows if row.key.routing and row.status == "ok"
            and row.key.benchmark.startswith("perplexity_windows")}  # fmt: skip
    (table,) = ahead_table(lines(rows))
    pairs = [nats["argmax", number] - nats["expert_choice", number] for number in range(len(ids) // 50)]
    assert [cell.value for cell in table.rows[0][-2:]] == [pytest.approx(mean(pairs)), len(pairs)]
    for row in plain:
        if row.status == "ok" and row.key.benchmark.startswith("perplexity_windows") and row.key.example < 3:
            piece = torch.tensor([[*start, *ids[50 * row.key.example : 50 * (row.key.example + 1) - len(start)]]])
            with torch.no_grad():
                wanted = float(reference.network(input_ids=piece, labels=piece, use_cache=False).loss)
            assert row.metrics["nll"] == pytest.approx(wanted, rel=1e-5)
    assert {row.status for row in plain if row.key.benchmark.startswith("perplexity_windows") and row.key.budget} == {"skipped"}
    assert {row.key.benchmark for row in plain} == {
        "perplexity:own(read=40,scored=10)@1",
        "perplexity_windows:own(window=50)@1",
    }


@pytest.mark.parametrize("raw", ["café ".encode("latin-1"), "a word ".encode("utf-16"), bytes(range(256))])
def test_texts_of_another_encoding_are_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(raw * 99)
    for read in (lambda: data.text("a.txt", tmp_path), lambda: data.words(tmp_path / "a.txt")):
        with pytest.raises(data.BadData, match=r"a.txt is no UTF-8 text \(byte \d+ is 0x"):
            read()


def test_texts_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("run", "--model", "reference", "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path))
    assert call(*asked, "--benchmarks", "perplexity:absent") == 2
    assert "no text 'absent'" in capsys.readouterr().err
    (tmp_path / "blank.txt").write_text(" \n")
    assert call(*asked, "--benchmarks", "perplexity:blank.txt") == 2
    assert "holds no text" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least 2"):
        PerplexityWindows(window=1)


def test_group_names_stand_for_their_members() -> None:
    asked = ["babilong(length=2k)", "lm_eval:piqa", "hellaswag(fewshot=2)", "recall", "perplexity:wikitext2"]
    assert expand(asked, BENCHMARKS, GROUPS) == [
        *(f"babilong_qa{number}(length=2k)" for number in range(1, 6)),
        "lm_eval:piqa",
        "lm_eval:hellaswag(fewshot=2)",
        "recall",
        "perplexity:wikitext2",
    ]
    assert {name for group in GROUPS.values() for name in group} <= set(BENCHMARKS)


def test_needles_are_drawn_as_heat_maps(tmp_path: Path) -> None:
    asked = ("run", "--model", "reference", "--benchmarks", "needle_facts(shortest=200,longest=400,lengths=2,depths=3)")
    asked += ("--methods", "full,snapkv", "--budgets", "24", "--limit", "6", "--prompt", "question_after")
    assert call(*asked, "--out", str(tmp_path)) == 0
    full = [row for row in read_rows(tmp_path) if not row.key.budget]
    assert {(row.columns["context"], row.columns["depth"]) for row in full} == {(n, d) for n in (200, 400) for d in (0, 50, 100)}
    assert sum(row.metrics["words"] for row in full) >= 500, "the embedded model finds a lone needle"
    assert call("report", "--out", str(tmp_path), "--pictures", "png,svg,pdf") == 0
    drawn = sorted(path.suffix for path in (tmp_path / "report" / "plots").glob("needle_*"))
    assert drawn == [".pdf", ".png", ".svg"]
