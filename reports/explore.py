"""The interactive plot of a page: its numbers as data, and the code of BokehJS, both inside the page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reports.keys import Protocol
from reports.plots import FIELDS, FULL, Panel
from reports.statistics import Estimate
from reports.style import Palette, in_order, kind_of
from reports.summary import Family, Overall
from reports.tables import Line

HERE = Path(__file__).parent
SCRIPTS = ("bokeh.min.js", "bokeh-api.min.js")
DIGITS = 4


def bokeh_folder() -> Path:
    """Where BokehJS lies in its package, which need not be imported for that.

    Raises:
        FileNotFoundError: the package is not there, or lays its files out otherwise.
    """
    spec = importlib.util.find_spec("bokeh")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("bokeh is not installed")
    return Path(spec.origin).parent / "server" / "static" / "js"


def library() -> Markup:
    """BokehJS (BSD 3-Clause, its notice inside), as text that a page holds and runs once the plot is opened."""
    code = "\n".join((bokeh_folder() / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return Markup(code.replace("</script", "<\\/script"))


def explored(panels: Sequence[Panel], families: Sequence[Family], palette: Palette) -> Markup:
    """Every number of the plot as JSON: views (a task, or the mean over tasks), labels, and points of those."""
    labels = in_order(line.label for panel in panels for line in panel.lines if line.byte_share is not None)
    numbers = {label: number for number, label in enumerate(labels)}
    views = [_mean_view(family, numbers) for family in families if len(family.tasks) > 1]
    views += [_view(panel, numbers) for panel in panels]
    shown = []
    for label in labels:
        style = palette.of_label(label)
        shown.append({"name": str(label), "kind": kind_of(label), "full": label == FULL, "whole": label.is_full}
                     | {"colour": style.colour, "marker": style.marker})  # fmt: skip
    text = json.dumps({"labels": shown, "views": views}, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _view(panel: Panel, numbers: dict[Any, int]) -> dict[str, Any]:
    named = dict(panel.fields)
    asked = {"model": panel.at.model, "task": _task(panel), "protocol": _protocol(panel.at.protocol)}
    points = [_point(line, numbers) for line in panel.lines if line.byte_share]
    lower = any(line.lower_is_better for line in panel.lines)
    return asked | {"fields": [[name, named[name]] for name, _ in FIELDS if name in named], "lower": lower, "points": points}


def _mean_view(family: Family, numbers: dict[Any, int]) -> dict[str, Any]:
    told = f" ({family.at.told})" if family.at.told else ""
    task = f"mean of {len(family.tasks)} tasks ({family.at.metric}){told}"
    asked = {"model": family.at.model, "task": task, "protocol": _protocol(family.at.protocol)}
    points = [_mean_point(cell, numbers) for cell in family.cells]
    return asked | {"fields": [["score", family.at.metric]], "lower": family.lower_is_better, "points": points}


def _task(panel: Panel) -> str:
    cut = panel.at.protocol.truncation
    return f"{panel.at.task}" + (f", at most {cut} tokens" if cut else "")


def _protocol(protocol: Protocol) -> str:
    """But for what may differ from task to task."""
    return f"{protocol.prompt}, {replace(protocol, truncation=None, routing='')}"


def _point(line: Line, numbers: dict[Any, int]) -> list[Any]:
    fields = [_bounds(getattr(line, name)) for name, _ in FIELDS]
    return [
        numbers[line.label],
        line.budget,
        _digits(line.byte_share),
        line.n,
        *fields,
        _bounds(line.score_difference),
        line.differs,
    ]


def _mean_point(cell: Overall, numbers: dict[Any, int]) -> list[Any]:
    fields = [_bounds(cell.score), None, None]
    return [numbers[cell.label], cell.budget, _digits(cell.byte_share), cell.score.n, *fields, None, False]


def _bounds(value: Estimate | None) -> list[float] | None:
    return None if value is None else [_digits(value.mean), _digits(value.low), _digits(value.high)]


def _digits(value: float | None) -> float:
    return float(f"{value or 0.0:.{DIGITS}g}")
