"""Answers of many cells at once, by greedy or sampled decoding with n-gram (prompt-lookup) speculation.

The cells of one prompt are the model's batch. They often say the same, and a small cache often repeats itself, so each step may
carry draft tokens: those that followed the same n-gram earlier in this cell's answer, or else in the prompt or in any other
cell's answer. A draft token counts only where it is what the model itself says next; rejected ones are cropped from the cache.
What a cell answers is thus what it would answer alone.

Saxena, "Prompt Lookup Decoding", 2023 (github.com/apoorvumang/prompt-lookup-decoding) looks n-grams up in the prompt alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from harness.engine.evict import Held, Turns
from harness.engine.model import Model
from harness.engine.rows import Counts, RowCache
from harness.engine.scoring import Likelihood, agreeing

MOST_DRAFTS = 15  # draft tokens of a step
NOISE_KEPT = 64  # places of an answer whose noise is kept for the other cells
COLDEST = 1e-30  # a temperature at which only the best token is drawn, and logits divided by it overflow
NO_NUMBER = -1  # in a token's place: the logits hold what is no number, so no token follows from them
TAIL = 8  # tokens that are looked at for a stop text, beyond those that its bytes can take


@dataclass(frozen=True)
class Sampler:
    """Which token follows from logits: the best one, or one drawn at a temperature.

    A draw is the best of the logits with Gumbel noise that depends on the seed and the place in the answer alone. So all cells of
    a prompt share their noise, their differences are the caches', and draft tokens can be verified as in greedy decoding.
    """

    temperature: float = 0.0
    seed: str = ""

    def sample(self, logits: Tensor, places: Sequence[int]) -> list[int]:
        """[N, V] logits of tokens for these places of an answer -> N tokens, or NO_NUMBER."""
        asked = logits
        if self.temperature > COLDEST:
            noise = torch.stack([_gumbel(self.seed, place, logits.shape[-1]) for place in places])
            logits = logits.float() / self.temperature + noise.to(logits.device)
        best = logits.argmax(-1)
        sure = torch.isfinite(asked.amax(-1))  # the largest of numbers and something else is the something else
        return torch.where(sure, best, NO_NUMBER).tolist()


@lru_cache(maxsize=NOISE_KEPT)
def _gumbel(seed: str, place: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{place}".encode()))
    return -torch.empty(size).exponential_(generator=generator).log()


@dataclass(frozen=True)
class Stop:
    """What ends an answer: a token, a text in it, or its length."""

    ids: frozenset[int]
    most: int  # tokens, end token included
    texts: tuple[str, ...] = ()
    words: Callable[[list[int]], str] | None = None  # of tokens, special ones too, for `texts`

    def reason(self, tokens: list[int]) -> str | None:
        """Why an answer ends with the last of `tokens`; None: it goes on."""
        if tokens[-1] in self.ids:
            return "end"
        if self.texts and self.words is not None:
            longest = max(len(text.encode()) for text in self.texts)  # a token is one byte at least, not one letter
            tail = self.words(tokens[-longest - TAIL :])
            if any(text in tail for text in self.texts):
                return "text"
        return "length" if len(tokens) >= self.most else None


@dataclass
class NgramTable:
    """Which token came last after which n-gram, for n from 1 to `longest`."""

    longest: int = 2
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def learn(self, tokens: Sequence[int], start: int = 1) -> None:
        """From the tokens at `start` and behind."""
        for place in range(max(start, 1), len(tokens)):
            for length in range(1, min(self.longest, place) + 1):
                self.after[tuple(tokens[place - length : place])] = tokens[place]


def propose(tokens: Sequence[int], count: int, *tables: NgramTable) -> list[int]:
    """At most `count` draft tokens: what followed the longest n-gram that ends here, in the first table that knows it."""
    longest = max(table.longest for table in tables)
    said = list(tokens[-longest:])
    kept = len(said)
    while len(said) < kept + count:
        lasts = (tuple(said[-length:]) for length in range(min(longest, len(said)), 0, -1))
        known = next((table.after[last] for last in lasts for table in tables if last in table.after), None)
        if known is None:
            break
        said.append(known)
    return said[kept:]


@dataclass
class Answer:
    """What one cell has said so far, or how likely it found what it was asked about."""

    tokens: list[int]
    stop_reason: str | None = None
    end: Counts | None = None  # what the cell held when it had ended
    width: int = 0  # draft tokens of the next step, at most
    likelihoods: dict[int, Likelihood] = field(default_factory=dict)  # by request
    held: Held | None = None  # over its tokens, if its cell evicts while decoding
    own: NgramTable = field(default_factory=lambda: NgramTable(longest=3))  # of what it said itself

    def adapt(self, offered: int, accepted: int) -> None:
        """Wider while drafts are accepted, narrower when they are not. Depends on tokens only, never on time."""
        if accepted == offered > 0:
            self.width = min(MOST_DRAFTS, 4 * self.width + 3)
        elif accepted < 0.4 * offered:
            self.width //= 2

    def add(self, tokens: Iterable[int], stop: Stop) -> None:
        for token in tokens:
            if self.stop_reason is None and token == NO_NUMBER:
                self.stop_reason = "no number"
            elif self.stop_reason is None:
                self.tokens.append(token)
                self.stop_reason = stop.reason(self.tokens)


@dataclass(frozen=True)
class Decoder:
    """How answers go on: the n-grams of the prompt and of every answer, when an answer ends, how tokens are drawn."""

    ngrams: NgramTable
    stop: Stop
    sampler: Sampler = Sampler()


def generate(
    model: Model, cache: RowCache, begun: Sequence[Sequence[int]], decoder: Decoder, turns: Turns | None = None
) -> list[Answer]:
    """Answers of the cells of `cache`.

    Cells that have ended leave the batch; the last of them stay in the cache, which then holds the prompt and their answers but
    for the last token.

    Args:
        begun: of each cell, the tokens that follow the prompt, all but the last of which are in its cache.
        turns: of cells that evict while decoding. They go token by token: what is evicted could not be taken back with a draft.
    """
    answers = [Answer([]) for _ in begun]
    for answer, tokens in zip(answers, begun, strict=True):
        answer.add(tokens, decoder.stop)
        for table in (answer.own, decoder.ngrams):
            table.learn(answer.tokens)
    active = list(range(len(answers)))
    while active := _drop_ended(cache, answers, active, turns):
        if turns is None:
            _step(model, cache, [answers[cell] for cell in active], decoder)
        else:
            _lone_step(model, cache, [answers[cell] for cell in active], decoder)
            turns.took(1)
    return answers


def _drop_ended(cache: RowCache, answers: Sequence[Answer], active: list[int], turns: Turns | None) -> list[int]:
    """The cells that go on; the cache keeps only those, or all if there are none."""
    staying = [number for number, cell in enumerate(active) if answers[cell].stop_reason is None]
    if len(staying) == len(active):
        return active
    for number, (cell, counts) in enumerate(zip(active, cache.counts(), strict=True)):
        if answers[cell].stop_reason is not None:
            answers[cell].end = counts
            answers[cell].held = None if turns is None else turns.held[number]
    if staying:
        cache.keep(staying)
        if turns is not None:
            turns.stay(staying)
    return [active[number] for number in staying]


def _lone_step(model: Model, cache: RowCache, answers: Sequence[Answer], decoder: Decoder) -> None:
    """One pass of the model over every cell's last token, without drafts."""
    logits = model.decode_ragged(cache, [answer.tokens[-1:] for answer in answers])
    said = decoder.sampler.sample(logits, [len(answer.tokens) for answer in answers])
    for answer, token in zip(answers, said, strict=True):
        answer.add([token], decoder.stop)


