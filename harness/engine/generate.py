"""Answers of many cells at once, and how close each stays to the full cache.

The cells of one prompt are the model's batch. They often say the same, and a small cache often repeats itself, so each step
may carry drafts: the tokens that followed the same last tokens earlier in this cell's answer, or else in the prompt or in
any other cell's. A draft counts only where it is what the model itself says next; the rest is taken back. What a cell
answers is thus what it would answer alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from harness.engine.model import Model
from harness.engine.rows import Counts, RowCache

MOST_DRAFTS = 15
NOISE_KEPT = 64  # places of an answer whose noise is kept for the other cells
TAIL = 8  # tokens that are looked at for a stop text, beyond those that its letters can take
FORCED_NUMBERS = 2**26  # logits held at once by the forced pass


@dataclass(frozen=True)
class Chooser:
    """Which token follows from logits: the best one, or one drawn at a temperature.

    A draw is the best of the logits with Gumbel noise that depends on the seed and the place in the answer alone. So all cells of
    a prompt share their luck, their differences are the caches', and drafts can be checked as in greedy decoding.
    """

    temperature: float = 0.0
    seed: str = ""

    def choose(self, logits: Tensor, places: Sequence[int]) -> list[int]:
        """[N, V] logits of tokens for these places of an answer -> N tokens."""
        if self.temperature:
            noise = torch.stack([_gumbel(self.seed, place, logits.shape[-1]) for place in places])
            logits = logits.float() / self.temperature + noise.to(logits.device)
        return [int(token) for token in logits.argmax(-1)]


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
    words: Callable[[list[int]], str] | None = None  # of tokens, for `texts`

    def reason(self, tokens: list[int]) -> str | None:
        """Why an answer ends with the last of `tokens`; None: it goes on."""
        if tokens[-1] in self.ids:
            return "end"
        if self.texts and self.words is not None:
            tail = self.words(tokens[-max(map(len, self.texts)) - TAIL :])  # a token of text has at least one character
            if any(text in tail for text in self.texts):
                return "text"
        return "length" if len(tokens) >= self.most else None


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: summed log-probability in nats, whether each token is the model's first choice, and how many."""

    logprob: float
    greedy: bool
    tokens: int

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.logprob + other.logprob, self.greedy and other.greedy, self.tokens + other.tokens)

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor) -> Likelihood:
        """[n, V] logits, or log-probabilities, of the places of `tokens` [n]."""
        chosen = -torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="sum")
        return cls(float(chosen), bool((logits.argmax(-1) == tokens).all()), len(tokens))


@dataclass
class Drafts:
    """Which token came last after which `longest` tokens, or else after which fewer."""

    longest: int = 2
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def learn(self, tokens: Sequence[int], start: int = 1) -> None:
        """From the tokens at `start` and behind."""
        for place in range(max(start, 1), len(tokens)):
            for length in range(1, min(self.longest, place) + 1):
                self.after[tuple(tokens[place - length : place])] = tokens[place]


def propose(tokens: Sequence[int], count: int, *sources: Drafts) -> list[int]:
    """At most `count` tokens that may follow: what followed the most last tokens, in the first source that knows it."""
    longest = max(source.longest for source in sources)
    said = list(tokens[-longest:])
    kept = len(said)
    while len(said) < kept + count:
        lasts = (tuple(said[-length:]) for length in range(min(longest, len(said)), 0, -1))
        known = next((source.after[last] for last in lasts for source in sources if last in source.after), None)
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
    width: int = 0  # drafts of the next step at most
    likelihoods: dict[int, Likelihood] = field(default_factory=dict)  # by request
    own: Drafts = field(default_factory=lambda: Drafts(longest=3))  # what it said itself

    def adapt(self, offered: int, accepted: int) -> None:
        """Wider while drafts hold, narrower when they do not. Depends on tokens only, never on time."""
        if accepted == offered > 0:
            self.width = min(MOST_DRAFTS, 4 * self.width + 3)
        elif accepted < 0.4 * offered:
            self.width //= 2

    def add(self, tokens: Iterable[int], stop: Stop) -> None:
        for token in tokens:
            if self.stop_reason is None:
                self.tokens.append(token)
                self.stop_reason = stop.reason(self.tokens)


def generate(
    model: Model,
    cache: RowCache,
    first: Sequence[int],
    drafts: Drafts,
    stop: Stop,
    chooser: Chooser = Chooser(),
) -> list[Answer]:
    """Answers of the cells of `cache`.

    Cells that have ended leave the batch; the last of them stay in the cache, which then holds the prompt and their answers but
    for the last token.

    Args:
        first: of each cell, the token that follows the prompt.
        drafts: the prompt, and what its earlier cells have said; learns from these.
    """
    answers = [Answer([]) for _ in first]
    for answer, token in zip(answers, first, strict=True):
        answer.add([token], stop)
    active = list(range(len(answers)))
    while active := _drop_ended(cache, answers, active):
        _step(model, cache, [answers[cell] for cell in active], drafts, stop, chooser)
    return answers


def _drop_ended(cache: RowCache, answers: Sequence[Answer], active: list[int]) -> list[int]:
    """The cells that go on; the cache keeps only those, or all if there are none."""
    staying = [number for number, cell in enumerate(active) if answers[cell].stop_reason is None]
    if len(staying) == len(active):
        return active
    for cell, counts in zip(active, cache.counts(), strict=True):
        if answers[cell].stop_reason is not None:
            answers[cell].end = counts
    if staying:
        cache.keep(staying)
    return [active[number] for number in staying]


