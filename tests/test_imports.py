"""Imports point one way: the rooms of docs/design.md, from the ground up, and no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("harness", "methods", "storages", "benchmarks", "results", "reports")
GROUND = (
    "errors",
    "files",
    "logits",
    "cache",
    "families",
    "layer_sharing",
    "storage",
    "__init__",
)  # of harness: nothing above them

# A room, and the rooms that it may import from beside itself.
MAY_IMPORT = {
    "ground": (),
    "results": ("ground",),
    "methods": ("ground",),
    "storages": ("ground",),
    "benchmarks": ("ground",),
    "reports": ("results",),
    "names": ("ground", "methods", "storages", "benchmarks", "results"),  # harness/registry.py, suites.py, env.py
    "engine": ("ground",),
    "models": ("ground", "names", "engine", "methods"),
    "cluster": ("ground", "names"),
    "evaluation": ("ground", "names", "engine", "models", "methods", "benchmarks", "results", "cluster"),
    "cost": ("ground", "names", "engine", "models", "methods", "benchmarks", "results", "evaluation", "cluster"),
    "training": ("ground", "names", "engine", "models", "methods", "benchmarks", "results", "evaluation"),
    "papers": ("ground", "names", "engine", "models", "methods", "benchmarks", "results", "evaluation", "cost", "training",
               "cluster"),
    "api": ("ground", "names", "results", "evaluation", "cost", "cluster"),
    "cli": ("ground", "names", "engine", "models", "methods", "benchmarks", "results", "evaluation", "cost", "training", "papers",
            "cluster", "reports"),
}  # fmt: skip
PROGRAMS = ("benchmarks/peers/",)  # they stand above everything, and nothing imports them


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "harness":
        return parts[0]
    if len(parts) > 1 and (ROOT / "harness" / parts[1]).is_dir():
        return parts[1]
    name = parts[1] if len(parts) > 1 else "__init__"
    return "ground" if name in GROUND else "api" if name == "api" else "names"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {module_of(path): path for path in found if not str(path.relative_to(ROOT)).startswith(PROGRAMS)}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of ours that it imports, anywhere in its text but under TYPE_CHECKING, which never runs."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    unread = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    named: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written out"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}  # modules of a package, or names of a module
            named |= parts if parts <= set(modules()) else parts | {str(node.module)}
    return frozenset(name for name in named if name in modules() and name != module)


def test_every_room_is_known() -> None:
    assert {room_of(module) for module in modules()} <= set(MAY_IMPORT)


def test_no_arrow_runs_back_up() -> None:
    wrong = [
        f"{module} ({room_of(module)}) imports {other} ({room_of(other)})"
        for module in modules()
        for other in imports_of(module)
        if room_of(other) not in (room_of(module), *MAY_IMPORT[room_of(module)])
    ]
    assert wrong == []


def test_there_are_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in sorted(imports_of(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize(
    "module", ["methods", "benchmarks", "harness.registry", "harness.cli.requests", "reports.write", "harness"]
)
def test_what_needs_no_torch_is_told_without_it(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_api_is_where_it_says() -> None:
    import harness

    for name in harness.API:
        assert getattr(harness, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        harness.absent  # noqa: B018
