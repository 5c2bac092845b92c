"""kvpress and this suite on four real prompts of SmolLM2: kept positions and answers of the methods of 2025, side by side.

    python -m venv peers && peers/bin/pip install kvpress
    python -m benchmarks.peers.real --python peers/bin/python --out results/peers-real

Settings are made equal where both have them: SnapKV under CriticalKV and ChunkKV with a window of 8 and mean-pooling over 7, no
chat template. 400 tokens, shares of two and three fifths: there LagKV's parts and ChunkKV's chunks come out evenly; elsewhere
kvpress keeps fewer whole chunks, and breaks ties between LagKV's parts in another order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.compare import KERNEL, WINDOW, prompts_of, shared
from harness.cache import Budget
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.sweep import Cell, Sweep
from harness.models.load import load
from harness.registry import BUILTIN
from methods.base import Eviction, score_prefill
from methods.criticalkv import Critical

CONTEXT = 400
NAMES = ("keydiff", "lagkv", "cur", "expected_attention", "criticalkv", "chunkkv", "kvzip")
TASK = "needle(haystack=python,shortest=500,longest=800,lengths=2,depths=2)"


def cells_of(budgets: list[str]) -> list[Cell]:
    found = [Cell("full", BUILTIN.method("full")[1], None)]
    for budget in budgets:
        for name in NAMES:
            over = f"(window={WINDOW},kernel={KERNEL},pooling=mean)" if name in ("criticalkv", "chunkkv") else ""
            found.append(Cell(name, BUILTIN.method(name + over)[1], Budget.parse(budget)))
    return found


def ours(model: Model, prompts: list[Prompt], cells: list[Cell], new_tokens: int) -> list[dict[str, Any]]:
    """A row a prompt and cell: what was said, and which positions were kept, [L][H]."""
    sweep, rows = Sweep(model, Protocol(prompt="question_after", stop="none"), with_fidelity=False), []
    for number, prompt in enumerate(prompts):
        said = {}
        for cell, outcome in sweep.example(prompt, cells, new_tokens):
            if outcome.answer is None:
                raise RuntimeError(f"{cell.name} {cell.budget}: {outcome.failed or outcome.skipped}")
            said[cell] = outcome.answer.tokens
        needs = Critical().needs
        for cell in cells:
            needs = needs | cell.method.needs
        prefill = model.prefill(torch.tensor(prompt.ids[: prompt.context]), needs)[0]
        for cell in cells:
            kept: list[list[list[int]]] = []
            if isinstance(cell.method, Eviction) and cell.budget is not None:
                total = cell.budget.entries(model.parent_shape, prefill.tokens, "kv")
                rows_kept = cell.method.compress(prefill, total, score_prefill(cell.method.scorer, prefill))
                kept = [[[] if row.kept is None else row.kept.tolist() for row in layer] for layer in rows_kept]
            rows.append({"prompt": number, "cell": cells.index(cell), "tokens": said[cell], "kept": kept})
    return rows


def table(cells: list[Cell], mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a cell: over all prompts, the share of our positions that they keep too, and the answers that are the same."""
    lines = []
    for number, cell in enumerate(cells):
        share = 1.0 if cell.budget is None else float(cell.budget.share or 0)
        here = [row for row in mine if row["cell"] == number]
        there = {row["prompt"]: row for row in theirs if (row["method"], round(row["share"], 6)) == (cell.name, round(share, 6))}
        failed = next((row["failed"] for row in there.values() if "failed" in row), "")
        done = [(row, there[row["prompt"]]) for row in here if "failed" not in there[row["prompt"]]]
        kept = ([layer for row, _ in done for layer in row["kept"]], [layer for _, row in done for layer in row.get("kept", [])])
        lines.append(
            {
                "method": cell.name,
                "budget": str(cell.budget or ""),
                "kept_equal": shared(*kept),
                "answers_equal": sum(a["tokens"] == b["tokens"] for a, b in done),
                "prompts": len(done),
                "failed": failed,
            }
        )
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    rows = ["| method | budget | same positions | same answers |", "|---|---|---|---|"]
    for line in lines:
        kept = "-" if line["kept_equal"] is None else f"{line['kept_equal']:.3%}"
        answers = line["failed"] or f"{line['answers_equal']} of {line['prompts']}"
        rows.append(f"| {line['method']} | {line['budget'] or '-'} | {kept} | {answers} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model = load("smollm2", torch.float32, torch.device("cpu"), registry=BUILTIN)
    prompts = prompts_of(model, BUILTIN.benchmark(TASK)[1], range(options.first, options.first + options.prompts), CONTEXT)
    cells = cells_of(options.budgets.split(","))
    options.out.mkdir(parents=True, exist_ok=True)
    assert model.tokenizer is not None
    model.tokenizer.chat_template = None  # kvpress's KVzip looks for one, and skips what it would have put before the prompt
    asked = {
        "prompts": [prompt.ids for prompt in prompts],
        "context": CONTEXT,
        "cells": [(cell.name, float(cell.budget.share or 0) if cell.budget else 1.0) for cell in cells],
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "window": WINDOW,
        "kernel": KERNEL,
        "kept_of_every_prompt": True,
    }
    (options.out / "task.json").write_text(json.dumps(asked))
    attention = model.network.config._attn_implementation
    model.network.set_attn_implementation("sdpa")
    model.network.save_pretrained(options.out / "model")
    model.tokenizer.save_pretrained(options.out / "model")
    side = Path(__file__).with_name("kvpress_side.py")
    peer = subprocess.Popen([options.python, str(side), str(options.out)])  # while ours runs
    model.network.set_attn_implementation(attention)
    mine = ours(model, prompts, cells, options.new_tokens)
    (options.out / "ours.json").write_text(json.dumps(mine))
    if peer.wait():
        print(f"{options.python} could not run kvpress", file=sys.stderr)
        return 1
    theirs = json.loads((options.out / "kvpress.json").read_text())
    lines = table(cells, mine, theirs["rows"])
    (options.out / "table.json").write_text(json.dumps(lines, indent=1))
    print(markdown(lines))
    print(f"kvpress {theirs['version']} on transformers {theirs['transformers']}; prompts of {CONTEXT} tokens and a question")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.peers.real", description="kvpress beside this suite on real prompts")
    parser.add_argument("--python", required=True, help="of an environment that has kvpress")
    parser.add_argument("--prompts", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt (default: %(default)s)")
    parser.add_argument("--budgets", default="40%,60%", help="with commas (default: 40%%,60%%)")
    parser.add_argument("--new-tokens", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/peers-real"), help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
