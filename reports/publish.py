"""A folder to be put on the web as it is: a leaderboard over several runs, each run's report, and all rows as one parquet file.

It is a results folder too: `report --out FOLDER` makes its report, and `publish` takes it beside other folders, so that others
can merge their rows with it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.answers import at_share, sentence, verdicts
from reports.cost import costs
from reports.front import first_shown
from reports.leaderboard import ABOUT, Board, behind
from reports.page import HERE, shown_table
from reports.sequential import read_watched, write_watched
from reports.summary import Family, families
from reports.tables import lines
from reports.write import write_report
from results.lines import tell
from results.published import PARQUET, merged, write_parquet
from results.record import Record
from results.store import StoreError, cannot, own_name, read_costs, read_folder, read_rows

CARD = "README.md"
OURS = ("index.html", CARD, PARQUET, "runs", "env", "data", "precision", "cost", ".nojekyll")


@dataclass(frozen=True)
class Run:
    name: str
    out: Path
    records: Sequence[Record]


def publish(folders: Sequence[Path], to: Path) -> list[Path]:
    """Writes the folder, and gives what is to be looked at first.

    Raises:
        StoreError: a folder without rows, or `to` is no place for it.
    """
    runs = [Run(name, out, read_rows(out)) for name, out in zip(_names(folders), folders, strict=True)]
    if any(to.resolve() == out.resolve() for out in folders):
        raise StoreError(f"--to {to} is one of the folders that are published: name another one")
    if to.exists() and any(path.name not in (*OURS, "report") for path in to.iterdir()):
        raise StoreError(f"--to {to} holds other files than a published folder does: name an empty one")
    records = merged(run.records for run in runs)
    try:
        for old in OURS:
            shutil.rmtree(to / old, ignore_errors=True)
        (to / "runs").mkdir(parents=True)
        (to / ".nojekyll").touch()  # GitHub Pages takes the files as they are
        write_parquet(records, to / PARQUET)
        for run in runs:
            _copy(run, to)
        found = sorted(families(lines(records, looks=_looks(runs))), key=first_shown)
        (to / "index.html").write_text(_index(runs, found), encoding="utf-8")
        (to / CARD).write_text(card(runs, records), encoding="utf-8")
    except OSError as error:
        raise cannot(f"write to {to}", error, "choose another folder with --to") from None
    return [to / "index.html", to / PARQUET, to / CARD]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own, told apart where several share one."""
    plain = [own_name(out.resolve().name) for out in folders]
    counts = Counter(plain)
    return [name if counts[name] == 1 else f"{name}-{number}" for number, name in enumerate(plain, 1)]


def _looks(runs: Sequence[Run]) -> dict[tuple[str, str], int]:
    """The numbers of examples at which any of the runs looked, all counted."""
    sizes: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        for one in read_watched(run.out):
            sizes.setdefault((one.model, one.benchmark), set()).update(one.sizes)
    return {where: len(found) for where, found in sizes.items()}


def _copy(run: Run, to: Path) -> None:
    """The run's report, and what belongs to its rows. Files of one name are the same in every run: they are named by content."""
    report = run.out / "report" / "scores.html"
    if not report.is_file() or report.stat().st_mtime < max(_changed(run.out), default=0.0):
        write_report(run.out)
    (to / "runs" / run.name).mkdir(exist_ok=True)
    shutil.copy2(report, to / "runs" / run.name / "scores.html")
    for part in ("env", "data"):
        for path in sorted((run.out / part).glob("*.json")):
            (to / part).mkdir(exist_ok=True)
            shutil.copy2(path, to / part / path.name)
    write_watched(to, [one for one in read_watched(run.out) if one.sizes])
    if (run.out / "cost" / "rows.jsonl").is_file():
        (to / "cost").mkdir(exist_ok=True)
        held = to / "cost" / "rows.jsonl"
        known = set(held.read_text(encoding="utf-8").splitlines()) if held.exists() else set()
        new = [line for line in (run.out / "cost" / "rows.jsonl").read_text(encoding="utf-8").splitlines() if line not in known]
        with held.open("a", encoding="utf-8") as handle:
            handle.writelines(f"{line}\n" for line in new)


