"""Records as a pandas DataFrame: one line a cell, flat columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

import pandas as pd

from results.record import Key, Record

NESTED = ("key", "metrics", "fidelity", "columns", "kept", "lower_is_better", "right_or_wrong")


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """The key's fields, the record's, each metric by its name, `fidelity.*`, and the example's columns as `example.*`."""
    lines = []
    for record in records:
        line: dict[str, Any] = {"id": record.key.id, **asdict(record.key)}
        line |= {field.name: getattr(record, field.name) for field in fields(record) if field.name not in NESTED}
        line |= record.metrics
        line |= {f"fidelity.{name}": value for name, value in record.fidelity.items()}
        line |= {f"example.{name}": value for name, value in record.columns.items()}
        lines.append(line)
    return pd.DataFrame(lines, columns=None if lines else ["id", *(field.name for field in fields(Key))])


def cost_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The cell's fields, then what was measured; phases in columns of their own."""
    return pd.json_normalize([{**row["cell"], **{k: v for k, v in row.items() if k != "cell"}} for row in rows])
