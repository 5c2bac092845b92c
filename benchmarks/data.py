"""Records of published data sets: from the user's folder first, else from the hub. Checked on load, named by their hash."""

from __future__ import annotations

import gzip
import hashlib
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

OPENERS: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")


class BadData(ValueError):
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


@dataclass(frozen=True)
class Data:
    """The records of one file."""

    rows: tuple[dict[str, Any], ...]
    sha256: str
    source: str  # the file's name, or where on the hub it lies, with the commit
    licence: str


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


def read(path: Path) -> bytes:
    """The file, unpacked.

    Raises:
        BadData: it cannot be read or unpacked.
    """
    try:
        data = path.read_bytes()
        return OPENERS[path.suffix](data) if path.suffix in OPENERS else data
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise BadData(f"{path} cannot be read: {error}") from None


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
    rows = _parquet(data, where) if shown.endswith(".parquet") else lines(data, where)
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


def _parquet(data: bytes, where: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
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
            return _checked(source, opened.read(member), shown, shown)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise BadData(f"{shown} cannot be read: {error}") from None
