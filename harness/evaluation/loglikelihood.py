"""From requests for likelihoods to prompts with branches: what lm-eval asks, read once and compressed once.

A request is tokenised as lm-eval does: context and continuation together, cut where the context alone would end, its trailing
spaces counted to the continuation; too long ones lose their beginning. Requests whose contexts agree in at least their first half
share one prompt: what they have in common, less a context's last token, is read and compressed, and each branch brings the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from benchmarks.base import Example, Request
from harness.evaluation.prompts import Branch, CannotPrompt, Prompt, Protocol, as_chat
from harness.evaluation.tokens import read_with, tokens_of, writes_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """One request as tokens."""

    number: int
    context: list[int]
    continuation: list[int]


def likelihood_prompts(
    tokenizer: PreTrainedTokenizerBase | None, example: Example, protocol: Protocol, limit: int
) -> list[Prompt]:
    """Prompts that answer all requests of an example, at most `limit` tokens each.

    Raises:
        CannotPrompt: no tokenizer or chat template, nothing to score, or a protocol other than `question_in`.
    """
    if tokenizer is None:
        raise CannotPrompt("the model has no tokenizer for a prompt in words")
    if protocol.prompt != "question_in":
        raise CannotPrompt("lm-eval does not say where a context ends and its question begins")
    prompts: list[Prompt] = []
    asked: list[Asked] = []
    for number, request in enumerate(example.requests):
        if request.rolling:
            prompts += _rolling(tokenizer, number, request.continuation, limit)
        else:
            asked.append(_cut(_encoded(tokenizer, number, request, protocol), limit))
    return prompts + [_prompt(together) for together in _sharing(asked)]


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text that has nothing before it.

    Raises:
        CannotPrompt: the tokenizer has neither a begin nor an end token.
    """
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise CannotPrompt("the tokenizer has neither a begin nor an end token to put before a text")
    return int(found)


def _encoded(tokenizer: PreTrainedTokenizerBase, number: int, request: Request, protocol: Protocol) -> Asked:
    context, continuation = request.context, request.continuation
    if protocol.chat == "template" and context:
        context = as_chat(tokenizer, context)
        continuation = continuation.removeprefix(" ")  # the template brings what stands between question and answer
    if not context:
        tokens, start = _tokens(tokenizer, continuation, False), prefix_token(tokenizer)
        return Asked(number, [start], tokens[1:] if tokens[:1] == [start] else tokens)
    special = not writes_begin(tokenizer, context)  # a template may have put it there
    before = _tokens(tokenizer, context.rstrip(), special)
    return Asked(number, before, _tokens(tokenizer, context + continuation, special)[len(before) :])


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    ids: list[int] = read_with(tokenizer, text, special)["input_ids"]
    return ids


def _cut(asked: Asked, limit: int) -> Asked:
    """Without the beginning of what is too long; the last token of a continuation is never read."""
    if not asked.continuation:
        raise CannotPrompt("a request has no continuation to score")
    room = limit + 1 - len(asked.continuation)
    if room < 1:
        raise CannotPrompt(f"a continuation of {len(asked.continuation)} tokens leaves no room for a context in {limit}")
    context = asked.context[-room:]
    if not context:
        raise CannotPrompt("a request has no context to read")
    return Asked(asked.number, context, asked.continuation)


def _sharing(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Requests that are read together: contexts that agree in at least half of the longest one."""
    groups: list[list[Asked]] = []
    for one in asked:
        for group in groups:
            together = [*group, one]
            if 2 * _common(together) >= max(len(other.context) for other in together):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _common(asked: Sequence[Asked]) -> int:
    """How many tokens at their beginning all contexts share."""
    columns = zip(*(one.context for one in asked), strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def _prompt(asked: Sequence[Asked]) -> Prompt:
    """The last token of every context is left to the branch: what follows it is then predicted over the compressed cache."""
    read = min(_common(asked), max(1, min(len(one.context) for one in asked) - 1))
    branches = [Branch(one.number, (*one.context[read:], *one.continuation), len(one.continuation)) for one in asked]
    return Prompt(asked[0].context[:read], read, branches=tuple(branches))


def _rolling(tokenizer: PreTrainedTokenizerBase, number: int, text: str, limit: int) -> list[Prompt]:
    """A whole text in windows of `limit` tokens: each token is scored once, and the last window reads back as far as it can."""
    ids = [prefix_token(tokenizer), *tokens_of(tokenizer, text)]
    if len(ids) < 2:
        raise CannotPrompt("a text without a token has no likelihood")
    prompts = []
    for start in range(0, len(ids) - 1, limit):
        stop = min(start + limit, len(ids) - 1)
        read = ids[max(0, stop - limit) : stop]
        prompts.append(Prompt(read, len(read), one_pass=tuple(ids[start + 1 : stop + 1]), request=number))
    return prompts
