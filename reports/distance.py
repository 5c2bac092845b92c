"""Loss along a long text: where a method breaks down, and whether one that keeps so many entries goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reports.formats import Table, TableCell, words
from reports.keys import LineKey
from reports.names import named
from results.record import Record

NOTE = (
    "Mean negative log-likelihood in nats of equal parts of one text, in order, scored token by token under a cap; the heads of "
    "the columns say where each part ends. Less is better, and a loss that rises from one part to the next where the others' do "
    "not is the method's. Texts that are longer than a model has positions for are scored by methods alone whose positions are "
    "those inside the cache."
)


def distance_tables(records: Sequence[Record]) -> list[Table]:
    """One table for each length of texts, one line a cell, averaged over its texts."""
    groups: dict[tuple[int, ...], dict[LineKey, list[list[float]]]] = {}
    for record, at in zip(records, named(records), strict=True):
        if record.status == "ok" and record.by_distance and record.new_tokens:
            ends = tuple(len(part) for part in np.array_split(np.arange(record.new_tokens), len(record.by_distance)))
            where = tuple(int(end) for end in np.cumsum(ends) + (record.prompt_tokens or 0))
            groups.setdefault(where, {}).setdefault(at, []).append(record.by_distance)
    tables = []
    for places, found in sorted(groups.items()):
        rows = []
        for at in sorted(found, key=lambda at: at.order):
            means = np.mean(found[at], 0).tolist()
            numbers = (TableCell(f"{mean:.3f}", mean) for mean in means)
            name = words(f"{at.model}, {at.task}", at.label.name, at.asked.budget or "-")
            rows.append((*name, TableCell(str(len(found[at])), len(found[at])), *numbers))
        header = ("where", "method", "budget", "n", *(f"to {place}" for place in places))
        tables.append(Table(f"Loss along a text of {places[-1]} tokens", header, tuple(rows), (NOTE,)))
    return tables
