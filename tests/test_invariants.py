"""What must always hold (docs: the design's section 7), over every method and kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, SCORED, masked_logits, network, read, selection, tiny, tokens, total_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, FalconConfig, FalconForCausalLM

from harness.cache import Budget, keep_all
from harness.engine.model import Model, UnsupportedModel
from harness.engine.observe import AttentionSettings, softcapped_attention
from harness.engine.rows import compact, slack_for
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.sweep import Cell, Sweep
from methods.ada_snapkv import AdaptiveHeads
from methods.allocators import Uniform
from methods.base import Eviction, score_prefill
from methods.pyramidkv import Pyramid
from methods.ranking import row_sizes
from methods.snapkv import WindowAttention

EVICTING = [name for name, method in SCORED.items() if isinstance(method, Eviction)]
ALIKE = (
    "keydiff",
    "lagkv",
    "cur",
    "chunkkv",
    "adakv",
    "critical_adakv",
    "expected_attention",
    "expected_adakv",
    "layer_defensivekv",
)
DECODED = [name for name in EVICTING if name not in (*ALIKE, "kvzip_uniform")]  # of rows of one kind, one method is enough
OLDEST = ("random", "streaming_llm", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "ada_snapkv", "headkv_r2")
T = 60


def decoded(family: str, cache, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits of `ids` [Q], appended in pieces, [C, Q, V]."""
    parts, done = [], 0
    for size in pieces:
        piece = ids[done : done + size].expand(cache.cells, -1)
        parts.append(tiny(family).decode(cache, piece, keep=size))
        done += size
    assert done == len(ids)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_full_cache_gives_the_models_own_logits(name: str) -> None:
    ids = tokens(T + 12)
    net = network(name)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        plain = net(ids[None], use_cache=False).logits[0]
    prefill = read(name, ids[:T])
    assert (prefill.logits - plain[T - 1]).abs().max() < 2e-5
    cache = compact(prefill, [keep_all(prefill)], 12)
    assert (decoded(name, cache, ids[T:], [5, 1, 1, 3, 1, 1])[0] - plain[T:]).abs().max() < 2e-5


@pytest.mark.parametrize("method", DECODED)
def test_budget_of_everything_is_full_attention(family: str, method: str) -> None:
    ids = tokens(T + 6)
    prefill = read(family, ids[:T])
    kept = selection(method, prefill, total_of(prefill, "100%"))
    cache = compact(prefill, [kept], 6)
    ours = decoded(family, cache, ids[T:], [1] * 6)[0]
    assert (ours - masked_logits(family, ids, T, None)[T:]).abs().max() < 2e-5


@pytest.mark.parametrize("granularity", ["kv", "query"])
@pytest.mark.parametrize("method", DECODED)
def test_a_compacted_cache_is_full_attention_with_the_evicted_masked(family: str, method: str, granularity: str) -> None:
    ids = tokens(T + 30, seed=1)
    prefill = read(family, ids[:T]).at(granularity)  # type: ignore[arg-type]
    total = Budget.parse("14").entries(prefill.shape, T, granularity)  # type: ignore[arg-type]
    kept = selection(method, prefill, total)
    cache = compact(prefill, [kept], 30)
    ours = decoded(family, cache, ids[T:], [6, 1, 1, 2, *[1] * 20])[0]  # long enough that kept entries leave the window
    masked = masked_logits(family, ids, T, kept)[T:]
    assert (ours - masked).abs().max() < 3e-5
    dense = masked_logits(family, ids, T, None)[T:]
    assert (masked - dense).abs().max() > 1e-3, "evicting changed nothing: the test would not see a fault"


@pytest.mark.parametrize("granularity", ["kv", "query"])
@pytest.mark.parametrize("method", DECODED)
def test_exactly_the_budget_is_held(family: str, method: str, granularity: str) -> None:
    for length in (5, 9, 33, T):
        prefill = read(family, tokens(length)).at(granularity)  # type: ignore[arg-type]
        everything = compact(prefill, [keep_all(prefill)], 0).counts()[0].entries
        for budget in ("9", "17", "33", "50", "50%", "97%", "100%"):
            total = Budget.parse(budget).entries(prefill.shape, length, granularity)  # type: ignore[arg-type]
            if SCORED[method].cannot_run(prefill.shape, Budget.parse(budget), length, granularity):  # type: ignore[union-attr]
                continue
            entries = compact(prefill, [selection(method, prefill, total)], 0).counts()[0].entries
            if method.endswith("_paper"):  # loses what a full head cannot hold, and rounds: its record shows the real share
                assert entries <= min(total + len(prefill.layers) * prefill.shape.query_heads / 2, everything)
            else:
                assert entries == min(total, everything)


