"""The report as one HTML file: it opens from the disk, asks no network for anything, and fits a phone and paper."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from reports import plots
from reports.bits import is_packed
from reports.explore import explored, library
from reports.formats import Table, TableCell, words
from reports.front import Front, first_shown
from reports.keys import PanelKey
from reports.names import named
from reports.places import ABOUT as ABOUT_RANKS
from reports.places import Ranking, ranking_figure, ranking_tables
from reports.present import PATH_ONLY, byte_table, mean_tables, score_tables
from reports.statistics import level_of
from reports.style import Palette
from reports.summary import Family
from reports.tables import Line
from results.record import Record

HERE = Path(__file__).parent
ANSWERED = 3  # examples of a benchmark whose answers are shown side by side
SHOWN = 240  # characters of an answer

NOTHING = "No score was measured, so there is nothing to choose from: what was skipped or failed is told below with its reason."
READING = (
    "Bytes kept and allocated are measured in the cache right after compaction, as a share of the unconverted model's full cache "
    "of the same prompt: a variant's bytes and an evicting method's are on one scale. Allocated counts whole storages: "
    "positions, slack, and room for the tokens to come.",
    "Intervals are of 95 %: bootstraps over examples, Wilson's for shares of right answers; those of means over tasks are "
    "recovered from the tasks' (Zou and Donner). `Against full` is the paired "
    "difference to the full cache on the same examples; a star marks one that is significant at 0.05 by Holm's correction over "
    "the methods at the same budget.",
    "{direction} KL and top token compare a cell with the full cache while both are fed the full cache's answer. `-`: nothing "
    "was measured; it is never 0.",
    "Which method is told apart from which is decided for all pairs at a budget at once: by differences on the same examples, "
    "whose signs are flipped example by example, and by the largest of all pairs (Westfall and Young's step-down). Equal methods "
    "are told apart with a chance of at most 5%, whichever is looked at, the best one included. Not shown to be worse does not "
    "mean equal.",
    "question_in: the prompt is read with its question, then compressed. question_after: the context alone is read and "
    "compressed, then the question is asked (query-agnostic). first_question, turns, turns_after: see `Many questions, one "
    "context`. Protocols are never ranked together.",
)


STOPPED = (
    "Examples of some tasks were added until their intervals were narrow enough, with up to {looks} looks at them. Whichever "
    "look ended that, 95 % hold: intervals are of {level:.2%} at each look, and tests are corrected for looks too (Bonferroni)."
)
FEWER_BITS = (
    "Caches of fewer bits (`int4`, `snapkv+int4`) are counted with their scales and with what stays in 16 bits, as a share "
    "of the full cache in 16 bits, which is what is deployed, whatever type was computed in. A budget is the same share of the "
    "bytes for all: behind a storage it holds more entries."
)


def reading(found: Sequence[Line]) -> list[str]:
    """How the numbers are to be read."""
    lower = sorted({line.metric for line in found if line.metric and line.lower_is_better})
    direction = (
        f"For {' and '.join(lower)} lower is better, for every other score higher." if lower else "Higher scores are better."
    )
    looks = max((line.looks for line in found), default=1)
    stopped = [STOPPED.format(looks=looks, level=level_of(looks))] if looks > 1 else []
    packed = [FEWER_BITS] if any(is_packed(line.at) for line in found) else []
    return [*(text.format(direction=direction) for text in READING), *packed, *stopped]


@dataclass(frozen=True)
class Pictures:
    """A section of images, and texts whose tokens are marked by their expert."""

    title: str
    hint: str  # in a few words
    about: str
    paths: Sequence[Path]
    texts: Sequence[Mapping[str, Any]] = field(default=())
    said: Sequence[tuple[str, Sequence[str]]] = field(default=())  # what it comes to: a title and lines

    @property
    def anchor(self) -> str:
        return _anchor(self.title)

    @property
    def images(self) -> list[dict[str, str]]:
        return [{"src": _data(path), "alt": path.stem.replace("_", " ")} for path in self.paths]


@dataclass(frozen=True)
class Made:
    """How the rows came about."""

    commands: Sequence[Mapping[str, Any]] = ()
    environments: Sequence[Mapping[str, Any]] = ()
    data: Sequence[Mapping[str, Any]] = ()
    judge: str = ""  # who judged, in words


@dataclass(frozen=True)
class Content:
    """What a page is made of."""

    title: str
    found: Sequence[Line]
    families: Sequence[Family]
    records: Sequence[Record]
    fronts: Sequence[Front]
    ranks: Sequence[Ranking]
    palette: Palette
    pictures: Sequence[Pictures]
    tables: Sequence[Table]
    made: Made


def page(content: Content) -> str:
    """The whole page as text."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    shown = plots.panels(content.found)
    several = [family for family in content.families if len(family.tasks) > 1]
    tables = [*([_bytes(content.found)] if content.found else []), *content.tables]
    titles = dict.fromkeys(map(_section_of, tables))
    sections = [_section(title, [table for table in tables if _section_of(table) == title]) for title in titles]
    if answers := answer_tables(content.records):
        sections.append(_section("Answers", answers, ANSWERS))
    pictured = [one for one in content.pictures if one.paths]
    drawn = any(line.byte_share and (line.score or line.kl) for line in content.found)
    contents = [("Explore", "explore")] * drawn + [("Ranks", "ranks")] * bool(content.ranks)
    contents += [("Means", "means")] * bool(several) + [("Tasks", "tasks")] * bool(shown)
    contents += [(one.title, one.anchor) for one in pictured] + [(one["title"], one["anchor"]) for one in sections]
    return environment.get_template("page.html.j2").render(
        title=content.title,
        subtitle=_subtitle(content.records),
        contents=[*contents, ("How to read it", "reading"), ("How it was made", "made")],
        css=_own("page.css"),
        script=_own("page.js") + (_own("explore.js") if drawn else ""),
        fronts=[_front(front, content.palette, number) for number, front in enumerate(content.fronts)],
        nothing=NOTHING if content.records else "Costs only: no answers are stored here.",
        explored=_explored(shown, content) if drawn else "",
        library=library() if drawn else "",
        about_ranks=ABOUT_RANKS,
        ranks=_ranks(content.ranks, content.palette),
        means=mean_tables(several),
        panels=[_panel(panel, content.found) for panel in shown],
        pictures=pictured,
        sections=sections,
        commands=content.made.commands,
        environments=[json.dumps(one, indent=1) for one in content.made.environments],
        data=[json.dumps({k: v for k, v in one.items() if k != "id"}) for one in content.made.data],
        reading=[*reading(content.found), *([content.made.judge] if content.made.judge else [])],
        show=shown_table,
    )


