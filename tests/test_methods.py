"""Scorers against slow, obvious versions; allocators against cases that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import read, tiny, tokens

from harness.cache import Budget, LayerKV, ModelShape, Needs
from harness.engine.observe import AttentionSettings, attention_with_sums, column_sums
from methods import METHODS
from methods.ada_snapkv import AdaptiveHeads
from methods.allocators import Uniform
from methods.base import Protected, Rows, rank, score_prefill
from methods.h2o import HeavyHitters
from methods.knorm import SmallKeys
from methods.pyramidkv import Pyramid
from methods.random import ByLot
from methods.rkv import ImportantAndUnlike
from methods.sharing import share_out
from methods.snapkv import WindowAttention
from methods.streaming_llm import SinksAndRecent
from methods.tova import LastQuery


def slow_attention(layer: LayerKV, head: int, back: int) -> list[float]:
    """Probabilities of one query head's query `back` places before the end, over the candidates."""
    assert layer.queries is not None
    key_head = head * layer.keys.shape[0] // layer.query_heads
    query, position = layer.queries[head, -1 - back], layer.tokens - 1 - back
    logits = []
    for key, place in zip(layer.keys[key_head], layer.positions.tolist(), strict=True):
        value = float(query @ key) * layer.scaling
        if layer.softcap:
            value = layer.softcap * float(np.tanh(value / layer.softcap))
        inside = layer.window is None or place > position - layer.window
        logits.append(value if place <= position and inside else -np.inf)
    exp = np.exp(np.array(logits) - max(logits))
    return list(exp / exp.sum())


