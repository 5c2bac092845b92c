"""The scorers of 2025 and 2026 and what they observe, against slow, obvious versions; allocators by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SCORED, call, network, read, tiny, tokens, total_of
from test_methods import rows_of, slow_attention

from harness.cache import Ahead, LayerKV, Needs, Prefill, Replay
from harness.engine.model import Model
from harness.engine.projections import output_weight
from harness.evaluation.head_scores import duo_pattern
from harness.registry import BUILTIN, UnknownChoice
from methods.allocators import Ranked, Uniform
from methods.base import CannotRun, Eviction, score_prefill
from methods.cake import LayerPreference, LayerShares, MeanAndVariance
from methods.chunkkv import Chunks
from methods.criticalkv import Critical
from methods.cur import Leverage
from methods.defensivekv import WorstCase
from methods.duo_attention import RetrievalHeads
from methods.expected_attention import ExpectedAttention
from methods.headkv import BadScores, HeadScores
from methods.keydiff import DistinctKeys
from methods.kvzip import Reconstruction
from methods.lagkv import LagRelative
from methods.ranking import row_sizes
from methods.snapkv import WindowAttention

ROTATED = ("llama", "qwen3", "gemma2", "phi3", "gpt_neox")


def layer_of(keys: np.ndarray, values: np.ndarray | None = None) -> LayerKV:
    """One KV head that one query head reads, of keys [n, D]."""
    held = torch.tensor(keys, dtype=torch.float32)[None]
    return LayerKV(0, held.shape[1], held, held if values is None else torch.tensor(values).float()[None], 1.0, 1, query_heads=1)


def test_keydiff_keeps_the_key_that_points_elsewhere() -> None:
    scores = DistinctKeys().score(layer_of(np.array([[1, 0], [9, 0], [0, 2]])))[0]
    anchor = np.array([2 / 3, 1 / 3]) / np.hypot(2 / 3, 1 / 3)
    assert np.allclose(scores, [-anchor[0], -anchor[0], -anchor[1]], atol=1e-6)


def test_lagkv_ranks_inside_each_part() -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 2 + 4 * 3 + 1, 5))
    got = LagRelative(sinks=2, lag=4).score(layer_of(keys, values))[0]
    wanted = np.ones(15)
    for part in range(2):
        here, after = slice(2 + 4 * part, 6 + 4 * part), slice(6 + 4 * part, 10 + 4 * part)
        spread = np.zeros(4)
        for states in (keys, values):
            low, high = states[after].min(0), states[after].max(0)
            exp = np.exp(((states[here] - low) / (high - low)).std(1, ddof=1))
            spread += exp / exp.sum()
        wanted[here] = np.argsort(np.argsort(spread)) / 4
    assert np.allclose(got, wanted)
    short = LagRelative(sinks=2, lag=4).score(layer_of(keys[:9], values[:9]))[0]
    assert short.tolist() == list(range(9)), "fewer than two parts: the newest"


def test_cur_is_the_leverage_in_a_neighbourhood() -> None:
    keys, values = np.random.default_rng(1).normal(size=(2, 7, 3))
    product = []
    for place in range(7):
        near = slice(place // 3 * 3, place // 3 * 3 + 3)
        product.append(np.prod([(part[place] ** 2).sum() / (part[near] ** 2).sum() for part in (keys, values)]))
    assert np.allclose(Leverage(local=3).score(layer_of(keys, values))[0], np.array(product) / sum(product), atol=1e-6)


def test_chunks_are_the_same_for_all_heads_and_whole() -> None:
    prefill = read("llama", tokens(47))
    layer, over = prefill.layers[1], WindowAttention(window=4, kernel=3)
    plain, got = over.score(layer).numpy().copy(), Chunks(over, chunk=10).score(layer).numpy()
    plain[:, -4:] = plain[:, :-4].max()
    for start in (0, 10, 20, 30, 40):
        assert np.allclose(got[:, start : start + 10], plain[:, start : start + 10].mean())
    method = Eviction(Chunks(over, chunk=10), Uniform())
    kept = method.compress(prefill, 24 * 6, score_prefill(method.scorer, prefill))
    for rows in kept:
        first, second = (row.kept.tolist() for row in rows)  # type: ignore[union-attr]
        assert first == second
        chunks = [sum(place // 10 == number for place in first if place < 43) for number in range(5)]
        assert sum(count not in (0, 10, 3) for count in chunks) <= 1, "no more than one chunk is kept in part"


@pytest.mark.parametrize("family", [*ROTATED, "opt"])
def test_queries_ahead_against_queries_caught_before_rope(family: str) -> None:
    """The model's own rotation, of position 0, catches queries as they were; of the next positions, one after the other."""
    asked, ids = Ahead(positions=9, skipped=2), tokens(30)
    prefill = tiny(family).prefill(ids, Needs(ahead=frozenset({asked})))[0]
    net, still = network(family), []
    modules = [module for module in net.modules() if hasattr(module, "layer_idx") and output_weight(module, 64) is not None]
    net.set_attn_implementation("eager")
    rotary = getattr(net.base_model, "rotary_emb", None)

    inputs: list[torch.Tensor] = []

    def catch(module: torch.nn.Module, plain: tuple, named: dict) -> None:
        inputs.append(named["hidden_states"] if "hidden_states" in named else plain[0])

    for module in modules:
        module.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        net(ids[None], use_cache=False)
    for module, hidden in zip(modules, inputs, strict=True):
        with torch.no_grad():
            if hasattr(module, "q_proj"):
                queries = module.q_proj(hidden).view(30, 4, -1)
            elif hasattr(module, "qkv_proj"):
                queries = module.qkv_proj(hidden)[..., :64].reshape(30, 4, -1)
            else:
                queries = module.query_key_value(hidden).view(30, 4, 3, -1)[:, :, 0]
            queries = module.q_norm(queries) if hasattr(module, "q_norm") else queries
            still.append(queries.transpose(0, 1)[:, 2:])  # [Hq, N, D]
    for layer, module, queries in zip(prefill.layers, modules, still, strict=True):
        if family == "opt":
            queries = queries * module.scaling if float(layer.scaling) == 1.0 else queries
        mean = queries.mean(1)
        centred = queries - mean[:, None]
        covariance = centred.transpose(1, 2) @ centred / 28
        if rotary is not None:
            import sys

            rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
            eye = torch.eye(queries.shape[2])[None, None]
            each = []
            for position in range(30, 39):
                cos, sin = rotary(queries[None], torch.tensor([[position]]))
                each.append(rotate(eye, eye, cos, sin)[0][0, 0].T)  # R, so that R @ q turns q
            average = torch.stack(each).mean(0)
            mean, covariance = mean @ average.T, average @ covariance @ average.T
        assert torch.allclose(layer.ahead[asked][0], mean, atol=1e-4)
        assert torch.allclose(layer.ahead[asked][1], covariance, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_expected_attention_entry_by_entry(family: str) -> None:
    scorer = ExpectedAttention(ahead=9, sinks=2, epsilon=0.01)
    prefill = tiny(family).prefill(tokens(24), scorer.needs)[0]
    for layer in prefill.layers:
        mean, covariance = next(iter(layer.ahead.values()))
        group = layer.width
        got = scorer.score(layer)
        for stored in range(layer.keys.shape[0]):
            keys, weights = layer.keys[stored, 2:], []
            for head in range(stored * group, (stored + 1) * group):
                logits = [
                    float(mean[head] @ k) * layer.scaling + float(k @ covariance[head] @ k) * layer.scaling**2 / 2 for k in keys
                ]
                exp = np.exp(np.array(logits) - max(logits))
                weights.append(exp / exp.sum())
            wanted = (np.mean(weights, 0) + 0.01) * layer.values[stored, 2:].norm(dim=1).numpy()
            assert np.allclose(got[stored, 2:], wanted, rtol=1e-3)


def test_output_norms_are_those_of_the_projection(family: str) -> None:
    prefill = tiny(family).prefill(tokens(20), Needs(output_norms=True))[0]
    modules = [m for m in tiny(family).network.modules() if hasattr(m, "layer_idx") and output_weight(m, 64) is not None]
    for layer, module in zip(prefill.layers, modules, strict=True):
        found = output_weight(module, 64)
        weight = None if found is None else found.detach()
        assert weight is not None and layer.output_norms is not None
        for head in range(4):
            value = layer.values[head * layer.keys.shape[0] // 4, 3]
            assert float(layer.output_norms[head, 3]) == pytest.approx(
                float((weight[:, head * 16 : head * 16 + 16] @ value).abs().sum()), rel=1e-4
            )


def test_critical_takes_half_by_score_and_half_by_what_values_do() -> None:
    prefill = read("llama", tokens(40))
    method = Eviction(Critical(WindowAttention(window=2, kernel=1)), Uniform())
    kept = method.compress(prefill, 10 * 6, score_prefill(method.scorer, prefill))
    for layer, rows in zip(prefill.layers, kept, strict=True):
        scores = WindowAttention(window=2, kernel=1).score(layer)
        norms = layer.mean_over_group(layer.output_norms)  # type: ignore[arg-type]
        for head, row in enumerate(rows):
            first = {38, 39, *scores[head, :38].topk(3).indices.tolist()}
            rest = [place for place in range(38) if place not in first]
            rest.sort(key=lambda place: -float((scores[head, place] + 1e-4) * norms[head, place]))
            assert set(row.kept.tolist()) == first | set(rest[:5])  # type: ignore[union-attr]


def test_defensive_scores_and_first_part() -> None:
    prefill = read("llama", tokens(40))
    scorer = WorstCase(window=3, kernel=3, mass=0.6)
    for layer in prefill.layers:
        found, sums = scorer.stages(layer), np.zeros((2, 37))
        inside, means = [], np.zeros((2, 37))
        norms = layer.mean_over_group(layer.output_norms).numpy()[:, :37]  # type: ignore[arg-type]
        for head in range(4):
            for back in range(3):
                row = np.array(slow_attention(layer, head, back))
                inside.append(row[37:].sum())
                before = row[:37]
                pooled = np.array([before[max(0, i - 1) : i + 2].sum() / 3 for i in range(37)])
                sums[head // 2] = np.maximum(sums[head // 2], pooled * before.sum() / pooled.sum())
                means[head // 2] += before / 6
        for stored in range(2):
            worst = np.maximum(sums[stored], sums[stored].mean()) * norms[stored] / norms.sum(0)
            assert np.allclose(found.rest[stored, :37], worst, rtol=1e-3)
            shares = np.sort(means[stored] / means[stored].sum())[::-1].cumsum()
            assert int(found.most[stored]) == int((shares < 0.6 - np.mean(inside)).sum())
    first = scorer.first_counts(np.array([10, 10]), np.array([3, 3]), np.array([2, 20]))
    assert first.tolist() == [5, 10], "as far as the even share reaches"


def test_cake_scores_and_layer_preferences() -> None:
    prefill = read("llama", tokens(40))
    preferences = []
    for layer in prefill.layers:
        attention = np.array([[slow_attention(layer, head, back) for back in (3, 2, 1, 0)] for head in range(4)])  # [Hq, W, n]
        plain = attention.mean(1) + 7 * attention.var(1)
        pooled = np.array([[row[max(0, i - 1) : min(36, i + 2)].sum() / 3 for i in range(36)] for row in plain])
        wanted = pooled.reshape(2, 2, 36).mean(1)
        assert np.allclose(MeanAndVariance(4, 3, 7.0).score(layer)[:, :36], wanted, atol=1e-5)
        mean = attention[..., :36].mean(1)
        preferences.append(-((mean * np.log(mean)).sum() ** 1) * attention[..., :36].var(1).sum() ** 0.5)
    made = LayerPreference(window=4, t1=1.0, t2=2.0).after(prefill)
    assert np.allclose(made.weights, preferences, rtol=1e-3)
    rows = rows_of([0, 0, 1, 1], [50] * 4, [4] * 4)
    assert LayerShares((3.0, 1.0)).counts(rows, 80, []).tolist() == [30, 30, 10, 10]
    assert LayerShares((99.0, 1.0)).counts(rows, 120, []).tolist() == [50, 50, 10, 10], "what a layer cannot hold goes on"


def test_ranked_by_hand() -> None:
    scores = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 6.5])]
    rows = rows_of([0, 0], [4, 4], [0, 0])
    assert Ranked(safeguard=0.0).counts(rows, 4, scores).tolist() == [3, 1]
    assert Ranked(safeguard=1.0).counts(rows, 4, scores).tolist() == [2, 2]
    apart = rows_of([0, 1], [4, 4], [0, 0])
    assert Ranked("layer", 0.0).counts(apart, 4, scores).tolist() == [2, 2]
    assert Ranked("cache", 0.0).counts(apart, 4, scores).tolist() == [3, 1]
    equal = [torch.ones(4), torch.ones(4)]
    assert Ranked(safeguard=0.5).counts(rows, 5, equal).sum() == 5


def test_retrieval_heads_keep_everything_in_the_order_of_their_scores() -> None:
    values = np.array([[0.1, 0.9], [0.5, 0.2]])
    heads = RetrievalHeads(streaming=6).with_head_scores(HeadScores("tiny", "0", "duo", values[None], 1))
    rows = rows_of([0, 0, 1, 1], [20] * 4, [2] * 4)
    rows = replace(rows, first=np.array([0, 1, 0, 1]), width=np.ones(4, dtype=np.int64))
    assert heads.counts(rows, 6 * 4 + 14 + 5, []).tolist() == [6, 20, 11, 6]
    assert heads.counts(rows, 16, []).tolist() == [4, 4, 4, 4], "too little for the streaming heads: evenly"


def test_a_published_pattern_is_its_models_alone(tmp_path: Path) -> None:
    folder = tmp_path / "duo_attention" / "Meta-tiny-llama" / "lr=0.02"
    folder.mkdir(parents=True)
    (folder / "full_attention_heads.tsv").write_text("0.5\t1.2\n0\t0.25\n1\t1\n")
    found = duo_pattern(tiny("llama"), (), tmp_path)
    assert found is not None and found.values.tolist() == [[0.5, 0.5, 1, 1], [0, 0, 0.25, 0.25], [1, 1, 1, 1]]
    assert duo_pattern(tiny("qwen3"), (), tmp_path) is None
    with pytest.raises(BadScores, match="lies in a folder of tiny-llama, the model is tiny-qwen3"):
        duo_pattern(tiny("qwen3"), (folder / "full_attention_heads.tsv",), None)
    (folder / "full_attention_heads.tsv").write_text("0.5\t1.2\n0\t0.25\n")
    with pytest.raises(BadScores, match="is of 2 layers x 2 KV heads, the model has 3 x 2"):
        duo_pattern(tiny("llama"), (), tmp_path)
    with pytest.raises(BadScores, match=r"gone.tsv cannot be read: No such file or directory"):
        duo_pattern(tiny("llama"), (tmp_path / "gone.tsv",), None)


def replay_by_hand(family: str, prefill: Prefill, ids: torch.Tensor, asked: Replay) -> list[torch.Tensor]:
    """Queries and keys of one dense pass over the prompt and the repetition, and the softmax written out, [Hq, T] a layer."""
    found = [torch.zeros(4, len(ids)) for _ in prefill.layers]
    for start in range(0, len(ids), asked.chunk):
        chunk = ids[start : start + asked.chunk]
        said = torch.cat([ids[max(0, start - 8) : start], chunk]) if start else chunk
        layers = tiny(family).prefill(torch.cat([ids, said]), Needs(window=len(said)))[0].layers
        for layer, into in zip(layers, found, strict=True):
            near = [*range(start, start + len(chunk)), *range(min(asked.sinks, start))]
            for head in range(4):
                keys = layer.keys[head * layer.keys.shape[0] // 4]
                for number, query in enumerate(layer.queries[head]):  # type: ignore[index]
                    seen = near + list(range(len(ids), len(ids) + number + 1))
                    logits = keys[seen] @ query * layer.scaling
                    logits = logits if layer.softcap is None else layer.softcap * torch.tanh(logits / layer.softcap)
                    share = logits.softmax(0)[: len(chunk)]
                    into[head, start : start + len(chunk)] = into[head, start : start + len(chunk)].maximum(share)
    return found


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_second_pass_against_one_dense_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ids = Replay(chunk=11, sinks=2), tokens(27)
    monkeypatch.setattr("harness.engine.observe.BLOCK_LOGITS", 300)
    prefill, seen = tiny(family).prefill(ids, Needs(replays=frozenset({asked})))
    for layer, wanted in zip(prefill.layers, replay_by_hand(family, prefill, ids, asked), strict=True):
        assert torch.allclose(layer.replayed[asked], wanted, atol=1e-5)
    assert seen.seconds >= seen.second_pass > 0
    plain = tiny(family).prefill(ids, Needs())[0]
    assert torch.equal(plain.logits, prefill.logits)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(plain.layers, prefill.layers, strict=True))


def test_a_second_pass_that_would_leave_the_positions_is_a_skipped_cell() -> None:
    method = Eviction(Reconstruction(chunk=300), Uniform())
    prefill = tiny("llama").prefill(tokens(300), method.needs)[0]
    with pytest.raises(CannotRun, match="repeats up to 300 tokens behind the prompt of 300: over the model's positions"):
        score_prefill(method.scorer, prefill)
    small = Eviction(Reconstruction(chunk=100), Uniform())
    assert score_prefill(small.scorer, tiny("llama").prefill(tokens(300), small.needs)[0])


def test_without_an_output_projection_the_cell_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engine.projections.OUTPUT", ())
    prefill = tiny("llama").prefill(tokens(20), SCORED["criticalkv"].needs)[0]
    with pytest.raises(CannotRun, match="output projection of this family's attention was not found"):
        score_prefill(Critical(), prefill)


def test_names_compose() -> None:
    label, method = BUILTIN.method("criticalkv:cake(window=16, over=h2o)")
    assert label == "criticalkv:cake(over=h2o,window=16)"
    assert repr(method.scorer) == "Critical(over=HeavyHitters(recent_share=0.5, recent=1), first_share=0.5, epsilon=0.0001)"
    assert "LayerPreference(window=16" in repr(method)
    label, method = BUILTIN.method("h2o(protect=4:10%)")
    assert label == "h2o(protect=4:10%)" and str(method.scorer.protected) == "first 4, last 10%"  # type: ignore[union-attr]
    assert BUILTIN.protected("snapkv(kernel=5)", "4:8")[0] == "snapkv(kernel=5,protect=4:8)"
    for text in (
        "criticalkv(over=nothing)",
        "snapkv(over=h2o)",
        "full(protect=4:8)",
        "snapkv(protect=4)",
        "snapkv(protect=60%:60%)",
    ):
        with pytest.raises(UnknownChoice):
            BUILTIN.method(text)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "criticalkv", "knorm", "cake"])