def _changed(out: Path) -> list[float]:
    """When what a report is made of was written."""
    return [
        path.stat().st_mtime
        for path in (*(out / "rows").glob("*.jsonl"), out / "cost" / "rows.jsonl", out / PARQUET)
        if path.is_file()
    ]


def _index(runs: Sequence[Run], found: Sequence[Family]) -> str:
    measured = costs([row for run in runs for row in read_costs(run.out)])
    environments = {one["id"]: one for run in runs for one in read_folder(run.out, "env")}
    board = Board(found, measured, behind({run.name: run.records for run in runs}), environments).tables()
    if not board:
        tell("no two methods were measured at one budget: the leaderboard is empty")
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("leaderboard.html.j2").render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        said=[(family.title, sentence(one)) for family in found if (one := at_share(verdicts(family)))],
        runs=[(run.name, f"runs/{run.name}/scores.html", len(run.records)) for run in runs],
        about=ABOUT,
        tables=[shown_table(table, 2) for table in board],
        parquet=PARQUET,
        card=CARD,
    )


def card(runs: Sequence[Run], records: Sequence[Record]) -> str:
    """The data card: what the rows are, in the form that data-set hubs read."""
    models = sorted({record.key.model for record in records})
    tasks = sorted({record.key.benchmark for record in records})
    methods = sorted({record.key.method for record in records})
    counts = Counter(record.status for record in records)
    size = next(name for name, most in SIZES if len(records) < most)
    data = [one for run in runs for one in read_folder(run.out, "data")]
    licences = sorted({f"{one.get('source', '?')}: {one.get('licence', 'not told')}" for one in data})
    status = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
    return CARD_TEXT.format(
        size=size,
        parquet=PARQUET,
        rows=f"{len(records):,}",
        status=status,
        runs=", ".join(run.name for run in runs),
        models="\n".join(f"- `{name}`" for name in models),
        tasks="\n".join(f"- `{name}`" for name in tasks),
        methods="\n".join(f"- `{name}`" for name in methods),
        data="\n".join(f"- {line}" for line in licences) or "- none: every example was generated",
    )


SIZES = (("n<1K", 1e3), ("1K<n<10K", 1e4), ("10K<n<100K", 1e5), ("100K<n<1M", 1e6), ("n>1M", float("inf")))
CARD_TEXT = """---
pretty_name: KV-cache methods at equal bytes
size_categories:
- {size}
tags:
- kv-cache
- benchmark
configs:
- config_name: rows
  data_files: {parquet}
---

# KV-cache methods at equal bytes: rows

{rows} rows ({status}) of the runs {runs}. One row is one cell: one model, example, protocol, method and budget.

Columns: what was asked (`model`, `revision`, `benchmark`, `example`, `method`, `params`, `budget`, `prompt`, ...; together
the row's identity, whose hash is `id`), what came out (`status`, `reason`, `answer`, counts of entries and bytes), a column
for each metric, `fidelity.*` (against the full cache), `example.*` (length, depth, ...), and `row`, the whole row as JSON.
`env` names a file of `env/` with device and versions. Bytes are counted in the cache after compaction; `bytes_full` is the
unconverted model's full cache.

Rows of different protocols (`prompt`, `chat`, `granularity`, `stop`, `dtype`, ...) do not belong into one ranking. Of equal
keys only one row is here. A failed or skipped cell is a row with its reason.

To merge it with rows of your own: `python run_all.py publish --out THIS_FOLDER --out YOURS --to NEW`.

## Models

{models}

## Tasks

{tasks}

## Methods

{methods}

## Data that the tasks read, with licences

{data}
"""
