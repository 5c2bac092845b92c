"""Bytes over an answer: the table and the picture beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

from reports.keys import Label
from reports.over_answer import grouped, over_answer_table, shares
from reports.over_answer_plot import _draw, over_answer_plots
from reports.style import Palette
from results.record import Key, Record

FULL = Key(
    *("tiny", "0", "perplexity_own@1", "PerplexityOwn()", "", 0, "full@1", "Full()", "", "question_after", "raw", 512, "kv", ""),
    *("eos", 8, "float32", 0, 0.0, True),
)


def row(method: str, budget: str, start: int, end: int, peak: int | None, mean: float | None, nll: float) -> Record:
    key = replace(FULL, method=f"{method}@1", params="Full()" if method == "full" else f"Eviction({method})", budget=budget)
    counts = {"bytes_kept": start, "bytes_kept_end": end, "bytes_kept_peak": peak, "bytes_kept_mean": mean, "bytes_full": 1000}
    told = {"metrics": {"nll": nll}, "lower_is_better": ["nll"], "stop_reason": "forced", "new_tokens": 8}
    return Record(key, "ok", "env", **counts, **told)  # type: ignore[arg-type]


def test_the_picture_stands_where_a_method_evicts_while_decoding(tmp_path: Path) -> None:
    once = [row("full", "", 1000, 3000, None, None, 2.0), row("snapkv", "128", 500, 2500, None, None, 2.2)]
    assert over_answer_plots(once, tmp_path, Palette.of({})) == [] and over_answer_table(once) == []
    again = [row("snapkv(every=8)", budget, size, size, size + 20, size + 10.0, 2.9 - size / 1000) for budget, size in
             (("128", 500), ("256", 800))]  # fmt: skip
    (picture,) = over_answer_plots([*once, *again], tmp_path, Palette.of({}))
    assert picture.suffix == ".png" and picture.stat().st_size > 10_000
    (table,) = over_answer_table([*once, *again])
    shown = {(str(line[1].text), str(line[2].text)): [cell.text for cell in line[5:7]] for line in table.rows}
    assert shown["snapkv", "128"] == ["75.0%", "83.3%"]  # half way from 500 to 2,500, of 2,000; and of 3,000
    assert shown["snapkv(every=8)", "128"] == ["25.5%", "17.3%"]
    assert len(grouped([*once, *again])) == 4


def test_what_a_storage_packs_is_shared_against_sixteen_bits() -> None:
    full = [row("full", "", 1000, 3000, None, None, 2.0)]
    packed = [replace(row("snapkv(every=8)+int4", "128", 100, 150, 160, 130.0, 2.1), bytes_full=500)]
    assert shares(packed, full) == (130 / 1000, 160 / 1500), "the full cache's 2,000 and 3,000 bytes are of 32 bits"
    assert shares(full, full) == (1.0, 1.0)


def test_a_line_of_one_point_has_a_mark() -> None:
    figure, axis = plt.subplots()
    for name in ("full", "snapkv"):
        _draw(axis, [(0.5, 2.0)], Label(name), Palette.of({}).of_label(Label(name)), dashed=False)
    assert all(line.get_marker() not in ("", "None", None) for line in axis.lines) and len(axis.lines) == 2
    plt.close(figure)
