"""A reproduced table, handed to the reports: the paper's rows, what stands for them, and under which settings."""

from __future__ import annotations

from pathlib import Path

from harness.papers.reproduce import Reproduced
from reports.paper import write_side_by_side
from reports.paper_points import Drawing, PaperRow, Setting, Side


def write(done: Reproduced, out: Path) -> list[Path]:
    """Paper and measured numbers, cell by cell; the paths of what was written."""
    table = done.table
    rows = [
        PaperRow(
            method=str(row["method"]),
            setting=Setting.of(row),
            values=row["values"],
            benchmarks={column: table.benchmarks(row, column, done.facts) for column in row["values"]},
            measured_with=one.method,
            command="" if one.model else one.command,
            numbers=done.numbers[place] if done.numbers else None,
        )
        for place, (row, one) in enumerate(zip(done.rows, done.asked, strict=True))
    ]
    title = f"{table.name}, {done.paper_model} in the paper, {done.model} here"
    drawing = Drawing(**table.numbers["drawing"]) if "drawing" in table.numbers else None
    side = Side(table.name, title, done.settings, table.numbers["averages"], table.scale, table.exponent, drawing)
    return write_side_by_side(out, side, rows, [(one.model, one.budget) for one in done.asked], done.keys)
