"""Rows as one parquet file: flat columns for whoever reads tables, and the whole row beside them, from which reports are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from results.lines import objects
from results.record import Record

PARQUET = "rows.parquet"
WHOLE = "row"  # the column with the row as it is stored


class BadParquet(UserError):
    """A file that is no parquet file, or not one of rows."""


def write_parquet(records: Sequence[Record], path: Path) -> None:
    """Every row once, the columns of `results.frame` and the row itself as JSON."""
    import pyarrow
    import pyarrow.parquet

    from results.frame import frame

    flat = frame(records)
    flat[WHOLE] = [record.to_json() for record in records]
    table = pyarrow.Table.from_pandas(flat, preserve_index=False).replace_schema_metadata(None)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stored rows of such a file, each with where it stands.

    Raises:
        BadParquet: it cannot be read, or has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=[WHOLE])[WHOLE].to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise BadParquet(f"{path} holds no rows of this suite ({type(error).__name__}); write one with `publish`") from None
    yield from objects("\n".join(map(str, column)).encode() + b"\n", path)


def merged(runs: Iterable[Sequence[Record]]) -> list[Record]:
    """The rows of several folders: of equal keys the first `ok` one, else the last."""
    found: dict[str, Record] = {}
    for records in runs:
        for record in records:
            held = found.get(record.key.id)
            if held is None or held.status != "ok":
                found[record.key.id] = record
    return list(found.values())
