"""A reproduced table, handed to the reports: the paper's rows, what stands for them, and under which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.papers.reproduce import Reproduced
from reports.paper import PaperRow, Side, write_side_by_side


def write(done: Reproduced, out: Path) -> list[Path]:
    """Paper and measured numbers, cell by cell; the paths of what was written."""
    table = done.table
    rows = [
        PaperRow(
            method=str(row["method"]),
            setting=_setting(row),
            values=row["values"],
            benchmarks={column: table.benchmarks(row, column, done.facts) for column in row["values"]},
            measured_with=one.method,
            command="" if one.model else one.command,
            numbers=done.numbers[place] if done.numbers else None,
        )
        for place, (row, one) in enumerate(zip(done.rows, done.asked, strict=True))
    ]
    title = f"{table.name}, {done.paper_model} in the paper, {done.model} here"
    side = Side(table.name, title, done.settings, table.numbers["averages"], table.scale, table.exponent)
    return write_side_by_side(out, side, rows, [(one.model, one.budget) for one in done.asked], done.keys)


def _setting(row: dict[str, Any]) -> str:
    size = f"{row['size']} ({row['ratios']})" if row.get("size") and row.get("ratios") else row.get("size")
    parts = [size or row.get("budget") or row.get("ratios"), row.get("task")]
    parts += [f"H2O keeps {row['h2o keeps']}"] if "h2o keeps" in row else []
    return ", ".join(str(part) for part in parts if part) or "-"
