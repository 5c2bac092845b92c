"""What variants are healed on, as batches by number: the embedded model's own documents, any text, or instructions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import data
from harness.errors import UserError
from harness.evaluation.tokens import tokens_of
from harness.training.loop import IGNORED, Batch
from harness.training.reference_data import Documents
from harness.training.reference_model import WEIGHTS, Phase
from harness.training.reference_model import batch as reference_documents

HELD_OUT = 10**6  # batches from this number on are never trained on


class BadText(UserError):
    """Training text that is missing, empty or too short, in one line."""


SHORT = Phase("short", 0, {64: 0.5, 128: 0.5}, 0.10, (0.2, 0.25, 0.55))
LONG = Phase("long", 0, {128: 0.1, 256: 0.2, 512: 0.3, 1024: 0.4}, 0.06)


@dataclass(frozen=True)
class ReferenceBatches:
    """Documents as the embedded model was trained on, from a stream of their own: short ones first, then long ones.

    Looking back forms on short documents far sooner, in healing as in training from nothing.
    """

    documents: Documents
    seed: int
    batches: int  # of the training: the first half is short documents
    tokens: int = 4096

    def __call__(self, number: int) -> Batch:
        self.documents.rng = random.Random(f"heal/{self.seed}/{number}")
        found = reference_documents(self.documents, SHORT if 2 * number < self.batches else LONG, self.tokens)
        ids = torch.tensor([document.ids for document in found])
        kinds = torch.tensor([document.kinds for document in found])[:, 1:]
        weights = torch.zeros(kinds.shape)
        for kind, weight in WEIGHTS.items():
            mine = kinds == kind
            weights[mine] = weight / max(1, int(mine.sum()))
        positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
        return Batch(ids[:, :-1], ids[:, 1:], positions, weights)


@dataclass(frozen=True)
class PackedBatches:
    """Documents side by side in rows of a fixed length; none of their tokens is dropped but at the end."""

    ids: torch.Tensor  # [N] of all documents
    scored: torch.Tensor  # [N] is this token's likelihood trained on?
    starts: torch.Tensor  # [N] does a document begin here?
    length: int
    rows: int  # of a batch
    seed: int
    digest: str  # of everything that batches are made from

    @classmethod
    def of(cls, documents: Sequence[tuple[list[int], list[bool]]], length: int, rows: int, seed: int) -> PackedBatches:
        """
        Raises:
            BadText: nothing there, or less than one row.
        """
        order = random.Random(seed).sample(range(len(documents)), len(documents))
        ids = [token for number in order for token in documents[number][0]]
        scored = [flag for number in order for flag in documents[number][1]]
        starts = [place == 0 for number in order for place in range(len(documents[number][0]))]
        of = hashlib.sha256(repr((ids, scored)).encode()).hexdigest()[:12]
        return cls.over(torch.tensor(ids), torch.tensor(scored), torch.tensor(starts), length, rows, seed, of)

    @classmethod
    def over(
        cls, ids: torch.Tensor, scored: torch.Tensor, starts: torch.Tensor, length: int, rows: int, seed: int, digest: str
    ) -> PackedBatches:
        """
        Args:
            digest: of the text and the tokenizer.

        Raises:
            BadText: less than one row.
        """
        if len(ids) <= length:
            raise BadText(
                f"the training text holds {len(ids)} tokens, less than one sequence of {length}: lower --length or add text"
            )
        return cls(ids, scored, starts, length, rows, seed, f"{digest}/{length}/{rows}/{seed}")

    @property
    def largest(self) -> int:
        """Of all token ids."""
        return int(self.ids.max())

    @property
    def available(self) -> int:
        return (len(self.ids) - 1) // self.length

    @property
    def usable(self) -> int:
        """Rows that are trained on."""
        return self.available - (max(1, self.available // 20) if self.available > 1 else 0)

    def __call__(self, number: int) -> Batch:
        """Rows in another order each time through. The last of 20 rows, and one at least, is held out."""
        usable = self.usable
        held = self.available - usable
        if number >= HELD_OUT:
            chosen = [usable + (number * self.rows + row) % max(1, held) for row in range(self.rows)] if held else [0] * self.rows
        else:
            chosen = []
            for place in range(number * self.rows, (number + 1) * self.rows):
                turn, at = divmod(place, usable)
                chosen.append(_order(f"{self.seed}/{turn}", usable)[at])
        spans = [slice(row * self.length, row * self.length + self.length + 1) for row in chosen]
        ids, scored, starts = (torch.stack([part[span] for span in spans]) for part in (self.ids, self.scored, self.starts))
        labels = ids[:, 1:].masked_fill(starts[:, 1:] | ~scored[:, 1:], IGNORED)
        return Batch(ids[:, :-1].long(), labels.long(), _positions(starts[:, :-1]))


@dataclass(frozen=True)
class ExampleBatches:
    """One example a row, padded to the longest of its batch; only outputs are trained on."""

    examples: Sequence[tuple[list[int], int]]  # tokens, and how many of them are the prompt's
    held_out: Sequence[tuple[list[int], int]]
    rows: int
    seed: int
    digest: str

    @property
    def largest(self) -> int:
        """Of all token ids."""
        return max(max(ids, default=0) for ids, _ in (*self.examples, *self.held_out))

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        training: Sequence[dict[str, str]],
        held_out: Sequence[dict[str, str]],
        length: int,
        rows: int,
        seed: int,
    ) -> ExampleBatches:
        """
        Raises:
            BadText: no record whose prompt leaves room for an output.
        """
        found = [[_example(tokenizer, row, length) for row in part] for part in (training, held_out)]
        kept = [[example for example in part if example[1] < len(example[0])] for part in found]
        if not all(kept):
            raise BadText(f"no record's prompt leaves room for an output in {length} tokens: raise --length")
        digest = hashlib.sha256(repr((kept, rows, seed)).encode()).hexdigest()[:12]
        return cls(kept[0], kept[1], rows, seed, digest)

    @property
    def usable(self) -> int:
        return len(self.examples)

    def __call__(self, number: int) -> Batch:
        """Examples in another order each time through."""
        if number >= HELD_OUT:
            chosen = [self.held_out[(number * self.rows + row) % len(self.held_out)] for row in range(self.rows)]
        else:
            places = (divmod(number * self.rows + row, self.usable) for row in range(self.rows))
            chosen = [self.examples[_order(f"{self.seed}/{turn}", self.usable)[at]] for turn, at in places]
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in chosen])
        place = torch.arange(longest)
        sizes, prompts = (torch.tensor(column)[:, None] for column in zip(*((len(i), p) for i, p in chosen), strict=True))
        labels = ids.masked_fill((place < prompts) | (place >= sizes), IGNORED)
        positions = torch.where(place < sizes, place, place - sizes)  # padding is a document of its own
        return Batch(ids[:, :-1], labels[:, 1:], positions[:, :-1], real=(place < sizes)[:, :-1])


def _example(tokenizer: Any, row: dict[str, Any], length: int) -> tuple[list[int], int]:
    if row["prompt"] is None:
        raise ValueError("prompt is null")
    output = data.texts_of(row["output"])[0]
    asked = tokens_of(tokenizer, data.text_of(row["prompt"]))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    said = [*tokenizer(output, add_special_tokens=False)["input_ids"], *end]
    return [*asked, *said][:length], min(len(asked), length)


@lru_cache(maxsize=2)
def _order(seed: str, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def _positions(starts: torch.Tensor) -> torch.Tensor:
    """[B, T] from where documents begin; a row begins one too."""
    place = torch.arange(starts.shape[1]).expand(starts.shape)
    begin = torch.where(starts, place, 0).cummax(1).values
    return place - begin


def text_batches(tokenizer: Any, path: Path, length: int, rows: int, seed: int) -> PackedBatches:
    """Batches of a text file, or of the .txt files of a folder, each a document.

    Raises:
        BadText: see `PackedBatches`.
    """
    paths = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    texts = map(data.words, paths)
    documents = [tokens_of(tokenizer, text) for text in texts if text.strip()]
    if not documents:
        raise BadText(f"--text {path}: no text there")
    return PackedBatches.of([(ids, [True] * len(ids)) for ids in documents], length, rows, seed)


def instruct_batches(tokenizer: Any, path: Path, length: int, rows: int, seed: int) -> PackedBatches:
    """Batches of a .jsonl file with `prompt` and `output`: only the output and the end token are trained on.

    Raises:
        BadText: see `PackedBatches`; or a line that is no such record.
    """
    documents = []
    for number, row in data.lines(data.read(path), f"--instruct {path}"):
        try:
            ids, asked = _example(tokenizer, row, length)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BadText(f"--instruct {path}, line {number}: a record with prompt and output is expected ({error})") from None
        documents.append((ids, [place >= asked for place in range(len(ids))]))
    if not documents:
        raise BadText(f"--instruct {path}: no record there")
    return PackedBatches.of(documents, length, rows, seed)
