"""What a paper's table needs, and which of it this machine has: weights, data, a GPU and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from harness.cache import ModelShape
from harness.models.shapes import SHAPES
from harness.papers.tables import HUB, SHAPE, TABLES, VARIANTS, PaperTable, asked_for, paper_models, rows_of

FLOPS = 4e14  # of a GPU really reached in bfloat16: two fifths of an H100's
BYTES = 3e12  # a second, of its memory
ROOM = 1.3  # of memory, beside weights and cache
TRAINING_BYTES = 18  # a weight: itself in two precisions, its gradient, two moments of AdamW
PARAMETERS = {  # in billions
    "Llama-3-8B-Instruct": 8.0,
    "Mistral-7B-Instruct-v0.2": 7.2,
    "OPT-125m": 0.125,
    "OPT-355m": 0.331,
    "Llama3.2-1B": 1.24,
    "Llama3.2-3B": 3.2,
    "Llama3.1-8B": 8.0,
    "Gemma2-2B": 2.6,
    "TinyLlama-1.1B": 1.1,
}


@dataclass(frozen=True)
class Need:
    """Of a table, for one of the paper's models."""

    model: str
    weights: str  # a hub id; "" where random ones do
    weights_here: bool
    data: Mapping[str, bool]  # folder -> is it here
    hours: float  # of one such GPU, for everything, variants included
    gigabytes: float  # of its memory
    measuring_gigabytes: float  # without training
    variants: int  # to be trained, of those that are not here
    gpu: str | None  # this machine's, with its memory
    gpu_gigabytes: float

    @property
    def text(self) -> str:
        have = "here" if self.weights_here else "not here"
        parts = [f"weights {self.weights} ({have})"] if self.weights else ["no weights"]
        parts += [f"{folder} ({'here' if there else 'not in --data-dir'})" for folder, there in self.data.items()]
        parts += [f"{self.variants} variants to train"] if self.variants else []
        if self.hours:
            gpu = "none here" if self.gpu is None else f"here: {self.gpu}, {self.gpu_gigabytes:.0f} GB"
            short = self.gigabytes - self.gpu_gigabytes
            gpu += f", {short:.0f} GB too small" if self.gpu and short > 0 else ""
            parts.append(f"about {max(self.hours, 0.1):.1f} GPU hours and {self.gigabytes:.0f} GB of memory ({gpu})")
        return f"{self.model}: " + ", ".join(parts)


def needs(table: PaperTable, model: str, data_dir: Path | None, trained: Path = VARIANTS) -> Need:
    """`trained`: where variants are looked for."""
    rows = rows_of(table, model)
    asked = [asked_for(table, row, HUB[model], False, trained) for row in rows]
    commands = {one.train for one in asked if one.train and not one.model}
    variants = len(commands) if table.kind == "scores" else 0
    gpu, room = _gpu()
    return Need(
        model=model,
        weights=HUB[model] if table.kind in ("scores", "tokens") else "",
        weights_here=isinstance(try_to_load_from_cache(HUB[model], "config.json"), str),
        data={folder: bool(data_dir and (data_dir / folder).is_dir()) for folder in table.data},
        hours=hours(table, model, rows, variants),
        gigabytes=gigabytes(table, model, variants),
        measuring_gigabytes=gigabytes(table, model, 0),
        variants=variants,
        gpu=gpu,
        gpu_gigabytes=room,
    )


def hours(table: PaperTable, model: str, rows: Sequence[Mapping[str, Any]], variants: int) -> float:
    """By arithmetic, from shapes: prompts are read at `FLOPS`, answers wait for weights and cache at `BYTES`.

    Prompts are read once a budget, for all its methods; of variants each reads them for itself.
    """
    sizes, weights = table.sizes, PARAMETERS[model] * 1e9
    read = 2 * weights * sizes.prompts * sizes.tokens / FLOPS
    passes = len(rows) if table.recipe else len({row.get("budget", "") for row in rows})
    together = len(rows) / passes  # cells decoded as one batch
    answer = sizes.prompts * sizes.answer * (2 * weights + together * _cache_bytes(model, sizes.tokens) / 4) / BYTES
    trained = 6 * weights * sizes.trained * variants / FLOPS
    return (passes * (read + answer) + trained) / 3600  # nothing where no model runs


def gigabytes(table: PaperTable, model: str, variants: int) -> float:
    weights = PARAMETERS[model]
    if variants:
        return weights * TRAINING_BYTES
    return ROOM * (2 * weights + 2 * _cache_bytes(model, table.sizes.tokens) / 1e9)


def _cache_bytes(model: str, tokens: int) -> float:
    """Of a full cache in two bytes a number."""
    known = SHAPES.get(SHAPE.get(model, ""))
    if known is None:
        return 0.0
    heads = known["num_attention_heads"]
    dim = known.get("head_dim") or known["hidden_size"] // heads
    layers = known["num_hidden_layers"]
    shape = ModelShape(layers, heads, known.get("num_key_value_heads", heads), dim, (None,) * layers, 2)
    return float(shape.full_bytes(tokens))


def _gpu() -> tuple[str | None, float]:
    if not torch.cuda.is_available():
        return None, 0.0
    about = torch.cuda.get_device_properties(0)
    return about.name, about.total_memory / 1e9


def needs_of_tables(data_dir: Path | None = None) -> dict[str, str]:
    """Name -> what it is and, for each of its models, what it needs."""
    found = {}
    for name, table in TABLES.items():
        models: Sequence[Need] = [needs(table, model, data_dir) for model in paper_models(table)]
        found[name] = ". ".join([table.numbers["about"], *(need.text for need in models)])
    return found
