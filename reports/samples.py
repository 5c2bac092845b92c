"""avg@k: problems that were answered several times, with intervals that count problems and samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reports.formats import Table, TableCell, words
from reports.keys import LineKey
from reports.names import named
from reports.statistics import clustered
from results.record import Record

NOTE = (
    "avg@k: the mean over problems and k samples of each. Intervals of 95 % draw problems, and samples within them. Tokens and "
    "ended: how long answers were, and which share of them stopped within their limit; small caps can lengthen answers. An "
    "answer that did not end is scored as it stands."
)


def samples_table(records: Sequence[Record]) -> list[Table]:
    """One line a cell whose answers were sampled under several seeds."""
    found: dict[LineKey, dict[int, list[Record]]] = {}
    for record, at in zip(records, named(records), strict=True):
        if record.status == "ok" and record.metrics and record.key.temperature and record.key.data:
            found.setdefault(at, {}).setdefault(record.key.example, []).append(record)
    rows = []
    for at in sorted(found, key=lambda at: at.order):
        problems = list(found[at].values())
        most, least = max(map(len, problems)), min(map(len, problems))
        if most < 2:
            continue
        mean = clustered([np.array([next(iter(one.metrics.values())) for one in mine]) for mine in problems])
        every = [record for mine in problems for record in mine]
        ended = float(np.mean([record.stop_reason in ("end", "text") for record in every]))
        tokens = float(np.mean([record.new_tokens or 0 for record in every]))
        rows.append(
            (
                *words(f"{at.model}, {at.task}", at.asked.prompt, at.label.name, at.asked.budget or "-"),
                TableCell(str(len(problems)), len(problems)),
                TableCell(str(most) if most == least else f"{least} to {most}", most),
                TableCell(f"{mean.mean:.3g} [{mean.low:.3g}, {mean.high:.3g}]", mean.mean),
                TableCell(f"{tokens:.0f}", tokens),
                TableCell(f"{ended:.0%}", ended),
            )
        )
    header = ("where", "prompt", "method", "budget", "problems", "k", "avg@k", "tokens", "ended")
    return [Table("Samples", header, tuple(rows), (NOTE,))] if rows else []
