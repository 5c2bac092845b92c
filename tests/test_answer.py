"""Greedy answers with drafts are the model's own; fidelity is what its definition says."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import network, read, tiny, tokens

import harness.engine.generate
import harness.engine.scoring
from harness.cache import keep_all
from harness.engine.generate import NO_NUMBER, Answer, Decoder, NgramTable, Sampler, Stop, generate, propose
from harness.engine.rows import compact
from harness.engine.scoring import FullAnswer, forced
from harness.errors import BadRequest
from harness.evaluation.request import RunRequest
from methods import METHODS
from methods.base import Eviction, score_prefill


def plain_greedy(family: str, ids: torch.Tensor, count: int) -> list[int]:
    """transformers alone, one pass over everything a token."""
    net = network(family)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, net(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return ids[-count:].tolist()


@pytest.mark.parametrize("most_drafts", [0, 1, 15])
def test_answers_are_the_models_own_whatever_is_drafted(family: str, most_drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.engine.generate, "MOST_DRAFTS", most_drafts)
    ids = tokens(30, seed=6)
    prefill = read(family, ids)
    first = int(prefill.logits.argmax())
    drafts = NgramTable()
    drafts.learn(ids.tolist())
    cache = compact(prefill, [keep_all(prefill)] * 2, 48)
    answers = generate(tiny(family), cache, [[first], [first]], Decoder(drafts, Stop(frozenset(), 40)))
    assert [answer.tokens for answer in answers] == [plain_greedy(family, ids, 40)] * 2
    assert answers[0].stop_reason == "length"


def test_drafts_save_passes() -> None:
    """What one cell has said is the next one's draft."""
    prefill = read("llama", tokens(30, seed=6))
    model, plain = tiny("llama"), tiny("llama").decode_ragged
    first, drafts, passes = [[int(prefill.logits.argmax())]], NgramTable(), []

    def counting(*arguments, **options):
        passes[-1] += 1
        return plain(*arguments, **options)

    model.decode_ragged = counting  # type: ignore[method-assign]
    try:
        answers = []
        for _ in range(2):
            passes.append(0)
            cache = compact(prefill, [keep_all(prefill)], 72)
            answers.append(generate(model, cache, first, Decoder(drafts, Stop(frozenset(), 64)))[0].tokens)
    finally:
        del model.decode_ragged  # type: ignore[attr-defined]
    assert answers[0] == answers[1]
    assert passes[1] < passes[0] / 2


def test_a_cell_ends_at_its_end_token_and_keeps_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(30, seed=6)
    said = plain_greedy("llama", ids, 20)
    stop = next(token for token in said[3:] if token not in said[:3])
    prefill = read("llama", ids)
    known = NgramTable()
    known.learn(said)
    for drafts, width in ((NgramTable(), 0), (known, 7)):  # drafts that go on behind the end are no part of the answer
        monkeypatch.setattr(harness.engine.generate, "Answer", lambda tokens, width=width: Answer(tokens, width=width))
        cache = compact(prefill, [keep_all(prefill)], 40)
        answer = generate(tiny("llama"), cache, [said[:1]], Decoder(drafts, Stop(frozenset({stop}), 20)))[0]
        assert answer.tokens == said[: said.index(stop) + 1]
        assert answer.stop_reason == "end"
        assert answer.end is not None
        assert answer.end.entries == 6 * (30 + len(answer.tokens) - 1)


def test_an_answer_takes_nothing_behind_its_end() -> None:
    answer = Answer([])
    answer.add([5, 6, 7, 8], Stop(frozenset({7}), 10))
    assert (answer.tokens, answer.stop_reason) == ([5, 6, 7], "end")
    answer = Answer([])
    answer.add([5, 6, 7], Stop(frozenset(), 2))
    assert (answer.tokens, answer.stop_reason) == ([5, 6], "length")


def test_drafts_follow_two_tokens_or_else_one() -> None:
    drafts = NgramTable()
    drafts.learn([1, 2, 3, 1, 2, 4])
    assert propose([1, 2], 1, drafts) == [4]
    assert propose([3, 1], 3, drafts) == [2, 4]
    assert propose([9, 3], 2, drafts) == [1, 2]
    assert propose([7], 2, drafts) == []
    drafts.learn([9, 9, 3, 5], start=3)
    assert propose([9, 3], 1, drafts) == [5] and propose([9], 1, drafts) == []


def test_a_cell_repeats_itself_rather_than_others() -> None:
    own, others = NgramTable(longest=3), NgramTable()
    own.learn([1, 2, 3, 1, 2, 4, 2, 3])
    others.learn([2, 3, 8, 5])
    assert propose([1, 2, 3], 1, own, others) == [1]
    assert propose([4, 2, 3], 1, own, others) == [1]  # nothing follows these three, but these two
    assert propose([3, 8], 2, own, others) == [5]


