"""What must be the same on every node: Python, torch, the suite, installed plugins, and the files that a request names."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness.errors import BadRequest

PACKAGES = ("torch", "transformers")
SOURCES = ("harness", "methods", "benchmarks", "results")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Node:
    """A machine, as it describes itself."""

    versions: Mapping[str, str]  # of Python, packages, the suite
    plugins: Mapping[str, str] = field(default_factory=dict)  # installed ones, by name: sha256
    lacks: Sequence[str] = ()  # of the paths that were asked for


def describe(paths: Sequence[str] = ()) -> Node:
    """This machine. Loads neither torch nor a model."""
    from harness.registry import installed_plugins

    versions = {"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "the suite": suite_version()}
    plugins = {str(plugin.path): plugin.sha256[:8] for plugin in installed_plugins()}
    return Node(versions, plugins, tuple(path for path in paths if not Path(path).exists()))


def suite_version() -> str:
    """A hash of the suite's files: the same for a checkout and for an installed copy of it."""
    digest = hashlib.sha256()
    for package in SOURCES:
        folder = ROOT / package
        for path in sorted(folder.rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if not place.startswith("harness/plugin_examples/"):  # of docs/ in a checkout
                digest.update(place.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def check_same(name: str, theirs: Node, ours: Node) -> None:
    """
    Raises:
        BadRequest: what the node lacks, or has in another version, by name.
    """
    for what, mine in ours.versions.items():
        other = theirs.versions.get(what, "none")
        if other != mine:
            raise BadRequest(f"node {name} has {what} {other}, this one {mine}: install the same on every node")
    for what in sorted({*ours.plugins, *theirs.plugins}):
        mine, other = (node.plugins.get(what, "none") for node in (ours, theirs))
        if other != mine:
            raise BadRequest(f"node {name} has plugin {what} {other}, this one {mine}: install the same on every node")
    if theirs.lacks:
        raise BadRequest(f"node {name} lacks {theirs.lacks[0]}: put it there, or where all nodes see it, under the same path")


def _version(package: str) -> str:
    """Without what is behind a plus: builds for a CPU and for CUDA of one version go together."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "none"