def _step(
    model: Model,
    cache: RowCache,
    answers: Sequence[Answer],
    drafts: Drafts,
    stop: Stop,
    chooser: Chooser,
) -> None:
    """One pass of the model: every cell's last token, with its drafts behind it."""
    guesses = [propose(a.tokens, min(max(a.width, 1), stop.most - len(a.tokens) - 1), a.own, drafts) for a in answers]
    pieces = [[answer.tokens[-1], *guess[: answer.width]] for answer, guess in zip(answers, guesses, strict=True)]
    places = [len(answer.tokens) + n for answer, piece in zip(answers, pieces, strict=True) for n in range(len(piece))]
    said = iter(chooser.choose(model.decode_ragged(cache, pieces), places))
    taken_back = []
    for answer, guess, piece in zip(answers, guesses, pieces, strict=True):
        spoken = [next(said) for _ in piece]
        right = _agreeing(guess, spoken)
        taken = min(right, len(piece) - 1)
        before = len(answer.tokens)
        answer.add(spoken[: taken + 1], stop)
        taken = len(answer.tokens) - before - 1  # drafts behind an end are no part of the answer
        for source in (answer.own, drafts):
            source.learn(answer.tokens, before)
        answer.adapt(len(guess), right)  # at width 0 the guess is made but not run: it says when to begin
        taken_back.append(len(piece) - 1 - taken)
    cache.crop(taken_back)


def _agreeing(guess: Sequence[int], said: Sequence[int]) -> int:
    """How many tokens of a draft the model says itself."""
    return next((n for n, (ours, its) in enumerate(zip(guess, said, strict=False)) if ours != its), min(len(guess), len(said)))


def forced(model: Model, cache: RowCache, tokens: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Feeds the same tokens to every cell, in pieces that fit in memory, and takes them back.

    Yields:
        where a piece starts, and the log-probabilities of what follows each of its tokens, [C, piece, V].
    """
    wide = max(1, FORCED_NUMBERS // (cache.cells * model.network.config.vocab_size))
    for start in range(0, len(tokens), wide):
        piece = torch.tensor(tokens[start : start + wide], device=model.device).expand(cache.cells, -1)
        yield start, model.decode(cache, piece, keep=piece.shape[1]).float().log_softmax(-1)
    cache.crop([len(tokens)] * cache.cells)


def branch(model: Model, cache: RowCache, lead: Tensor, tokens: Sequence[int], scored: int) -> list[Likelihood]:
    """How likely each cell finds the last `scored` of `tokens` behind what it holds. The cache is left as it was.

    Args:
        lead: [C, V], logits of the first token.
    """
    wanted = torch.tensor(tokens, device=lead.device)
    sums = [Likelihood(0.0, True, 0) for _ in range(cache.cells)]

    def add(start: int, logprobs: Tensor) -> None:  # [C, p, V], of the tokens from `start` on
        first = max(0, len(tokens) - scored - start)
        for cell, found in enumerate(logprobs[:, first:]):
            if len(found):
                sums[cell] += Likelihood.of(found, wanted[start + first : start + first + len(found)])

    add(0, lead.float().log_softmax(-1)[:, None])
    for start, logprobs in forced(model, cache, tokens[:-1]):
        add(start + 1, logprobs)
    return sums


@dataclass(frozen=True)
class FullAnswer:
    """What the full cache said, and how sure it was: the yardstick of fidelity."""

    tokens: list[int]
    logprobs: Tensor  # [A, V], of each of the tokens' places but the first under question_in

    @classmethod
    def of(cls, model: Model, cache: RowCache, answer: Answer, lead: Tensor | None) -> FullAnswer:
        """`lead`: [1, V], log-probabilities of the first token, where it came out of the cache and not of the prefill."""
        parts = [] if lead is None else [lead.cpu()]
        parts += [logprobs[0].cpu() for _, logprobs in forced(model, cache, answer.tokens[:-1])]
        empty = torch.zeros(0, model.network.config.vocab_size)
        return cls(answer.tokens, torch.cat(parts) if parts else empty)

    def fidelity(self, model: Model, cache: RowCache, lead: Tensor | None) -> list[dict[str, float]]:
        """How far each cell's predictions lie from the full cache's, all fed the full cache's answer.

        Args:
            lead: [C, V] or None, as above.

        Returns:
            of each cell, kl: mean KL of the full cache's distribution to the cell's, nats; top1: share of places at which
            both prefer the same token; loss: mean negative log-likelihood of full's answer, nats. Empty if the answer's
            only token came out of the prefill.
        """
        if not len(self.logprobs):
            return [{} for _ in range(cache.cells)]
        sums = torch.zeros(cache.cells, 3, dtype=torch.float64)
        done = 0
        if lead is not None:
            sums += self._compare(lead[:, None], 0)
            done = 1
        for start, logprobs in forced(model, cache, self.tokens[:-1]):
            sums += self._compare(logprobs, done + start)
        means = (sums / len(self.logprobs)).tolist()
        return [{"kl": max(0.0, kl), "top1": top1, "loss": loss} for kl, top1, loss in means]

    def _compare(self, ours: Tensor, start: int) -> Tensor:
        """Sums over a piece [C, p, V] of places that starts at place `start`, [C, 3]."""
        places = ours.shape[1]
        full = self.logprobs[start : start + places].to(ours.device)
        said = torch.tensor(self.tokens[len(self.tokens) - len(self.logprobs) :][start : start + places])
        kl = (full.exp() * (full - ours)).nan_to_num(0.0).sum(-1)
        same = (ours.argmax(-1) == full.argmax(-1)).double()
        loss = -ours.gather(-1, said.to(ours.device).expand(ours.shape[0], -1)[..., None])[..., 0]
        return torch.stack([kl.double().sum(1), same.sum(1), loss.double().sum(1)], 1).cpu()
