"""Plugins: the examples of docs/plugins run as a newcomer would run them; what breaks the contract is told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import call

from benchmarks import BENCHMARKS
from harness.evaluation.conformance import check_plugin
from harness.registry import BUILTIN, BadPlugin, Plugin, load_plugin, registry_of
from methods import CONVERSIONS, METHODS
from methods.base import Eviction
from results.store import read_rows

EXAMPLES = Path(__file__).parent.parent / "docs" / "plugins"
HEAD = """from dataclasses import dataclass
import torch
from harness.cache import Needs
from methods.allocators import Uniform
from methods.base import Eviction, Protected
"""
METHOD = (
    HEAD
    + """
@dataclass(frozen=True)
class Mine:
    needs = Needs(window=4)
    protected = Protected(last=4)
    def score(self, layer):
        BODY
METHODS = {"mine": Eviction(Mine(), Uniform())}
"""
)
BROKEN = {
    "return layer.positions.float()": "(60,) entries of layer 0, not (2, 60)",
    "return layer.stored_keys.sum(-1) * float('nan')": "scores that are not numbers in layer 0",
    "layer.keys.zero_(); return layer.stored_keys.sum(-1)": "it writes to the prefill, which other methods read too",
    "layer.keys.numpy()[:] = 0; return layer.stored_keys.sum(-1)": "tensor 0 of the prefill was written to",
    "return torch.rand(layer.stored_keys.shape[:2])": "keep different entries",
    "return layer.stored_keys.sum(-1) * layer.queries.shape[1]": None,
    "return layer.stored_keys.sum(-1) * (-1) ** layer.queries.shape[1] * torch.ones(())": None,
    "return layer.stored_keys.sum(-1) + layer.queries[:, 0].sum() * layer.positions": "read no more than `needs` asks for",
    "return layer.absent": "AttributeError",
}


@pytest.mark.parametrize("kind", ["method", "allocator", "benchmark", "conversion"])
def test_an_example_runs_as_it_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert len((EXAMPLES / f"{kind}.py").read_text().splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    assert call("new", kind, "mine") == 0 and call("new", kind, "mine") == 2
    assert call("check", "mine.py") == 0
    said = capsys.readouterr()
    assert "mine.py is there already" in said.err and "NO:" not in said.out and ": ok" in said.out
    wanted = {"benchmark": ("--benchmarks", "mine(times=3)"), "conversion": ("--model", "random:tiny-llama+mine-2")}
    more = wanted.get(kind, ("--methods", "full,mine"))
    asked = ("run", "--suite", "smoke", "--plugin", "mine.py", "--methods", "full,snapkv", "--budgets", "12", *more)
    assert call(*asked, "--limit", "1", "--out", "out") == 0
    rows = read_rows(Path("out"))
    assert {row.status for row in rows} == {"ok"}
    marked = {"benchmark": "benchmark", "conversion": "revision"}.get(kind, "method")
    sha = load_plugin(Path("mine.py")).sha256[:8]
    assert any(getattr(row.key, marked).endswith(f"+{sha}") for row in rows)
    assert "mine" in Path("out/report/scores.md").read_text()
    Path("mine.py").write_text(Path("mine.py").read_text() + "\n# another version\n")
    assert call(*asked, "--limit", "1", "--out", "out") == 0
    assert len(read_rows(Path("out"))) > len(rows), "another text of the plugin is another entry"
    assert call("list", "methods", "--plugin", "mine.py") == 0
    assert not any("mine" in table for table in (METHODS, BENCHMARKS, CONVERSIONS)), "nothing stays plugged in"


def test_a_method_may_protect_many(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text((EXAMPLES / "method.py").read_text().replace("window: int = 8", "window: int = 64"))
    assert call("check", str(path)) == 0


@pytest.mark.parametrize("body", list(BROKEN))
def test_what_breaks_the_contract_is_told_in_one_line(body: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METHOD.replace("BODY", body))
    said = BROKEN[body]
    assert call("check", str(path)) == (0 if said is None else 1)
    out = capsys.readouterr().out
    if said is not None:
        assert any(line.startswith("mine: ") and "NO: " in line and said in line for line in out.splitlines()), out
        asked = ("run", "--suite", "smoke", "--plugin", str(path), "--methods", "full,mine", "--budgets", "12")
        assert call(*asked, "--out", str(tmp_path / "out")) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert str(path) in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def broken(:\n", "line 1: invalid syntax"),
        ("x = 1\nraise RuntimeError('no way')\n", "line 2: RuntimeError: no way"),
        ("x = 1\n", "holds none of the tables"),
        (METHOD.replace("BODY", "return 1").replace('"mine":', '"snapkv":'), "'snapkv' in METHODS is a name that is taken"),
        (METHOD.replace("BODY", "return 1").replace('"mine":', '"a b":'), "no name of letters"),
        ("METHODS = {'mine': 3}\n", "is int, which lacks 'version'"),
        ("METHODS = [3]\n", "must be a dict"),
        ("BENCHMARKS = {'mine': 3}\n", "which lacks 'name'"),
        ("CONVERSIONS = {'mine': 3}\n", "which lacks 'about'"),
    ],
)
def test_files_that_are_no_plugins(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert call("plan", "--suite", "smoke", "--plugin", str(path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    with pytest.raises(BadPlugin, match="No such file"):
        load_plugin(tmp_path / "absent.py")


def test_two_plugins_may_not_share_a_name(tmp_path: Path) -> None:
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(METHOD.replace("BODY", "return layer.stored_keys.sum(-1)"))
    with pytest.raises(BadPlugin, match="choose another"):
        registry_of([tmp_path / "one.py", tmp_path / "two.py"])
    assert "mine" in registry_of([tmp_path / "one.py"]).methods and "mine" not in BUILTIN.methods


def test_our_own_entries_keep_the_contract() -> None:
    evicting = {
        n: m for n, m in METHODS.items() if isinstance(m, Eviction) and n != "headkv_paper"
    }  # exempt: the authors' counts
    tasks = {
        name: BENCHMARKS[name] for name in ("recall", "two_hop", "recall_many", "needle", "ruler_variables", "perplexity_own")
    }
    tables = {"METHODS": evicting, "BENCHMARKS": tasks, "CONVERSIONS": CONVERSIONS}
    broken = [finding for finding in check_plugin(Plugin(Path("ours"), "", tables)) if finding.wrong]
    assert broken == []


def test_a_cost_cell_finds_its_plugin(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METHOD.replace("BODY", "return layer.stored_keys.sum(-1)"))
    asked = ("run", "--suite", "cost-default", "--model", "random:tiny-llama", "--methods", "mine", "--contexts", "64")
    assert call(*asked, "--max-new-tokens", "2", "--plugin", str(path), "--out", str(tmp_path / "out")) == 0
    text = (tmp_path / "out" / "cost" / "rows.jsonl").read_text()
    assert '"status": "ok"' in text and str(tmp_path) not in text
