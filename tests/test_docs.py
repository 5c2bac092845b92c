"""The documents: no dead link, and what the README shows is what the report in the repository says."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.cli.arguments import parser
from harness.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_no_link_is_dead(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_pages_that_the_code_names_are_there() -> None:
    for room in ("benchmarks", "harness", "methods", "reports", "results"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text()):
                assert (ROOT / page).exists(), f"{path.name}: {page}"


@pages
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^ +python run_all\.py(.*)$", text, re.MULTILINE):
        words = shlex.split(re.sub(r"\[|\]", "", re.split(r" {3,}|#", line)[0]))
        if any(word in ("|", "...", "S") for word in words):
            continue  # a form, not a command
        try:
            parser().parse_args(words or ["run"])
        except SystemExit:
            pytest.fail(f"{page.name}: python run_all.py{line}")


def test_the_example_of_the_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace("limit=10", "limit=1"), names)
    found = names["found"]
    assert len(found) == 5 and set(found["status"]) == {"ok"} and {"exact", "fidelity.kl", "example.length"} <= set(found)
    again = names["evaluate"](replace(names["request"], methods=("full",), limit=1))
    assert again["id"].tolist() == found[found["method"] == "full@1"]["id"].tolist()
    with pytest.raises(UserError, match="no method 'nosuch'"):
        names["evaluate"](replace(names["request"], methods=("nosuch",)))


def test_the_readmes_tables_are_those_of_the_reports() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    for name, table in zip(("smollm2", "reference"), tables, strict=False):
        report = (ROOT / "reports" / name / "scores.md").read_text()
        rows = table.splitlines()
        assert len(rows) >= 10 and all(row in report for row in rows), name
