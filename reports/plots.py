"""Pictures of scores and fidelity against the measured bytes: one idea each, panels for methods, variants and storages."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from reports.drawing import LETTERS_AN_INCH, WHOLE, Curve, Picture, Point, Room, draw, shortened
from reports.formats import literal
from reports.keys import Label, PanelKey
from reports.pictures import place
from reports.statistics import Estimate
from reports.style import Palette, in_order
from reports.summary import Family, Overall
from reports.tables import Line

FULL = Label("full")
FORMATS = ("png", "svg", "pdf")
WIDE, HIGH = 3.5, 2.6  # inches of a panel with its names: a column of a paper
LEFT, RIGHT, BELOW, ABOVE = 0.5, 1.45, 0.42, 0.2  # inches around the axes
ACROSS = 2  # panels side by side: the width of a page
FIELDS = (("score", "score"), ("kl", "KL to the full cache, nats"), ("top1", "same top token as full"))
LATER = 0.2  # by how much other settings of a method, and single points, come later where colours are given
NOTHING_SAVED = 4.0  # the same of lines that have the full cache's bytes
DRAWN = ("score", "kl")  # as files; the page tells all three
UNUSED_IDS = r'id="(figure_1|axes_1|matplotlib\.axis_\d+|(patch|text|[xy]tick|line2d|LineCollection)_\d+)"'


@dataclass(frozen=True)
class Panel:
    """The lines of a model and its variants on one benchmark: they are counted in the same bytes."""

    at: PanelKey
    lines: tuple[Line, ...]

    @property
    def labels(self) -> list[Label]:
        return in_order(line.label for line in self.lines if line.byte_share is not None)

    @property
    def fields(self) -> list[tuple[str, str]]:
        """What can be drawn, with what the axis says."""
        metric = next((line.metric for line in self.lines if line.metric), "score")
        drawn = [line for line in self.lines if not line.is_full] or self.lines
        shown = [(field, metric if field == "score" else what) for field, what in FIELDS]
        return [(field, what) for field, what in shown if any(getattr(line, field) for line in drawn)]

    def picture(self, field: str, what: str) -> Picture:
        curves = []
        for label in self.labels:
            mine = [line for line in self.lines if line.label == label and getattr(line, field) and line.byte_share]
            points = [Point(line.byte_share or 0.0, getattr(line, field), tip(line, getattr(line, field))) for line in mine]
            if points and label != FULL and not (label.is_full and field != "score"):  # which is compared with itself
                curves.append(Curve(label, tuple(sorted(points, key=lambda point: point.share))))
        full = next((line.score for line in self.lines if line.label == FULL), None) if field == "score" else None
        lower = field == "kl" or (field == "score" and any(line.lower_is_better for line in self.lines))
        return Picture(what, tuple(curves), full, log=field == "kl", lower_is_better=lower)


def panels(found: Sequence[Line]) -> list[Panel]:
    grouped: dict[PanelKey, list[Line]] = {}
    for line in found:
        where = PanelKey(line.parent, line.at.task, replace(line.protocol, routing=""))  # both routings: their labels differ
        grouped.setdefault(where, []).append(line)
    made = [Panel(where, tuple(lines)) for where, lines in grouped.items()]
    return sorted(made, key=lambda panel: any(line.lower_is_better for line in panel.lines))  # what is answered comes first


def family_picture(family: Family) -> Picture:
    """Means over tasks."""
    grouped: dict[Label, list[Overall]] = {}
    for cell in family.cells:
        grouped.setdefault(cell.label, []).append(cell)
    curves = [
        Curve(label, tuple(sorted((Point(cell.byte_share, cell.score, tip(cell, cell.score)) for cell in mine), key=_share)))
        for label, mine in grouped.items()
        if label != FULL
    ]
    full = next((cell.score for cell in family.cells if cell.is_full), None)
    tasks = f", mean of {len(family.tasks)} tasks" if len(family.tasks) > 1 else ""
    return Picture(f"{family.at.metric}{tasks}", tuple(curves), full, lower_is_better=family.lower_is_better)


def _share(point: Point) -> float:
    return point.share


def tip(line: Line | Overall, value: Estimate) -> str:
    budget = f" at {line.budget}" if line.budget else ""
    shown = f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"
    return f"{line.label}{budget}: {shown}, {line.byte_share:.1%} of the bytes, n = {value.n}"


def palette_of(families: Sequence[Family], found: Sequence[Line], timed: Collection[Label] = ()) -> Palette:
    """Eight lines in colour for a whole report: those that usually come first, of each kind some; last those that save no bytes.

    Args:
        timed: what only costs are known of; they have what colours are left.
    """
    behind: dict[Label, list[float]] = {}
    for family in families:
        for budget in {cell.budget for cell in family.cells}:
            cells = [cell for cell in family.cells if cell.budget == budget and cell.label != FULL]
            sign = 1.0 if family.lower_is_better else -1.0
            ordered = sorted(cells, key=lambda cell: sign * cell.score.mean)
            for number, cell in enumerate(ordered):
                behind.setdefault(cell.label, []).append(number / len(ordered))
    rest = {line.label: 1.0 for line in found if line.byte_share is not None and line.label != FULL}
    placed = (
        {label: 2.0 for label in timed if label != FULL}
        | rest
        | {label: sum(places) / len(places) for label, places in behind.items()}
    )
    saving = {line.label for line in found if line.byte_share is not None and line.byte_share < WHOLE} | set(timed)
    return Palette.of(
        {
            label: place + LATER * (label.has_settings + 3 * label.is_full) + NOTHING_SAVED * (label not in saving)
            for label, place in placed.items()
        }
    )


@contextmanager
def quiet_svg(salt: str) -> Iterator[None]:
    """Text stays text, and the same figure has the same bytes."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "pdf.fonttype": 42}):
        yield


