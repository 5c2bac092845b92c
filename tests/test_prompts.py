"""Prompts: one tokenisation, its cut between context and question, truncation, chat templates."""

from __future__ import annotations

import pytest

from benchmarks.base import Example
from harness.evaluation.prompts import CannotPrompt, Protocol, tokenize
from harness.models.load import byte_tokenizer

BYTES = byte_tokenizer()


def example(context: str, question: str) -> Example:
    return Example(0, context + question, len(context), (), 4)


def cut(context: str, question: str, limit: int = 1000, **protocol) -> tuple[str, str]:
    prompt = tokenize(BYTES, example(context, question), Protocol(prompt="question_after", **protocol), limit)
    return BYTES.decode(prompt.ids[: prompt.context]), BYTES.decode(prompt.ids[prompt.context :])


def test_the_cut_is_behind_the_token_that_holds_the_contexts_last_character() -> None:
    assert cut("some context.", " what?") == ("some context.", " what?")
    assert cut("日本語", "何?") == ("日本語", "何?")


def test_both_protocols_read_the_same_ids() -> None:
    inside = tokenize(BYTES, example("abc", "de"), Protocol(prompt="question_in"), 100)
    after = tokenize(BYTES, example("abc", "de"), Protocol(prompt="question_after"), 100)
    assert inside.ids == after.ids
    assert (inside.context, after.context) == (5, 3)


def test_truncation_keeps_the_two_ends_and_nothing_else() -> None:
    whole = list(range(100))
    given = Example(0, "", 90, (), 4, tuple(whole))
    for limit in (100, 101):
        assert tokenize(None, given, Protocol(), limit).ids == whole
    assert tokenize(None, given, Protocol(), 10).ids == [0, 1, 2, 3, 4, 95, 96, 97, 98, 99]
    assert tokenize(None, given, Protocol(), 11).ids == [0, 1, 2, 3, 4, 95, 96, 97, 98, 99], "as LongBench does"
    after = tokenize(None, given, Protocol(prompt="question_after"), 40)
    assert after.ids[: after.context] == whole[:20] + whole[80:90]
    assert tokenize(None, given, Protocol(prompt="question_after"), 10).context == 5


def test_what_has_no_prompt_is_said() -> None:
    for context, question, why in (("abc", "", "no text behind"), ("", "abc", "no context"), ("", "", "empty")):
        with pytest.raises(CannotPrompt, match=why):
            cut(context, question)
    with pytest.raises(CannotPrompt, match="no tokenizer"):
        tokenize(None, example("a", "b"), Protocol(), 10)
    with pytest.raises(CannotPrompt, match="chat template"):
        cut("a", "b", chat="template")


def test_chat_templates_wrap_the_prompt_and_move_the_cut() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<u>{{ messages[0]['content'] }}</u>{% if add_generation_prompt %}<a>{% endif %}"
    prompt = tokenize(tokenizer, example("abc", "?"), Protocol(prompt="question_after", chat="template"), 100)
    assert tokenizer.decode(prompt.ids[: prompt.context]) == "<u>abc"
    assert tokenizer.decode(prompt.ids[prompt.context :]) == "?</u><a>"
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(CannotPrompt, match="changes the prompt"):
        tokenize(tokenizer, example("abc", "?"), Protocol(chat="template"), 100)


def test_what_is_to_be_scored_is_kept_apart_and_nothing_is_asked() -> None:
    given = Example(0, "abcdef", 4, (), 0)
    prompt = tokenize(BYTES, given, Protocol(), 100, forced=True)
    assert BYTES.decode(prompt.ids) == "abcd"
    assert BYTES.decode(list(prompt.forced)) == "ef"
    assert prompt.context == len(prompt.ids)
    with pytest.raises(CannotPrompt, match="nothing to score"):
        tokenize(BYTES, Example(0, "abcd", 4, (), 0), Protocol(), 100, forced=True)
