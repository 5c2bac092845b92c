"""One table, several forms: Markdown, LaTeX, and (by its template) the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TableCell:
    """What is shown, and what it is sorted by."""

    text: str
    value: float | None = None  # None: sorted by its text
    best: bool = False  # of its column or row


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    notes: tuple[str, ...] = ()  # before the table
    label: str = ""  # a short name, for references
    section: str = ""  # of a page, which several tables share; "": its own, of the table's title


def literal(text: str) -> str:
    """For a picture: a dollar begins no formula, and a name with a leading underscore is not left out of a legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def for_spreadsheets(text: str) -> str:
    """For a CSV: what a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def words(*texts: str) -> tuple[TableCell, ...]:
    return tuple(TableCell(text) for text in texts)


def markdown(tables: Sequence[Table], level: int = 2) -> str:
    return "\n".join(_markdown(table, level) for table in tables)


def _markdown(table: Table, level: int) -> str:
    lines = [f"{'#' * level} {_plain(table.title)}", ""]
    for note in table.notes:
        lines += [_plain(note), ""]
    lines += [_row(table.header), f"|{'---|' * len(table.header)}"]
    lines += [_row([f"**{cell.text}**" if cell.best else cell.text for cell in row]) for row in table.rows]
    return "\n".join([*lines, ""])


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(text).replace('|', '&#124;') for text in texts)} |"


def _plain(text: str) -> str:
    """For Markdown: on one line, and no tag of HTML."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.splitlines()))


def latex(tables: Sequence[Table]) -> str:
    """`table` environments with booktabs' rules, to be \\input."""
    return "% needs \\usepackage{booktabs}\n\n" + "\n".join(_latex(table) for table in tables)


def _latex(table: Table) -> str:
    columns = "l" + "r" * (len(table.header) - 1)
    lines = ["\\begin{table}", "\\centering", f"\\caption{{{escaped(' '.join((table.title + '.', *table.notes)))}}}"]
    lines += [f"\\label{{tab:{re.sub(r'[^a-z0-9]+', '-', (table.label or table.title).lower()).strip('-')}}}"]
    lines += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", f"{' & '.join(map(escaped, table.header))} \\\\", "\\midrule"]
    for row in table.rows:
        shown = [f"\\textbf{{{escaped(cell.text)}}}" if cell.best else escaped(cell.text) for cell in row]
        opened = "{}" if shown[0].startswith(("[", "*")) else ""  # an argument of the line before
        lines.append(f"{opened}{' & '.join(shown)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\n": " ",
}


def escaped(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)
