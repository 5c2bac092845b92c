"""What `run_all.py list` tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.registry import Registry


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
        from harness.training.recipes import RECIPES

        return {name: recipe.about for name, recipe in RECIPES.items()}
    if what == "conversions":
        return {name: conversion.about for name, conversion in registry.conversions.items()}
    return {name: repr(entry) for name, entry in registry.table(what).items()}
