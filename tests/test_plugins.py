"""Plugins: the examples of docs/plugins run as a newcomer would run them; what breaks the contract is told in one line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import call

from benchmarks import BENCHMARKS
from benchmarks.base import embedded_can
from harness.cache import Needs, Prefill, Selection, keep_all
from harness.evaluation.conformance import check_plugin
from harness.evaluation.request import RunRequest
from harness.evaluation.run import run_request
from harness.registry import BUILTIN, BadPlugin, Plugin, load_plugin, registry_of
from methods import CONVERSIONS, METHODS
from methods.base import Eviction
from reports.tables import lines
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


@pytest.mark.parametrize("kind", ["method", "allocator", "storage", "benchmark", "conversion"])
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


def _benchmark(path: Path, metric: str, score: str) -> Path:
    """The example with another metric."""
    text = (EXAMPLES / "benchmark.py").read_text()
    for ours, theirs in (
        ('Metric("exact", unit="share", right_or_wrong=True)', metric),
        ('{"exact": float(answer.strip().startswith(example.answers[0]))}', score),
    ):
        assert ours in text
        text = text.replace(ours, theirs)
    path.write_text(text)
    return path


def test_rows_say_what_a_plugins_metric_means(tmp_path: Path) -> None:
    metric = 'Metric("errors", unit="share", higher_is_better=False, right_or_wrong=True)'
    path = _benchmark(tmp_path / "mine.py", metric, '{"errors": float(example.answers[0] not in answer)}')
    assert call("check", str(path)) == 0
    asked = ("run", "--suite", "smoke", "--plugin", str(path), "--benchmarks", "capitals", "--methods", "full,snapkv,h2o")
    assert call(*asked, "--budgets", "12,30", "--limit", "2", "--out", str(tmp_path / "out")) == 0
    rows = read_rows(tmp_path / "out")
    assert {row.status for row in rows} == {"ok"}
    assert all(row.lower_is_better == row.right_or_wrong == ["errors"] and not row.embedded_can for row in rows)
    assert all(line.lower_is_better for line in lines(rows))


def test_a_metric_that_is_right_or_wrong_is_0_or_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metric = 'Metric("exact", unit="share", right_or_wrong=True)'
    assert call("check", str(_benchmark(tmp_path / "mine.py", metric, '{"exact": len(answer) / 100}'))) == 1
    assert "as exact, which is said to be right or wrong: 0 or 1" in capsys.readouterr().out


def test_facts_of_a_task_are_no_part_of_its_repr() -> None:
    made_for = {name for name, task in BENCHMARKS.items() if embedded_can(task)}
    facts = ("recall", "recall_each", "two_hop", "recall_many", "needle_text", "needle_facts")
    assert made_for == {*facts, "perplexity_own", "random_tokens"}
    assert not any("embedded_can" in repr(task) or "right_or_wrong" in repr(task) for task in BENCHMARKS.values())


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


def test_an_allocator_with_a_field_called_kind_is_given_no_head_scores(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = (EXAMPLES / "allocator.py").read_text().replace("lift: float = 1.0", 'kind: str = "plain"\n    lift: float = 1.0')
    path.write_text(text + '\nALLOCATORS = {"rising": MiddleLayers(lift=2.0)}\n')
    registry = registry_of([path])
    assert registry.methods["middle_layers"].head_scores is None
    assert call("run", "--suite", "smoke", "--plugin", str(path), "--methods", "full,middle_layers,h2o:rising", "--budgets", "12",
                "--limit", "1", "--out", str(tmp_path / "out")) == 0  # fmt: skip
    sha = load_plugin(path).sha256[:8]
    assert {row.key.method for row in read_rows(tmp_path / "out")} == {"full@1", f"middle_layers@1+{sha}", f"h2o:rising@1+{sha}"}
    assert {row.status for row in read_rows(tmp_path / "out")} == {"ok"}


@dataclass(frozen=True)
class EveryOther:
    """A method that is no eviction by scorer and allocator: neighbours are merged into their mean."""

    version = 1
    takes_budget, is_reference = False, False
    needs, scorer, head_scores, given_head_scores = Needs(), None, None, None

    def with_head_scores(self, scores: object) -> EveryOther:
        return self

    def cannot_run(self, *_: object) -> str | None:
        return None

    def while_decoding(self, _: object) -> None:
        return None

    def compress(self, prefill: Prefill, total: int, scores: object) -> Selection:
        kept = torch.arange(1, prefill.tokens, 2)
        return tuple(
            tuple(replace(row, kept=kept, merged=(_pairs(kv.keys[n]), _pairs(kv.values[n]))) for n, row in enumerate(rows))
            for kv, rows in zip(prefill.layers, keep_all(prefill), strict=True)
        )


def _pairs(entries: torch.Tensor) -> torch.Tensor:
    return entries[: len(entries) // 2 * 2].unflatten(0, (-1, 2)).mean(1)


def test_a_method_that_merges_runs_without_a_change_of_the_sweep(tmp_path: Path) -> None:
    registry = BUILTIN.adding(Plugin(Path("merging"), "0" * 64, {"METHODS": {"every_other": EveryOther()}}))
    settings = {"methods": ("full", "every_other"), "models": ("random:tiny-llama",), "limit": 1, "out": tmp_path}
    request = RunRequest("smoke", benchmarks=("random_tokens(length=64,max_new_tokens=4)",), **settings)  # type: ignore[arg-type]
    assert run_request(request, registry).failed == 0
    full, half = sorted(read_rows(tmp_path)[::2], key=lambda row: -(row.entries or 0))
    assert half.key.method == "every_other@1+00000000" and 2 * (half.entries or 0) == full.entries and half.fidelity["kl"] > 0


def test_installed_packages_bring_entries_by_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as pip would lay it: a module, and the metadata that names what it brings."""
    (tmp_path / "their_package.py").write_text((EXAMPLES / "method.py").read_text())
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    points = "[kv_cache_scale.methods]\ntheirs = their_package:METHOD\n"
    (info / "entry_points.txt").write_text(points)
    with (tmp_path / "their_package.py").open("a") as file:
        file.write('\nMETHOD = METHODS["large_values"]\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = registry_of()
    assert "theirs" in registry.methods and registry.plugins[0].path == Path("their-package")
    assert registry.mark("METHODS", "theirs(sinks=0)") == f"+{registry.plugins[0].sha256[:8]}"
    assert (
        call("run", "--suite", "smoke", "--methods", "theirs", "--budgets", "20", "--limit", "1", "--out", str(tmp_path / "o"))
        == 0
    )
    assert {row.key.method.split("+")[0] for row in read_rows(tmp_path / "o")} == {"theirs@1"}
    (info / "entry_points.txt").write_text(points.replace("METHOD\n", "ABSENT\n"))
    assert call("list", "methods") == 2


def test_a_plugin_that_ends_the_process_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import sys\nsys.exit(0)\n")
    assert call("list", "methods", "--plugin", str(path)) == 2
    assert "line 2: SystemExit: 0" in capsys.readouterr().err
    assert call("new", "method", "snapkv") == 2
    assert "'snapkv' is the name of something that is there already" in capsys.readouterr().err


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
