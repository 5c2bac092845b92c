"""What `run_all.py list` tells."""

from __future__ import annotations

from pathlib import Path

from harness.registry import Registry


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
        return {"reference": "the embedded model", "smollm2": smollm2, **shapes}
    if what == "recipes":
        from harness.training.recipes import RECIPES

        return {name: recipe.about for name, recipe in RECIPES.items()}
    if what == "conversions":
        return {name: conversion.about for name, conversion in registry.conversions.items()}
    return {name: repr(entry) for name, entry in registry.table(what).items()}
