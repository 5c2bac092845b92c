"""lm-eval's tasks over the sweep: over the full cache what lm-eval itself says, over a smaller one what masked attention says."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
import torch
from helpers import DATA, SCORED, call, masked_logits, network, read, selection, tiny, tokens, total_of

from benchmarks.base import Example, Request
from benchmarks.lm_eval_tasks import LmEval, _open, aggregate
from harness.cache import Budget
from harness.engine.model import Model
from harness.evaluation.loglikelihood import likelihood_prompts
from harness.evaluation.prompts import Branch, CannotPrompt, Prompt, Protocol
from harness.evaluation.sweep import Cell, Sweep
from harness.models.load import load
from results.store import read_rows

pytest.importorskip("lm_eval")

PARTS = ["the old miller", "a quiet stranger", "the code of Mira is 37 82.", "near the harbour"]
CHOICES = """task: our_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{said}}}} the colour is"
doc_to_choice: colours
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
WORDS = """task: our_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{said}}}} Question:"
doc_to_target: "{{{{colours[gold]}}}}"
generation_kwargs: {{max_gen_toks: 12, until: ["."]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TEXT = """task: our_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{said}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""


@pytest.fixture(scope="module")
def reference() -> Model:
    return load("reference", torch.float32, torch.device("cpu"))


def task_file(folder: Path, text: str, count: int = 12, **changed: Any) -> Path:
    rng = random.Random(3)
    rows = []
    for number in range(count):
        said = " ".join(rng.choices(PARTS, k=9))
        rows.append({"said": said, "colours": [" red", " deep sea blue", " green."][: 2 + number % 2], "gold": number % 2})
        rows[-1] |= changed if number == 3 else {}
    data, path = folder / "rows.jsonl", folder / f"{text.split()[1]}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(text.format(rows=data))
    return path


