"""Which head scores belong to a model: named by the user, shipped with the package, or published and at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.engine.model import Model
from harness.evaluation.plan import Grid
from harness.models.load import REFERENCE
from methods.duo_attention import read_pattern
from methods.headkv import BadScores, HeadScores
from methods.triattention import KIND, BadStatistics, QueryStatistics

MOST_KINDS = 2  # of scores that one method may want: its allocator's and its scorer's

SHIPPED = {
    "reference": REFERENCE / "head_scores",
    "smollm2": Path(__file__).parents[1] / "models" / "head_scores",  # docs/smollm2.md says how they were estimated
}


def with_head_scores(grid: Grid, model: Model, given: Sequence[Path], data_dir: Path | None) -> Grid:
    """The same grid, its methods given the model's own scores. A method without any stays, and says why it cannot run.

    Raises:
        BadScores: a file cannot be read, or the only one given for a kind is another model's.
    """
    found: dict[str, Any] = {}
    methods = dict(grid.methods)
    for _ in range(MOST_KINDS):
        for kind in {method.head_scores for method in methods.values()} - {None, *found}:
            found[str(kind)] = _scores(str(kind), model, given, data_dir)
        for name, method in methods.items():
            if method.given_head_scores is None and (scores := found.get(str(method.head_scores))) is not None:
                methods[name] = method.with_head_scores(scores)
    return replace(grid, methods=methods)


def _scores(kind: str, model: Model, given: Sequence[Path], data_dir: Path | None) -> HeadScores | QueryStatistics | None:
    if kind == KIND:
        return query_statistics(model, given)
    if kind == "duo":
        return duo_pattern(model, given, data_dir) or _scores("r2", model, given, data_dir)
    shape = (model.shape.layers, model.shape.query_heads)
    refusal: BadScores | None = None
    for scores in map(HeadScores.load, (path for path in _files(given) if path.suffix not in (".tsv", ".npz"))):
        if scores.kind != kind:
            continue
        try:
            scores.check(model.name, model.revision, *shape)
            return scores
        except BadScores as error:
            refusal = refusal or error
    at_hand = [SHIPPED[model.name]] if model.name in SHIPPED else []
    at_hand += [] if data_dir is None else [data_dir / "headkv" / "head_score"]
    name = model.name.rsplit("/", 1)[-1]
    for path in _files([place for place in at_hand if place.is_dir()]):
        if not path.name.startswith((f"{name}_", f"{name}.")):
            continue
        scores = HeadScores.load(path)
        if scores.kind == kind:
            scores.check(model.name, model.revision, *shape)
            return scores
    if refusal is not None:  # what was given is another model's, and there is nothing else
        raise refusal
    return None


def query_statistics(model: Model, given: Sequence[Path]) -> QueryStatistics | None:
    """The model's, of the files named and those of folders, or shipped with the package; None: there are none.

    Raises:
        BadStatistics: a file that is none, or the only ones given are another model's.
    """
    places = [*given, *([SHIPPED[model.name]] if model.name in SHIPPED else [])]
    files = [path for place in places for path in (sorted(place.glob("*.npz")) if place.is_dir() else [place])]
    refusal: BadStatistics | None = None
    for statistics in map(QueryStatistics.load, (path for path in files if path.suffix == ".npz")):
        try:
            statistics.check(model.name, model.revision, model.shape.layers)
            return statistics
        except BadStatistics as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    return None


def duo_pattern(model: Model, given: Sequence[Path], data_dir: Path | None) -> HeadScores | None:
    """The authors' pattern of retrieval heads: a .tsv that is named, or the model's under the data folder; None: there is none.

    Raises:
        BadScores: a file that is none, or is another model's.
    """
    named = [path for path in given if path.suffix == ".tsv"]
    places = [data_dir / "duo_attention", data_dir / "duo_attention" / "attn_patterns"] if data_dir is not None else []
    name = model.name.rsplit("/", 1)[-1]
    folders = [place / known for place in places for known in (name, f"Meta-{name}") if (place / known).is_dir()]
    found = named or [path for folder in folders for path in sorted(folder.rglob("full_attention_heads.tsv"))]
    if not found:
        return None
    return read_pattern(found[0], model.name, (model.shape.layers, model.shape.kv_heads, model.shape.query_heads))


def _files(places: Sequence[Path]) -> list[Path]:
    """The files, and those of the folders."""
    found: list[Path] = []
    for place in places:
        found += sorted([*place.glob("*.json"), *place.glob("*.json.xz")]) if place.is_dir() else [place]
    return found
