"""How likely what is fed to a cache is, and how close its predictions stay to the full cache's (fidelity).

Tokens are fed by force (teacher forcing): appended to the rows in one pass or a few, scored, and cropped again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.engine.evict import Turns
from harness.engine.model import Model
from harness.engine.rows import RowCache

FORCED_NUMBERS = 2**26  # logits held at once by a forced pass
CACHED_NUMBERS = 2**20  # log-probabilities that are made and compared at once on a CPU: they stay in its cache


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


def forced(model: Model, cache: RowCache, tokens: Sequence[int], turns: Turns | None = None) -> Iterator[tuple[int, Tensor]]:
    """Feeds the same tokens to every cell, in pieces that fit in memory, and takes them back.

    Args:
        turns: of cells that evict while decoding: pieces end where one of them does, and nothing is taken back.

    Yields:
        where a part of a piece starts, and the log-probabilities of what follows each of its tokens, [C, part, V].
    """
    each = cache.cells * model.config.vocab_size
    wide = max(1, FORCED_NUMBERS // each)
    part = max(1, CACHED_NUMBERS // each) if model.device.type == "cpu" else wide
    start = 0
    while start < len(tokens):
        stop = start + (wide if turns is None else min(wide, turns.room))
        piece = torch.tensor(tokens[start:stop], device=model.device).expand(cache.cells, -1)
        logits = model.decode(cache, piece, keep=piece.shape[1])
        for place in range(0, piece.shape[1], part):
            yield start + place, logits[:, place : place + part].float().log_softmax(-1)
        start = stop
        if turns is not None:
            turns.took(piece.shape[1])
    if turns is None:
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


def losses(model: Model, cache: RowCache, lead: Tensor, tokens: Sequence[int], turns: Turns | None = None) -> Tensor:
    """The negative log-likelihood of each token behind what the cells hold, nats, [C, n] on the host.

    Args:
        lead: [C, V], logits of the first.
        turns: of cells that evict while decoding; their cache is not left as it was.
    """
    wanted = torch.tensor(tokens, device=lead.device)
    found = torch.empty(cache.cells, len(tokens))

    def add(start: int, logprobs: Tensor) -> None:  # [C, p, V]
        mine = wanted[start : start + logprobs.shape[1]].expand(len(logprobs), -1)
        found[:, start : start + logprobs.shape[1]] = -logprobs.gather(-1, mine[..., None])[..., 0].cpu()

    add(0, lead.float().log_softmax(-1)[:, None])
    for start, logprobs in forced(model, cache, tokens[:-1], turns):
        add(start + 1, logprobs)
    return found


@dataclass(frozen=True)
class FullAnswer:
    """What the full cache said, and how sure it was: the yardstick of fidelity."""

    tokens: list[int]
    logprobs: Tensor  # [A, V], of each of the tokens' places but the first under question_in

    @classmethod
    def of(cls, model: Model, cache: RowCache, tokens: list[int], lead: Tensor | None) -> FullAnswer:
        """`lead`: [1, V], log-probabilities of the first token, where it came out of the cache and not of the prefill."""
        parts = [] if lead is None else [lead.cpu()]
        parts += [logprobs[0].cpu() for _, logprobs in forced(model, cache, tokens[:-1])]
        empty = torch.zeros(0, model.config.vocab_size)
        return cls(tokens, torch.cat(parts) if parts else empty)

    def fidelity(self, model: Model, cache: RowCache, lead: Tensor | None, turns: Turns | None = None) -> list[dict[str, float]]:
        """How far each cell's predictions lie from the full cache's, all fed the full cache's answer.

        Args:
            lead: [C, V] or None, as above.
            turns: of cells that evict while decoding; their cache is not left as it was.

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
        for start, logprobs in forced(model, cache, self.tokens[:-1], turns):
            sums += self._compare(logprobs, done + start)
        means = sums / len(self.logprobs)
        means[:, 0].clamp_(min=0.0)  # what is no number stays none
        return [{"kl": kl, "top1": top1, "loss": loss} for kl, top1, loss in means.tolist()]

    def _compare(self, ours: Tensor, start: int) -> Tensor:
        """Sums over a piece [C, p, V] of places that starts at place `start`, [C, 3]."""
        places = ours.shape[1]
        full = self.logprobs[start : start + places].to(ours.device)
        said = torch.tensor(self.tokens[len(self.tokens) - len(self.logprobs) :][start : start + places])
        shares = full.exp()
        kl = torch.where(shares == 0, 0.0, shares * (full - ours)).sum(-1)  # an impossible token: 0 times infinity, and no more
        same = (ours.argmax(-1) == full.argmax(-1)).double()
        loss = -ours.gather(-1, said.to(ours.device).expand(ours.shape[0], -1)[..., None])[..., 0]
        return torch.stack([kl.double().sum(1), same.sum(1), loss.double().sum(1)], 1).cpu()