@pytest.mark.parametrize("granularity", ["kv", "query"])
def test_window_attention(family: str, granularity: str) -> None:
    prefill = read(family, tokens(30)).at(granularity)  # type: ignore[arg-type]
    for layer, expert_groups in zip(prefill.layers, prefill.expert_groups, strict=True):
        width = expert_groups[0].width
        got = WindowAttention(window=4, kernel=3).score(layer.read_by(width))
        n = layer.keys.shape[1]
        for stored in range(layer.query_heads // width):
            heads = range(stored * width, (stored + 1) * width)
            mean = np.mean([slow_attention(layer, head, back) for head in heads for back in range(4)], axis=0)[: n - 4]
            pooled = [max(mean[max(0, i - 1) : i + 2]) for i in range(n - 4)]
            assert np.allclose(got[stored, : n - 4], pooled, atol=1e-6)


def test_tova_is_one_ranking_a_layer(family: str) -> None:
    for layer in read(family, tokens(30)).layers:
        got = LastQuery().score(layer)
        mean = np.mean([slow_attention(layer, head, 0) for head in range(layer.query_heads)], axis=0)
        assert np.allclose(got, np.broadcast_to(mean, got.shape), atol=1e-6)


def test_rkv_is_importance_without_redundancy(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (2**22, 26 * 5, 1):
        monkeypatch.setattr("methods.rkv.BLOCK", block)
        for layer in read(family, tokens(30)).layers:
            got = ImportantAndUnlike(importance=0.3, window=4, kernel=3, alike=0.2).score(layer)
            older, width = layer.keys.shape[1] - 4, layer.query_heads // layer.keys.shape[0]
            assert layer.queries is not None
            for stored, keys in enumerate(layer.keys[:, :older].double()):
                shares = []
                for back in range(4):
                    asking = layer.queries[stored * width : (stored + 1) * width, -1 - back].double()
                    logits = (asking @ keys.T * layer.scaling).numpy()
                    logits = np.tanh(logits / layer.softcap) * layer.softcap if layer.softcap else logits
                    largest = logits.max(0)
                    if layer.window is not None:
                        largest[layer.positions[:older].numpy() <= layer.tokens - 1 - back - layer.window] = -np.inf
                    shares.append(np.exp(largest) / np.exp(largest).sum())
                mean = np.mean(shares, axis=0)
                importance = np.array([mean[max(0, i - 1) : i + 2].max() for i in range(older)])
                unit = (keys / keys.norm(dim=1, keepdim=True)).numpy()
                alike = unit @ unit.T
                for i in range(older):
                    alike[i, i] = 0
                    if partners := [j for j in range(older) if alike[i, j] > 0.2]:
                        alike[i, partners[-1]] = 0
                said = np.exp(alike.mean(0))
                assert np.allclose(got[stored, :older], 0.3 * importance - 0.7 * said / said.sum(), atol=1e-5)


def test_column_sums(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(4, 23, 8), torch.randn(2, 23, 8), torch.randn(2, 23, 8)
    large = torch.where(torch.arange(23)[:, None] < 12, values, 1e30)
    found = attention_with_sums(queries, keys, large, AttentionSettings(0.3), False)
    assert found is not None and found[0][:, :12].abs().max() < 10, "what comes later weighs nothing, however large"
    for window, softcap, scaling in (
        (None, None, 0.3),
        (None, None, 40.0),
        (7, None, 0.3),
        (7, 3.0, 0.3),
    ):  # 40: most weights would be subnormal
        settings = AttentionSettings(scaling, softcap, window)
        slow, said = torch.zeros(4, 23), torch.zeros(4, 23, 8)
        for head in range(4):
            for place in range(23):
                first = 0 if window is None else max(0, place - window + 1)
                logits = keys[head // 2, first : place + 1] @ queries[head, place] * scaling
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                weights = logits.softmax(0)
                slow[head, first : place + 1] += weights
                said[head, place] = weights @ values[head // 2, first : place + 1]
        for block in (2**25, 4 * 23 * 5, 1):
            monkeypatch.setattr("harness.engine.observe.BLOCK_LOGITS", block)
            assert torch.allclose(column_sums(queries, keys, settings), slow, atol=1e-5)
            for summed in (True, False):
                found = attention_with_sums(queries, keys, values, settings, summed)
                assert (found is None) == bool(window)
                if found is not None:
                    assert torch.allclose(found[0], said, atol=1e-5)
                    assert found[1] is None if not summed else torch.allclose(found[1], slow, atol=1e-5)  # type: ignore[arg-type]
    monkeypatch.setattr("harness.engine.observe.JOINED", 22)
    assert attention_with_sums(queries, keys, values, AttentionSettings(0.3), True) is None, "longer prompts are left to sdpa"


def test_a_joined_prefill_says_the_same_whoever_asks(family: str) -> None:
    model, ids = tiny(family), tokens(40)
    plain = model.prefill(ids, Needs(column_sums=True))[0]
    asked = model.prefill(ids, Needs(column_sums=True), joined=True)[0]
    not_asked = model.prefill(ids, Needs(), joined=True)[0]
    assert torch.equal(asked.logits, not_asked.logits), "sums change no bit of the rest"
    assert torch.allclose(asked.logits, plain.logits, atol=1e-4)
    for ours, theirs in zip(asked.layers, plain.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4) and torch.allclose(ours.values, theirs.values, atol=1e-4)
        assert torch.allclose(ours.column_sums, theirs.column_sums, atol=1e-4)  # type: ignore[arg-type]


def test_h2o_takes_half_by_weight_and_half_by_age() -> None:
    prefill = read("llama", tokens(40))
    eviction = METHODS["h2o"]
    kept = eviction.compress(prefill, 6 * 10, score_prefill(HeavyHitters(), prefill))  # type: ignore[union-attr]
    for layer, rows in zip(prefill.layers, kept, strict=True):
        sums = layer.mean_over_group(layer.column_sums)  # type: ignore[arg-type]
        for head, row in enumerate(rows):
            heavy = set(sums[head, :35].topk(5).indices.tolist())
            assert set(row.kept.tolist()) == heavy | set(range(35, 40))  # type: ignore[union-attr]


def test_knorm_streaming_and_random() -> None:
    prefill = read("llama", tokens(40))
    layer = prefill.layers[1]
    assert torch.allclose(SmallKeys().score(layer), -(layer.keys**2).sum(-1).sqrt())
    kept = METHODS["streaming_llm"].compress(prefill, 6 * 10, score_prefill(SinksAndRecent(), prefill))  # type: ignore[union-attr]
    assert all(row.kept.tolist() == [0, 1, 2, 3, *range(34, 40)] for rows in kept for row in rows)  # type: ignore[union-attr]
    assert torch.equal(ByLot().score(layer), ByLot().score(layer))
    assert not torch.equal(ByLot().score(layer), ByLot(seed=1).score(layer))
    assert not torch.equal(ByLot().score(layer), ByLot().score(prefill.layers[0]))
    assert not torch.equal(ByLot().score(layer), ByLot().score(read("llama", tokens(40, seed=1)).layers[1]))


def test_rank_puts_the_later_of_equals_first() -> None:
    values = torch.tensor([[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert rank(values).tolist() == [[3, 1, 2, 0], [3, 2, 1, 0]]


def rows_of(layer: list[int], length: list[int], floor: list[int]) -> Rows:
    first = np.zeros(len(layer), dtype=np.int64)
    return Rows(np.array(layer), np.array(length), np.array(floor), first, first + 1, max(layer) + 1, max(length))


def test_ada_snapkv_by_hand() -> None:
    """Two heads with 2 protected entries each and 4 others to share: head 0 has all of its mass on one entry."""
    inf = float("inf")
    scores = [torch.tensor([8.0, 0.0, 0.0, 0.0, inf, inf]), torch.tensor([2.0, 2.0, 2.0, 2.0, inf, inf])]
    rows = rows_of([0, 0], [6, 6], [2, 2])
    # weights: head 0: (8 + 0) / 8 = 1, head 1: (2 + 2) / 8 = 0.5. The best four: 8, 1, 1, 1: one and three.
    assert AdaptiveHeads(floor=0.0).counts(rows, 8, scores).tolist() == [3, 5]
    # floor 0.5: half of the even two a head, then half of what was won: 1 + 0.5 and 1 + 1.5; the rest in flat order.
    assert AdaptiveHeads(floor=0.5).counts(rows, 8, scores).tolist() == [4, 4]
    assert AdaptiveHeads(floor=1.0).counts(rows, 8, scores).tolist() == [4, 4]


def test_pyramid_by_hand() -> None:
    rows = rows_of([0, 1, 2], [500, 500, 500], [8, 8, 8])
    # 120 beyond the window a layer on average; steepness 20: 234 down to 6, as the paper's code for a KV size of 128.
    assert Pyramid(steepness=20).counts(rows, 3 * 128, []).tolist() == [8 + 234, 8 + 120, 8 + 6]


def test_uniform_gives_unequal_rows_the_same_share() -> None:
    rows = rows_of([0, 0, 0], [100, 20, 40], [8, 8, 2])
    assert Uniform().counts(rows, 80, []).tolist() == [50, 10, 20]
    assert Uniform().counts(rows, 18, []).tolist() == [8, 8, 2]


def test_share_out_properties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = int(rng.integers(1, 40))
        caps = rng.integers(0, 200, size)
        floors = (caps * rng.random(size)).astype(np.int64)
        total = int(rng.integers(floors.sum(), caps.sum() + 1))
        weights = rng.random(size) * (rng.random(size) < 0.7)
        base = floors * rng.random()
        counts = share_out(total, weights, floors, caps, base)
        assert counts.sum() == total
        assert (counts >= floors).all()
        assert (counts <= caps).all()
        order = np.argsort(weights)
        same = (caps == caps[0]).all() and (floors == floors[0]).all()
        assert not same or (np.diff(counts[order]) >= -1).all()
    assert share_out(7, np.ones(3), np.zeros(3, int), np.full(3, 9)).tolist() == [3, 2, 2]  # the remainder in flat order
    assert share_out(12, np.array([1, 3]), np.zeros(2, int), np.array([99, 4])).tolist() == [8, 4]  # the surplus moves on
    assert share_out(9, np.array([1.0, 0, 0]), np.zeros(3, int), np.full(3, 4)).tolist() == [4, 3, 2]  # and then evenly
    with pytest.raises(ValueError, match="cannot be shared out"):
        share_out(10, np.ones(2), np.zeros(2, int), np.full(2, 4))


def test_protected_counts_what_its_mask_shows() -> None:
    for tokens_read in (1, 3, 7, 12, 30):
        for candidates in range(1, tokens_read + 1):
            for protected in (Protected(4, 1), Protected(0, 8), Protected(2, 5), Protected()):
                positions = torch.arange(tokens_read - candidates, tokens_read)
                assert protected.count(candidates, tokens_read) == int(protected.mask(positions, tokens_read).sum())


@pytest.mark.parametrize("text", ["0", "-3", "0%", "-1%", "101%", "1.5", "abc", "", "%", "nan", "inf%", "1e2", "12 8"])
def test_budgets_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


def test_budgets() -> None:
    shape = ModelShape(2, 8, 4, 16, (None, 10), 4)
    assert shape.full_entries(25) == 4 * (25 + 10)
    assert Budget.parse("16").entries(shape, 25, "kv") == 16 * 2 * 4
    assert Budget.parse("16").entries(shape, 25, "query") == 16 * 2 * 8
    assert Budget.parse("25%").entries(shape, 25, "kv") == 35 == Budget.parse("25%").entries(shape, 25, "query")
    assert Budget.parse("12.5%").entries(shape, 25, "kv") == 17
    assert Budget.parse("100%").entries(shape, 25, "kv") == 140
    assert str(Budget.parse(" 25.0% ")) == "25%"
    assert str(Budget.parse("12.5%")) == "12.5%"
    assert str(Budget.parse("100%")) == "100%"
    assert str(Budget.parse("12.34567%")) != str(Budget.parse("12.345671%"))
    assert Budget.parse("25%") == Budget.parse("25.00%")


class Wrong:
    """A scorer with a fault of choice."""

    needs = METHODS["snapkv"].needs
    protected = Protected()

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def score(self, layer: LayerKV) -> torch.Tensor:
        return self.scores


def test_scores_of_a_wrong_shape_or_not_numbers_are_refused() -> None:
    prefill = read("llama", tokens(20))
    with pytest.raises(ValueError, match=r"Wrong scored \(2, 19\) entries of layer 0, not \(2, 20\)"):
        score_prefill(Wrong(torch.zeros(2, 19)), prefill)
    with pytest.raises(ValueError, match="not numbers in layer 0"):
        score_prefill(Wrong(torch.full((2, 20), float("nan"))), prefill)
