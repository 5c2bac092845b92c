"""The data that the named recipes read: Dolly-15k in the words of DollyEval's prompts, and MiniPile, tokenised once."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data
from benchmarks.data import BadData, Source
from benchmarks.instruct import SETS
from harness.errors import first_line
from harness.evaluation.tokens import added
from harness.training.data import BadText, ExampleBatches, PackedBatches

VALIDATION, TRAINING = 500, 14_000  # records of Dolly; its other 500 are DollyEval, which is measured


def _no_record(row: dict[str, Any]) -> str | None:
    return data.no_text(row, "instruction", "context", "response")


DOLLY = Source(
    ("instruct/databricks-dolly-15k", "databricks-dolly-15k"),
    ("instruction", "context", "response"),
    "CC BY-SA 3.0 (Dolly-15k)",
    "databricks/databricks-dolly-15k",
    "databricks-dolly-15k.jsonl",
    filled=("instruction", "response"),
    fault=_no_record,
)
DOLLY_IN_PROMPTS = "instruct/dolly_train"  # the same in MiniLLM's form, with prompt and output, if the user has it
MINIPILE = "JeanKaddour/minipile"
TOKENS = Path("results/tokens")  # texts once read, as token ids


def dolly(tokenizer: Any, data_dir: Path | None, length: int, rows: int, seed: int) -> ExampleBatches:
    """Dolly-15k without the records of DollyEval, in the words of DollyEval's prompts. 500 more are held out.

    Raises:
        BadData: no Dolly-15k, or no DollyEval to take the words from.
    """
    try:
        records = _in_prompts(data_dir)
    except BadData:
        records = _worded(data_dir)
    order = random.Random(seed).sample(records, len(records))
    held = min(VALIDATION, max(1, len(order) // 20))
    return ExampleBatches.of(tokenizer, order[held : held + TRAINING], order[:held], length, rows, seed)


def _in_prompts(data_dir: Path | None) -> list[dict[str, str]]:
    source = Source((DOLLY_IN_PROMPTS,), ("prompt", "output"), DOLLY.licence, filled=("prompt", "output"), fault=_no_example)
    rows = data.load(source, data_dir).rows
    return [{"prompt": data.text_of(row["prompt"]), "output": data.texts_of(row["output"])[0]} for row in rows]


def _no_example(row: dict[str, Any]) -> str | None:
    try:
        data.texts_of(row["output"])
    except ValueError as error:
        return f"field 'output' is {error}"
    return data.no_text(row, "prompt")


def _worded(data_dir: Path | None) -> list[dict[str, str]]:
    evaluated = data.load(SETS["dolly"], data_dir).rows
    prompt = template_of(evaluated)
    known = {_texts_of(row, "instruction", "input") for row in evaluated}
    found = [_texts_of(row, "instruction", "context", "response") for row in data.load(DOLLY, data_dir).rows]
    return [{"prompt": prompt(asked, given), "output": said} for asked, given, said in found if (asked, given) not in known]


def _texts_of(record: dict[str, Any], *names: str) -> tuple[str, ...]:
    return tuple(data.text_of(record.get(name)).strip() for name in names)


def template_of(records: Sequence[dict[str, Any]]) -> Callable[[str, str], str]:
    """How these records' prompts are made of instruction and input: what most of them have around the two.

    Raises:
        BadText: there is no such form.
    """
    forms: dict[bool, Counter[tuple[str, ...]]] = {True: Counter(), False: Counter()}
    for record in records:
        parts = _texts_of(record, "instruction", "input")
        around, rest = [], data.text_of(record["prompt"])
        for part in filter(None, parts):
            before, found, rest = rest.partition(part)
            around += [before] if found else []
        forms[bool(parts[1])][(*around, rest)] += 1
    common = {asks: forms[asks].most_common(1)[0] for asks in forms if forms[asks]}
    for asks, (form, count) in common.items():
        if 2 * count < forms[asks].total() or len(form) != 2 + asks:
            raise BadText("the prompts of DollyEval are not all made in one way, so training prompts cannot be made alike")
    if len(common) < 2:
        raise BadText("DollyEval needs records with an input and without one, to make training prompts alike")

    def prompt(instruction: str, text: str) -> str:
        form = common[bool(text)][0]
        return form[0] + instruction + form[1] + (text + form[2] if text else "")

    return prompt


def minipile(tokenizer: Any, data_dir: Path | None, length: int, rows: int, seed: int, folder: Path = TOKENS) -> PackedBatches:
    """MiniPile's documents side by side, tokenised once into `folder`.

    Raises:
        BadText: neither in `<data_dir>/minipile` nor on the hub.
    """
    files = sorted((data_dir / "minipile").glob("*")) if data_dir else []
    files = [path for path in files if {".parquet", ".jsonl", ".txt"} & set(path.suffixes)]
    sizes = [(path.name, path.stat().st_size) for path in files] or MINIPILE
    words = json.dumps([sizes, sorted(tokenizer.get_vocab().items())])
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    texts = (text for path in files for text in _texts(path)) if files else _from_hub()
    ids, starts = tokenised(tokenizer, texts, folder / digest)
    return PackedBatches.over(ids, torch.ones(1, dtype=torch.bool).expand(len(ids)), starts, length, rows, seed, digest)


def _texts(path: Path) -> Iterator[str]:
    if ".txt" in path.suffixes:
        yield data.words(path)
        return
    rows = data.parquet(data.read(path), path) if path.suffix == ".parquet" else data.lines(data.read(path), path)
    for number, row in rows:
        if not isinstance(row.get("text"), str):
            raise BadText(f"{path}, record {number}: a field text is expected")
        yield row["text"]


def _from_hub() -> Iterator[str]:
    from datasets import load_dataset

    try:
        found = load_dataset(MINIPILE, split="train", streaming=False)
    except Exception as error:  # whatever the client's transport raises: all of it means the same here
        raise BadText(
            f"no folder minipile in --data-dir, and {MINIPILE} on the hub is not reachable: {first_line(error, 120)}"
        ) from None
    yield from (row["text"] for row in found)


def tokenised(tokenizer: Any, texts: Iterator[str], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N] (int32) of all documents, each with its end token, and where documents begin [N]: files mapped into memory.

    A run that was stopped begins again; a finished one is read.
    """
    ids, starts, done = folder / "ids.bin", folder / "starts.bin", folder / "done.json"
    if not done.exists():
        some = list(islice(texts, 512))  # before anything is written: there may be none
        folder.mkdir(parents=True, exist_ok=True)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        behind = added(tokenizer)[1]
        count = 0
        with ids.open("wb") as to_ids, starts.open("wb") as to_starts:
            while some:
                for document in tokenizer(some)["input_ids"]:
                    whole = [*document[: len(document) - behind], *end]
                    to_ids.write(np.array(whole, dtype=np.int32).tobytes())
                    to_starts.write(bytes([1]) + bytes(len(whole) - 1) if whole else b"")
                    count += len(whole)
                some = list(islice(texts, 512))
        done.write_text(json.dumps({"tokens": count}))
    if not json.loads(done.read_text())["tokens"]:
        raise BadText(f"{folder}: the training text holds no token")
    return (
        torch.from_numpy(np.memmap(ids, dtype=np.int32, mode="c")),
        torch.from_numpy(np.memmap(starts, dtype=np.bool_, mode="c")),
    )
