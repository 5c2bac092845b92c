"""Generated tasks: the same everywhere, answerable from the context alone, scored to the word; and what the model learns from."""

from __future__ import annotations

import hashlib
import random
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks import BENCHMARKS
from benchmarks.base import Example
from benchmarks.facts import NAMES, Facts, Recall, RecallEach, RecallMany, TwoHop, World, words
from benchmarks.perplexity import PerplexityOwn
from benchmarks.prose import sentences
from harness.models.load import byte_tokenizer
from harness.training.reference_data import (
    ANSWER,
    ANSWER_OF_MANY,
    REPEAT,
    TEMPLATE,
    UNSCORED,
    Documents,
    Plan,
    book_sentences,
    build_tokenizer,
)
from harness.training.reference_model import Phase, main, train

BOOKS = Path(__file__).parent.parent.parent / "shared" / "data" / "lm" / "books"
TASKS = [task for task in BENCHMARKS.values() if isinstance(task, Facts)]
COUNT = lambda text: len(text.split())  # noqa: E731


def make(task: Facts, index: int = 0, seed: int = 0) -> Example:
    return task.example(index, seed, COUNT)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_example_depends_on_its_seed_and_number_alone(task: Facts) -> None:
    alone = make(task, 7)
    for index in range(7):
        make(task, index)
    assert make(task, 7) == alone
    assert make(task, 8).prompt != alone.prompt
    assert make(task, 7, seed=1).prompt != alone.prompt


def test_examples_are_the_same_on_any_machine() -> None:
    later = (RecallEach,)
    for tasks, digest in ((set(TASKS) - {kind() for kind in later}, "83323ba12dcce71d"), ({RecallEach()}, "29fc6dd9786935ab")):
        text = "".join(make(task, index).prompt for task in TASKS if task in tasks for index in range(3))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_context_and_nothing_else_tells_the_answer(task: Facts) -> None:
    for index in range(20):
        example = make(task, index)
        context, question = example.prompt[: example.context_end], example.prompt[example.context_end :]
        codes = dict(re.findall(r"The code of (\w+) is (\d\d \d\d)\.", context))
        friends = dict(re.findall(r"The friend of (\w+) is (\w+)\.", context))
        assert (len(codes), len(friends)) == (task.facts, task.links)
        asked = [name for name in words(question) if name in NAMES]
        if isinstance(task, TwoHop):
            expected = f"{friends[asked[0]]} {codes[friends[asked[0]]]}"
        else:
            expected = " ".join(codes[name] for name in asked)
        assert example.answers == (expected,)
        assert not any(code in question for code in codes.values())
        numbers = [number for code in codes.values() for number in code.split()]
        assert len(set(numbers)) == len(numbers)
        others = sum(COUNT(turn.question + turn.answer) for turn in example.turns)  # the context leaves room for them
        assert task.length - 40 - others < COUNT(example.prompt) <= task.length
        assert example.max_new_tokens == len(expected.split())


def test_lengths_are_counted_in_the_models_own_tokens() -> None:
    tokenizer = byte_tokenizer()
    example = Recall(length=3000).example(0, 0, lambda text: len(tokenizer(text)["input_ids"]))
    assert 2800 < len(tokenizer(example.prompt)["input_ids"]) <= 3000
    assert example.max_new_tokens == len(" 12 34")


def test_facts_lie_at_every_depth() -> None:
    depths = [float(make(Recall(), index).columns["depth"]) for index in range(60)]
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_prose_states_no_fact() -> None:
    for text in islice(sentences("any"), 2000):
        assert not re.search(r"\d|code of|friend of", text)
        assert not set(words(text)) & set(NAMES)
        assert text[0].isupper()
        assert text.endswith(".")
    assert list(islice(sentences("a"), 5)) == list(islice(sentences("a"), 5))


@pytest.mark.parametrize(
    ("answer", "score"),
    [("37 82", 1), (" 37 82.", 1), ("37, 82 and so on", 1), ("82 37", 0), ("37", 0), ("", 0), ("137 82", 0), ("the 37 82", 0)],
)
def test_scores_are_exact(answer: str, score: float) -> None:
    example = Example(0, "", 0, ("37 82",), 2)
    assert Recall().score(answer, example) == {"exact": score}