@pytest.mark.parametrize(
    ("numbers", "cached"), [(2**26, 2**20), (97 * 2 * 3, 2**20), (1, 2**20), (2**26, 97 * 2 * 3), (2**26, 1), (97 * 2 * 3, 1)]
)
def test_fidelity_is_its_definition(numbers: int, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.engine.scoring, "FORCED_NUMBERS", numbers)
    monkeypatch.setattr(harness.engine.scoring, "CACHED_NUMBERS", cached)
    model, prefill = tiny("llama"), read("llama", tokens(40))
    snap = METHODS["snapkv"]
    kept = snap.compress(prefill, 6 * 10, score_prefill(snap.scorer, prefill))  # type: ignore[union-attr]
    said = [5, 9, 13, 4, 60]
    full_cache, cache = compact(prefill, [keep_all(prefill)], 8), compact(prefill, [kept, keep_all(prefill)], 8)
    full = FullAnswer.of(model, full_cache, said, None)
    ours, same = full.fidelity(model, cache, None)
    assert cache.seen.tolist() == [40, 40]
    fed = torch.tensor(said[:-1])
    p = model.decode(full_cache, fed[None], keep=4)[0].log_softmax(-1)
    q = model.decode(cache, fed.expand(2, -1), keep=4)[0].log_softmax(-1)
    kl = sum(float((p[i].exp() * (p[i] - q[i])).sum()) for i in range(4)) / 4
    assert ours["kl"] == pytest.approx(kl, rel=1e-4)
    assert ours["loss"] == pytest.approx(-sum(float(q[i, said[i + 1]]) for i in range(4)) / 4, rel=1e-5)
    assert ours["top1"] == sum(int(p[i].argmax() == q[i].argmax()) for i in range(4)) / 4
    assert same == {"kl": pytest.approx(0, abs=1e-6), "top1": 1.0, "loss": pytest.approx(full_loss(p, said), rel=1e-5)}


def full_loss(p: torch.Tensor, said: list[int]) -> float:
    return -sum(float(p[i, said[i + 1]]) for i in range(4)) / 4


def test_under_question_after_the_first_token_counts_too() -> None:
    model, prefill = tiny("llama"), read("llama", tokens(40))
    said = [5, 9]
    lead = torch.randn(1, 97).log_softmax(-1)
    full = FullAnswer.of(model, compact(prefill, [keep_all(prefill)], 8), said, lead)
    assert full.logprobs.shape == (2, 97)
    other = torch.randn(1, 97).log_softmax(-1)
    found = full.fidelity(model, compact(prefill, [keep_all(prefill)], 8), other)[0]
    assert found["kl"] == pytest.approx(float((lead.exp() * (lead - other)).sum()) / 2, rel=1e-4)


def test_an_answer_of_one_token_out_of_the_prefill_has_no_fidelity() -> None:
    model, prefill = tiny("llama"), read("llama", tokens(10))
    cache = compact(prefill, [keep_all(prefill)], 4)
    assert FullAnswer.of(model, cache, [5], None).fidelity(model, cache, None) == [{}]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pass_that_measures_fidelity_begins_the_answers(family: str, temperature: float, monkeypatch) -> None:
    """What is begun goes on to the answer that a cell gives by itself, with the entries that it then holds."""
    monkeypatch.setattr(harness.engine.scoring, "CACHED_NUMBERS", 4 * 97 * 2)  # two tokens a part
    model, ids = tiny(family), tokens(40, seed=8)
    prefill, sampler, stop = read(family, ids), Sampler(temperature, "3/prompt"), Stop(frozenset(), 12)
    snap = METHODS["snapkv"]
    assert isinstance(snap, Eviction)
    scores = score_prefill(snap.scorer, prefill)
    sizes = (9, 20, 39)
    small = [snap.compress(prefill, prefill.shape.layers * size * prefill.shape.kv_heads, scores) for size in sizes]
    kept, logits = [*small, keep_all(prefill)], prefill.logits.expand(4, -1)
    alone, begun = compact(prefill, kept, 30), compact(prefill, kept, 30)
    first = [[token] for token in sampler.sample(logits, [0] * 4)]
    wanted = generate(model, alone, first, Decoder(NgramTable(), stop, sampler))
    full = FullAnswer.of(model, compact(prefill, [keep_all(prefill)], 30), wanted[-1].tokens, None)
    measured = full.fidelity(model, begun, None)
    numbers, found = full.follow(model, begun, logits, None, sampler.sample)
    assert numbers == measured and numbers[-1] == pytest.approx(full.of_itself(), abs=1e-5)
    assert begun.seen.tolist() == [40 + len(mine) - 1 for mine in found]
    for mine, answer in zip(found, wanted, strict=True):
        shared = next((n for n, (a, b) in enumerate(zip(answer.tokens, full.tokens, strict=True)) if a != b), 12)
        assert mine == answer.tokens[: shared + 1]
    assert found[-1] == full.tokens and len(found[0]) < 12
    answers = generate(model, begun, found, Decoder(NgramTable(), stop, sampler))
    assert [(a.tokens, a.stop_reason, a.end) for a in answers] == [(a.tokens, a.stop_reason, a.end) for a in wanted]


