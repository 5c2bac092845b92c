"""Bytes over the time of an answer: what methods that evict while decoding are compared by, at equal mean and at equal peak."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reports.formats import Table, TableCell, words
from reports.keys import LineKey, PanelKey
from reports.names import named
from results.record import Record

NOTE = (
    "A cache that is compressed once grows with every token of its answer; one that evicts while decoding stays between its cap "
    "and cap plus interval. Mean and peak are over the tokens of the answer, as shares of the full cache's over its answers to "
    "the same prompts: compare methods at equal mean or at equal peak, not at equal budget. Ended: answers that stopped by "
    "themselves within their limit; small caps can lengthen answers."
)


def grouped(records: Sequence[Record]) -> dict[LineKey, list[Record]]:
    """Rows by cell, of panels where any of the cells evicts while decoding: all of such a panel's, to compare with."""
    done = [(record, at) for record, at in zip(records, named(records), strict=True) if record.bytes_over_answer]
    panels = {at.panel for record, at in done if record.bytes_kept_peak is not None}
    groups: dict[LineKey, list[Record]] = {}
    for record, at in done:
        if at.panel in panels and record.status == "ok":
            groups.setdefault(at, []).append(record)
    return groups


def full_caches(groups: dict[LineKey, list[Record]]) -> dict[PanelKey, list[Record]]:
    """Each panel's rows of the full cache."""
    return {at.panel: found for at, found in groups.items() if at.label.is_full and not at.asked.variant}


def shares(records: Sequence[Record], full: Sequence[Record]) -> tuple[float, float]:
    """Mean and peak bytes of a cell's rows, of the full cache's in the type that the cell is counted against: what a storage
    packs, in 16 bits, whatever type was computed in.
    """
    counted = {record.key.example: record.bytes_full for record in full}
    pairs = [(record.bytes_full, counted.get(record.key.example)) for record in records]
    against = [mine / theirs for mine, theirs in pairs if mine and theirs]
    mean, peak = np.array(means(records)) / np.array(means(full)) / (np.mean(against) if against else 1.0)
    return float(mean), float(peak)


def over_answer_table(records: Sequence[Record]) -> list[Table]:
    """One line a cell, see `grouped`."""
    groups = grouped(records)
    if not groups:
        return []
    full = full_caches(groups)
    rows = []
    for at in sorted(groups, key=lambda at: at.order):
        found = groups[at]
        held = shares(found, full[at.panel]) if at.panel in full else (None, None)
        scores = [next(iter(record.metrics.values())) for record in found if record.metrics]
        ends = [record.stop_reason in ("end", "text") for record in found if record.stop_reason != "forced"]
        where = f"{at.model}, {at.task}"
        numbers = (
            _cell(float(np.mean(scores)) if scores else None, "{:.3g}"),
            *(_cell(share, "{:.1%}") for share in held),
            _cell(float(np.mean([record.new_tokens or 0 for record in found])), "{:.0f}"),
            _cell(float(np.mean(ends)) if ends else None, "{:.0%}"),
        )
        rows.append((*words(where, at.label.name, at.asked.budget or "-"), TableCell(str(len(found)), len(found)), *numbers))
    header = ("where", "method", "budget", "n", "score", "mean bytes", "peak bytes", "tokens", "ended")
    return [Table("Bytes over the answer", header, tuple(rows), (NOTE,))]


def means(records: Sequence[Record]) -> tuple[float, float]:
    """Mean and peak bytes, averaged over the examples."""
    both = np.array([record.bytes_over_answer for record in records if record.bytes_over_answer], dtype=np.float64)
    mean, peak = both.mean(0).tolist()
    return mean, peak


def _cell(value: float | None, form: str) -> TableCell:
    return TableCell("-", float("-inf")) if value is None else TableCell(form.format(value), value)