def test_equal_protection_keeps_the_same_ends(name: str) -> None:
    prefill = read("llama", tokens(60))
    for ends, kept_ends in (("4:8", {*range(4), *range(52, 60)}), ("10%:10%", {*range(6), *range(54, 60)})):
        method = BUILTIN.method(f"{name}(protect={ends})")[1]
        assert isinstance(method, Eviction)
        rows = row_sizes(prefill, method.scorer.protected)
        assert set(rows.floor.tolist()) == {len(kept_ends)}
        kept = method.compress(prefill, total_of(prefill, "15"), score_prefill(method.scorer, prefill))
        assert all(kept_ends <= set(row.kept.tolist()) for layer in kept for row in layer)  # type: ignore[union-attr]


def test_protect_runs_beside_each_at_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ("--model", "random:tiny-llama", "--methods", "full,snapkv", "--budgets", "25%", "--limit", "1")
    asked = (*asked, "--benchmarks", "random_tokens(length=64)", "--prompt", "question_in", "--out", str(tmp_path / "out"))
    assert call("plan", "--suite", "smoke", *asked, "--protect", "2,4") == 0
    assert "3 cells to run on 1 prompts" in capsys.readouterr().out
    assert call("plan", "--suite", "smoke", *asked, "--protect", "2") == 2
    assert "is not first and last positions, such as 4:8" in capsys.readouterr().err
    assert call("list", "methods") == 0
    told = capsys.readouterr().out
    assert told.index("looks at nothing") < told.index("keydiff") < told.index("the question:") < told.index("kvzip")
    assert len([line for line in told.splitlines() if line.startswith("  ")]) >= 24


def test_mixed_rows_and_shared_layers_take_the_new_methods() -> None:
    from helpers import converted

    for text in ("mixsga-3:1:6", "cla-50"):
        model: Model = converted("llama", text)
        for name in ("kvzip", "expected_attention", "criticalkv", "defensivekv", "cake", "chunkkv"):
            method = SCORED[name]
            assert isinstance(method, Eviction)
            prefill = model.prefill(tokens(80), method.needs)[0]
            total = int(row_sizes(prefill, method.scorer.protected).length.sum() * 0.6)
            kept = method.compress(prefill, total, score_prefill(method.scorer, prefill))
            entries = sum(row.entries(kv.keys.shape[1]) for kv, rows in zip(prefill.layers, kept, strict=True) for row in rows)
            assert entries == total, (text, name)