def _count(things: Collection[str], what: str) -> str:
    return f"{len(things)} {what}{'s' * (len(things) != 1)}"


def _explored(shown: Sequence[plots.Panel], content: Content) -> Markup:
    """In the order of the first screen."""
    panels = sorted((panel for panel in shown if panel.fields), key=lambda panel: panel.at.protocol.prompt != "question_in")
    return explored(panels, sorted(content.families, key=first_shown), content.palette)


def _own(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _front(front: Front, palette: Palette, number: int) -> dict[str, Any]:
    parts = {name: getattr(front, name) for name in ("title", "metric", "sentences", "table", "caption", "note")}
    return parts | {"svg": Markup(plots.inline(front.picture, palette, number))}


def _ranks(found: Sequence[Ranking], palette: Palette) -> list[tuple[str, Markup, Table]]:
    figures = (ranking_figure(ranking, palette) for ranking in found)
    drawn = [Markup(plots.as_svg(figure, {}, 1000 + number)) for number, figure in enumerate(figures)]
    return [
        (one.title, svg, replace(table, title="")) for one, svg, table in zip(found, drawn, ranking_tables(found), strict=True)
    ]


def _bytes(found: Sequence[Line]) -> Table:
    return replace(byte_table(_of_first_panel(found)), section="Bytes", notes=(BYTES,))


BYTES = "What each budget meant on the first task: whole entries asked for and kept, and what their memory took."
ANSWERS = f"The first {ANSWERED} examples of each task, as they were answered; long answers are cut."


def _subtitle(records: Sequence[Record]) -> str:
    models = sorted({at.model for at in named(records)})
    benchmarks = {record.key.benchmark for record in records}
    methods = {record.key.method for record in records}
    if not records:
        return "Costs only: no answers are stored here."
    counts = f"{len(records):,} cells: {_count(methods, 'method')} on {_count(benchmarks, 'task')}"
    return f"{', '.join(models)}. {counts}."


def _panel(panel: plots.Panel, found: Sequence[Line]) -> dict[str, Any]:
    tables = [replace(table, title="") for table in score_tables(panel.lines, found)]
    return {"title": panel.at.title, "note": PATH_ONLY if panel.lines[0].path_only else "", "tables": tables}


def _of_first_panel(found: Sequence[Line]) -> list[Line]:
    return [line for line in found if line.panel == found[0].panel] if found else []


def answer_tables(records: Sequence[Record]) -> list[Table]:
    """The first examples of each benchmark and protocol, method by method and budget by budget."""
    grouped: dict[PanelKey, list[tuple[Record, str]]] = {}
    for record, at in zip(records, named(records), strict=True):
        if record.answer and record.key.example < ANSWERED and record.stop_reason != "forced":
            grouped.setdefault(replace(at.panel, task=replace(at.task, length=None)), []).append((record, at.label.name))
    return [_answers(where, grouped[where]) for where in sorted(grouped, key=lambda where: where.order)]


def _answers(where: PanelKey, found: Sequence[tuple[Record, str]]) -> Table:
    """found: each with the name of its method."""
    rows = []
    ordered = sorted(found, key=lambda one: (one[0].key.example, one[0].key.seed, one[0].key.method, one[1], one[0].key.budget))
    for record, method in ordered:
        score = next(iter(record.metrics.values()), None)
        number = TableCell("-", -math.inf) if score is None else TableCell(f"{score:.3g}", score)
        asked = (TableCell(str(record.key.example), record.key.example), *words(method, record.key.budget or "-"))
        text = record.answer or ""
        rows.append((*asked, number, TableCell(text if len(text) <= SHOWN else f"{text[:SHOWN]} ...")))
    return Table(where.title, ("example", "method", "budget", "score", "answer"), tuple(rows), (str(where.protocol),))


def _section_of(table: Table) -> str:
    return table.section or table.title


def _section(title: str, tables: Sequence[Table], about: str = "") -> dict[str, Any]:
    return {"title": title, "anchor": _anchor(title), "about": about, "tables": tables, "folded": len(tables) > 3}


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")


def shown_table(table: Table, level: int = 3, notes_stand: str = "before") -> Markup:
    """Every text escaped; what a column is sorted by as `data-value`."""
    head = "".join(f'<th><button type="button">{escape(text)}</button></th>' for text in table.header)
    rows = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows)
    notes = "".join(f'<p class="fine">{escape(note)}</p>' for note in table.notes)
    title = f"<h{level}>{escape(table.title)}</h{level}>" if table.title else ""
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return Markup(f"{title}{body}{notes}" if notes_stand == "after" else f"{title}{notes}{body}")


def _cell(cell: TableCell) -> str:
    kinds = [kind for kind, holds in (("best", cell.best), ("words", cell.value is None), ("long", len(cell.text) > 60)) if holds]
    marks = f' class="{" ".join(kinds)}"' if kinds else ""
    value = "" if cell.value is None else f' data-value="{_number(cell.value)}"'
    text = str(escape(cell.text)).replace("(", "<wbr>(") if cell.value is None else escape(cell.text)
    return f"<td{marks}{value}>{text}</td>"


def _number(value: float) -> str:
    return f"{value:.12g}".replace("inf", "Infinity")


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def simple_page(title: str, about: str, tables: Sequence[Table]) -> str:
    """Tables alone, in the same manner."""
    shown = "".join(str(shown_table(table)) for table in tables)
    css, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{view}<link rel="icon" href="data:,">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{css}</style></head><body>'
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header><main>{shown}</main>"
        f'<div id="tip" role="status"></div><script>{script}</script></body></html>\n'
    )
