"""How many examples are enough: looks at growing numbers of them, until every interval is as narrow as was asked for.

Whoever stops once an interval is narrow has looked several times, and an interval of 95 % at each look holds less often at the
one that ended it. So the numbers of examples are fixed before, and each look's intervals are wide enough that all looks hold
together (Bonferroni): the one at which it ends is then covered, whatever ended it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from reports.statistics import proportion
from reports.tables import Line
from results.lines import Check, is_count, is_number, is_text, list_of, tell, wrong_field
from results.store import read_folder, write_json

FIRST = 10  # examples at the first look; then twice as many each time
FOLDER = "precision"
RANGE = {"share": 1.0, "percent": 100.0}  # of a metric in this unit


@dataclass(frozen=True)
class Watched:
    """A benchmark on a model, whose examples are added to."""

    model: str
    benchmark: str  # as in the keys
    half_width: float  # asked for, of a range of 1
    sizes: tuple[int, ...]  # numbers of examples at which somebody looks, ever
    examples: int = 0  # at the last look
    widest: float | None = None  # half of the widest interval at the last look

    @property
    def narrow(self) -> bool:
        return self.widest is not None and self.widest <= self.half_width


def sizes_up_to(limit: int) -> list[int]:
    """Numbers of examples at which somebody looks."""
    found = [FIRST]
    while found[-1] < limit:
        found.append(2 * found[-1])
    return [size for size in found if size < limit] + [limit]


def half_width(line: Line, unit: str) -> float:
    """Half of a line's interval, of a range of 1. Answers that are all alike still leave a doubt: that of right ones in a row."""
    if line.score is None or line.score.n < 2:
        return float("inf")
    range_ = RANGE.get(unit, 1.0)
    if line.score.high > line.score.low:
        return (line.score.high - line.score.low) / 2 / range_
    alike = proportion(np.ones(line.score.n), line.looks) if unit in RANGE else None
    return (alike.high - alike.low) / 2 if alike else float("inf")


def looks_of(out: Path) -> dict[tuple[str, str], int]:
    """By model and benchmark, how often somebody may have looked."""
    return {(one.model, one.benchmark): len(one.sizes) for one in read_watched(out)}


WATCHED: dict[str, Check] = {"model": is_text, "benchmark": is_text, "half_width": is_number, "sizes": list_of(is_count)}


def read_watched(out: Path) -> list[Watched]:
    found = []
    for one in read_folder(out, FOLDER):
        wrong = wrong_field(one, WATCHED, list(WATCHED)) or (None if one["sizes"] else "no sizes")
        if wrong:
            tell(f"{FOLDER}/{one['id']}.json: {wrong}")
            continue
        last = (one.get("examples", 0), one.get("widest"))
        found.append(Watched(one["model"], one["benchmark"], one["half_width"], tuple(one["sizes"]), *last))
    return found


def write_watched(out: Path, found: Sequence[Watched]) -> None:
    """One file a model and benchmark; looks of before count on.

    Raises:
        StoreError: the folder cannot be written to.
    """
    for one in found:
        name = hashlib.sha256(f"{one.model} {one.benchmark}".encode()).hexdigest()[:16]
        write_json(out / FOLDER / f"{name}.json", asdict(one))
