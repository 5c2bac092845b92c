"""The first screen of a page: one picture, one small table, a few sentences. Which method at my budget, and how sure is that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

from reports.answers import QUARTER, Verdict, at_share, how_sure, interval, listed, outdone, percent, verdicts
from reports.cost import Cost
from reports.drawing import Picture
from reports.formats import Table, TableCell
from reports.keys import Label
from reports.plots import family_picture
from reports.present import PATH_ONLY
from reports.statistics import Estimate
from reports.summary import Family, Overall
from results.record import EMBEDDED

HEADER = ("bytes", "take", "score", "maybe as good", "better than", "ms a token")
NAMED = 2  # of those that may be as good
MOST = 6  # budgets of the small table
NEAR = 0.1  # of a quarter, in shares of it: still called one


CAPTION = (
    "Yellow: the best at as many bytes or fewer. Shaded: 95% intervals of the two that are best most often. Grey: the others. "
    "Point at a mark for its numbers."
)
SMALL = "The model comes with the suite and is tiny: this says nothing about large ones."


@dataclass(frozen=True)
class Sentence:
    """What is said; the method that it is about stands out."""

    before: str
    strong: str = ""
    after: str = ""


@dataclass(frozen=True)
class Front:
    """What the first screen shows of one family."""

    title: str
    metric: str
    sentences: tuple[Sentence, ...]
    table: Table | None
    picture: Picture
    caption: str
    note: str = ""  # a warning


def fronts(families: Sequence[Family], measured: Sequence[Cost]) -> list[Front]:
    """Of every family, the one that says most first."""
    return [_front(family, measured) for family in sorted(families, key=first_shown)]


def first_shown(family: Family) -> tuple[object, ...]:
    """For sorting: what can be ranked before what proves the path, answers before likelihoods, a real model before the embedded
    one, many tasks before few.
    """
    return (
        family.path_only,
        family.lower_is_better,
        family.at.model == EMBEDDED,
        -len(family.tasks),
        -len(family.cells),
        family.at.protocol.prompt != "question_in",
    )


def _front(family: Family, measured: Sequence[Cost]) -> Front:
    found = verdicts(family)
    asked = at_share(found)
    times = Times(measured, family.at.model)
    said = _answer(asked, family, times) if asked else [_nothing(family)]
    if family.at.model == EMBEDDED:
        said.append(Sentence(SMALL))
    picture = replace(family_picture(family), marked=asked.byte_share if asked else 0.0)
    note = PATH_ONLY if family.path_only else ""
    table = _table(found, asked, times)
    return Front(family.title, family.at.metric, tuple(said), table, picture, CAPTION, note)


def _answer(verdict: Verdict, family: Family, times: Times) -> list[Sentence]:
    best = verdict.best
    near = abs(verdict.byte_share / QUARTER - 1) <= NEAR
    where = "At a quarter of the cache's bytes" if near else f"At {verdict.budget_words}, the nearest to a quarter"
    alone = len(verdict.cells) == 1
    take = "only this was measured: " if alone else "nothing is decided; the best mean has " if verdict.undecided else "take "
    answers = f"{best.score.n} answers" + (f" on {len(family.tasks)} tasks" if len(family.tasks) > 1 else "")
    better = ", less is better" if family.lower_is_better else ""
    scores = f"It scores {_short(best.score.mean)}"
    bounds = f"95% interval {_short(best.score.low)} to {_short(best.score.high)}, {answers}"
    bounds = "one answer, which has no interval" if best.score.n == 1 else bounds
    said = [Sentence(f"{where}, {take}", str(best.label), f". {scores} ({family.at.metric}{better}, {bounds}){_full(verdict)}.")]
    if not alone:
        said.append(Sentence(f"How sure? {_capital(how_sure(verdict))}{_visible(verdict)}."))
    if time := times.first_of([best, *verdict.level], verdict.byte_share):
        untimed = "" if time.cost.method == best.label.name else f"; {best.label} was not timed"
        said.append(
            Sentence(f"A token takes {time.ms:.3g} ms with {time.cost.method}{times.full(time)} ({time.where}){untimed}.")
        )
    return said


def _full(verdict: Verdict) -> str:
    if verdict.full is None or verdict.to_full is None:
        return ""
    scores, apart = f"; the full cache scores {_short(verdict.full.score.mean)}", verdict.to_full
    if not verdict.differs_from_full:
        return f"{scores}, and no difference to it is shown"
    bounds = " to ".join(map(_short, sorted((abs(apart.low), abs(apart.high)))))
    return f"{scores}, which is {_short(abs(apart.mean))} {'more' if apart.mean < 0 else 'less'} ({bounds})"


def _visible(verdict: Verdict) -> str:
    """What could have been shown at all."""
    if not verdict.level or not verdict.visible:
        return ""
    return f", since {verdict.best.score.n} answers cannot show a difference below about {verdict.visible:.2g}"


def _nothing(family: Family) -> Sentence:
    best = max(family.cells, key=lambda cell: -cell.score.mean if family.lower_is_better else cell.score.mean)
    what = f"{family.at.metric} {interval(best.score)}, {best.score.n} answers"
    return Sentence(
        "No method was measured at a budget at which it loses entries, so there is nothing to choose: ",
        str(best.label),
        f" has {what}.",
    )


def _table(found: Sequence[Verdict], asked: Verdict | None, times: Times) -> Table | None:
    if not found or asked is None:
        return None
    shown = sorted(found, key=lambda one: abs(log(one.byte_share / asked.byte_share)))[:MOST]
    rows = [_row(one, times, one is asked, outdone(one, found)) for one in sorted(shown, key=lambda one: -one.byte_share)]
    full = f"The full cache has {_short(asked.full.score.mean)}. " if asked.full else ""
    told = f"{full}In brackets 95% intervals. Better is what is shown at a level of 5% over all pairs of methods of a budget."
    timed = [time for one in shown if (time := times.first_of([one.best, *one.level], one.byte_share))]
    wheres = sorted({time.where for time in timed})
    notes = (told, *([f"Times are those of {'; '.join(wheres)}."] if wheres else []))
    return Table("At my budget, which method?", HEADER, tuple(rows), notes)


def _row(verdict: Verdict, times: Times, marked: bool, less: Verdict | None) -> tuple[TableCell, ...]:
    best, others = verdict.best, len(verdict.cells) - 1
    entries = "" if verdict.is_share else f" ({verdict.budget})"
    instead = f"; not run here: {less.best.label}, {_short(less.best.score.mean)} at {percent(less.byte_share)}" if less else ""
    return (
        TableCell(f"{percent(verdict.byte_share)}{entries}", verdict.byte_share, best=marked),
        TableCell(f"{best.label}{', undecided' * verdict.undecided}{instead}", best=marked),
        TableCell(_bracketed(best.score), best.score.mean, best=marked),
        TableCell(listed(verdict.level, NAMED) if verdict.level else "none" if verdict.beaten else "-"),
        TableCell(f"{len(verdict.beaten)} of {others}" if others else "-", len(verdict.beaten)),
        _timed(times.first_of([best, *verdict.level], verdict.byte_share), best.label),
    )


def _timed(time: Time | None, best: Label) -> TableCell:
    """Of the best, or of the first of those not shown to be worse that was timed."""
    if time is None:
        return TableCell("-", float("-inf"))
    return TableCell(f"{time.ms:.3g}" + f" {time.cost.method}" * (time.cost.method != best.name), time.ms)


def _bracketed(value: Estimate) -> str:
    return f"{_short(value.mean)} [{_short(value.low)}, {_short(value.high)}]"


def _short(value: float) -> str:
    """Two places for shares, three digits for others."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Time:
    ms: float  # a token
    where: str  # of what it was measured
    cost: Cost


