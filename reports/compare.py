"""Two runs side by side: the same task, protocol, method and budget in both, with the second's paired difference to the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reports.formats import Table, TableCell, latex, markdown
from reports.keys import Label, LineKey
from reports.page import simple_page
from reports.present import estimated
from reports.sequential import looks_of
from reports.statistics import Estimate, holm, paired_difference
from reports.tables import SIGNIFICANT, Line, lines
from results.drafts import report_draft
from results.lines import tell
from results.store import StoreError, read_rows


@dataclass(frozen=True)
class PairKey:
    """What a line of the one run and a line of the other must share."""

    question: LineKey  # without the weights, and of variants their parent, which the label completes
    label: Label
    budget: str

    @classmethod
    def of(cls, line: Line, single: bool, several: Collection[str]) -> PairKey:
        """single: both runs have one model, whatever it is called. several: models of which one run has two revisions or more."""
        key = line.at.question.asked
        same_name = not single and key.model in several
        model = "" if single else key.model if same_name else key.parent
        asked = replace(key, model=model, revision=key.revision if same_name else "")
        return cls(LineKey(asked, line.at.length), line.label, line.budget)


@dataclass(frozen=True)
class Pair:
    """A cell that both runs measured."""

    first: Line
    second: Line
    difference: Estimate | None  # of the examples that both answered


def write_comparison(first: Path, others: Sequence[Path]) -> list[Path]:
    """Writes `<first>/report/side_by_side.{html,md,tex}`: each of the others against the first.

    Raises:
        StoreError: nothing that the first and any other measured alike, or a folder that cannot be read or written to.
    """
    ours = lines(read_rows(first), looks=looks_of(first))
    several = len({folder.name for folder in (first, *others)}) <= len(others)
    named = {folder: str(folder) if several else folder.name for folder in (first, *others)}
    tables: list[Table] = []
    for other in others:
        found = comparison(ours, lines(read_rows(other), looks=looks_of(other)), (named[first], named[other]))
        against = f"{named[other]} against {named[first]}: " if len(others) > 1 else ""
        tables += [replace(table, title=f"{against}{table.title}") for table in found]
        if not found and len(others) > 1:
            tell(f"{other} shares no task, protocol, method and budget with {first}")
    if not tables:
        whom = " and ".join(map(str, (first, *others)))
        raise StoreError(f"{whom} share no task, protocol, method and budget: there is nothing to put side by side")
    title = f"{', '.join(named[other] for other in others)} against {named[first]}"
    names = [f"side_by_side.{ending}" for ending in ("html", "md", "tex")]
    texts = (simple_page(title, NOTE, tables), f"# {title}\n\n{NOTE}\n\n{markdown(tables)}", latex(tables))
    with report_draft(first) as draft:
        for name, text in zip(names, texts, strict=True):
            (draft / name).write_text(text, encoding="utf-8")
    return [first / "report" / name for name in names]


NOTE = (
    "A difference is the second run's score less the first's, paired over the examples that both answered; a star marks one "
    "that is significant at 0.05 by Holm's correction over the methods at its budget. Runs of different protocols are not "
    "compared."
)


def comparison(ours: Sequence[Line], theirs: Sequence[Line], names: tuple[str, str]) -> list[Table]:
    """One table a task and protocol. Two runs of one model each are compared whatever the models are called."""
    single = len({line.parent for line in ours}) == len({line.parent for line in theirs}) == 1
    several = _several(ours) | _several(theirs)
    known = {PairKey.of(line, single, several): line for line in theirs}
    panels: dict[LineKey, list[Pair]] = {}
    for line in ours:
        where = PairKey.of(line, single, several)
        other = known.get(where)
        if other is not None and line.score and other.score:
            difference = (
                paired_difference(other.values, line.values, looks=max(line.looks, other.looks))
                if line.metric == other.metric
                else None
            )
            panels.setdefault(where.question, []).append(Pair(line, other, difference))
    return [_table(pairs, names) for pairs in panels.values()]


def _several(found: Sequence[Line]) -> set[str]:
    revisions = {(line.at.asked.model, line.at.asked.revision) for line in found}
    return {model for model, count in Counter(model for model, _ in revisions).items() if count > 1}


def _table(pairs: Sequence[Pair], names: tuple[str, str]) -> Table:
    shown: set[int] = set()
    for budget in dict.fromkeys(pair.first.budget for pair in pairs):
        tests = {id(pair): pair.difference.p for pair in pairs if pair.first.budget == budget and pair.difference}
        ps = holm([p for p in tests.values() if p is not None])
        shown |= {pair for pair, p in zip(tests, ps, strict=True) if p < SIGNIFICANT}
    first = pairs[0].first
    rows = tuple(_row(pair, id(pair) in shown) for pair in pairs)
    header = ("method", "budget", *(f"{what}, {name}" for what in ("bytes", "score") for name in names), "difference", "pairs")
    models = dict.fromkeys(line.parent for line in (first, pairs[0].second))
    title = f"{first.at.task}, {first.protocol.prompt}, {' and '.join(models)}"
    return Table(title, header, rows, (f"Score: {first.metric}. Protocol: {first.protocol}",))


def _row(pair: Pair, differs: bool) -> tuple[TableCell, ...]:
    shares = (pair.first.byte_share, pair.second.byte_share)
    count = pair.difference.n if pair.difference else 0
    return (
        TableCell(str(pair.first.label)),
        TableCell(pair.first.budget or "-"),
        *(TableCell("-" if share is None else f"{share:.1%}", share) for share in shares),
        estimated(pair.first.score),
        estimated(pair.second.score),
        estimated(pair.difference, differs),
        TableCell(str(count), count),
    )
