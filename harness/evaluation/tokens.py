"""Texts as a model reads them: the tokens that a tokenizer puts around a text belong there once in front, and never behind."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def writes_begin(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Does the text itself start with the begin token, so that the tokenizer must not put a second one before it?"""
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


@lru_cache(maxsize=4)
def added(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int]:
    """The tokens that a tokenizer puts before every text, and how many it puts behind it.

    Tokenizers saved after a training often put an end token behind (`add_eos_token`); a prompt that ends with it asks for
    nothing.
    """
    whole, bare = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for before in range(len(whole) - len(bare) + 1):
        if bare and whole[before : before + len(bare)] == bare:
            return tuple(whole[:before]), len(whole) - len(bare) - before
    return (), 0


def read_with(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, **more: Any) -> dict[str, Any]:
    """What the tokenizer gives for a text, list by list, without what it puts behind it.

    Args:
        special: with the tokens that it puts before every text.
    """
    found = tokenizer(text, add_special_tokens=special, **more)
    behind = added(tokenizer)[1] if special else 0
    return {name: list(values)[: len(values) - behind] for name, values in found.items()}


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the begin token once, whoever writes it: the tokenizer or, as many templates do, the text."""
    ids: list[int] = read_with(tokenizer, text, not writes_begin(tokenizer, text))["input_ids"]
    return ids


def beyond(largest: int, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Why a model of so many embeddings cannot read this token, if it cannot: a GPU that is asked to stops for good."""
    if largest < vocabulary:
        return None
    shown = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
    return (
        f"token {largest}{shown} is beyond the model's {vocabulary} embeddings: its tokenizer is another model's, or was added to"
    )
