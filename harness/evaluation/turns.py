"""Prompts of questions that share a context: it is read and compressed once, and each question is asked over the same rows.

A method that looks at the last queries sees the first question (`first_question`, `turns`) or none (`turns_after`, and
`question_after`, whose prompts are made elsewhere). What stood before a question in a conversation are the right answers, not the
model's own, as in SCBench: so each question's prompt is known before any is answered, and each answer is a row of its own.

Li et al., "SCBench: A KV Cache-Centric Analysis of Long-Context Methods", 2024. arxiv.org/abs/2412.10319
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from benchmarks.base import Example, Turn
from harness.cache import Chat, PromptProtocol
from harness.evaluation.prompts import CannotPrompt, Prompt, Protocol, as_chat, encode, ends_of, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARING = ("first_question", "turns", "turns_after")  # protocols that are about several questions


def prompt_of(
    tokenizer: PreTrainedTokenizerBase | None, example: Example, protocol: Protocol, limit: int, forced: bool = False
) -> Prompt:
    """The prompt as ids, at most `limit` of them, whatever the protocol.

    Raises:
        CannotPrompt: see `tokenize`, and below.
    """
    if protocol.prompt not in SHARING:
        return tokenize(tokenizer, example, protocol, limit, forced)
    return _shared(tokenizer, example, protocol, limit)


def _shared(tokenizer: PreTrainedTokenizerBase | None, example: Example, protocol: Protocol, limit: int) -> Prompt:
    """The context is cut alike for all its questions: to what leaves room for the longest of them.

    Raises:
        CannotPrompt: no text, only one question on it, or questions that leave no room for it.
    """
    if len(example.turns) < 2:
        raise CannotPrompt(f"only one question is asked of this context: {protocol.prompt} is about several")
    if tokenizer is None:
        raise CannotPrompt("the model has no tokenizer for a prompt in words")
    asked = _asked(tokenizer, example.prompt[: example.context_end], example.turns, protocol.prompt, protocol.chat)
    room = limit - max(map(len, asked.behind))
    read = asked.read
    if len(read) > room and example.cut == "never":
        raise CannotPrompt(f"{len(read)} tokens do not fit into {room}, and cut this prompt means nothing: ask for a shorter one")
    if room < 2:
        raise CannotPrompt(f"the questions on this context leave {room} of {limit} tokens for it")
    if len(read) > room and example.cut == "start":
        read = read[-room:]
    if len(read) > room:
        half = room // 2
        read = read[:half] + read[len(read) - half :]
    ids = [*read, *asked.behind[example.turn]]
    return Prompt(ids, len(read), until=ends_of(tokenizer, example), looked=asked.looked)


@dataclass(frozen=True)
class _Asked:
    """A context and its questions as tokens."""

    read: tuple[int, ...]  # what is compressed, and stays
    looked: tuple[int, ...]  # behind it while entries are chosen
    behind: tuple[tuple[int, ...], ...]  # of each question, what is appended


@lru_cache(maxsize=2)
def _asked(
    tokenizer: PreTrainedTokenizerBase, context: str, turns: tuple[Turn, ...], prompt: PromptProtocol, chat: Chat
) -> _Asked:
    read, first = _cut(tokenizer, context, turns[0].question, chat)
    if prompt == "first_question":
        cuts = [_cut(tokenizer, context, turn.question, chat) for turn in turns]
        if any(front != read for front, _ in cuts):
            raise CannotPrompt("the tokens of this context depend on the question behind it, so that none can be taken back")
        return _Asked(read, first, tuple(behind for _, behind in cuts))
    later = _later(tokenizer, context, turns, chat)
    if prompt == "turns":
        return _Asked(read + first, (), later)
    return _Asked(read, (), tuple(first + behind for behind in later))


def _cut(tokenizer: PreTrainedTokenizerBase, context: str, question: str, chat: Chat) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a context, and of a question behind it."""
    encoded = encode(tokenizer, context + question, chat)
    at = encoded.reach(len(context))
    if not 0 < at < len(encoded.ids):
        raise CannotPrompt("no context before the question, or no text behind the context")
    return tuple(encoded.ids[:at]), tuple(encoded.ids[at:])


def _later(tokenizer: PreTrainedTokenizerBase, context: str, turns: tuple[Turn, ...], chat: Chat) -> tuple[tuple[int, ...], ...]:
    """Of each question, the tokens behind the first question: the answers and questions before it, and itself."""
    texts = [_conversation(tokenizer, context, turns[: number + 1], chat) for number in range(len(turns))]
    if any(not text.startswith(texts[0]) for text in texts):
        raise CannotPrompt("the chat template writes a first turn otherwise once it is answered: use --chat raw")
    return tuple(tuple(tokenizer(text[len(texts[0]) :], add_special_tokens=False)["input_ids"]) for text in texts)


def _conversation(tokenizer: PreTrainedTokenizerBase, context: str, turns: tuple[Turn, ...], chat: Chat) -> str:
    """A context and questions on it, all but the last answered."""
    first, *others = turns
    if chat == "raw":
        pairs = zip(turns, others, strict=False)
        return context + first.question + "".join(before.answer + turn.question for before, turn in pairs)
    said = [context + first.question]
    for before, turn in zip(turns, others, strict=False):
        said += [before.answer.strip(), turn.question.strip()]
    return as_chat(tokenizer, *said)
