"""Scores by how-manieth question on a context: a method that looked at the first question pays at the second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reports.formats import Table, TableCell, words
from reports.keys import LineKey, number
from reports.names import named
from reports.statistics import Estimate, clustered
from results.record import Record

NOTE = (
    "Several questions on one context, which was read and compressed once for all of them (under question_in: for each anew). "
    "first_question: entries were chosen with the first question in view, which was then taken back; each question is asked over "
    "these rows by itself. turns: the same, and the questions stay, with their right answers behind them. question_after and "
    "turns_after: compressed before any question was known (query-agnostic). Intervals of 95 % draw whole contexts, since "
    "questions on one context go wrong together."
)
APART = 3  # questions with a column of their own; those behind them share one
ALL, LATER = "all", f"{APART + 1} and later"


def by_question_table(records: Sequence[Record]) -> list[Table]:
    """One line a cell of a task that asks several questions on a context."""
    found: dict[LineKey, list[tuple[int, tuple[int, object], float]]] = {}
    for record, at in zip(records, named(records), strict=True):
        asked, shares = number(record.columns.get("question")), record.columns.get("shares")
        if asked is not None and record.status == "ok" and record.metrics:
            context = (0 if record.key.data else record.key.seed, shares)
            found.setdefault(at, []).append((int(asked), context, next(iter(record.metrics.values()))))
    if not found:
        return []
    places = sorted({min(asked, APART + 1) for mine in found.values() for asked, _, _ in mine})
    header = tuple(LATER if place > APART else f"question {place}" for place in places)
    rows = []
    for at in sorted(found, key=lambda at: at.order):
        mine = found[at]
        scores = (_score([one for one in mine if min(one[0], APART + 1) == place]) for place in places)
        contexts = len({context for _, context, _ in mine})
        asked_of = words(f"{at.model}, {at.task}", at.asked.prompt, at.label.name, at.asked.budget or "-")
        rows.append((*asked_of, TableCell(str(contexts), contexts), *scores, _score(mine)))
    columns = ("where", "compressed", "method", "budget", "contexts", *header, ALL)
    return [Table("Many questions, one context", columns, tuple(rows), (NOTE,))]


def _score(found: Sequence[tuple[int, tuple[int, object], float]]) -> TableCell:
    if not found:
        return TableCell("-", float("-inf"))
    contexts: dict[tuple[int, object], list[float]] = {}
    for _, context, value in found:
        contexts.setdefault(context, []).append(value)
    mean: Estimate = clustered([np.array(values) for values in contexts.values()])
    return TableCell(f"{mean.mean:.3g} [{mean.low:.3g}, {mean.high:.3g}]", mean.mean)
