"""What `run_all.py list` tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.registry import Registry
from methods.base import Method

ABOUT = 44  # letters of the column before the settings


SIGHTS = (  # what a method looks at, from the least
    "everything is kept",
    "looks at nothing",
    "looks at keys and values",
    "looks at the last queries: under question_in, the question",
    "looks at all queries",
    "looks at a second pass over the prompt",
    "a method of another kind",
)


def sight_of(method: Method) -> str:
    """Which of `SIGHTS` a method has."""
    if method.is_reference:
        return SIGHTS[0]
    if method.scorer is None:
        return SIGHTS[-1]
    needs = method.needs
    for number, seen in ((5, needs.replays), (4, needs.column_sums or needs.ahead), (3, needs.window)):
        if seen:
            return SIGHTS[number]
    return SIGHTS[1] if getattr(method.scorer, "blind", False) else SIGHTS[2]


def methods_by_sight(registry: Registry) -> dict[str, dict[str, str]]:
    """The methods by what they look at: name -> what they protect, what they need besides, and their settings."""
    found: dict[str, dict[str, str]] = {sight: {} for sight in SIGHTS}
    for name, method in registry.methods.items():
        protects = "" if method.scorer is None else f"protects {method.scorer.protected}"
        wants = [wanted] if (wanted := getattr(method, "wanted", method.head_scores)) else []
        wants += ["output projection"] if method.needs.output_norms else []
        about = "; ".join(filter(None, (protects, f"needs {', '.join(wants)}" if wants else "")))
        found[sight_of(method)][name] = f"{about:{ABOUT}}  {method!r}".strip()
    return {sight: methods for sight, methods in found.items() if methods}


def _families() -> dict[str, str]:
    """What was seen of each family of transformers, out of the table that `python -m harness.models.tried` makes."""
    table = Path(__file__).parents[1] / "models" / "tried.json"
    return {f"family {one['family']}": _family(one) for one in json.loads(table.read_text())["families"]}


def _family(one: dict[str, Any]) -> str:
    if one["refused"]:
        return f"refused: {one['refused']}"
    converted = ", ".join(text.split("-")[0] for text in one["conversions"])
    graph = {"yes": "graph"}.get(one["graph"], f"graph {one['graph']}")
    parts = ("decode", "eviction", graph, f"conversion {converted}" if converted else "no conversion")
    return f"{', '.join(parts)} (logits within {one['logits_within']:.0e} of its own)"


def listing(what: str, registry: Registry, data_dir: Path | None = None) -> dict[str, str]:
    """Name -> what it is, in one line. Only papers need torch: to see whether a GPU is here."""
    if what == "papers":
        from harness.papers.needs import needs_of_tables

        return needs_of_tables(data_dir)
    if what == "suites":
        from harness.suites import COST_SUITES, SUITES

        return {name: suite.about for name, suite in (SUITES | COST_SUITES).items()}
    if what == "models":
        from harness.models.shapes import SHAPES

        shapes = {f"random:{name}": f"{shape['model_type']}, random weights" for name, shape in SHAPES.items()}
        smollm2 = "SmolLM2-135M-Instruct out of a package, dequantised; unquantised: HuggingFaceTB/SmolLM2-135M-Instruct"
        return {"reference": "the embedded model", "smollm2": smollm2, **shapes, **_families()}
    if what == "recipes":
        from harness.training.recipes import RECIPES, STARTS

        return {name: recipe.about for name, recipe in RECIPES.items()} | {name: about for name, (about, _) in STARTS.items()}
    if what == "conversions":
        return {name: conversion.about for name, conversion in registry.conversions.items()}
    return {name: repr(entry) for name, entry in registry.table(what).items()}