def test_cannot_run_says_so_exactly_where_compress_would_fail(family: str) -> None:
    refused = 0
    for length in (5, 12, 40):
        prefill = read(family, tokens(length))
        for name in EVICTING:
            for budget in ("1", "4", "7", "8", "5%", "20%", "40%"):
                why = SCORED[name].cannot_run(prefill.shape, Budget.parse(budget), length, "kv")  # type: ignore[union-attr]
                try:
                    selection(name, prefill, total_of(prefill, budget))
                    fails = None
                except ValueError as error:
                    fails = str(error)
                assert (why is None) == (fails is None), (name, budget, length, why, fails)
                refused += why is not None
    assert refused


@pytest.mark.parametrize("method", EVICTING)
def test_no_evicted_entry_outscores_a_kept_one_and_ties_go_to_the_later(family: str, method: str) -> None:
    prefill = read(family, tokens(T, seed=2))
    eviction = SCORED[method]
    assert isinstance(eviction, Eviction)
    scores = score_prefill(eviction.scorer, prefill)
    kept = eviction.compress(prefill, total_of(prefill, "13"), scores)
    rows_before = row_sizes(prefill, eviction.scorer.protected)
    ranking = eviction.ranking(prefill, rows_before, total_of(prefill, "13"), scores)
    for layer, rows in enumerate(kept):
        for number, row in enumerate(rows):
            assert row.kept is not None
            values = ranking.scores.values[layer][0][number]
            inside = torch.zeros(len(values), dtype=torch.bool)
            inside[row.kept] = True
            if inside.all():
                continue
            worst, best = values[inside].min(), values[~inside].max()
            assert worst >= best
            if worst == best:
                assert (values[inside] == worst).nonzero().numel() >= 1
                ties = (values == worst).nonzero()[:, 0]
                held = inside[ties]
                assert bool((held.long().diff() >= 0).all()), "an earlier entry was kept, a later equal one was not"


@pytest.mark.parametrize("method", EVICTING)
def test_nobody_writes_to_the_prefill(family: str, method: str) -> None:
    prefill = read(family, tokens(T))
    before = [[t.clone() for t in (kv.keys, kv.values, kv.queries, kv.column_sums)] for kv in prefill.layers]  # type: ignore[union-attr]
    cache = compact(prefill, [selection(method, prefill, total_of(prefill, "12")), keep_all(prefill)], 20)
    decoded(family, cache, tokens(4), [3, 1])
    cache.crop([2, 2])
    for kv, copies in zip(prefill.layers, before, strict=True):
        for tensor, copy in zip((kv.keys, kv.values, kv.queries, kv.column_sums), copies, strict=True):
            assert torch.equal(tensor, copy)  # type: ignore[arg-type]
    held = {t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)}
    assert not held & {t.data_ptr() for kv in prefill.layers for t in (kv.keys, kv.values)}


