"""From an example to token ids: chat template, one tokenisation, truncation, and the cut between context and question."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.base import Example
from harness.cache import Chat, Granularity, PromptProtocol, Routing
from harness.errors import UserError, first_line
from harness.evaluation.tokens import added, read_with, writes_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Branch:
    """What may stand behind a prompt's context; the last `scored` tokens of it are what a request asks about."""

    request: int  # number of the request in the example
    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Prompt:
    """Token ids, of which the first `context` are read and compressed before the rest is asked."""

    ids: list[int]
    context: int
    forced: tuple[int, ...] = ()  # tokens behind them whose likelihood is the score; nothing is generated then
    until: tuple[str, ...] = ()  # texts at which an answer ends
    branches: tuple[Branch, ...] = ()  # what is scored behind the context, instead of an answer
    one_pass: tuple[int, ...] = ()  # what follows each of the last ids: scored in the pass that reads them, instead of an answer
    request: int = 0  # which request `one_pass` answers
    streamed: bool = False  # `forced` is scored as it comes, beside nothing else
    looked: tuple[int, ...] = ()  # read behind the context while entries are chosen, and then taken back

    @property
    def asks_likelihoods(self) -> bool:
        return bool(self.branches or self.one_pass)


@dataclass(frozen=True)
class Protocol:
    """Choices that move numbers. Rows of different protocols are never ranked together."""

    prompt: PromptProtocol = "question_in"
    chat: Chat = "raw"
    granularity: Granularity = "kv"
    stop: Literal["eos", "none"] = "eos"
    truncation: int | None = None  # tokens; None: what the model has positions for
    max_new_tokens: int | None = None  # None: the benchmark's own
    temperature: float = 0.0  # 0: greedy
    routing: Routing = "expert_choice"  # of a mixSGA variant's prefill


class CannotPrompt(UserError):
    """This example has no prompt under this protocol: it is skipped with this reason."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase | None, example: Example, protocol: Protocol, limit: int, forced: bool = False
) -> Prompt:
    """The prompt as ids, at most `limit` of them: a longer one keeps its first and last half.

    Raises:
        CannotPrompt: nothing to read, no chat template, no text behind the context under `question_after`, or too long for what
            may not be cut.
    """
    ids, context = _ids(tokenizer, example, protocol)
    if not ids:
        raise CannotPrompt("the prompt is empty")
    if (context if example.streamed else len(ids)) > limit and example.cut == "never":
        raise CannotPrompt(f"{len(ids)} tokens do not fit into {limit}, and cut this prompt means nothing: ask for a shorter one")
    if example.one_pass:
        return Prompt(ids[:-1], len(ids) - 1, one_pass=tuple(ids[context:]))
    if len(ids) > limit and example.cut == "start":
        ids, context = ids[-limit:], max(0, context - (len(ids) - limit))
    if len(ids) > limit and not example.streamed:
        head = tail = limit // 2  # as LongBench does: an odd limit leaves one unused
        dropped = len(ids) - head - tail
        ids = ids[:head] + ids[len(ids) - tail :]
        context = min(context, head) if context <= head + dropped else context - dropped
    if forced:
        if not 0 < context < len(ids) - 1:
            raise CannotPrompt("nothing to read, or nothing to score behind it")
        return Prompt(ids[:context], context, tuple(ids[context:]), streamed=example.streamed)
    if protocol.prompt == "question_in":
        return Prompt(ids, len(ids), until=ends_of(tokenizer, example))
    if context >= len(ids):
        raise CannotPrompt("no text behind the context, so nothing can be asked after it")
    if context <= 0:
        raise CannotPrompt("no context before the question")
    return Prompt(ids, context, until=ends_of(tokenizer, example))


def ends_of(tokenizer: PreTrainedTokenizerBase | None, example: Example) -> tuple[str, ...]:
    """Texts that end an answer; among several, as in lm-eval, the end token's, where a model spells it letter by letter."""
    end = tokenizer.eos_token if tokenizer is not None and example.until else None
    return example.until if end is None or end in example.until else (*example.until, str(end))


def has_example(tokenizer: PreTrainedTokenizerBase | None, example: Example) -> bool:
    """Does the text still have the piece that this example is?"""
    return example.piece is None or tokenizer is None or len(_stream(tokenizer, example.prompt)) >= example.piece[1]


