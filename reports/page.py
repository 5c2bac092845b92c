"""The report as one HTML file: it opens from the disk, asks no network for anything, and fits a phone and paper."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from reports import plots
from reports.bits import is_packed
from reports.formats import Table, TableCell, words
from reports.keys import PanelKey
from reports.names import named
from reports.present import PATH_ONLY, byte_table, mean_tables, score_tables
from reports.style import order_of
from reports.summary import Family, sentence, verdicts
from reports.tables import Line
from results.record import Record

HERE = Path(__file__).parent
ANSWERED = 3  # examples of a benchmark whose answers are shown side by side
SHOWN = 240  # characters of an answer

HOW_CHOSEN = (
    "The best is chosen on the examples on which it is then compared, which favours it a little. Comparisons are paired over "
    "examples (sign flips) and corrected by Holm's method over the methods of a line; the level is 0.05. Not shown to differ "
    "does not mean equal: with few examples little can be shown."
)
NOTHING = "No task was measured for two methods or more at one budget, so there is nothing to compare in words."
READING = (
    "Bytes kept and allocated are measured in the cache right after compaction, as a share of the unconverted model's full cache "
    "of the same prompt: a variant's bytes and an evicting method's are on one scale. Allocated counts whole storages: "
    "positions, slack, and room for the tokens to come.",
    "Intervals are of 95 %: bootstraps over examples, Wilson's for shares of right answers. `Against full` is the paired "
    "difference to the full cache on the same examples; a star marks one that is significant at 0.05 by Holm's correction over "
    "the methods at the same budget.",
    "{direction} KL and top token compare a cell with the full cache while both are fed the full cache's answer. `-`: nothing "
    "was measured; it is never 0.",
    "question_in: the prompt is read with its question, then compressed. question_after: the context alone is read and "
    "compressed, then the question is asked. Protocols are never ranked together.",
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
    packed = [FEWER_BITS] if any(is_packed(line.at) for line in found) else []
    return [*(text.format(direction=direction) for text in READING), *packed]


@dataclass(frozen=True)
class Pictures:
    """A section of images, and texts whose tokens are marked by their expert."""

    title: str
    about: str
    paths: Sequence[Path]
    texts: Sequence[Mapping[str, Any]] = field(default=())

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


def page(
    title: str,
    found: Sequence[Line],
    families: Sequence[Family],
    records: Sequence[Record],
    pictures: Sequence[Pictures],
    tables: Sequence[Table],
    made: Made,
    costs: Sequence[tuple[str, list[str]]] = (),
) -> str:
    """The whole page as text. costs: what they come to, in words, with a title each."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    shown = plots.panels(found)
    several = [family for family in families if len(family.tasks) > 1]
    sections = [
        *([_section("Bytes", [byte_table(_of_first_panel(found))], BYTES)] if found else []),
        *(_section(title, [t for t in tables if _section_of(t) == title]) for title in dict.fromkeys(map(_section_of, tables))),
        *([_section("Answers", answers, ANSWERS)] if (answers := answer_tables(records)) else []),
    ]
    pictured = [one for one in pictures if one.paths]
    chosen = [summary for family in families if (summary := _summary(family))]
    contents = [("In short", "short"), *([("Means", "means")] if several else []), *([("Tasks", "tasks")] if shown else [])]
    contents += [(one.title, one.anchor) for one in pictured]
    contents += [(one["title"], one["anchor"]) for one in sections] + [("How it was made", "made")]
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=_subtitle(records),
        contents=contents,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        summary=[
            *chosen,
            *({"title": title, "lines": lines, "note": ""} for title, lines in costs),
        ],
        nothing=NOTHING,
        how_chosen=HOW_CHOSEN if chosen else "",
        means=mean_tables(several),
        panels=[_panel(panel, number) for number, panel in enumerate(shown)],
        legend=_legend(shown),
        pictures=pictured,
        sections=sections,
        commands=made.commands,
        environments=[json.dumps(one, indent=1) for one in made.environments],
        data=[json.dumps({k: v for k, v in one.items() if k != "id"}) for one in made.data],
        reading=[*reading(found), *([made.judge] if made.judge else [])],
        show=_table,
    )


BYTES = "What each budget meant on the first task: whole entries asked for and kept, and what their memory took."
ANSWERS = f"The first {ANSWERED} examples of each task, as they were answered; long answers are cut."


def _subtitle(records: Sequence[Record]) -> str:
    models = sorted({at.model for at in named(records)})
    benchmarks = {record.key.benchmark for record in records}
    methods = {record.key.method for record in records}
    if not records:
        return "Costs only: no answers are stored here."
    counts = f"{len(records):,} cells: {len(methods)} methods on {len(benchmarks)} tasks"
    return f"{', '.join(models)}. {counts}."


def _summary(family: Family) -> dict[str, Any] | None:
    found = verdicts(family)
    if not found:
        return None
    note = PATH_ONLY if family.path_only else ""
    return {"title": f"{family.title}: {family.at.metric}", "lines": [sentence(verdict) for verdict in found], "note": note}


def _panel(panel: plots.Panel, number: int) -> dict[str, Any]:
    return {
        "anchor": f"task-{number}",
        "title": panel.at.title,
        "protocol": str(panel.at.protocol),
        "note": PATH_ONLY if panel.lines[0].path_only else "",
        "plots": [Markup(plots.inline(panel, field, what, 10 * number + n)) for n, (field, what) in enumerate(panel.fields)],
        "tables": [Table(table.title, table.header, table.rows) for table in score_tables(panel.lines)],
    }


def _legend(shown: Sequence[plots.Panel]) -> list[tuple[str, Markup]]:
    labels = sorted({label for panel in shown for label in panel.labels}, key=order_of)
    return [(str(label), Markup(plots.swatch(label))) for label in labels]


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


def _table(table: Table, level: int = 3) -> Markup:
    """Every text escaped; what a column is sorted by as `data-value`."""
    head = "".join(f'<th><button type="button">{escape(text)}</button></th>' for text in table.header)
    rows = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows)
    notes = "".join(f'<p class="fine">{escape(note)}</p>' for note in table.notes)
    title = f"<h{level}>{escape(table.title)}</h{level}>"
    return Markup(f'{title}{notes}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')


def _cell(cell: TableCell) -> str:
    kinds = [kind for kind, holds in (("best", cell.best), ("words", cell.value is None), ("long", len(cell.text) > 60)) if holds]
    marks = f' class="{" ".join(kinds)}"' if kinds else ""
    value = "" if cell.value is None else f' data-value="{_number(cell.value)}"'
    return f"<td{marks}{value}>{escape(cell.text)}</td>"


def _number(value: float) -> str:
    return f"{value:.12g}".replace("inf", "Infinity")


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def simple_page(title: str, about: str, tables: Sequence[Table]) -> str:
    """Tables alone, in the same manner."""
    shown = "".join(str(_table(table)) for table in tables)
    css, script = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{view}<link rel="icon" href="data:,">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{css}</style></head><body>'
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header><main>{shown}</main>"
        f'<div id="tip" role="status"></div><script>{script}</script></body></html>\n'
    )
