"""HeadKV: golden allocations, exact sums, score formulas by hand, and the estimator on the embedded model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FAMILIES, call, converted, head_scores, network, read, tiny, tokens

from benchmarks.haystack import Haystack
from benchmarks.needles import REASONING_NEEDLES, RETRIEVAL_NEEDLES, TEXTS
from harness.cache import Arena, Needs, keep_all
from harness.engine.rows import compact
from harness.errors import BadRequest
from harness.evaluation.head_scores import SHIPPED
from harness.models.load import REFERENCE, load
from harness.papers.importance import Attempt, Estimate, Journal, attempt, estimate_scores, observe, succeeded
from methods import METHODS
from methods.base import Eviction, Rows, score_prefill
from methods.headkv import BadScores, HeadScores, HeadShares, PaperHeadShares, attended, copied
from methods.snapkv import WindowAttention
from results.store import read_rows

PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "data" / "headkv" / "head_score"
LLAMA, MISTRAL = "Meta-Llama-3-8B-Instruct", "Mistral-7B-Instruct-v0.2"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published head scores are not in ../shared/data")

# model, kind, KV size, beta: sum, smallest, median, largest, and four heads, all without the window (headkv.md, section 2)
GOLDEN = (
    (LLAMA, "r2", 128, 1.01, (122864, 2, 14, 1821, 1821, 2, 4, 227)),
    (LLAMA, "r", 128, 1.5, (122880, 40, 40, 4213, 4213, 40, 40, 51)),
    (MISTRAL, "r2", 128, 1.1, (122880, 11, 24, 1801, 156, 21, 468, 1801)),
    (LLAMA, "r2", 64, 1.2, (57320, 10, 15, 719, 719, 10, 11, 98)),
    (LLAMA, "r2", 1024, 1.2, (1040386, 170, 257, 13208, 13208, 171, 183, 1786)),
)


def published(model: str, kind: str) -> HeadScores:
    ending = {"r": "retrieval_heads", "r2": "retrieval_reasoning_heads"}[kind]
    return HeadScores.load(PUBLISHED / f"{model}_{ending}.json.xz")


def rows_of(tokens: int, width: int = 1, layers: int = 32, heads: int = 32, window: int = 8) -> Rows:
    count = layers * heads // width
    first = np.tile(np.arange(0, heads, width), layers)
    layer = np.repeat(np.arange(layers), heads // width)
    return Rows(layer, np.full(count, tokens), np.full(count, window), first, np.full(count, width), layers, tokens)


@needs_published
@pytest.mark.parametrize(("model", "kind", "size", "beta", "golden"), GOLDEN)
def test_paper_allocation_is_the_authors(model: str, kind: str, size: int, beta: float, golden: tuple[int, ...]) -> None:
    allocator = PaperHeadShares(kind, beta, scores=published(model, kind))  # type: ignore[arg-type]
    counts = allocator.counts(rows_of(10**6), size * 1024, []) - 8
    at = counts.reshape(32, 32)
    heads = (at[15, 30], at[0, 0], at[31, 31], at[18, 0])
    assert (counts.sum(), counts.min(), int(np.median(counts)), counts.max(), *heads) == golden


@needs_published
@pytest.mark.parametrize(("model", "kind"), [(LLAMA, "r"), (LLAMA, "r2"), (MISTRAL, "r"), (MISTRAL, "r2")])
def test_exact_allocation_spends_what_it_is_given(model: str, kind: str) -> None:
    scores = published(model, kind)
    for length in (100, 500, 2048, 7950, 32000):
        for width in (1, 4):
            rows = rows_of(length, width)
            for size, beta in ((64, 1.005), (128, 1.5), (1024, 1.2)):
                if size >= length:
                    continue
                allocator = HeadShares(kind, beta, scores=scores)  # type: ignore[arg-type]
                counts = allocator.counts(rows, size * len(rows), [])
                assert counts.sum() == size * len(rows)
                least = np.floor((size - 8) * (1 - 1 / beta)) + 8
                assert counts.min() >= min(least, length)
                assert counts.max() <= length
                weights = allocator.weights(rows).round(12)  # what differs by rounding is equal, the later one first
                order = np.lexsort((-np.arange(len(rows)), weights))
                assert (np.diff(counts[order]) >= 0).all(), "a row that weighs more got less"


@needs_published
def test_exact_equals_paper_but_for_rounding_where_nothing_is_clamped() -> None:
    scores = published(LLAMA, "r2")
    rows = rows_of(10**6)
    for size, beta in ((64, 1.2), (128, 2.0), (1024, 1.25)):
        paper = PaperHeadShares("r2", beta, scores=scores).counts(rows, size * 1024, [])
        exact = HeadShares("r2", beta, scores=scores).counts(rows, size * 1024, [])
        pool = (size - 8) / beta - (size - 8) // beta  # the authors floor the pool: up to an entry a head goes another way
        share = scores.values.ravel() / scores.values.sum()
        assert (np.abs(exact - paper) <= 1.5 + pool * share * 1024).all()


@needs_published
def test_what_a_full_head_cannot_hold_is_lost_by_the_paper_and_moved_on_by_ours() -> None:
    rows = rows_of(2048)
    scores = published(LLAMA, "r")
    target = 512 * 1024
    paper = PaperHeadShares("r", 1.2, scores=scores).counts(rows, target, []).sum() - 8 * 1024
    assert abs(1 - paper / (504 * 1024) - 0.384) < 0.001  # headkv.md: 38.4 % of the prefix budget
    assert HeadShares("r", 1.2, scores=scores).counts(rows, target, []).sum() == target


def test_paper_arithmetic_by_hand() -> None:
    """KV size 20, window 8, beta 5: 12 beyond the window, a pool of 2 a head and 10 guaranteed."""
    runs = np.array([[[0.0, 3.0], [1.0, 0.0]]])
    scores = HeadScores("m", "", "r2", runs, 1)
    counts = PaperHeadShares("r2", 5.0, scores=scores).counts(rows_of(1000, layers=2, heads=2), 20 * 4, [])
    assert counts.tolist() == [8 + 10, 8 + 10 + 6, 8 + 10 + 2, 8 + 10]
    assert HeadShares("r2", 1.5, base=12, scores=scores).counts(rows_of(99, layers=2, heads=2), 80, []).tolist() == [20] * 4


def test_equal_scores_and_a_large_beta_are_snapkv(family: str) -> None:
    prefill = read(family, tokens(60))
    scores = score_prefill(WindowAttention(), prefill)
    equal = HeadScores("m", "", "r2", np.ones((1, 3, 4)), 1)
    snapkv = METHODS["snapkv"]
    assert isinstance(snapkv, Eviction)
    rows = prefill.shape.layers * prefill.shape.kv_heads
    for total in (rows * 9, rows * 13 + 5):
        wanted = snapkv.compress(prefill, total, scores)
        for shares in (HeadShares("r2", 1.2, scores=equal), HeadShares("r2", 1e12, scores=head_scores())):
            got = Eviction(WindowAttention(), shares).compress(prefill, total, scores)
            for mine, theirs in zip(got, wanted, strict=True):
                if any(kv.window for kv in prefill.layers) and shares.scores is equal:
                    continue  # rows of unequal length weigh unequally: a share of T, not of the row
                for ours, other in zip(mine, theirs, strict=True):
                    assert torch.equal(ours.kept, other.kept)  # type: ignore[arg-type]


def test_a_shuffle_deals_the_same_scores_to_other_heads() -> None:
    plain = HeadShares("r2", scores=head_scores())
    one, two = replace(plain, shuffle=1), replace(plain, shuffle=2)
    assert sorted(one.shares().ravel()) == sorted(plain.shares().ravel())
    assert (one.shares() != plain.shares()).any() and (one.shares() != two.shares()).any()
    assert (one.shares() == replace(plain, shuffle=1).shares()).all()


def test_copied_by_hand() -> None:
    """Two heads, three steps, the answer at 2..4 holds tokens 7 and 9."""
    ids = torch.tensor([5, 7, 7, 9, 5, 1, 1, 1])
    said = torch.tensor([7, 9, 5])
    attention = torch.zeros(2, 3, 8)
    attention[0, 0, 2] = attention[0, 1, 3] = attention[0, 2, 2] = 1.0  # copies both; the third step is one too many
    attention[1, 0, 1] = 1.0  # the right token, outside the span
    attention[1, 1, 2] = 1.0  # inside the span, another token than is said
    assert copied(attention, (2, 4), ids, said).tolist() == [1.0, 0.0]


def test_attended_by_hand() -> None:
    """A span of two: the two most attended count, as far as they lie in it."""
    attention = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0]]])
    assert attended(attention, (1, 3)).tolist() == pytest.approx([(0.3 + 0.3) / 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_watched_is_transformers_own_attention(family: str) -> None:
    ids = tokens(40, seed=4)
    model = tiny(family)
    prefill = model.prefill(ids[:30], Needs())[0]
    cache = compact(prefill, [keep_all(prefill)], 20)
    seen: dict[int, torch.Tensor] = {}
    model.decode(cache, ids[None, 30:], watch=lambda layer, attention: seen.update({layer: attention.clone()}))
    net = network(family)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        official = net(ids[None], output_attentions=True, use_cache=False).attentions
    assert len(seen) == len(official) == 3
    for layer, theirs in enumerate(official):
        assert (seen[layer] - theirs[0, :, 30:]).abs().max() < 1e-5


def test_needles_are_found_where_they_were_put_and_lie_everywhere() -> None:
    model = load("reference", torch.float32, torch.device("cpu"))
    assert model.tokenizer is not None
    for kind in ("r", "r2"):
        for needles in ("text", "facts"):
            estimate = Estimate(kind, needles, max_length=1600, lengths=2, depths=3)  # type: ignore[arg-type]
            for number in range(30):
                made = attempt(model.tokenizer, estimate, Haystack(), number)
                length, depth = estimate.place(number)
                words = model.tokenizer.decode(made.ids[slice(*made.span)])
                assert estimate.needle(number).span[1] in words
                assert len(words) <= len(estimate.needle(number).span[1]) + 8
                assert length - 60 < len(made.ids) <= length
                assert abs(made.span[0] / len(made.ids) - depth) < 0.3
                assert model.tokenizer.decode(made.answer).strip() == estimate.needle(number).answer
    for draw in (*RETRIEVAL_NEEDLES.values(), *REASONING_NEEDLES.values()):
        assert len({draw(n, random.Random(n)).answer for n in range(20)}) >= 20
    for kind, written in (("r", "retrieval"), ("r2", "reasoning")):
        asked = {Estimate(kind, "text").needle(n).span[1] for n in range(4 * len(TEXTS[written]))}  # type: ignore[arg-type]
        assert len(asked) >= len(TEXTS[written]), "every needle takes its turn"
    reasoning = REASONING_NEEDLES["text"]
    assert {reasoning(0, random.Random(n)).span[0] for n in range(40)} == {0, 1, 2}


def test_success_is_judged_as_the_authors_do() -> None:
    assert succeeded("r", "it is smoked eels on bread", "smoked eel on rye bread")  # four of five stems
    assert not succeeded("r", "an eel", "smoked eel on rye bread")
    assert succeeded("r2", "Marta loves old accordions", "Marta loves the old accordions.")
    assert not succeeded("r2", "Ilse loves boats", "Marta loves the old accordions.")


def test_an_estimate_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    model = load("reference", torch.float32, torch.device("cpu"))
    estimate = Estimate("r2", "facts", max_length=400, lengths=2, depths=2, attempts=5)

    def stop_at(count: int):
        def progress(done: int) -> None:
            stop_at.seen += done  # type: ignore[attr-defined]
            if stop_at.seen == count:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        stop_at.seen = 0  # type: ignore[attr-defined]
        return progress

    whole = estimate_scores(model, estimate, Haystack(), tmp_path / "whole.json", stop_at(99))
    with pytest.raises(KeyboardInterrupt):
        estimate_scores(model, estimate, Haystack(), tmp_path / "two.json", stop_at(2))
    (journal,) = tmp_path.glob("two.*.attempts.jsonl")
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("a") as handle:
        handle.write('{"attempt": 2, "sco')  # torn
    fewer = estimate_scores(model, replace(estimate, seed=1, attempts=1), Haystack(), tmp_path / "one.json", stop_at(99))
    assert fewer.attempts == 1, "another estimate begins anew"
    resumed = estimate_scores(model, estimate, Haystack(), tmp_path / "two.json", stop_at(99))
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "two.json").read_text()
    assert (resumed.runs == whole.runs).all() and not journal.exists()
    assert 0 < whole.successes <= whole.attempts == 5
    assert whole.values.max() <= 1


def test_the_scores_shipped_for_smollm2_are_of_its_shape_and_say_how_they_were_made() -> None:
    found = [HeadScores.load(path) for path in sorted(SHIPPED["smollm2"].glob("*.json"))]
    assert [shipped.kind for shipped in found] == ["er", "r", "r2"] and len({shipped.revision for shipped in found}) == 1
    for shipped in found:
        shipped.check("smollm2", shipped.revision, 30, 9)
        assert shipped.attempts == shipped.settings["attempts"] >= shipped.successes == len(shipped.runs) > 0
        assert shipped.settings["chat"] == "template" and shipped.settings["needles"] == "text"
        assert shipped.settings["teacher_forced"] == (shipped.kind != "r2"), "of R and ER the right answers were fed"


def test_the_embedded_models_scores_are_its_own_and_come_again() -> None:
    model = load("reference", torch.float32, torch.device("cpu"))
    for kind in ("r", "er", "r2"):
        shipped = HeadScores.load(REFERENCE / "head_scores" / f"reference_{kind}.json")
        shipped.check(model.name, model.revision, 4, 8)
        assert shipped.kind == kind and shipped.successes > 90 and shipped.attempts == 100
    settings = {key: value for key, value in shipped.settings.items() if key != "dtype"}
    estimate = Estimate(**settings)  # type: ignore[arg-type]
    made = attempt(model.tokenizer, estimate, Haystack(), 0)  # type: ignore[arg-type]
    outcome = observe(model, made, estimate, Arena())
    assert outcome.scores is not None and np.allclose(outcome.scores, shipped.runs[0], atol=1e-4)


def test_artefacts_come_back_and_bad_ones_are_refused(tmp_path: Path) -> None:
    scores = replace(head_scores(), settings={"seed": 3})
    path = tmp_path / "s.json"
    scores.save(path)
    again = HeadScores.load(path)
    assert (again.runs == scores.runs).all() and again.sha256 == scores.sha256 and again.settings == {"seed": 3}
    again.check("tiny", "0", 3, 4)
    for wrong, says in (
        (("other", "0", 3, 4), "not inherited"),
        (("tiny", "1", 3, 4), "not inherited"),
        (("tiny", "0", 4, 3), "the model has 4 x 3"),
    ):
        with pytest.raises(BadScores, match=says):
            again.check(*wrong)
    found = json.loads(path.read_text())
    shuffled = dict(sorted(found["runs"].items(), key=lambda item: item[0][::-1]))
    path.write_text(json.dumps({**found, "runs": shuffled}))
    assert (HeadScores.load(path).runs == scores.runs).all(), "the order of the keys mattered"
    for change, says in (
        ({"2-3": [0.1]}, "equally many"),
        ({"2-3": None}, "heads are missing|equally many"),
        ({"2-3": [float("nan"), 0.0]}, "not all of them are numbers"),
        ({"2-3": [-1.0, 0.0]}, "below 0"),
        ({key: [0.0, 0.0] for key in found["runs"]}, "all of them are 0"),
        ({"head": [0.0, 0.0]}, "is no head"),
        ({"5-0": [0.0, 0.0]}, "heads are missing"),
    ):
        path.write_text(json.dumps({**found, "runs": {**found["runs"], **change}}))
        with pytest.raises(BadScores, match=says):
            HeadScores.load(path)
    for text, says in (
        ("[]", "JSON object"),
        ("{", "cannot be read"),
        ("{}", "is named MODEL"),
        ('{"format": "x"}', "format 'x'"),
    ):
        path.write_text(text)
        with pytest.raises(BadScores, match=says):
            HeadScores.load(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "headkv_r2(beta=1)"), "beta 1.0 must be above 1"),
        (("--methods", "headkv_r2(beta=0.5)"), "beta 0.5 must be above 1"),
        (("--methods", "headkv_r2(kind=x)"), "none of r, er, r2"),
        (("--methods", "headkv_r2(scores=x)"), "no setting 'scores'"),
        (("--methods", "headkv_r2", "--budgets", "4"), "cannot hold the 8 protected"),
        (("--methods", "headkv_r2", "--head-scores", "missing.json"), "cannot be read"),
        (("--methods", "headkv_r2", "--model", "random:tiny-llama"), "it needs r2 head scores of this model"),
        (
            ("--methods", "headkv_r2", "--model", "random:tiny-llama", "--head-scores", f"{REFERENCE}/head_scores"),
            "scores are not inherited",
        ),
    ],
)
def test_bad_requests_about_head_scores(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", "--benchmarks", "random_tokens(length=64)", "--limit", "1", "--budgets", "20", "--out", str(tmp_path)]
    assert call(*asked, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1] and len([line for line in said if line.startswith("run_all.py:")]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--haystack", "EMPTY"), "no text in its .txt files"),
        (("--max-length", "40", "--needles", "text"), "do not fit into a context of 8"),
        (("--max-length", "99999"), "leaves no room for an answer"),
        (("--attempts", "0"), "--attempts 0 must be at least 1"),
        (("--out", "map.png"), "must name a .json file"),
        (("--chat", "template"), "no chat template"),
        (("--model", "random:tiny-llama", "--attempts", "2", "--max-length", "4000"), "none of 2 attempts (0 successes)"),
    ],
)
def test_bad_requests_to_the_estimator(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path) if text == "EMPTY" else text for text in arguments]
    asked = ["importance", "--model", "reference", "--kind", "r2", "--out", str(tmp_path / "s.json")]
    assert call(*asked, *given) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("variant", "layers"), [("mixsga-3:1:6", 4), ("cla-50", 2)])
def test_heads_of_a_variant_have_scores_of_their_own(variant: str, layers: int, tmp_path: Path) -> None:
    """Rows of experts, and rows that two layers read; HeadKV then runs on the variant."""
    name, out = f"reference+{variant}", tmp_path / "s.json"
    asked = ["importance", "--model", name, "--kind", "r2", "--attempts", "2", "--max-length", "1000", "--teacher-forced"]
    assert call(*asked, "--out", str(out)) == 0
    scores = HeadScores.load(out)
    assert scores.variant.startswith(name) and scores.runs.shape == (2, layers, 8) and 0 < scores.values.max() <= 1
    run = ["run", "--model", name, "--methods", "full,headkv_r2", "--budgets", "20", "--limit", "1", "--benchmarks", "recall"]
    assert call(*run, "--prompt", "question_in", "--head-scores", str(out), "--out", str(tmp_path / "out")) == 0
    rows = [row for row in read_rows(tmp_path / "out") if row.key.method_name == "headkv_r2"]
    assert len(rows) == 1 and rows[0].status == "ok" and rows[0].bytes_kept


def test_what_two_layers_read_has_the_mean_of_their_scores() -> None:
    model, ids = converted("llama", "cla-50"), tokens(40).tolist()
    estimate, seen = Estimate("er", "facts", teacher_forced=True), []  # type: ignore[var-annotated]
    work = Attempt(ids[:30], (10, 14), ids[30:34], "")
    found = observe(model, work, estimate, Arena()).scores
    cache = compact(
        model.prefill(torch.tensor(ids[:29]), Needs())[0], [keep_all(model.prefill(torch.tensor(ids[:29]), Needs())[0])], 20
    )
    model.decode(cache, torch.tensor([ids[29:33]]), watch=lambda layer, attention: seen.append((layer, attention.clone())))
    assert [layer for layer, _ in seen] == sorted(layer for layer, _ in seen) and len(seen) == model.depth > model.shape.layers
    for layer in range(model.shape.layers):
        mine = [attended(attention, (10, 14)).numpy() for number, attention in seen if number == layer]
        assert found is not None and np.allclose(found[layer], np.mean(mine, 0), atol=1e-6)


def test_teacher_forcing_scores_a_model_that_cannot_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    asked = ["importance", "--model", "random:tiny-llama", "--kind", "er", "--attempts", "2", "--max-length", "2000"]
    haystack = tmp_path / "hay"
    haystack.mkdir()
    (haystack / "a.txt").write_text("A sentence of nothing. Another one of it! " * 20)
    assert call(*asked, "--teacher-forced", "--haystack", str(haystack), "--out", str(out)) == 0
    assert "teacher-forced (ours): 2 of 2" in capsys.readouterr().out
    scores = HeadScores.load(out)
    assert scores.settings["teacher_forced"] and scores.settings["haystack"]
    assert out.with_suffix(".png").stat().st_size > 1000
    run = ["run", "--model", "random:tiny-llama", "--methods", "full,headkv_er", "--budgets", "20", "--limit", "1"]
    run += ["--benchmarks", "random_tokens(length=64)", "--out", str(tmp_path / "o"), "--head-scores", str(out)]
    assert call(*run) == 0
    row = next(row for row in read_rows(tmp_path / "o") if row.key.method.startswith("headkv"))
    assert row.status == "ok" and scores.sha256 in row.key.params


def test_beta_is_chosen_on_held_out_examples_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["beta", "--methods", "headkv_r2", "--budgets", "32", "--benchmarks", "recall(length=300)", "--limit", "23"]
    out = tmp_path / "b"
    assert call(*asked, "--prompt", "question_in", "--no-fidelity", "--betas", "1.1,5", "--out", str(out)) == 0
    assert {row.key.example for row in read_rows(out)} == {0, 1, 2, 20, 21, 22}
    (choice,) = json.loads((out / "beta.json").read_text())
    assert set(choice["means"]) == {"1.1", "5"} and choice["examples"] == 6 and choice["beta"] in (1.1, 5)
    assert choice["means"][f"{choice['beta']:g}"] == max(choice["means"].values())
    run = ["run", "--methods", "headkv_r2", *asked[3:], "--examples", "test", "--prompt", "question_in", "--no-fidelity"]
    assert call(*run, "--out", str(tmp_path / "t")) == 0
    assert {row.key.example for row in read_rows(tmp_path / "t")} == set(range(3, 20))
    assert call("beta", "--methods", "snapkv", "--out", str(out)) == 2


def test_a_journal_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="cannot write"):
        Journal(tmp_path / "file" / "x.jsonl", {}).read()
