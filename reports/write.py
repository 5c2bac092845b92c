"""A report from stored rows alone: no model, no torch."""

from __future__ import annotations

from pathlib import Path

from reports.needles import needle_maps
from reports.plots import plot
from reports.tables import frame, lines, lm_eval, markdown, not_measured
from results.store import StoreError, read_lm_eval, read_ratings, read_rows


def write_report(out: Path) -> list[Path]:
    """Rebuilds every table and plot of `out` under `<out>/report`, and gives their paths.

    Raises:
        StoreError: no rows, rows of another schema, or a folder that cannot be written to.
    """
    records = read_rows(out)
    ratings = read_ratings(out)
    found = lines(records, next(iter(ratings.values()), None))
    folder = out / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table, text = folder / "scores.csv", folder / "scores.md"
        frame(found).to_csv(table, index=False)
        text.write_text(INTRODUCTION + _judged_by(ratings) + markdown(found) + lm_eval(read_lm_eval(out)) + not_measured(records))
        return [text, table, *plot(found, folder), *needle_maps(records, folder)]
    except OSError as error:
        raise StoreError(f"cannot write the report to {folder}: {error.strerror}") from None


def _judged_by(ratings: dict[str, dict[str, float]]) -> str:
    """Who judged. Of several judges the first one's ratings are shown: they are not on one scale."""
    if not ratings:
        return ""
    shown, *others = ratings
    more = f" Ratings of {', '.join(others)} are stored, but not shown." if others else ""
    return f"Ratings from 1 to 10 are those of {shown}, of {len(ratings[shown])} answers.{more}\n\n"


INTRODUCTION = """# Scores against bytes

Bytes kept and allocated are measured in the cache right after compaction, as a share of the unconverted model's full cache of
the same prompt. Intervals are of 95 %: bootstraps over examples, Wilson's for shares of right answers. "Against full" is the
paired difference to the full cache on the same examples; a star marks an interval that excludes 0, of at least six examples.
For `nll` lower is better, for every other score higher. KL and top token compare the cell with the full cache while both are fed
the full cache's answer. `-`: nothing was measured.

"""
