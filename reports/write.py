"""A report from stored rows alone: no model, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import plots
from reports.answers import sentence, verdicts
from reports.beside import beside
from reports.bits import ABOUT, bits_maps
from reports.by_question import by_question_table
from reports.cost import Cost, costs
from reports.cost_plots import cost_pictures
from reports.cost_tables import cost_sentences, cost_tables
from reports.distance import distance_tables
from reports.evidence import importance_maps, kept_maps, routing_pictures
from reports.formats import latex, markdown
from reports.front import fronts
from reports.keys import Label
from reports.more_tables import ahead_table, length_tables, lm_eval_table, missing_table
from reports.needles import needle_maps
from reports.over_answer import over_answer_table
from reports.over_answer_plot import ABOUT as OVER_ANSWER
from reports.over_answer_plot import over_answer_plots
from reports.page import Content, Made, Pictures, page, reading
from reports.places import ranking_tables, rankings
from reports.plots import palette_of
from reports.present import mean_tables, score_tables
from reports.protection import protection_tables
from reports.samples import samples_table
from reports.sequential import looks_of
from reports.style import Palette
from reports.summary import Family, families
from reports.tables import Line, frame, lines
from results.drafts import report_draft
from results.lines import Check, dict_of, is_count, is_number, is_text, list_of, tell, wrong_field
from results.record import Record
from results.store import read_commands, read_costs, read_folder, read_ratings, read_rows, read_verdicts

MANY = 6  # panels of scores, from which on another process draws them
USUAL = ("png", "svg")  # of pictures, unless asked for; PDFs would take two thirds as long again


def write_report(out: Path, formats: Collection[str] = ()) -> list[Path]:
    """Rebuilds every table, plot and page of `out` under `<out>/report`, and gives the paths of the first to be looked at.

    Args:
        formats: of the pictures of scores, USUAL where none is asked for; those that the page holds are PNG in any case.

    Raises:
        StoreError: no rows, rows of another schema, or a folder that cannot be written to.
    """
    rows = read_costs(out)
    records = () if rows and not (out / "rows").is_dir() else tuple(read_rows(out))
    ratings = read_ratings(out)
    found = lines(records, next(iter(ratings.values()), None), looks_of(out))
    averaged, measured = families(found), costs(rows)
    timed = {Label(cost.method, variant=cost.panel.variant) for cost in measured}
    palette, ranked = palette_of(averaged, found, timed), rankings(averaged)
    several = mean_tables([family for family in averaged if len(family.tasks) > 1])
    cost, said = cost_tables(measured, rows), cost_sentences(measured)
    rest = [
        *protection_tables(records),
        *over_answer_table(records),
        *distance_tables(records),
        *by_question_table(records),
        *samples_table(records),
        *length_tables(records),
        *ahead_table(found),
        *lm_eval_table(read_folder(out, "lm_eval"), records),
        *missing_table(records),
    ]
    judged = _judged_by(ratings, read_verdicts(out))
    made = Made(read_commands(out), read_folder(out, "env"), read_folder(out, "data"), judged)
    files = ("scores.html", "scores.md", "scores.csv", "scores.tex", "plots")
    with report_draft(out, files) as draft:
        html, text, table, paper, plotted = (draft / name for name in files)
        plotted.mkdir()
        frame(found).to_csv(table, index=False)
        ranks = ranking_tables(ranked)
        text.write_text(_head(found, averaged, said, judged) + markdown([*several, *ranks, *score_tables(found), *cost, *rest]))
        paper.write_text(latex([*several, *ranks, *score_tables(found), *cost]))
        drawn = Drawn(plotted, palette, formats or USUAL)
        with beside(len(plots.panels(found)) >= MANY, _save, found, averaged, drawn):
            pictures = [
                Pictures("Bits", "entries against bits at equal bytes", ABOUT, bits_maps(found, plotted)),
                Pictures("Over an answer", "mean and peak bytes", OVER_ANSWER, over_answer_plots(records, plotted, palette)),
                *_pictures(out, records, drawn, measured, said),
            ]
            title, tables = f"KV-cache methods: {out.name}", [*cost, *rest]
            shown = (fronts(averaged, measured), ranked, palette, pictures, tables, made)
            html.write_text(page(Content(title, found, averaged, records, *shown)), encoding="utf-8")
    return [out / "report" / name for name in files]


@dataclass(frozen=True)
class Drawn:
    """Where pictures go, and how they look."""

    folder: Path
    palette: Palette
    formats: Collection[str]


def _save(found: Sequence[Line], averaged: Sequence[Family], drawn: Drawn) -> None:
    """The pictures of scores as files: a mean over tasks, and each task."""
    for family in averaged:
        if len(family.tasks) > 1:
            plots.save_family(family, drawn.palette, drawn.folder, drawn.formats)
    for panel in plots.panels(found):
        plots.save_panel(panel, drawn.palette, drawn.folder, drawn.formats)


def _head(found: Sequence[Line], averaged: Sequence[Family], said: Sequence[tuple[str, list[str]]], judged: str) -> str:
    """How to read it, and in short what came out."""
    short = []
    for family in averaged:
        budgets = verdicts(family)
        short += [f"- {family.title}, {family.at.metric}. {sentence(one, budgets)}" for one in budgets]
    short += [f"- {title}, {line}" for title, lines in said for line in lines]
    paragraphs = [*([judged] if judged else []), *reading(found)]
    return "\n".join(["# Scores against bytes", "", *short, "", "\n\n".join(paragraphs), "", ""])


def _pictures(
    out: Path, records: Sequence[Record], drawn: Drawn, measured: Sequence[Cost], said: Sequence[tuple[str, Sequence[str]]]
) -> list[Pictures]:
    heads = [one for one in read_folder(out, "heads") if not _broken("heads", one, HEAD_SCORES)]
    routing = [one for one in read_folder(out, "routing") if not _broken("routing", one, ROUTED)]
    folder = drawn.folder
    needles = [path for path in needle_maps(records, folder, drawn.formats) if path.suffix == ".png"]
    return [
        Pictures("Cost", "milliseconds and memory", COST, cost_pictures(measured, folder, drawn.palette), said=said),
        Pictures("Needles", "by length and depth", NEEDLES, needles),
        Pictures("Heads", "which heads matter", HEADS, [*importance_maps(heads, folder), *kept_maps(records, folder)]),
        Pictures("Routing", "of mixSGA's tokens", ROUTING, routing_pictures(routing, folder), [_text(one) for one in routing]),
    ]


SHARES = list_of(list_of(is_number))
HEAD_SCORES: dict[str, Check] = {
    "variant": is_text,
    "kind": is_text,
    "attempts": is_count,
    "successes": is_count,
    "values": lambda found: SHARES(found) and len({len(line) for line in found}) == 1 and sum(map(sum, found)) > 0,
}
ROUTED: dict[str, Check] = {
    "model": is_text,
    "benchmark": is_text,
    "tokens": is_count,
    "words": list_of(is_text),
    "experts": lambda found: isinstance(found, dict) and all(list_of(list_of(is_count))(one) and one for one in found.values()),
    "shares": lambda found: (
        dict_of(SHARES)(found) and bool(found) and len({len(line) for one in found.values() for line in one}) == 1
    ),
}


def _broken(folder: str, one: Mapping[str, Any], checks: Mapping[str, Check]) -> bool:
    """Is there something wrong with an artefact? It is told."""
    wrong = wrong_field(one, checks, list(checks))
    if wrong is None and "experts" in one and "expert_choice" not in one["experts"]:
        wrong = "no experts of expert_choice"
    if wrong:
        tell(f"{folder}/{one['id']}.json: {wrong}")
    return wrong is not None


def _text(routing: Mapping[str, Any]) -> dict[str, Any]:
    """A text with the expert of each token, in the last layer of the prefill."""
    layers = routing["experts"]["expert_choice"]
    title = f"{routing['model']}, layer {len(layers) - 1}, expert choice"
    return {"title": title, "tokens": list(zip(routing["words"], layers[-1], strict=False))}


NEEDLES = "How much of a needle's words was found, by the length of the text and the depth of the needle."
HEADS = (
    "Head scores that were given to HeadKV, and how many entries each query head read on one prompt: methods that share a budget "
    "unevenly differ from head to head."
)
ROUTING = "Where a mixSGA variant sends its tokens: the shares of its experts by layer, and one text marked token by token."


COST = (
    "What an answer costs, measured cell by cell in processes of their own: milliseconds a token with their floor, and peaks of "
    "memory while decoding and before the first token. Then, by arithmetic and counted rows, the bytes of keys and values over "
    "the time of an answer."
)


def _judged_by(ratings: dict[str, dict[str, float]], verdicts: dict[str, Counter[str]]) -> str:
    """Who judged, and how often without a rating. Of several judges the first one's are shown: they are not on one scale."""
    if not ratings:
        return ""
    shown, *others = ratings
    more = f" Ratings of {', '.join(others)} are stored, but not shown." if others else ""
    without = ", ".join(f"{count} {status}" for status, count in sorted(verdicts[shown].items()) if status != "ok")
    missing = f", and {without}, which are no ratings" if without else ""
    return f"Ratings from 1 to 10 are those of {shown}, of {len(ratings[shown])} answers{missing}.{more}"
