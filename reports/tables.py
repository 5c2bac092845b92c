"""From rows to one table: a line a model, benchmark, protocol, method and budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pandas as pd

from reports.formats import for_spreadsheets
from reports.keys import Label, LineKey, PanelKey, Protocol
from reports.names import named
from reports.statistics import Estimate, estimate, holm, paired_difference, proportion
from results.record import EMBEDDED, Record

Example = tuple[int, int]  # seed and number
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Line:
    """What one method at one budget did on one benchmark. Scores are absent where nothing ran, never 0."""

    at: LineKey
    label: Label
    n: int  # examples: those of the mean
    skipped: int
    failed: int
    compressed: int  # of n, how many prompts lost entries
    byte_share: float | None  # measured: kept over the full cache of the unconverted model
    allocated_share: float | None
    entries: float | None  # mean, right after compaction
    metric: str | None  # the benchmark's main one: what `score` is
    score: Estimate | None
    score_difference: Estimate | None  # to full, paired
    kl: Estimate | None
    top1: Estimate | None
    loss: Estimate | None
    asked: float | None = None  # entries, mean
    judge: Estimate | None = None  # 1 to 10
    own: bool = True  # a task that the embedded model can do
    p: float | None = None  # of the difference to full, by Holm over the panel's methods at this budget
    values: Mapping[Example, float] = field(default_factory=dict)  # the main metric by example
    lower_is_better: bool = False
    looks: int = 1  # at the examples so far, before it was decided that they are enough

    @property
    def model(self) -> str:
        return self.at.model

    @property
    def parent(self) -> str:
        return self.at.parent

    @property
    def budget(self) -> str:
        return self.at.asked.budget

    @property
    def protocol(self) -> Protocol:
        return self.at.protocol

    @property
    def panel(self) -> PanelKey:
        return self.at.panel

    @property
    def is_full(self) -> bool:
        return self.label.is_full

    @property
    def path_only(self) -> bool:
        """Do the scores prove no more than that the path works?"""
        return self.at.asked.parent == EMBEDDED and not self.own

    @property
    def differs(self) -> bool:
        """Is a difference to full shown?"""
        return self.p is not None and self.p < SIGNIFICANT


def lines(
    records: Iterable[Record], ratings: Mapping[str, float] | None = None, looks: Mapping[tuple[str, str], int] | None = None
) -> list[Line]:
    """One line a cell of the suite, in the order: model, benchmark, protocol, method, budget.

    What would bear the same name but is not the same (another version, other records, other weights) is told apart, see
    `reports.names`.

    Args:
        ratings: a judge's, by row id.
        looks: by model and benchmark of the keys, where examples were added until intervals were narrow.
    """
    groups: dict[LineKey, list[Record]] = {}
    every = records if isinstance(records, tuple) else tuple(records)
    for record, at in zip(every, named(every), strict=True):
        groups.setdefault(at, []).append(record)
    ordered = sorted(groups, key=lambda at: at.order)
    full: dict[LineKey, list[Record]] = {}
    for at in ordered:
        if at.label.is_full:
            full.setdefault(at.question, groups[at])
    looked = {at: (looks or {}).get((at.asked.model, at.asked.benchmark), 1) for at in ordered}
    return _corrected([_line(at, groups[at], full.get(at.question, ()), ratings or {}, looked[at]) for at in ordered])


def _corrected(found: Sequence[Line]) -> list[Line]:
    """With the tests against full of all methods at one budget of a panel corrected together."""
    tests: dict[tuple[PanelKey, str], dict[int, float]] = {}
    for number, line in enumerate(found):
        if line.score_difference and line.score_difference.p is not None and not line.is_full:
            tests.setdefault((line.panel, line.budget), {})[number] = line.score_difference.p
    corrected: dict[int, float] = {}
    for family in tests.values():
        corrected |= dict(zip(family, holm(list(family.values())), strict=True))
    return [replace(line, p=corrected.get(number)) for number, line in enumerate(found)]


def _line(at: LineKey, records: Sequence[Record], full: Sequence[Record], ratings: Mapping[str, float], looks: int) -> Line:
    done = [record for record in records if record.status == "ok"]
    asked = {_example(record): bool(record.compressed) for record in done}
    scores, baseline = _by_example(done), _by_example(record for record in full if record.status == "ok")
    metric = next((next(iter(record.metrics)) for record in done if record.metrics), None)
    return Line(
        at,
        at.label,
        n=len(scores) if scores else len(asked),
        skipped=sum(record.status == "skipped" for record in records),
        failed=sum(record.status == "failed" for record in records),
        compressed=sum(asked[example] for example in scores or asked),
        byte_share=_share(done, "bytes_charged"),
        allocated_share=_share(done, "bytes_allocated"),
        entries=_mean(record.entries for record in done),
        metric=metric,
        score=_score(scores.values(), any(metric in record.right_or_wrong for record in done), looks),
        score_difference=paired_difference(scores, baseline, looks=looks),
        kl=_estimate((record.fidelity["kl"] for record in done if "kl" in record.fidelity), looks),
        top1=_estimate((record.fidelity["top1"] for record in done if "top1" in record.fidelity), looks),
        loss=_estimate((record.fidelity["loss"] for record in done if "loss" in record.fidelity), looks),
        asked=_mean(record.entries_asked for record in done),
        judge=_estimate((ratings[record.key.id] for record in done if record.key.id in ratings), looks),
        own=any(record.embedded_can for record in records),
        values=scores,
        lower_is_better=any(metric in record.lower_is_better for record in done),
        looks=looks,
    )


def _by_example(records: Iterable[Record]) -> dict[Example, float]:
    """The main metric (a benchmark's first) of each example, by seed and number.

    Records of a data set are the same under every seed: there a seed is a draw of the answer, and the draws are averaged.
    """
    found: dict[Example, list[float]] = {}
    for record in records:
        if record.metrics and np.isfinite(next(iter(record.metrics.values()))):
            found.setdefault(_example(record), []).append(next(iter(record.metrics.values())))
    return {where: float(np.mean(values)) for where, values in found.items()}


def _example(record: Record) -> Example:
    return (0 if record.key.data else record.key.seed, record.key.example)


def _estimate(values: Iterable[float], looks: int) -> Estimate | None:
    found = np.array(list(values), dtype=np.float64)
    found = found[np.isfinite(found)]
    return estimate(found, looks=looks) if len(found) else None


def _score(values: Iterable[float], right_or_wrong: bool, looks: int) -> Estimate | None:
    """As `_estimate`; of answers that are right or wrong, a proportion. A mean over draws of one answer may be neither."""
    found = np.array(list(values), dtype=np.float64)
    whole = right_or_wrong and len(found) and bool(np.isin(found, (0.0, 1.0)).all())
    return proportion(found, looks) if whole else _estimate(found, looks)


def _share(records: Sequence[Record], count: str) -> float | None:
    return _mean(getattr(r, count) / r.bytes_full for r in records if r.bytes_full and getattr(r, count) is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


ESTIMATES = ("score", "score_difference", "kl", "top1", "loss", "judge")
NO_COLUMNS = ("at", "label", "values", "lower_is_better", "looks")


def frame(found: Sequence[Line]) -> pd.DataFrame:
    """The lines as a table, estimates in columns of their own: the CSV."""
    return pd.DataFrame([_asked(line) | _measured(line) for line in found])


def _asked(line: Line) -> dict[str, object]:
    method = f"{line.label.name}@{line.at.asked.method_version}"
    where = {"model": line.model, "benchmark": str(line.at.task), "prompt": line.protocol.prompt, "protocol": str(line.protocol)}
    return {name: for_spreadsheets(text) for name, text in {**where, "method": method, "budget": line.budget}.items()}


def _measured(line: Line) -> dict[str, object]:
    row: dict[str, object] = {}
    for name in (f.name for f in fields(line) if f.name not in NO_COLUMNS):
        value = getattr(line, name)
        if name in ESTIMATES:
            row |= {f"{name}_{part}": None if value is None else getattr(value, part) for part in ("mean", "low", "high")}
        else:
            row[name] = for_spreadsheets(value) if isinstance(value, str) else value
    return row
