"""The picture of what averaging each token's heads does to the perplexity."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from reports.formats import for_spreadsheets, literal


def token_picture(words: Sequence[str], changes: Sequence[float], plain: float, title: str, out: Path) -> list[Path]:
    """Writes `<out>.csv` and `<out>.png`: a bar a token, in their order."""
    out.parent.mkdir(parents=True, exist_ok=True)
    table, picture = out.with_suffix(".csv"), out.with_suffix(".png")
    with table.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("place", "token", "perplexity_change"))
        writer.writerows(
            (place, for_spreadsheets(word), f"{change:.6g}")
            for place, (word, change) in enumerate(zip(words, changes, strict=True))
        )
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    axis.bar(range(len(changes)), changes, width=1.0, color="#0072B2")
    title = f"{title}: perplexity {plain:.3g} as it is"
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="place in the sequence", ylabel="change of perplexity", title=literal(title))
    axis.margins(x=0)
    for place in sorted(range(len(changes)), key=lambda place: -changes[place])[:5]:
        axis.annotate(literal(words[place].strip() or "␣"), (place, changes[place]), fontsize=7, ha="center", va="bottom")
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    return [table, picture]