@pytest.mark.parametrize("prompt", ["question_in", "question_after"])
def test_a_cell_answers_as_if_alone_with_a_prefill_of_its_own(family: str, prompt: str) -> None:
    ids = tokens(T + 8, seed=3).tolist()
    asked = Prompt(ids, T if prompt == "question_after" else len(ids))
    cells = [Cell("full", SCORED["full"], None)]
    cells += [
        Cell(name, SCORED[name], Budget.parse(budget))
        for name in DECODED
        for budget in ("45%", "12", "60%")[: 3 if name in OLDEST else 1]
    ]

    def answers(chosen: list[Cell], **settings) -> dict[tuple[str, str], list[int]]:
        sweep = Sweep(tiny(family), Protocol(prompt=prompt), **settings)  # type: ignore[arg-type]
        found = {(c.name, str(c.budget)): o.answer.tokens for c, o in sweep.example(asked, chosen, 12) if o.answer}
        assert len(found) == len(chosen)
        return found

    def tied(cell: Cell, ours: list[int], theirs: list[int]) -> bool:
        """Do they part where the two best logits lie within rounding of each other?"""
        place = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        read_first = asked.context
        prefill = read(family, torch.tensor(ids[:read_first]))
        kept = selection(cell.name, prefill, total_of(prefill, str(cell.budget))) if cell.budget else None
        logits = masked_logits(family, torch.tensor(ids + ours[:place]), read_first, kept)[-1]
        best = logits.topk(2).values
        return float(best[0] - best[1]) < 1e-4

    together = answers(cells)
    in_small_batches = answers(cells, cell_bytes=200_000, with_fidelity=False)
    exceptions = 0
    for cell in cells:
        name = (cell.name, str(cell.budget))
        alone = answers([cell], with_fidelity=False) if str(cell.budget) != "60%" else {}  # two budgets of a method tell as much
        for other in (in_small_batches[name], alone.get(name, together[name])):
            if other != together[name]:
                assert tied(cell, together[name], other), name
                exceptions += 1
    assert exceptions <= 2
    assert len({tuple(answer) for answer in together.values()}) > 3, "all cells say the same: the test would see nothing"


def test_allocated_bytes_are_those_of_the_storages_and_bounded(family: str) -> None:
    prefill = read(family, tokens(200))
    for budget in ("20", "50%", "100%"):
        kept = [selection(name, prefill, total_of(prefill, budget)) for name in ("snapkv", "ada_snapkv", "pyramidkv")]
        for room in (0, 1, 64, 100):
            cache = compact(prefill, kept, room)
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for layer in cache.layers
                for t in (layer.keys, layer.values, layer.positions)
            }
            counts = cache.counts()
            assert sum(c.bytes_allocated for c in counts) == sum(storages.values())
            for count, chosen in zip(counts, kept, strict=True):
                rows = sum(len(layer) for layer in chosen)
                tail = rows * slack_for(room) * (prefill.shape.entry_bytes() + 4)
                assert count.bytes_kept == count.entries * 2 * prefill.shape.head_dim * 4
                assert count.bytes_allocated - count.bytes_kept <= 0.02 * count.bytes_kept + 4 * count.entries + tail


@pytest.mark.parametrize("budget", ["10", "23", "40%", "77%"])
def test_special_cases_are_snapkv(family: str, budget: str) -> None:
    prefill = read(family, tokens(T, seed=4))
    scores = score_prefill(WindowAttention(), prefill)
    total = total_of(prefill, budget)
    plain = Eviction(WindowAttention(), Uniform()).compress(prefill, total, scores)
    for allocator in (Pyramid(steepness=1), AdaptiveHeads(floor=1)):
        other = Eviction(WindowAttention(), allocator).compress(prefill, total, scores)
        for ours, theirs in zip(plain, other, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.kept, b.kept)  # type: ignore[arg-type]


def test_a_model_out_of_reach_is_refused_by_name() -> None:
    falcon = FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50))
    with pytest.raises(UnsupportedModel, match="falcon"):
        Model(falcon, None, "some-falcon", "0")


def test_an_unknown_attention_feature_is_refused() -> None:
    model = Model(network("llama"), None, "m", "0")
    with pytest.raises(UnsupportedModel, match="alibi"):
        model.network(tokens(4)[None], use_cache=False, alibi=torch.zeros(4))


def test_a_layer_that_attention_does_not_reach_is_noticed() -> None:
    net = network("llama")
    model = Model(net, None, "m", "0")
    net.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModel, match="2 of 3 layers"):
        model.prefill(tokens(10), SCORED["full"].needs)


@pytest.mark.parametrize("prompt", ["question_in", "question_after"])
def test_the_window_ends_where_the_protocol_says(prompt: str) -> None:
    """question_in: the last queries are the question's last tokens; question_after: the context's."""
    ids = tokens(50).tolist()
    seen = {}

    class Watching(WindowAttention):
        def score(self, layer):
            seen[layer.index] = layer.queries
            return super().score(layer)

    cell = Cell("w", Eviction(Watching(), Uniform()), Budget.parse("12"))
    context = 40 if prompt == "question_after" else 50
    list(Sweep(tiny("llama"), Protocol(prompt=prompt)).example(Prompt(ids, context), [cell], 2))  # type: ignore[arg-type]
    captured = {}

    def catch(module, query, key, value, mask, scaling, **_):
        captured[module.layer_idx] = query
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    net = network("llama")
    AttentionInterface.register("catching_in_test", catch)
    net.set_attn_implementation("catching_in_test")
    with torch.no_grad():
        net(torch.tensor([ids[:context]]), use_cache=False)
    for layer, queries in seen.items():
        assert torch.allclose(queries, captured[layer][0, :, -8:], atol=1e-5)