@lru_cache(maxsize=4)
def _stream(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids(tokenizer: PreTrainedTokenizerBase | None, example: Example, protocol: Protocol) -> tuple[list[int], int]:
    """All ids, and how many of them reach to the context's last character."""
    if example.ids is not None:
        return list(example.ids), example.context_end
    if tokenizer is None:
        raise CannotPrompt("the model has no tokenizer for a prompt in words")
    if example.piece is not None:
        start = list(added(tokenizer)[0])
        first, last = example.piece
        if first == 0 and writes_begin(tokenizer, example.prompt):
            start = []
        return start + _stream(tokenizer, example.prompt)[first : last - len(start)], example.context_end
    encoded = encode(tokenizer, example.prompt, protocol.chat)
    return encoded.ids, encoded.reach(example.context_end)


@dataclass(frozen=True)
class Encoded:
    """A text as tokens, and where each lies in what the tokenizer was given."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # characters
    shift: int  # characters that the chat template puts in front of the text

    def reach(self, end: int) -> int:
        """How many tokens reach to the text's character before `end`."""
        holds = [number for number, (start, stop) in enumerate(self.offsets) if start < min(stop, end + self.shift)]
        return holds[-1] + 1 if holds else 0

    def tokens_of(self, start: int, stop: int) -> tuple[int, int]:
        """[first, last) tokens that hold any of the text's characters [start, stop)."""
        start, stop = start + self.shift, stop + self.shift
        inside = [number for number, (a, b) in enumerate(self.offsets) if a < min(b, stop) and b > start]
        return inside[0], inside[-1] + 1


TODAY = date(2024, 7, 26)  # in templates that write the date, so that a prompt is the same every day; Llama 3's falls back to it
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.+?)\1\s*\)""")


def _fixed(clock: re.Match[str]) -> str:
    return repr(TODAY.strftime(clock[2]))


def as_chat(tokenizer: PreTrainedTokenizerBase, *said: str) -> str:
    """What a user and an assistant have said in turn, the user first and last, up to where the next answer begins.

    Raises:
        CannotPrompt: no chat template, none that is the default, or one that cannot be applied to such messages.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise CannotPrompt(f"the tokenizer{_of(tokenizer)} has no chat template: use --chat raw")
    if isinstance(templates, dict) and "default" not in templates:
        raise CannotPrompt(
            f"the tokenizer{_of(tokenizer)} has the chat templates {', '.join(sorted(templates))} and none named default: "
            "use --chat raw, or name one of them so in a copy of the model"
        )
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]
    try:
        written = CLOCK.sub(_fixed, templates["default"] if isinstance(templates, dict) else templates)
        return str(tokenizer.apply_chat_template(messages, chat_template=written, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of its author's
        what = "a lone user message" if len(said) == 1 else f"a conversation of {len(said)} messages"
        raise CannotPrompt(
            f"the chat template{_of(tokenizer)} cannot be applied to {what} ({type(error).__name__}: {first_line(error)}): "
            "use --chat raw"
        ) from None


def turn_end_of(tokenizer: PreTrainedTokenizerBase | None, chat: Chat) -> str:
    """What stands behind a user's words and before the answer."""
    if chat == "raw" or tokenizer is None:
        return "\n"
    words = "an instruction"
    return as_chat(tokenizer, words).rpartition(words)[2]


def _of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whose it is, as far as that is known; of a folder its name, since rows are shown on other machines."""
    name = str(tokenizer.name_or_path or "")
    shown = Path(name).name if Path(name).is_absolute() else name
    return f" of {shown}" if shown else ""


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: Chat) -> Encoded:
    """
    Raises:
        CannotPrompt: the tokenizer is a slow one, has no chat template, or one that changes the text.
    """
    if not tokenizer.is_fast:
        raise CannotPrompt("the tokenizer does not say where its tokens lie in the text: it needs a tokenizer.json")
    shift, given = 0, text
    if chat == "template":
        given = as_chat(tokenizer, text)
        bare = text.strip()  # many templates trim what they are given
        at = given.find(bare)
        if at < 0:
            raise CannotPrompt(
                f"the chat template{_of(tokenizer)} changes the prompt's text, so its context cannot be found: use --chat raw"
            )
        shift = at - text.find(bare)
    special = chat == "raw" and not writes_begin(tokenizer, given)  # a template writes what it wants
    found = read_with(tokenizer, given, special, return_offsets_mapping=True)
    return Encoded(found["input_ids"], found["offset_mapping"], shift)
