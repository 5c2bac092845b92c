"""Records of published data sets: from the user's folder first, else from the hub. Checked on load, named by their hash."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.base import Data
from harness.errors import UserError

OPENERS: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet", ".json")  # .json: lines too


class BadData(UserError):
    """Data that is missing or broken: file, line and reason, in one line."""


@dataclass(frozen=True)
class Source:
    """Where a data set is found, and what its records must hold."""

    local: tuple[str, ...]  # below the user's folder, without ending
    fields: tuple[str, ...]  # every record has them
    licence: str
    repository: str = ""  # of the hub
    file: str = ""  # in it; "archive.zip::member" for a file in an archive
    revision: str = "main"
    filled: tuple[str, ...] = ()  # of the fields, those that may not be empty
    fault: Callable[[dict[str, Any]], str | None] | None = None  # what else is wrong with a record


class OfRecords:
    """A task whose examples are the records of one data set, in order."""

    def records(self) -> Data:
        raise NotImplementedError

    @property
    def size(self) -> int:
        return len(self.records().rows)

    @property
    def data(self) -> str:
        return self.records().sha256


def text_of(value: Any) -> str:
    """A record's text: null is none, a number its digits, and a conversation of one user turn what the user says.

    Raises:
        ValueError: anything else, which would be read as its Python form.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    turns = value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else []
    if len(turns) == 1 and turns[0].get("role") == "user" and isinstance(turns[0].get("content"), str):
        return str(turns[0]["content"])
    if turns:
        raise ValueError(f"a conversation of {len(turns)} turns; a text, or one turn of a user, is expected")
    raise ValueError(f"a {type(value).__name__}, where a text is expected")


def texts_of(value: Any) -> tuple[str, ...]:
    """One text or several: lists of lists are one list, and what is null is left out.

    Raises:
        ValueError: none is left, or something that is no text.
    """
    parts = [part for one in value for part in (one if isinstance(one, list) else [one])] if isinstance(value, list) else [value]
    found = tuple(text_of(part) for part in parts if part is not None)
    if not found:
        raise ValueError("empty")
    return found


def no_text(row: dict[str, Any], *names: str) -> str | None:
    """Of a record's fields, the first that cannot be read as a text, in words."""
    for name in names:
        try:
            text_of(row.get(name))
        except ValueError as error:
            return f"field {name!r} is {error}"
    return None


@lru_cache(maxsize=64)
def load(source: Source, data_dir: Path | None) -> Data:
    """
    Raises:
        BadData: nothing there, or a record that is not what the source says.
    """
    for name in source.local if data_dir else ():
        for ending in ENDINGS:
            path = Path(str(data_dir)) / f"{name}{ending}"
            if path.exists():
                return _checked(source, read(path), f"{name}{ending}", path)
    if not source.repository:
        raise BadData(f"no {source.local[0]}.jsonl in {data_dir or 'the folder of --data-dir, which was not given'}")
    return _from_hub(source, data_dir)


WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", "CC BY-SA 3.0 and GFDL (Wikipedia)")


@lru_cache(maxsize=8)
def text(name: str, data_dir: Path | None) -> Data:
    """One record with the field `text`: WikiText-2's test split, or the user's file or folder of .txt.

    Raises:
        BadData: nothing there, or nothing in it.
    """
    places = [Path(name)] if data_dir is None else [data_dir / name, data_dir / "lm" / name, Path(name)]
    path = next((place for place in places if place.exists()), None)
    if path is None and name == "wikitext2":
        repository, file, licence = WIKITEXT2
        found = _from_hub(Source(("lm/wikitext2/wiki.test.raw",), ("text",), licence, repository, file), data_dir)
        return Data(({"text": "".join(row["text"] for row in found.rows)},), found.sha256, found.source, licence)
    if path is None:
        raise BadData(f"no text {name!r}: wikitext2, or a file or folder of .txt, by itself or in --data-dir, is expected")
    paths = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".raw")) if path.is_dir() else [path]
    parts = [read(p) for p in paths]
    raw, joined = b"\n".join(parts), "\n".join(decoded(part, p) for part, p in zip(parts, paths, strict=True))
    if not joined.strip():
        raise BadData(f"{path} holds no text")
    licence = WIKITEXT2[2] if name == "wikitext2" else "the user's own text"
    return Data(({"text": joined},), hashlib.sha256(raw).hexdigest(), name, licence)