def _step(model: Model, cache: RowCache, answers: Sequence[Answer], decoder: Decoder) -> None:
    """One pass of the model: every cell's last token, with its draft tokens behind it."""
    left = [decoder.stop.most - len(answer.tokens) - 1 for answer in answers]
    guesses = [
        propose(a.tokens, min(max(a.width, 1), most), a.own, decoder.ngrams) for a, most in zip(answers, left, strict=True)
    ]
    pieces = [[answer.tokens[-1], *guess[: answer.width]] for answer, guess in zip(answers, guesses, strict=True)]
    places = [len(answer.tokens) + n for answer, piece in zip(answers, pieces, strict=True) for n in range(len(piece))]
    said = iter(decoder.sampler.sample(model.decode_ragged(cache, pieces), places))
    rejected = []
    for answer, guess, piece in zip(answers, guesses, pieces, strict=True):
        spoken = [next(said) for _ in piece]
        right = agreeing(guess, spoken)
        accepted = min(right, len(piece) - 1)
        before = len(answer.tokens)
        answer.add(spoken[: accepted + 1], decoder.stop)
        accepted = max(0, len(answer.tokens) - before - 1)  # draft tokens behind an end are no part of the answer
        for table in (answer.own, decoder.ngrams):
            table.learn(answer.tokens, before)
        answer.adapt(len(guess), right)  # at width 0 the guess is made but not run: it says when to begin
        rejected.append(len(piece) - 1 - accepted)
    cache.crop(rejected)
