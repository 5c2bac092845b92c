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


def words(*texts: str) -> tuple[TableCell, ...]:
    return tuple(TableCell(text) for text in texts)


def markdown(tables: Sequence[Table], level: int = 2) -> str:
    return "\n".join(_markdown(table, level) for table in tables)


def _markdown(table: Table, level: int) -> str:
    lines = [f"{'#' * level} {table.title}", ""]
    for note in table.notes:
        lines += [note, ""]
    lines += [_row(table.header), f"|{'---|' * len(table.header)}"]
    lines += [_row([f"**{cell.text}**" if cell.best else cell.text for cell in row]) for row in table.rows]
    return "\n".join([*lines, ""])


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', '&#124;').replace(chr(10), ' ') for text in texts)} |"


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
        lines.append(f"{' & '.join(shown)} \\\\")
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