def test_several_answers_count_only_in_order() -> None:
    example = make(RecallMany())
    wanted = example.answers[0]
    assert RecallMany().score(wanted, example) == {"exact": 1.0}
    assert RecallMany().score(" ".join(reversed(wanted.split())), example) == {"exact": 0.0}
    assert RecallMany().score(wanted[:-3], example) == {"exact": 0.0}


def test_friends_have_a_code_and_are_somebody_else() -> None:
    for seed in range(50):
        world = World.draw(random.Random(seed), 8, 4)
        assert all(friend in world.codes and friend != name for name, friend in world.friends.items())


def test_what_perplexity_scores_was_partly_told_before() -> None:
    example = PerplexityOwn(length=400, scored=200).example(0, 0, COUNT)
    assert example == PerplexityOwn(length=400, scored=200).example(0, 0, COUNT)
    context, rest = example.prompt[: example.context_end], example.prompt[example.context_end :]
    told = [line for line in re.split(r"(?<=\.) ", rest.strip()) if line in context]
    assert 1 <= len(told) < len(rest.split("."))
    assert 350 < COUNT(context) <= 400
    assert 150 < COUNT(rest) <= 200


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(list(islice(sentences("tokenizer"), 3000)))


def test_names_numbers_and_any_text_survive_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (*(f" {name}" for name in NAMES), " 07", " 99"):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
    for text in (" The code of Mira is 37 82.", "héllo 你好\n\tx", " Question: the codes of Oslo, Elif are"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_documents_ask_what_they_state(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = Documents(tokenizer, [], seed=0)
    for length, plan in ((64, Plan(3, 2, 0)), (64, Plan(4, 0, 1)), (512, Plan(12, 4, 2))):
        for _ in range(5):
            document = documents.facts(length, plan)
            assert len(document.ids) == len(document.kinds) == length + 1
            text = tokenizer.decode(document.ids)
            codes = dict(re.findall(r"The code of (\w+) is (\d\d \d\d)\.", text))
            asked = re.findall(r"Question: the code of (\w+) is (\d\d \d\d)\.", text)
            assert all(codes[name] == code for name, code in asked)
            scored = [i for i, kind in zip(document.ids, document.kinds, strict=True) if kind in (ANSWER, ANSWER_OF_MANY)]
            assert all(re.fullmatch(r" (\d\d|[A-Z]\w+)", tokenizer.decode([token])) for token in scored)
            assert scored
            assert TEMPLATE in document.kinds


def test_repeated_spans_are_scored_from_their_second_time_on(tokenizer: PreTrainedTokenizerFast) -> None:
    document = Documents(tokenizer, [], seed=0).repeats(64)
    first = document.kinds.index(REPEAT)
    assert set(document.kinds[:first]) == {UNSCORED}
    size = first - 1
    assert document.ids[size:] == document.ids[: len(document.ids) - size]


def test_a_few_steps_of_training_learn_something(tokenizer: PreTrainedTokenizerFast) -> None:
    phases = (Phase("short", 4, {64: 1.0}, 0.25), Phase("longer", 3, {128: 1.0}, 0.1))
    torch.manual_seed(0)
    model, history = train(Documents(tokenizer, [], seed=0), phases, seed=0, tokens=1024)
    again, same = train(Documents(tokenizer, [], seed=0), phases, seed=0, tokens=1024)
    assert [entry["step"] for entry in history] == [4, 7]
    assert history[1]["loss"][TEMPLATE] < history[0]["loss"][TEMPLATE] < 9  # type: ignore[index]
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in same]
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_without_books_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "--data-dir" in lines[0]


@pytest.mark.skipif(not BOOKS.is_dir(), reason="the books are not here (../shared/data)")
def test_books_become_sentences_and_some_are_held_out() -> None:
    training, held_out = book_sentences(BOOKS, held_out=False), book_sentences(BOOKS, held_out=True)
    assert len(training) > 50_000
    assert 1_000 < len(held_out) < len(training) / 5
    assert not set(held_out[:200]) <= set(training)
    assert all("\n" not in line for line in training[:1000])
