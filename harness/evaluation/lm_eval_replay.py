"""Stored answers of lm-eval's tasks given back to lm-eval, once a cell: its own filters, metrics and aggregation."""

from __future__ import annotations

from pathlib import Path

from benchmarks.lm_eval_tasks import LmEval, aggregate
from harness.evaluation.plan import Grid
from results.record import Record, cell_id
from results.store import read_rows, write_json


def replay(out: Path, grid: Grid) -> list[Path]:
    """Writes `<out>/lm_eval/<id>.json` for every cell of these tasks that has answers, and gives the paths.

    Raises:
        StoreError: the folder cannot be written to.
    """
    mine = {grid.benchmark_name(label): task for label, task in grid.tasks.items() if isinstance(task, LmEval)}
    cells: dict[str, list[Record]] = {}
    for row in read_rows(out) if mine else ():
        task = mine.get(row.key.benchmark)
        if task is not None and row.status == "ok" and (row.key.benchmark_params, row.key.data) == (repr(task), task.data):
            cells.setdefault(cell_id(row.key), []).append(row)
    return [_write(out, cell, mine[found[0].key.benchmark], found) for cell, found in cells.items()]


def _write(out: Path, cell: str, task: LmEval, rows: list[Record]) -> Path:
    key = rows[0].key
    shown = ("model", "benchmark", "method", "budget", "prompt", "chat", "routing")
    about = {
        **{name: getattr(key, name) for name in shown},
        "examples": len(rows),
        "compressed": sum(bool(row.compressed) for row in rows) / len(rows),
        "results": aggregate(task, {row.key.example: row.answer or "" for row in rows}),
    }
    path = out / "lm_eval" / f"{cell}.json"
    write_json(path, about)
    return path
