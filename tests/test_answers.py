"""Which method at a budget, who is a rival, what is drawn in colour, and where names stand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from test_report import KEY, _row, made_rows

from reports.answers import at_share, outdone, sentence, verdicts
from reports.cost import Cost, CostPanel, Way
from reports.drawing import Curve, Picture, Point, shortened, spread
from reports.front import fronts
from reports.keys import Label
from reports.places import ranking_tables, rankings
from reports.plots import family_picture, palette_of, panels
from reports.ranking import all_pairs
from reports.statistics import Estimate
from reports.style import COLOURS, GREY, STORAGES, VARIANTS, Palette, kind_of
from reports.summary import families
from reports.tables import lines
from results.record import Record


def rows_of(right: dict[str, int], share: float = 0.25, budget: str = "25%", **others: float) -> list[Record]:
    """right: of 20 examples how many each method gets right; others: shares of the bytes of those that differ in it."""
    rows = [_row(replace(KEY, example=n), 1.0, 1.0) for n in range(20)]
    for method, count in right.items():
        key = replace(KEY, method=f"{method}@1", budget=budget)
        rows += [_row(replace(key, example=n), float(n < count), others.get(method, share)) for n in range(20)]
    return rows


def test_a_method_with_more_bytes_is_no_rival() -> None:
    rows = rows_of({"a": 12, "b": 10, "c": 8, "paper": 20}, paper=0.4)
    (family,) = families(lines(rows))
    (verdict,) = verdicts(family)
    assert [str(cell.label) for cell in verdict.cells] == ["a", "b", "c"] and verdict.byte_share == 0.25
    (ranking,) = rankings([family])
    assert [str(label) for label in ranking.labels] == ["a", "b", "c"], "nor is it ranked"


def test_a_task_that_the_model_cannot_do_is_not_ranked() -> None:
    rows = rows_of({"a": 12, "b": 10, "random": 8})
    unable = [replace(row, key=replace(row.key, benchmark="hard@1")) for row in rows_of({"a": 0, "b": 20, "random": 20})]
    (family,) = families(lines(rows + unable))
    (ranking,) = rankings([family])
    assert ranking.tasks == 1 and [str(label) for label in ranking.labels] == ["a", "b", "random"]
    assert ranking.left_out == ("hard@1 1024",) and "hard@1" in ranking_tables([ranking])[0].notes[0]
    assert rankings(families(lines(unable))) == [], "nothing is left to rank"


def test_of_equal_means_the_one_closest_to_the_full_cache_is_first() -> None:
    rows = rows_of({"near": 20, "far": 20, "none": 0})
    rows = [replace(row, fidelity={"kl": 0.1 + (row.key.method == "far@1")}) if row.key.budget else row for row in rows]
    (verdict,) = verdicts(families(lines(rows))[0])
    assert [str(cell.label) for cell in verdict.cells] == ["near", "far", "none"]
    assert [verdict.place(number) for number in range(3)] == [(1, 2), (1, 2), (3, 3)]
    assert [str(cell.label) for cell in verdict.beaten] == ["none"] and not verdict.differs_from_full


def test_every_task_counts_alike_in_a_comparison() -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.normal(size=(2, 5)), rng.normal(size=(2, 400))]
    expected = np.mean([task[0].mean() - task[1].mean() for task in tasks])
    assert all_pairs(tasks).differences[0, 1] == pytest.approx(expected)


def test_a_budget_at_which_few_methods_ran_is_not_spoken_of_first() -> None:
    """And where it is spoken of, a method that was not run there and does better with less is named."""
    rows = rows_of({"a": 14, "b": 1}, 0.3, "30%") + rows_of({"a": 4, "b": 2, "c": 15, "d": 1, "e": 0}, 0.1, "10%")
    (family,) = families(lines(rows))
    found = verdicts(family)
    assert [one.budget for one in found] == ["10%", "30%"] and at_share(found) is found[0]
    assert outdone(found[1], found) is found[0] and outdone(found[0], found) is None
    assert "not run here: c, 0.75 [" in sentence(found[1], found) and "not run here" not in sentence(found[0], found)
    (front,) = fronts([family], [])
    assert front.table is not None
    assert [row[1].text for row in front.table.rows] == ["a; not run here: c, 0.75 at 10%", "c"]
    rows = rows_of({"a": 6, "b": 3, "c": 5}, 0.3, "30%") + rows_of({"a": 4, "b": 2, "c": 15}, 0.1, "10%")
    found = verdicts(families(lines(rows))[0])
    assert outdone(found[1], found) is None and at_share(found) is found[1], "it was run there, and did worse"


def test_a_real_model_is_shown_before_the_embedded_one() -> None:
    rows = rows_of({"a": 12, "b": 3, "c": 2})
    real = [replace(row, key=replace(row.key, model="real")) for row in rows_of({"a": 12})]
    shown = [front.title.split(",")[0] for front in fronts(families(lines(rows + real)), [])]
    assert shown == ["real", "reference"], "though fewer methods ran on it"


def test_the_budget_nearest_to_a_quarter_is_spoken_of_and_its_times_are_told() -> None:
    rows = rows_of({"a": 20, "b": 3}) + rows_of({"a": 9, "b": 1}, 0.05, "5%")
    (family,) = families(lines(rows))
    found = verdicts(family)
    assert [one.budget for one in found] == ["5%", "25%"] and at_share(found).budget == "25%"  # type: ignore[union-attr]
    panel = CostPanel("other", "float32", "cpu", 1, "env")
    timed = [Cost(panel, name, budget, 4096, 1, Way(), ({"token": ms / 1000, "bytes_kept": kept},), None)
             for name, budget, ms, kept in (("full", "", 20, 100), ("a", "10%", 11, 10), ("a", "25%", 12.5, 25))]  # fmt: skip
    (front,) = fronts([family], timed)
    assert front.table is not None
    said = [one.before + one.strong + one.after for one in front.sentences]
    assert said[0].startswith(
        "At a quarter of the cache's bytes, take a. It scores 1.00 (exact, 95% interval 0.84 to 1.00, 20 answers)"
    )
    assert said[1] == "How sure? Shown to be better than the other."
    assert said[2] == "A token takes 12.5 ms with a, 20 ms with the full cache (other at 25% of 4,096 tokens, cpu)."
    assert [[cell.text for cell in row] for row in front.table.rows] == [
        ["25%", "a", "1.00 [0.84, 1.00]", "none", "1 of 1", "12.5"],
        ["5%", "a", "0.45 [0.26, 0.66]", "none", "1 of 1", "11"],
    ]


def _picture(*curves: tuple[str, list[tuple[float, float]]], lower: bool = False) -> Picture:
    made = [Curve(Label(name), tuple(Point(share, Estimate(y, y, y, 9)) for share, y in points)) for name, points in curves]
    return Picture("score", tuple(made), lower_is_better=lower)


def test_the_frontier_is_the_best_at_as_many_bytes_or_fewer() -> None:
    curves = (("a", [(0.1, 0.5), (0.4, 0.6)]), ("b", [(0.2, 0.7), (0.4, 0.9)]), ("c", [(0.1, 0.1)]))
    assert _picture(*curves).frontier == [(0.1, 0.5), (0.2, 0.7), (0.4, 0.9)]
    assert _picture(*curves, lower=True).frontier == [(0.1, 0.1)]
    picture = _picture(*curves)
    assert picture.leading(picture.frontier) == [Label("b"), Label("a")]
    control = _picture(*curves, ("control", [(1.0, 0.95)]))
    assert control.frontier[-1] == (1.0, 0.95)
    assert replace(control, full=Estimate(1.0, 1.0, 1.0, 9)).frontier == picture.frontier, "the full cache has as many bytes"


def test_names_are_apart_inside_the_axes_and_near_their_lines() -> None:
    for seed in range(40):
        wanted = sorted(np.random.default_rng(seed).random(8) ** 3)
        found = spread(wanted, 0.08)
        assert all(later - before >= 0.08 - 1e-9 for before, later in pairwise(found))
        assert found[0] >= -1e-9 and found[-1] <= 1 + 1e-9
    assert spread([0.1, 0.5, 0.9], 0.08) == pytest.approx([0.1, 0.5, 0.9]), "what has room stays"
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert shortened("snapkv") == "snapkv" and len(shortened("x" * 80)) == 21


def test_eight_lines_have_a_colour_and_a_marker_of_their_own_everywhere() -> None:
    names = [Label(f"m{number}") for number in range(20)] + [Label("snapkv", variant=f"gqa-{n}") for n in (2, 4, 8)]
    palette = Palette.of({label: number / 30 for number, label in enumerate([*names, Label("snapkv+int4")])})
    styles = list(palette.styles.values())
    assert len(styles) == len({style.colour for style in styles}) == len({style.marker for style in styles}) == len(COLOURS) == 8
    assert {kind_of(label) for label in palette.styles} >= {VARIANTS, STORAGES}, "of each kind some"
    assert palette.of_label(names[19]).colour == GREY and not palette.of_label(names[0]).grey
    found = lines(made_rows())
    report = palette_of(families(found), found)
    drawn = [curve.label for panel in panels(found) for field in panel.fields for curve in panel.picture(*field).curves]
    drawn += [curve.label for family in families(found) for curve in family_picture(family).curves]
    assert {str(label): report.of_label(label) for label in drawn} == {
        str(label): style for label, style in report.styles.items() if label in drawn
    }, "few lines have all of them a colour, the same in every picture"
    best = rows_of({f"m{number}": 3 for number in range(9)}, 0.25, "25%") + rows_of({"whole": 20}, 1.0, "100%")
    crowded = lines(best)
    assert palette_of(families(crowded), crowded).of_label(Label("whole")).grey, "what saves nothing comes last"
