"""What `run_all.py list` tells."""

from __future__ import annotations

from pathlib import Path

from benchmarks import BENCHMARKS
from harness.models.shapes import SHAPES
from harness.papers.needs import needs_of_tables
from harness.suites import COST_SUITES, SUITES
from harness.training.recipes import RECIPES
from methods import CONVERSIONS, METHODS


def listing(what: str, data_dir: Path | None = None) -> dict[str, str]:
    """Name -> what it is, in one line."""
    if what == "papers":
        return needs_of_tables(data_dir)
    tables: dict[str, dict[str, str]] = {
        "suites": {name: suite.about for name, suite in (SUITES | COST_SUITES).items()},
        "models": {"reference": "the embedded model"}
        | {f"random:{name}": f"{shape['model_type']}, random weights" for name, shape in SHAPES.items()},
        "conversions": {name: conversion.about for name, conversion in CONVERSIONS.items()},
        "recipes": {name: recipe.about for name, recipe in RECIPES.items()},
        "methods": {name: repr(method) for name, method in METHODS.items()},
        "benchmarks": {name: repr(task) for name, task in BENCHMARKS.items()},
    }
    return tables[what]