@dataclass(frozen=True)
class Times:
    """What methods cost, of the cells of the model itself or else of another one: that is said."""

    measured: Sequence[Cost]
    model: str

    def first_of(self, cells: Sequence[Overall], share: float) -> Time | None:
        return next((time for cell in cells if (time := self.of(cell.label, share))), None)

    def of(self, label: Label, share: float) -> Time | None:
        """Of the cell of this method whose bytes are nearest."""
        mine = [cost for cost in self._timed() if cost.method == label.name and cost.panel.variant == label.variant]
        cost = min(mine, key=lambda cost: self._far(cost, share), default=None)
        return None if cost is None or cost.token_ms is None else Time(cost.token_ms, self._where(cost), cost)

    def full(self, time: Time) -> str:
        """What the full cache costs in the same place, in words."""
        whole = next((cost for cost in self._timed() if cost.method == "full" and _place(cost) == _place(time.cost)), None)
        return "" if whole is None or whole.token_ms is None else f", {whole.token_ms:.3g} ms with the full cache"

    def _timed(self) -> list[Cost]:
        timed = [cost for cost in self.measured if cost.laps and not cost.fell_back]
        return [cost for cost in timed if cost.panel.parent == self.model] or timed

    def _far(self, cost: Cost, share: float) -> tuple[float, int, int]:
        kept = cost.laps[0]["bytes_kept"]
        whole = [
            other.laps[0]["bytes_kept"] for other in self._timed() if other.method == "full" and other.context == cost.context
        ]
        return abs(log(kept / max(whole, default=kept) / share)) if kept else 0.0, -cost.context, cost.batch

    def _where(self, cost: Cost) -> str:
        budget = f" at {cost.budget}" if cost.budget else ""
        batch = f", batch {cost.batch}" if cost.batch > 1 else ""
        way = "" if cost.decode == "eager" else f", {cost.decode}"
        return f"{cost.panel.model}{budget} of {cost.context:,} tokens, {cost.panel.device}{batch}{way}"


def _place(cost: Cost) -> tuple[object, ...]:
    return (cost.panel, cost.context, cost.batch, cost.way)