def test_forcing_leaves_the_cache_as_it_was() -> None:
    model, prefill = tiny("llama"), read("llama", tokens(10))
    cache = compact(prefill, [keep_all(prefill)], 9)
    before = model.decode(cache, tokens(1)[None])
    cache.crop([1])
    assert sum(part.shape[1] for _, part in forced(model, cache, [3, 4, 5])) == 3
    assert torch.allclose(model.decode(cache, tokens(1)[None]), before, atol=1e-6)


@pytest.mark.parametrize("most", [5, 14, 21])
def test_drafts_never_reach_behind_the_answers_end(most: int) -> None:
    """Not in the counts, and not beyond the positions that the model has (OPT's are learned: one more would be an error)."""
    model = tiny("opt")
    ids = tokens(model.max_tokens - most, seed=6)
    prefill = read("opt", ids)
    drafts = NgramTable()
    for _ in range(2):  # the second time everything is drafted
        cache = compact(prefill, [keep_all(prefill)], most + 7)
        answer = generate(model, cache, [[int(prefill.logits.argmax())]], Decoder(drafts, Stop(frozenset(), most)))[0]
        assert len(answer.tokens) == most
        assert answer.end is not None
        assert answer.end.entries == model.shape.full_entries(len(ids) + most - 1)


def test_sampled_answers_share_their_noise_and_do_not_depend_on_drafts_or_neighbours(family: str) -> None:
    ids = tokens(40, seed=8)
    prefill = read(family, ids)
    sampler = Sampler(temperature=1.0, seed="3/prompt")
    snap = METHODS["snapkv"]
    assert isinstance(snap, Eviction)
    small = snap.compress(prefill, 10 * 3 * prefill.shape.kv_heads, score_prefill(snap.scorer, prefill))
    selections = [keep_all(prefill), small, keep_all(prefill)]

    def answers(chosen: list) -> list[list[int]]:
        cache = compact(prefill, chosen, 40)
        first = [[token] for token in sampler.sample(prefill.logits.expand(len(chosen), -1), [0] * len(chosen))]
        return [a.tokens for a in generate(tiny(family), cache, first, Decoder(NgramTable(), Stop(frozenset(), 24), sampler))]

    def one_by_one(selection) -> list[int]:
        cache, said = compact(prefill, [selection], 40), sampler.sample(prefill.logits[None], [0])
        while len(said) < 24:
            logits = tiny(family).decode(cache, torch.tensor([said[-1:]]))[0]
            said += sampler.sample(logits, [len(said)])
        return said

    together = answers(selections)
    assert together[0] == together[2] == one_by_one(selections[0])
    assert together[1] == one_by_one(small)
    other = Sampler(temperature=1.0, seed="4/prompt").sample(prefill.logits.expand(99, -1), range(99))
    assert len(set(other)) > 5, "draws at other places must differ"
    assert Sampler().sample(prefill.logits[None], [0]) == [int(prefill.logits.argmax())]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    drawn = torch.tensor(Sampler(0.5, "x").sample(logits.expand(4000, -1), range(4000)))
    share = torch.bincount(drawn, minlength=4) / 4000
    assert (share - (logits[0] / 0.5).softmax(0)).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_follows_from_what_is_no_number(temperature: float) -> None:
    logits = torch.zeros(5, 7)
    logits[1, 3], logits[2, 3], logits[3, :], logits[4, :3] = float("nan"), float("inf"), -float("inf"), -float("inf")
    said = Sampler(temperature, "x").sample(logits, range(5))
    assert [token == NO_NUMBER for token in said] == [False, True, True, True, False], "an impossible token is none's fault"
    answer = Answer([5])
    answer.add([6, NO_NUMBER, 7], Stop(frozenset(), 9))
    assert (answer.tokens, answer.stop_reason) == ([5, 6], "no number")


def test_fidelity_tells_impossible_tokens_from_numbers_that_are_none() -> None:
    half = torch.tensor([0.5, 0.5, 0.0]).log()
    full = FullAnswer([0, 0], half[None])
    kl, top1, loss = full._compare(torch.tensor([[[0.25, 0.75, 0.0]]]).log(), 0)[0].tolist()
    assert (
        abs(kl - 0.5 * math.log(0.5 / 0.25) - 0.5 * math.log(0.5 / 0.75)) < 1e-6 and top1 == 0 and abs(loss - math.log(4)) < 1e-6
    )
    for wrong in (torch.full((1, 1, 3), float("nan")), torch.tensor([[[0.0, 1.0, 0.0]]]).log()):
        assert not math.isfinite(float(full._compare(wrong, 0)[0, 0])), "neither is close to the full cache"
    assert math.isnan(float(FullAnswer([0, 0], half[None] + float("nan"))._compare(half[None, None], 0)[0, 0]))


def test_temperatures_at_the_edges() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-45, 1e-38, 1e-8):
        assert Sampler(temperature, "x").sample(logits, [0]) == [1], "only the best is drawn"
    for temperature in (math.inf, math.nan, -1.0):
        with pytest.raises(BadRequest, match="--temperature"):
            RunRequest(temperature=temperature)