def save(picture: Picture, title: str, name: tuple[str, str], palette: Palette, to: tuple[Path, Collection[str]]) -> list[Path]:
    """One figure, a panel a kind; its files.

    Args:
        name: of the files, and a mark that comes behind it in any case; to: folder and formats.
    """
    if not to[1] or (not picture.curves and picture.full is None):
        return []
    kinds = picture.kinds or [""]
    across = min(ACROSS, len(kinds))
    wide, high = WIDE * across, HIGH * -(-len(kinds) // across) + 0.25
    figure = Figure(figsize=(wide, high))
    for number, kind in enumerate(kinds):
        left, top = WIDE * (number % across), 0.25 + HIGH * (number // across)
        room = Room(WIDE - LEFT - RIGHT, HIGH - BELOW - ABOVE)
        box = (left + LEFT) / wide, 1 - (top + HIGH - BELOW) / high, room.wide / wide, room.high / high
        axis = figure.add_axes(box)
        draw(axis, picture, [kind], palette, room)
        if len(kinds) > 1:
            axis.set_title(kind, fontsize=7.5, loc="left", pad=3)
    figure.suptitle(literal(shortened(title, int(LETTERS_AN_INCH * wide))), fontsize=8, y=1 - 0.05 / high)
    paths = []
    for ending in to[1]:
        path = place(to[0], name[0], f".{ending}", name[1])
        about = {"svg": {"Date": None}, "pdf": {"CreationDate": None, "ModDate": None}}.get(ending)
        with quiet_svg("bytes"):
            figure.savefig(path, dpi=200, metadata=about)
        paths.append(path)
    return paths


def save_panel(panel: Panel, palette: Palette, folder: Path, formats: Collection[str]) -> list[Path]:
    """A panel's pictures, one each for the score and KL."""
    paths = []
    for field, what in panel.fields:
        if field in DRAWN:
            name = f"{field}_{panel.at.model}_{panel.at.task}_{panel.at.protocol.prompt}"
            mark = f"_{panel.at.protocol.short}"
            paths += save(panel.picture(field, what), panel.at.title, (name, mark), palette, (folder, formats))
    return paths


def save_family(family: Family, palette: Palette, folder: Path, formats: Collection[str]) -> list[Path]:
    """The picture of the means over tasks."""
    name = f"mean_{family.at.metric}_{family.at.model}_{family.at.protocol.prompt}_{family.at.told}".rstrip("_")
    mark = f"_{family.at.protocol.short}"
    return save(family_picture(family), family.title, (name, mark), palette, (folder, formats))


def inline(picture: Picture, palette: Palette, number: int) -> str:
    """All kinds on one axis as SVG for a page, with letters for a phone: every point says what it is in `data-tip`."""
    wide, high = 4.7, 3.4
    figure = Figure(figsize=(wide, high))
    room = Room(wide - 0.62 - 1.85, high - 0.5 - 0.12, size=8.5)
    axis = figure.add_axes((0.62 / wide, 0.5 / high, room.wide / wide, room.high / high))
    tips = draw(axis, picture, picture.kinds, palette, room)
    return as_svg(figure, tips, number)


def as_svg(figure: Figure, tips: Mapping[str, Sequence[str]], number: int) -> str:
    """For a page, whose other pictures have other numbers."""
    held = io.StringIO()
    with quiet_svg(f"page {number}"):
        figure.savefig(held, format="svg", metadata={"Date": None})
    return _with_tips(held.getvalue(), tips, number)


def _with_tips(svg: str, tips: Mapping[str, Sequence[str]], number: int) -> str:
    """Without what only a file of its own needs; the k-th mark of a group gets the k-th text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(UNUSED_IDS, "", svg)
    for group, texts in tips.items():
        at = svg.index(f'id="{group}"')
        end = svg.index("</g>", at)
        marks = iter(texts)
        body = re.sub("<use ", lambda _, marks=marks: f'<use data-tip="{_attribute(next(marks))}" ', svg[at:end])  # type: ignore[misc]
        svg = svg[:at] + body + svg[end:]
    return svg.replace('id="tips', f'id="p{number}tips')


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