def stock(model: Model, path: Path) -> dict[str, Any]:
    """lm-eval by itself, over transformers' own attention and cache."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    alone = load("reference", torch.float32, torch.device("cpu")).network
    alone.set_attn_implementation("sdpa")
    judge = HFLM(pretrained=alone, tokenizer=model.tokenizer, batch_size=1)
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(model=judge, tasks=[str(path)], task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("text", [CHOICES, WORDS, TEXT], ids=["choices", "words", "text"])
def test_for_the_full_cache_the_numbers_are_lm_evals_own(text: str, reference: Model, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = task_file(tmp_path, text, 12 if text != TEXT else 3)
    name = path.stem
    asked = ("run", "--model", "reference", "--benchmarks", f"lm_eval:{path}", "--methods", "full", "--limit", "100")
    assert call(*asked, "--prompt", "question_in", "--out", str(tmp_path / "out")) == 0
    rows = sorted(read_rows(tmp_path / "out"), key=lambda row: row.key.example)
    assert {row.key.benchmark for row in rows} == {f"lm_eval:{name}@1"} and str(tmp_path) not in rows[0].to_json()
    theirs = stock(reference, path)
    for row, sample in zip(rows, sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"]), strict=True):
        said = [response[0] for response in sample["resps"]]
        if text == WORDS:
            assert row.answer == said[0]
        elif text == TEXT:
            assert json.loads(str(row.answer))[0][0] == pytest.approx(float(said[0]), abs=1e-3)
        else:
            for ours, (logprob, greedy) in zip(json.loads(str(row.answer)), said, strict=True):
                assert ours[0] == pytest.approx(float(logprob), abs=1e-4) and ours[1] == greedy
            assert row.metrics == {metric: float(sample[metric]) for metric in ("acc", "acc_norm")}
    (cell,) = [json.loads(found.read_text()) for found in (tmp_path / "out" / "lm_eval").glob("*.json")]
    assert cell["examples"] == len(rows) and cell["compressed"] == 0
    compared = {metric: value for metric, value in theirs["results"][name].items() if metric in cell["results"]}
    assert cell["results"] == pytest.approx(compared, abs=1e-5, rel=1e-5) and compared  # a perplexity is of thousands
    report = (tmp_path / "out" / "report" / "scores.md").read_text()
    assert "lm-eval's own aggregation" in report and f"| reference | {name} | full | - |" in report


def test_some_examples_are_aggregated_as_lm_eval_would(tmp_path: Path) -> None:
    task = LmEval(str(task_file(tmp_path, CHOICES)))
    right = "[[-1.0, true, 3], [-2.0, false, 3], [-9.0, false, 3]]"
    wrong = "[[-3.0, true, 3], [-2.0, false, 3], [-9.0, false, 3]]"
    answers = {2: json.dumps(json.loads(right)[:2]), 4: json.dumps(json.loads(wrong)[:2]), 9: wrong}
    scores = [task.score(answer, task.example(number, 0, len))["acc"] for number, answer in answers.items()]
    assert scores == [1.0, 0.0, 1.0]
    assert aggregate(task, answers)["acc,none"] == pytest.approx(2 / 3)


def test_requests_are_cut_into_tokens_as_lm_eval_cuts_them(reference: Model) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    theirs = HFLM(pretrained=reference.network, tokenizer=reference.tokenizer, batch_size=1)
    for context, continuation in (
        ("near the", " harbour"),
        ("the old ", "miller"),
        ("A:  ", " b"),
        ("37", "82 99"),
        ("x\n", "y"),
    ):
        example = Example(0, "", 0, (), 0, requests=(Request(context, continuation),))
        (prompt,) = likelihood_prompts(reference.tokenizer, example, Protocol(), 100)
        before, after = theirs._encode_pair(context, continuation)
        (one,) = prompt.branches
        assert ([*prompt.ids, *one.ids], one.scored) == ([*before, *after], len(after))
        assert len(prompt.ids) == max(1, len(before) - 1), "what follows a context's last token is predicted over the cache"
    long = "the captain walked slowly along the frozen river. " * 9
    ids = theirs.tok_encode(long)
    for limit in (7, 20, 1000):
        rolling = Example(0, "", 0, (), 0, requests=(Request("", long, rolling=True),))
        prompts = likelihood_prompts(reference.tokenizer, rolling, Protocol(), limit)
        windows = map(make_disjoint_window, get_rolling_token_windows(ids, theirs.prefix_token_id, limit, 1))
        for prompt, (before, after) in zip(prompts, windows, strict=True):
            assert [*before, *after][:-1][-limit:] == prompt.ids and list(prompt.one_pass) == after
        pair = Example(0, "", 0, (), 0, requests=(Request(long, " and went"),))
        (prompt,) = likelihood_prompts(reference.tokenizer, pair, Protocol(), limit)
        before, after = theirs._encode_pair(long, " and went")
        whole = [*before, *after][-(limit + 1) :]
        assert [*prompt.ids, *prompt.branches[0].ids] == whole


def test_contexts_that_begin_alike_are_read_once(reference: Model) -> None:
    def prompts(*pairs: tuple[str, str]) -> list[Prompt]:
        example = Example(0, "", 0, (), 0, requests=tuple(Request(*pair) for pair in pairs))
        return likelihood_prompts(reference.tokenizer, example, Protocol(), 100)

    same = "near the harbour lights the old miller"
    (one,) = prompts((same, " walked"), (same, " sang softly"))
    assert [branch.request for branch in one.branches] == [0, 1] and len(one.branches[1].ids) == one.branches[1].scored + 1
    (one,) = prompts((f"{same} walked", " home"), (f"{same} sang", " home"))
    assert all(len(branch.ids) > branch.scored for branch in one.branches), "what differs is brought by the branch"
    assert len(prompts((f"Mira {same}", " home"), (f"Oslo {same}", " home"))) == 2
    assert len(prompts((f"near {same}", " home"), (f"near a stranger {same}", " home"))) == 2, "less than half in common"
    with pytest.raises(CannotPrompt, match="no continuation"):
        prompts((same, ""))
    with pytest.raises(CannotPrompt, match="where a context ends"):
        likelihood_prompts(reference.tokenizer, Example(0, "", 0, (), 0), Protocol(prompt="question_after"), 100)


def test_continuations_over_a_compressed_cache_are_those_of_masked_attention(family: str) -> None:
    T = 50
    ids = tokens(T, seed=5)
    ends = [tokens(n, seed=n).tolist() for n in (1, 5, 9)]
    branches = tuple(Branch(number, tuple(end), len(end) - (number == 2) * 3) for number, end in enumerate(ends))
    cells = [Cell("full", SCORED["full"], None), Cell("snapkv", SCORED["snapkv"], Budget.parse("11"))]
    sweep = Sweep(tiny(family), Protocol())
    found = dict(sweep.example(Prompt(ids.tolist(), T, branches=branches), cells, 0))
    prefill = read(family, ids)
    kept = selection("snapkv", prefill, total_of(prefill, "11"))
    for cell, evicted in zip(cells, (None, kept), strict=True):
        for branch in branches:
            whole = torch.cat([ids, torch.tensor(branch.ids)])
            logprobs = masked_logits(family, whole, T, evicted).log_softmax(-1)
            places = range(len(whole) - branch.scored - 1, len(whole) - 1)
            wanted = sum(float(logprobs[place, whole[place + 1]]) for place in places)
            best = all(int(logprobs[place].argmax()) == int(whole[place + 1]) for place in places)
            likelihood = found[cell].answer.likelihoods[branch.request]  # type: ignore[union-attr]
            assert (likelihood.greedy, likelihood.tokens) == (best, branch.scored)
            assert likelihood.logprob == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert found[cells[1]].compressed and not found[cells[0]].compressed


def test_a_text_scored_in_one_pass_is_scored_as_transformers_does(family: str) -> None:
    ids = tokens(60, seed=8)
    prompt = Prompt(ids[:-1].tolist(), 59, one_pass=tuple(ids[20:].tolist()))
    cell = Cell("full", SCORED["full"], None)
    outcome = dict(Sweep(tiny(family), Protocol()).example(prompt, [cell], 0))[cell]
    net = network(family)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        logprobs = net(ids[None], use_cache=False).logits[0].log_softmax(-1)
    wanted = float(logprobs[19:-1].gather(-1, ids[20:, None]).sum())
    likelihood = outcome.answer.likelihoods[0]  # type: ignore[union-attr]
    assert likelihood.logprob == pytest.approx(wanted, rel=1e-5) and likelihood.tokens == 40
    assert outcome.counts is not None and not outcome.compressed


def test_evictions_refuse_a_text_that_is_scored_as_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = task_file(tmp_path, TEXT, 2)
    asked = (
        "--model",
        "reference",
        "--benchmarks",
        f"lm_eval:{path}",
        "--methods",
        "full,snapkv",
        "--budgets",
        "9",
        "--prompt",
        "question_in",
    )
    assert call("run", *asked, "--limit", "2", "--out", str(tmp_path / "out")) == 0
    assert "only `full` applies" in capsys.readouterr().err
    statuses = {row.key.method: row.status for row in read_rows(tmp_path / "out")}
    assert statuses == {"full@1": "ok", "snapkv@1": "skipped"}


def test_broken_tasks_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: Path | str, *more: str) -> str:
        assert call("run", "--model", "reference", "--benchmarks", f"lm_eval:{name}", *more, "--out", str(tmp_path / "out")) == 2
        said = capsys.readouterr().err.strip().splitlines()
        return said[-1]

    assert "no task 'nosuch'" in refused("nosuch")
    assert "no such file" in refused(tmp_path / "absent.yaml")
    assert "no lm_eval/boolq.jsonl in --data-dir" in refused("boolq", "--data-dir", str(tmp_path))
    assert "right answer 7 is none of its 3 choices" in refused(task_file(tmp_path, CHOICES, gold=7))
    odd = tmp_path / "odd.yaml"
    odd.write_text(task_file(tmp_path, CHOICES).read_text().replace("output_type: multiple_choice", "output_type: telepathy"))
    assert "telepathy" in refused(odd)
    (tmp_path / "lm_eval").mkdir()
    rows = tmp_path / "lm_eval" / "piqa.jsonl"
    whole = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    rows.write_text(json.dumps(whole) + "\n" + json.dumps({**whole, "label": 1}).replace('"label"', '"lable"') + "\n")
    assert "piqa.jsonl, line 2: no field 'label'" in refused("piqa", "--data-dir", str(tmp_path))
    rows.write_text(json.dumps({"goal": "g", "sol1": "a", "sol2": "b"}) + "\n")
    assert "piqa.jsonl" in refused("piqa", "--data-dir", str(tmp_path))


@pytest.mark.data
def test_published_tasks_run_on_local_rows() -> None:
    for name, choices in (("hellaswag", 4), ("piqa", 2), ("winogrande", 2), ("arc_easy", 4), ("arc_challenge", 4)):
        task = LmEval(name, data_dir=DATA)
        assert task.size == 200 and len(task.example(7, 0, len).requests) == choices
        assert task.metrics[0].name == "acc" and task.metrics[0].higher_is_better
        perfect = json.dumps([[-float(number), False, 1] for number in range(choices)])
        assert set(task.score(perfect, task.example(7, 0, len))) >= {"acc"}


def test_under_a_chat_template_the_context_is_the_users_message(reference: Model) -> None:
    from copy import deepcopy

    from lm_eval.models.huggingface import HFLM

    tokenizer = deepcopy(reference.tokenizer)
    assert tokenizer is not None
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]\n"
    theirs = HFLM(pretrained=reference.network, tokenizer=tokenizer, batch_size=1)
    example = Example(0, "", 0, (), 0, requests=(Request("the old miller walked", " slowly home"),))
    (prompt,) = likelihood_prompts(tokenizer, example, Protocol(chat="template"), 100)
    shown = theirs.apply_chat_template([{"role": "user", "content": "the old miller walked"}])
    before, after = theirs._encode_pair(shown, "slowly home")
    assert [*prompt.ids, *prompt.branches[0].ids] == [*before, *after] and prompt.branches[0].scored == len(after)
    with pytest.raises(CannotPrompt, match="no chat template"):
        likelihood_prompts(reference.tokenizer, example, Protocol(chat="template"), 100)


def test_a_continuation_of_one_token_feels_what_was_evicted(reference: Model) -> None:
    text = "the code of Mira is 37 82. " + "the old miller walked slowly along the frozen river. " * 12 + "the code of Mira is"
    example = Example(0, "", 0, (), 0, requests=(Request(text, " 37"), Request(text, " 82")))
    (prompt,) = likelihood_prompts(reference.tokenizer, example, Protocol(), 4000)
    cells = [Cell("full", SCORED["full"], None), Cell("streaming_llm", SCORED["streaming_llm"], Budget.parse("16"))]
    full, evicted = (o.answer.likelihoods for o in dict(Sweep(reference, Protocol()).example(prompt, cells, 0)).values())  # type: ignore[union-attr]
    assert all(abs(full[n].logprob - evicted[n].logprob) > 0.01 for n in (0, 1))


def test_a_task_is_known_by_all_that_it_asks_and_scores(tmp_path: Path) -> None:
    hashes = set()
    for number, (text, changed) in enumerate((("", {}), ("", {"gold": 0}), ("x", {}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = task_file(folder, CHOICES, **changed)
        if text:
            path.write_text(path.read_text().replace("  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n", ""))
        hashes.add(LmEval(str(path)).data)
    assert len(hashes) == 3


@pytest.mark.data
def test_no_example_is_among_its_own_worked_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = lm_eval.utils.env  # which compiles a task's templates anew for each of its records
    monkeypatch.setattr(templates, "from_string", cache(templates.from_string))
    task = LmEval("arc_easy", 25, DATA)
    questions = [row["question"] for row in task.records().rows]
    for index, question in enumerate(questions):
        if sum(question in other for other in questions) == 1:  # a few are asked twice
            assert task.example(index, 0, len).requests[0].context.count(question) == 1
    first = task.example(3, 0, len)
    _open.cache_clear()
    assert task.example(3, 0, len) == first, "the worked examples are drawn by a fixed seed"
    with pytest.raises(Exception, match=r"cannot be loaded|no record"):
        LmEval("mmlu_anatomy", data_dir=DATA).size  # noqa: B018  (its file is found, its data are on the hub)
