"""TriAttention: scores against the formula in full, statistics against the model's projections, rows that know their heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import call, converted, head_scores, network, read, tiny, tokens

from harness.cache import Needs
from harness.engine.evict import Turns, remember
from harness.engine.renumber import rotation_of
from harness.engine.rows import compact
from harness.evaluation.conformance import drawn_statistics
from harness.papers.calibrate import statistics
from methods import METHODS
from methods.allocators import Uniform
from methods.base import Eviction, score_prefill
from methods.headkv import HeadShares
from methods.triattention import BadStatistics, QueryStatistics, Trigonometric
from results.store import read_rows

ROTATED = ("llama", "mistral-window", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")


@pytest.mark.parametrize("family", ROTATED)
def test_statistics_are_those_of_the_models_own_projections(family: str) -> None:
    """Of queries before RoPE, behind the projection and, where there is one, its norm."""
    texts, net, seen = [tokens(40), tokens(30, seed=1)], network(family), {}  # type: ignore[var-annotated]
    found = statistics(tiny(family), texts, {})
    for module in net.modules():
        if not hasattr(module, "layer_idx") or not hasattr(module, "scaling"):
            continue
        name = next(part for part in ("q_norm", "q_proj", "qkv_proj", "query_key_value") if hasattr(module, part))
        getattr(module, name).register_forward_hook(
            lambda _, __, out, at=module.layer_idx: seen.setdefault(at, []).append(out.detach())
        )
    with torch.no_grad():
        for ids in texts:
            net(ids[None])
    dim = tiny(family).shape.head_dim
    for layer, outs in seen.items():
        flat = [out.reshape(out.shape[1], -1) for out in outs]
        if family == "gpt_neox":  # query, key and value of each head side by side
            flat = [out.view(len(out), 4, 3, dim)[:, :, 0].flatten(1) for out in flat]
        queries = torch.cat([out[:, : 4 * dim] for out in flat]).view(-1, 4, dim)
        assert np.allclose(found.mean[layer], queries.mean(0), atol=1e-4)
        first, second = found.pairs.T
        assert np.allclose(found.size[layer], torch.hypot(queries[..., first], queries[..., second]).mean(0), atol=1e-4)
    assert found.tokens == 70 and len(found.mean) == 3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scores_are_the_formula(family: str) -> None:
    """One distance, one head, one key at a time; the model's own rotation turns the mean query to where the next ones stand."""
    model, prefill = tiny(family), read(family, tokens(50))
    known = statistics(model, [tokens(60, seed=3)], {})
    offsets, layer = 9, prefill.layers[1]
    found = Trigonometric(offsets, scores=known).score(layer)
    rotation = rotation_of(model, 50 + 2**offsets)
    first, second = known.pairs.T
    by_head = []
    for head, (mean, size) in enumerate(zip(torch.tensor(known.mean[1]), torch.tensor(known.size[1]), strict=True)):
        keys, scores = layer.keys[head // prefill.shape.group], torch.zeros(50)
        for number in range(offsets):
            turned = rotation.turn(mean[None, None], torch.tensor([49 + 2**number]))[0, 0]
            scores += keys @ turned / offsets
        beyond = size - torch.hypot(mean[first], mean[second])
        scores += (torch.hypot(keys[:, first], keys[:, second]) * beyond).sum(1)
        by_head.append((scores - scores.mean()) / scores.std(correction=0))
    wanted = torch.stack(by_head).unflatten(0, (-1, prefill.shape.group)).amax(1)
    assert torch.allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("which", ["llama", "qwen3+cla-50", "llama+mixsga-3:1:6"])
def test_rows_that_are_decoded_know_which_heads_read_them(which: str) -> None:
    """Of ragged rows, shown one by one: the heads that they name are those whose queries they are shown."""
    family, _, variant = which.partition("+")
    model = converted(family, variant) if variant else tiny(family)
    method = METHODS["ada_snapkv"]
    assert isinstance(method, Eviction)
    prefill = model.prefill(tokens(60), method.needs)[0]
    kept = method.compress(prefill, 12 * prefill.shape.kv_heads * prefill.shape.layers, score_prefill(method.scorer, prefill))
    cache, shown = compact(prefill, [kept], 20), []  # type: ignore[var-annotated]

    class Looks:
        every, needs, ordered = 1, Needs(window=4), True

        def keep(self, held: Any, tokens: int) -> list[torch.Tensor]:
            shown.extend(rows.kv for rows in held)
            return [torch.ones(len(rows.first), rows.kv.keys.shape[1], dtype=torch.bool) for rows in held]

    remember(cache, prefill.layers, [Looks()])  # type: ignore[list-item]
    turns = Turns(cache, [Looks()])  # type: ignore[list-item]
    model.decode(cache, tokens(1)[None])
    turns.took(1)
    remembered = {part.memory.like.index: part.memory.queries[0] for part in cache.parts}  # type: ignore[union-attr, index]
    assert len(shown) > len(remembered)
    for kv in shown:
        assert kv.heads is not None and torch.equal(kv.queries, remembered[kv.index][kv.heads])


def test_two_kinds_of_scores_for_one_method() -> None:
    method = Eviction(Trigonometric(), HeadShares("r2"), every=8)
    assert method.head_scores == "r2"
    half = method.with_head_scores(head_scores())
    assert half.head_scores == "queries" and half.given_head_scores is None
    done = half.with_head_scores(drawn_statistics())
    assert done.given_head_scores is not None and isinstance(done.scorer, Trigonometric) and done.scorer.scores is not None
    assert isinstance(done.allocator, HeadShares) and done.allocator.scores is not None
    assert done.wanted == "r2 head scores" and Eviction(Trigonometric(), Uniform()).wanted == "statistics of the queries"
    with pytest.raises(ValueError, match="cannot be renumbered"):
        Eviction(Trigonometric(), Uniform(), every=8, renumber=True)


def test_statistics_come_back_and_others_are_refused(tmp_path: Path) -> None:
    known, path = replace(drawn_statistics(), settings={"seed": 1}), tmp_path / "a.npz"
    known.save(path)
    again = QueryStatistics.load(path)
    assert again.sha256 == known.sha256 and again.settings == known.settings and again.tokens == 100
    for wrong, said in (
        ({"variant": "other"}, "are not inherited"),
        ({"revision": "9"}, "are not inherited"),
        ({"layers": 4}, "of 3 layers"),
    ):
        with pytest.raises(BadStatistics, match=said):
            again.check(**{"variant": "check", "revision": "0", "layers": 3, **wrong})
    path.write_bytes(path.read_bytes()[:300])
    for place in (path, tmp_path / "none.npz"):
        with pytest.raises(BadStatistics, match="cannot be read"):
            QueryStatistics.load(place)


def test_a_model_is_calibrated_and_its_answers_are_evicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q.npz"
    model = "random:tiny-llama"
    assert call("calibrate", "--model", model, "--tokens", "256", "--length", "64", "--out", str(out)) == 0
    assert "over 256 tokens" in capsys.readouterr().out
    run = ["run", "--model", model, "--methods", "full,triattention(every=4),triattention:headkv_r2", "--budgets", "16"]
    run += [
        "--benchmarks",
        "random_tokens(length=48,max_new_tokens=12)",
        "--limit",
        "1",
        "--prompt",
        "question_in",
        "--device",
        "cpu",
    ]
    assert call(*run, "--head-scores", str(out), "--out", str(tmp_path / "out")) == 0
    rows = {row.key.method_name: row for row in read_rows(tmp_path / "out")}
    evicting = rows["triattention(every=4)"]
    assert evicting.status == "ok" and evicting.entries_peak is not None and evicting.entries_peak < rows["full"].entries_end
    assert "r2 head scores" in str(rows["triattention:headkv_r2"].reason)
    assert call(*run, "--out", str(tmp_path / "without")) == 0
    (row,) = [row for row in read_rows(tmp_path / "without") if row.key.method_name == "triattention(every=4)"]
    assert row.status == "skipped" and "run_all.py calibrate" in str(row.reason)
    assert call(*run, "--model", "reference+gqa-2", "--head-scores", str(out), "--out", str(tmp_path / "wrong")) == 2
    assert "are not inherited" in capsys.readouterr().err
    for wrong, said in (
        (("--out", "x.json"), "must name a .npz file"),
        (("--out", "/dev/null/x.npz"), "cannot write to"),
        (("--length", "1"), "must lie between 2"),
        (("--tokens", "10"), "not below it"),
        (("--haystack", str(tmp_path / "nothing")), "nothing"),
    ):
        assert call("calibrate", "--model", model, *wrong) == 2 and said in capsys.readouterr().err
