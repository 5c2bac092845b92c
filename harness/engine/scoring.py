"""How likely what is fed to a cache is, and how close its predictions stay to the full cache's (fidelity).

Tokens are fed by force (teacher forcing): appended to the rows in one pass or a few, scored, and cropped again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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


def fed(model: Model, cache: RowCache, tokens: Sequence[int], turns: Turns | None = None) -> Iterator[tuple[int, Tensor]]:
    """Feeds the same tokens to every cell, in pieces that fit in memory.

    Args:
        turns: of cells that evict while decoding: pieces end where one of them does.

    Yields:
        where a part of a piece starts, and the logits of what follows each of its tokens, [C, part, V].
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
            yield start + place, logits[:, place : place + part]
        start = stop
        if turns is not None:
            turns.took(piece.shape[1])


def forced(model: Model, cache: RowCache, tokens: Sequence[int], turns: Turns | None = None) -> Iterator[tuple[int, Tensor]]:
    """The same with log-probabilities for logits; the tokens are taken back, where no cell evicts while decoding."""
    for start, logits in fed(model, cache, tokens, turns):
        yield start, logits.float().log_softmax(-1)
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
        return self._means(cache.cells, lead, forced(model, cache, self.tokens[:-1], turns))

    def follow(
        self,
        model: Model,
        cache: RowCache,
        logits: Tensor,
        lead: Tensor | None,
        sample: Callable[[Tensor, Sequence[int]], list[int]],
    ) -> tuple[list[dict[str, float]], list[list[int]]]:
        """Fidelity, and how each cell's own answer begins: as far as it says what the full cache said, and a token more.

        The full cache's answer is thus the draft of every other one, and the pass that compares with it verifies it.

        Args:
            logits: [C, V], of the first token. lead: as above.
            sample: tokens by their logits [N, V] and places in the answer; the cells' own, see `generate.Sampler`.

        Returns:
            as `fidelity`; and tokens of each cell, all but the last of which its cache then holds.
        """
        said = [[token] for token in sample(logits, [0] * cache.cells)]

        def parts() -> Iterator[tuple[int, Tensor]]:
            for start, found in fed(model, cache, self.tokens[:-1]):
                cells, places, _ = found.shape
                own = sample(found.flatten(0, 1), [start + 1 + place for _ in range(cells) for place in range(places)])
                for cell, mine in enumerate(said):
                    mine += own[cell * places : (cell + 1) * places]
                yield start, found.float().log_softmax(-1)

        numbers = self._means(cache.cells, lead, parts())
        begun = [mine[: agreeing(mine, self.tokens) + 1] for mine in said]
        cache.crop([len(self.tokens) - len(mine) for mine in begun])
        return numbers, begun

    def of_itself(self) -> dict[str, float]:
        """The full cache's own fidelity: no distance, and how likely it found what it said."""
        wide = max(1, CACHED_NUMBERS // self.logprobs.shape[1])
        parts = ((start, self.logprobs[None, start : start + wide]) for start in range(0, len(self.logprobs), wide))
        return self._means(1, None, parts)[0]

    def _means(self, cells: int, lead: Tensor | None, parts: Iterable[tuple[int, Tensor]]) -> list[dict[str, float]]:
        """Of each cell, over all places. `parts`: log-probabilities [C, p, V] of places from a start on, behind the lead's."""
        sums = torch.zeros(cells, 3, dtype=torch.float64)
        if lead is not None:
            sums += self._compare(lead[:, None], 0)
        for start, logprobs in parts:
            sums += self._compare(logprobs, (lead is not None) + start)
        if not len(self.logprobs):
            return [{} for _ in range(cells)]
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


def agreeing(guess: Sequence[int], said: Sequence[int]) -> int:
    """How many tokens two answers have in common at their beginning."""
    return next((n for n, (ours, its) in enumerate(zip(guess, said, strict=False)) if ours != its), min(len(guess), len(said)))
