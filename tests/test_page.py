"""The page in a real browser: the first screen, the plot to explore, tables, and pages of what is strange or little."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import KEY, NASTY, RIGHT, _row, made_rows, stored

from reports.write import write_report
from results.record import Record

LONG = "a_method_with_a_name_of_eighty_letters_" * 2 + "xy"


@pytest.fixture(scope="module")
def browser() -> Any:
    program = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is looked at with playwright")
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as tools:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        opened = tools.chromium.launch(executable_path=program, args=[*quiet, "--no-first-run", "--disable-sync"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the rows of the golden files, and of a likelihood beside them."""
    likelihoods = [row for row in made_rows() if row.key.benchmark == "recall@1" and row.metrics]
    nll = {"metrics": {"nll": 1.0}, "lower_is_better": ["nll"], "right_or_wrong": []}
    rows = [replace(row, key=replace(row.key, benchmark="text@1"), **nll) for row in likelihoods]
    out = stored(tmp_path_factory.mktemp("page") / "made", [*made_rows(), *rows])
    (out / "heads").mkdir()
    heads = {"variant": "reference", "kind": "r2", "attempts": 9, "successes": 8, "values": [[0.1, 0.9], [0.4, 0.2]]}
    (out / "heads" / "2.json").write_text(json.dumps(heads))
    write_report(out, formats=())
    return out / "report" / "scores.html"


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, browser: Any, made: Path) -> Iterator[Any]:
    """Opened; when it is closed, no script has failed and nothing was asked of a network."""
    opened = browser.new_page(viewport={"width": request.param, "height": 844})
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda one: asked.append(one.url))
    opened.goto(made.as_uri())
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") <= request.param, "nothing sticks out"
    assert said == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    opened.close()


def test_the_first_screen_answers_and_everything_else_is_folded(page: Any) -> None:
    assert page.title() == "KV-cache methods: made", "a script in an answer stays text"
    said = page.locator(".front:visible .said").inner_text()
    assert "At 50% of the bytes, the nearest to a quarter, nothing is decided; the best mean has headkv_r2." in said
    assert "It scores 1.00 (exact, 95% interval 0.77 to 1.00, 16 answers on 2 tasks); the full cache scores 1.00" in said
    assert "How sure? Shown to be better than none of the others; snapkv and h2o may be as good" in said
    assert said.count(".\n") + 1 <= 5, "a few sentences"
    assert page.locator(".front:visible svg").count() == 1 and page.locator(".front:visible tbody tr").count() == 2
    assert page.locator("details[open]:visible").count() == 0
    assert page.locator(".front:visible").bounding_box()["y"] < 250, "on the first screen"
    page.select_option("#fronts", label="reference, text@1 1024, question_in: nll")
    assert "less is better" in page.locator(".front:visible .said").inner_text() and page.locator(".front:visible").count() == 1
    mark = page.locator(".front:visible svg [data-tip]").first
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    assert "of the bytes, n = " in page.locator("#tip").inner_text()


MARK = """([share, value]) => {
  const view = [...Bokeh.index.roots].find((one) => one.frame), box = view.el.getBoundingClientRect();
  return [box.left + view.frame.x_scale.compute(share), box.top + view.frame.y_scale.compute(value)];
}"""  # where on the screen a mark lies


def test_what_is_chosen_is_drawn_and_told(page: Any) -> None:
    page.click("#explore > summary")
    drawn, words = page.locator("#explore .drawn canvas"), page.locator("#explore .words")
    drawn.first.wait_for()
    assert "4 of 5 methods, 7 points: exact on mean of 2 tasks" in words.inner_text()
    page.select_option("[data-choose=task]", label="recall@1 1024, at most 100 tokens")
    page.select_option("[data-choose=field]", value="kl")
    assert "3 of 5 methods, 6 points: KL to the full cache" in words.inner_text()
    page.select_option("[data-choose=field]", value="score")
    page.select_option("[data-choose=budget]", value="50%")
    assert "4 of 5 methods, 4 points: exact on recall@1 1024, at most 100 tokens at 50%." in words.inner_text()
    page.fill("[data-filter=methods]", "snap")
    assert page.locator("#explore .chips label:visible").all_inner_texts() == ["snapkv"]
    page.locator("#explore .chips label", has_text="snapkv").click()
    assert "3 of 5 methods" in words.inner_text()
    page.fill("[data-filter=methods]", "")
    page.click("[data-chips=none]")
    assert "Nothing that is chosen" in words.inner_text()
    page.click("[data-chips=all]")
    page.select_option("[data-choose=budget]", value="")
    drawn.first.wait_for()
    page.locator("#explore .drawn").scroll_into_view_if_needed()
    at = page.evaluate(MARK, [0.0625, 3 / 8])
    page.mouse.move(at[0] - 4, at[1] - 4)
    page.mouse.move(*at)
    page.locator(".bk-tooltip-row-value").first.wait_for()
    told = page.locator(".bk-tooltip-row-value").all_inner_texts()
    assert told[:2] == ["snapkv", "32, 6.25% of the bytes"] and told[2].startswith("0.375 [0.137, 0.694]") and told[4] == "8"


