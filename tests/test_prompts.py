"""Prompts: one tokenisation, its cut between context and question, truncation, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from benchmarks.base import Example, Request
from harness.evaluation.loglikelihood import likelihood_prompts
from harness.evaluation.prompts import CannotPrompt, Protocol, tokenize
from harness.models.load import byte_tokenizer
from harness.training.corpora import tokenised
from harness.training.data import instruct_batches

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
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now( '%d %b %Y' ) }} {% endif %}{{ messages[0]['content'] }}"
    )
    dated = tokenize(tokenizer, example("abc", "?"), Protocol(chat="template"), 100)
    assert tokenizer.decode(dated.ids) == "26 Jul 2024 abc?", "the same on every day"
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


def with_begin_token(end: str = ""):
    """The byte tokenizer, putting <s> before every text as Llama's does, and perhaps something behind."""
    inner = byte_tokenizer().backend_tokenizer
    inner.add_special_tokens(["<s>", "</s>"])
    used = [(text, inner.token_to_id(text)) for text in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=f"<s>:0 $A:0{end and f' {end}:0'}", special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_there_is_one_begin_token_whoever_writes_it() -> None:
    tokenizer = with_begin_token()
    plain = tokenize(tokenizer, example("abc", "de"), Protocol(prompt="question_after"), 100)
    written = tokenize(tokenizer, example("<s>abc", "de"), Protocol(prompt="question_after"), 100)
    assert plain == written and plain.ids.count(tokenizer.bos_token_id) == 1 and plain.context == 4
    later = tokenize(tokenizer, example("a<s>bc", "de"), Protocol(), 100)
    assert later.ids.count(tokenizer.bos_token_id) == 2, "where a text goes on with one, it is the text's own"
    for template in ("{{ bos_token }}{{ messages[0]['content'] }}", "{{ messages[0]['content'] }}"):
        tokenizer.chat_template = template
        asked = tokenize(tokenizer, example("abc", "de"), Protocol(chat="template"), 100)
        assert asked.ids.count(tokenizer.bos_token_id) == ("bos" in template), "a template says all"
    for text in ("some words", "<s>some words"):
        piece = tokenize(tokenizer, Example(0, text, 6, (), 0, piece=(0, 8)), Protocol(), 100)
        assert tokenizer.decode(piece.ids) == "<s>some wo"


def test_no_end_token_stands_behind_a_prompt(tmp_path: Path) -> None:
    plain, ending = with_begin_token(), with_begin_token("</s>")
    assert ending("ab")["input_ids"][-1] == ending.eos_token_id
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "ab", "output": "cd"}) for _ in range(8)))
    requests = Example(0, "", 0, (), 0, requests=(Request("a word", " b"), Request("", "a text", rolling=True)))
    piece = Example(0, "some words", 6, (), 0, piece=(0, 8))
    for make in (
        lambda tokenizer: tokenize(tokenizer, example("abc", "de"), Protocol(prompt="question_after"), 100).ids,
        lambda tokenizer: tokenize(tokenizer, piece, Protocol(), 100).ids,
        lambda tokenizer: likelihood_prompts(tokenizer, requests, Protocol(), 100),
        lambda tokenizer: instruct_batches(tokenizer, path, 8, 1, 0)(0).ids.tolist(),
        lambda tokenizer: [
            part.tolist() for part in tokenised(tokenizer, iter(["one", "two"]), tmp_path / str(tokenizer is ending))
        ],
    ):
        assert make(plain) == make(ending)


def test_training_reads_one_begin_token_too(tmp_path: Path) -> None:
    tokenizer = with_begin_token()
    ids = []
    for begin in ("", "<s>"):
        path = tmp_path / f"{len(begin)}.jsonl"
        rows = [{"prompt": f"{begin}ab", "output": "cd"} for _ in range(8)]
        path.write_text("\n".join(map(json.dumps, rows)))
        ids.append(instruct_batches(tokenizer, path, 8, 1, 0)(0).ids)
    assert torch.equal(*ids) and "<s>ab" in (said := tokenizer.decode(ids[0][0].repeat(2))) and "<s><s>" not in said


def test_likelihoods_have_one_begin_token_too() -> None:
    tokenizer = with_begin_token()
    found = [
        likelihood_prompts(tokenizer, Example(0, "", 0, (), 0, requests=(Request(text, " b"),)), Protocol(), 100)
        for text in ("a word", "<s>a word")
    ]
    assert found[0] == found[1]
    rolled = [
        likelihood_prompts(tokenizer, Example(0, "", 0, (), 0, requests=(Request("", text, rolling=True),)), Protocol(), 100)
        for text in ("a word", "<s>a word")
    ]
    assert rolled[0] == rolled[1]


ODD = {
    "{{ tools | length }}{{ messages[0]['content'] }}": "TypeError",
    "{{ date_string.strftime('%d') }}{{ messages[0]['content'] }}": "UndefinedError",
    "{{ raise_exception('a system message must come first') }}": "a system message must come first",
    "{% for m in messages %}{{ m['content'] }": "TemplateSyntaxError",
    "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}": "changes the prompt's text",
}


@pytest.mark.parametrize("template", ODD)
def test_a_template_that_cannot_be_used_is_said_in_one_line(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path, tokenizer.chat_template = "someone/model", template
    with pytest.raises(CannotPrompt, match=rf"of someone/model (.*{ODD[template]}.*): use --chat raw$"):
        tokenize(tokenizer, example("abc", "?"), Protocol(chat="template"), 100)
    if "changes" not in ODD[template]:
        asked = Example(0, "", 0, (), 0, requests=(Request("a word", " b"),))
        with pytest.raises(CannotPrompt, match="of someone/model"):
            likelihood_prompts(tokenizer, asked, Protocol(chat="template"), 100)


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"rag": "x", "tool_use": "{{ messages[0]['content'] }}"}
    with pytest.raises(CannotPrompt, match="rag, tool_use and none named default"):
        tokenize(tokenizer, example("abc", "?"), Protocol(chat="template"), 100)
    tokenizer.chat_template = {"rag": "x", "default": "<u>{{ messages[0]['content'] }}"}
    prompt = tokenize(tokenizer, example("abc", "?"), Protocol(chat="template"), 100)
    assert tokenizer.decode(prompt.ids) == "<u>abc?"