def test_a_likelihood_over_a_compacted_cache_is_that_of_masked_attention(family: str) -> None:
    ids = tokens(T + 20, seed=5)
    prompt = Prompt(ids[:T].tolist(), T, tuple(ids[T:].tolist()))
    cells = [Cell("full", SCORED["full"], None), Cell("snapkv", SCORED["snapkv"], Budget.parse("11"))]
    found = dict(Sweep(tiny(family), Protocol(), with_fidelity=False).example(prompt, cells, 0))
    kept = selection("snapkv", read(family, ids[:T]), total_of(read(family, ids[:T]), "11"))
    for cell, evicted in zip(cells, (None, kept), strict=True):
        logprobs = masked_logits(family, ids, T, evicted).log_softmax(-1)
        nll = -sum(float(logprobs[place, ids[place + 1]]) for place in range(T, T + 19)) / 19
        assert found[cell].fidelity["loss"] == pytest.approx(nll, rel=1e-4)
        assert found[cell].answer.stop_reason == "forced"  # type: ignore[union-attr]


def test_compression_is_counted() -> None:
    prefill_ids = tokens(50).tolist()
    cells = [Cell("snapkv", SCORED["snapkv"], Budget.parse(budget)) for budget in ("12", "49", "50", "60", "100%")]
    outcomes = dict(Sweep(tiny("llama"), Protocol()).example(Prompt(prefill_ids, 50), cells, 3))
    said = {str(cell.budget): outcome.compressed for cell, outcome in outcomes.items()}
    assert said == {"12": True, "49": True, "50": False, "60": False, "100%": False}


def test_uniform_scores_are_not_mistaken_for_nothing() -> None:
    """A scorer that cannot tell entries apart keeps the newest: ties go to the later position."""

    class Flat(WindowAttention):
        def score(self, layer):
            return torch.zeros(layer.query_heads // layer.width, layer.keys.shape[1])

    prefill = read("llama", tokens(30))
    scorer = replace(Flat(), window=1)
    kept = Eviction(scorer, Uniform()).compress(prefill, 6 * 10, score_prefill(scorer, prefill))
    assert all(row.kept.tolist() == list(range(20, 30)) for layer in kept for row in layer)  # type: ignore[union-attr]


@pytest.mark.parametrize("block", [1, 700, 2**20])
@pytest.mark.parametrize("window", [None, 24])
def test_softcapped_prefill_attention_is_its_definition(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any size, for all queries or the last ones."""
    monkeypatch.setattr("harness.engine.observe.BLOCK_LOGITS", block)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 50, 16, generator=generator) * 3
    keys, values = torch.randn(2, 2, 50, 16, generator=generator).unbind(0)
    settings = AttentionSettings(0.25, softcap=2.0, window=window)
    logits = 2.0 * torch.tanh(queries @ keys.repeat_interleave(2, 0).transpose(1, 2) * 0.25 / 2.0)
    place = torch.arange(50)
    hidden = place[None] > place[:, None]
    if window:
        hidden |= place[None] <= place[:, None] - window
    wanted = logits.masked_fill(hidden, float("-inf")).softmax(-1) @ values.repeat_interleave(2, 0)
    assert (softcapped_attention(queries, keys, values, settings) - wanted).abs().max() < 1e-5
    assert (softcapped_attention(queries[:, -3:], keys, values, settings) - wanted[:, -3:]).abs().max() < 1e-5


def test_a_softcapped_prefill_makes_no_square_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither logits nor a mask: no tensor of T x T numbers is ever made."""
    monkeypatch.setattr("harness.engine.observe.BLOCK_LOGITS", 2000)
    squares: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 400 * 400:
                squares.append(f"{func} {tuple(out.shape)}")
            return out

    with Watch():
        read("gemma2", tokens(400))
    assert not squares