def test_tables_sort_and_filter_and_texts_stay_texts(page: Any) -> None:
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    table = page.locator("#means table").first
    column = table.locator("tbody td:nth-child(2)")
    first = column.all_inner_texts()
    table.locator("th button").nth(1).click()
    ascending = column.all_inner_texts()
    table.locator("th button").nth(1).click()
    descending = column.all_inner_texts()
    assert ascending == sorted(first, key=_value) and descending == sorted(first, key=_value, reverse=True) != ascending
    answers = page.locator("#answers .scroll").first
    page.locator("#answers .filter").first.fill("headkv 50%")
    shown = answers.locator("tbody tr:visible").all_inner_texts()
    assert shown and all("headkv_r2" in row and "50%" in row for row in shown)
    assert page.locator("#answers td", has_text="<script>").count() > 0 and page.locator("#answers script").count() == 0
    page.locator("#heads img").first.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("#ranks svg").count() == 2


def _value(text: str) -> float:
    return -math.inf if text == "-" else float(text.split()[0].rstrip("*"))


def one_method() -> list[Record]:
    return [row for row in made_rows() if row.key.method == "snapkv@1"]


def one_cell() -> list[Record]:
    return one_method()[:1]


def sixty_methods() -> list[Record]:
    rng = random.Random(0)
    named = [replace(KEY, method=f"{LONG}_{number}@1", budget="32") for number in range(60)]
    return [_row(replace(key, example=n), float(rng.random() < 0.5), 0.0625) for key in named for n in range(6)]


def only_nan() -> list[Record]:
    return [replace(row, metrics={"exact": math.nan}) for row in made_rows() if row.metrics]


def two_models() -> list[Record]:
    budgets = {"": "", "32": "8", "50%": "10%"}
    mine = [row for row in made_rows() if row.key.model == KEY.model and row.key.method in ("full@1", "snapkv@1", "h2o@1")]
    return [*made_rows(), *(replace(row, key=replace(row.key, model="other", budget=budgets[row.key.budget])) for row in mine)]


def nasty() -> list[Record]:
    return [replace(row, key=replace(row.key, method=f"{NASTY}@1")) for row in one_method()] + made_rows()


STRANGE = {
    one_method: "only this was measured: snapkv",
    one_cell: "one answer, which has no interval",
    sixty_methods: "nothing is decided",
    only_nan: "No score was measured",
    two_models: "other, 2 tasks, question_in: exact",
    nasty: "the best mean has headkv_r2",
}


@pytest.mark.parametrize("rows", STRANGE)
def test_what_is_strange_or_little_has_a_page_that_is_right(rows: Any, browser: Any, tmp_path: Path) -> None:
    out = stored(tmp_path / "made", rows())
    write_report(out, formats=())
    text = (out / "report" / "scores.html").read_text()
    assert len(text) < 6e6
    opened = browser.new_page(viewport={"width": 390, "height": 844})
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto((out / "report" / "scores.html").as_uri())
    words = re.sub(r"\s+", " ", opened.locator("body").text_content())
    assert STRANGE[rows] in words
    if opened.locator("#explore").count():
        opened.click("#explore > summary")
        opened.click("[data-chips=all]")
        opened.locator("#explore .drawn canvas").first.wait_for()
    opened.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390 and said == []
    assert opened.title() == "KV-cache methods: made"
    opened.close()


def test_the_numbers_of_the_plot_are_those_of_the_rows(made: Path) -> None:
    data = json.loads(re.search(r'id="explore-data">(.*?)</script>', made.read_text(), re.DOTALL)[1])  # type: ignore[index]
    view = next(view for view in data["views"] if view["task"].startswith("recall@1"))
    scores = {(data["labels"][point[0]]["name"], point[1]): point[4][0] for point in view["points"]}
    wanted = {
        (method, budget): right / 8
        for method, found in RIGHT["recall"].items()
        for budget, right in ({"": found} if isinstance(found, int) else found).items()
    }
    assert scores == {**wanted, ("full on gqa-2", ""): 7 / 8}