def likelihoods(answer: str) -> list[tuple[float, bool, int]]:
    """Of a stored answer: log-probability in nats, first choice throughout?, tokens; of every request."""
    return [(float(logprob), bool(greedy), int(tokens)) for logprob, greedy, tokens in json.loads(answer)]


def lm_eval_task(folder: str, task: str) -> dict[str, Any]:
    """The settings of one of lm-eval's task files; functions that it names are not run.

    Raises:
        BadData: lm-eval is not installed, or has no such file.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise BadData(f"the prompts of {task} are read from lm-eval, which is not installed: pip install lm-eval")
    path = Path(found.origin).parent / "tasks" / folder / f"{task}.yaml"
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, yaml.YAMLError) as error:
        raise BadData(f"lm-eval's file of {task} is not as expected: {error}") from None
    if not isinstance(settings, dict):
        raise BadData(f"lm-eval's file of {task} is not as expected: it holds no settings")
    return settings


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's task files without running the functions that they name."""


_Loader.add_multi_constructor("!function", lambda *_: None)


def read(path: Path) -> bytes:
    """The file, unpacked.

    Raises:
        BadData: it cannot be read or unpacked.
    """
    try:
        data = path.read_bytes()
        return OPENERS[path.suffix](data) if path.suffix in OPENERS else data
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise BadData(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def decoded(raw: bytes, where: Path | str) -> str:
    """
    Raises:
        BadData: no UTF-8, as texts in Latin-1 or UTF-16 and binary files: read as far as it goes, it would be another text.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"{where} is no UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x}): save it as UTF-8") from None


def words(path: Path) -> str:
    """The text of a file, packed or not, with its lines ended in one way.

    Raises:
        BadData: it cannot be read, or is no text.
    """
    return decoded(read(path), path).replace("\r\n", "\n").replace("\r", "\n")


def lines(data: bytes, where: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects, one a line, with the line's number.

    Raises:
        BadData: a line that is no JSON object.
    """
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if b"\\ud" in line.lower():  # half of a pair of surrogates is no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise BadData(f"{where}, line {number}: not JSON ({str(error)[:80]})") from None
        if not isinstance(row, dict):
            raise BadData(f"{where}, line {number}: a JSON object is expected")
        yield number, row


def _checked(source: Source, data: bytes, shown: str, where: Path | str) -> Data:
    rows = parquet(data, where) if shown.endswith(".parquet") else lines(data, where)
    found = []
    for number, row in rows:
        missing = [field for field in source.fields if field not in row]
        empty = [field for field in source.filled if field in row and not row[field]]
        what = f"no field {missing[0]!r}" if missing else f"field {empty[0]!r} is empty" if empty else None
        if what or (what := source.fault(row) if source.fault else None):
            raise BadData(f"{where}, line {number}: {what}")
        found.append(row)
    if not found:
        raise BadData(f"{where} holds no record")
    return Data(tuple(found), hashlib.sha256(data).hexdigest(), shown, source.licence)


def parquet(data: bytes, where: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pandas as pd

    try:
        table = pd.read_parquet(io.BytesIO(data))
    except (OSError, ValueError) as error:
        raise BadData(f"{where} is no parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(table.to_dict("records"), 1):
        yield number, {str(key): value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}


def _from_hub(source: Source, data_dir: Path | None) -> Data:
    from huggingface_hub import hf_hub_download

    archive, _, member = source.file.partition("::")
    try:
        path = Path(hf_hub_download(source.repository, archive, repo_type="dataset", revision=source.revision))
    except Exception as error:  # the hub's client raises whatever its transport does: all of it means the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        looked = f"no {source.local[0]}.jsonl in {data_dir}" if data_dir else "--data-dir was not given"
        raise BadData(f"{looked}, and {source.repository} on the hub is not reachable: {reason}") from None
    shown = f"{source.repository}@{path.parts[-2 - archive.count('/')]}/{source.file}"
    if not member:
        return _checked(source, read(path), shown, shown)
    try:
        with zipfile.ZipFile(path) as opened:
            same = [name for name in opened.namelist() if name.rpartition("/")[2] == member.rpartition("/")[2]]
            return _checked(source, opened.read(member if member in same or not same else same[0]), shown, shown)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise BadData(f"{shown} cannot be read: {error}") from None
