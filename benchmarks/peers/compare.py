"""kvpress and this suite on the same model, prompts, methods and budgets, side by side.

    python -m venv peers && peers/bin/pip install kvpress
    python -m benchmarks.peers.compare --python peers/bin/python --prompts 1 --out results/peers

kvpress pins other versions of transformers and pandas, so it runs in an environment of its own (`kvpress_side.py`). The model
is that of `run_all.py bench sweep`, or `--model smollm2`: then prompts are needles in Python's manual. Settings are made equal
where both have them: SnapKV with a window of 8 and mean-pooling over 7, StreamingLLM with 4 sinks. Kept positions are compared
for SnapKV, StreamingLLM, TOVA and Knorm; PyramidKV and AdaKV share budgets by other rules.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.base import Task
from benchmarks.random_tokens import RandomTokens
from harness.cache import Budget
from harness.cost.microbench import METHODS, speed_model
from harness.engine.measure import keep_freed_memory
from harness.engine.model import Model
from harness.evaluation.plan import token_counter
from harness.evaluation.prompts import Prompt, Protocol, tokenize
from harness.evaluation.sweep import Cell, Sweep
from harness.models.load import load
from harness.registry import BUILTIN
from methods import METHODS as ALL
from methods.base import Eviction, score_prefill
from methods.snapkv import WindowAttention

WINDOW, KERNEL = 8, 7
COMPARED = ("snapkv", "streaming_llm", "tova", "knorm")  # whose kept positions must be the same


def cells_of(methods: Sequence[str], budgets: Sequence[str]) -> list[Cell]:
    """The full cache, and every method at every budget, with the settings that both sides have."""
    found = [Cell("full", ALL["full"], None)]
    for budget in budgets:
        for name in methods:
            method = ALL[name]
            if isinstance(method, Eviction) and isinstance(method.scorer, WindowAttention):
                method = Eviction(WindowAttention(WINDOW, KERNEL, "mean"), method.allocator)
            found.append(Cell(name, method, Budget.parse(budget)))
    return found


def ours(sweep: Sweep, prompts: Sequence[Prompt], cells: Sequence[Cell], new_tokens: int) -> dict[str, Any]:
    """Rows as the other side has them, the seconds of the whole sweep, and the positions kept of the first prompt."""
    start, rows = time.perf_counter(), []
    for number, prompt in enumerate(prompts):
        for cell, outcome in sweep.example(prompt, list(cells), new_tokens):
            if outcome.answer is None or outcome.counts is None:
                raise RuntimeError(f"{cell.name} {cell.budget}: {outcome.failed or outcome.skipped}")
            counts = {"bytes": outcome.counts.bytes_kept, "allocated": outcome.counts.bytes_allocated}
            rows.append({"prompt": number, "cell": cells.index(cell), **counts, "tokens": outcome.answer.tokens})
    return {"seconds": time.perf_counter() - start, "rows": rows, "kept": [kept(sweep, prompts[0], cell) for cell in cells]}


def kept(sweep: Sweep, prompt: Prompt, cell: Cell) -> list[list[list[int]]]:
    """[L][H] positions in order; empty for the full cache."""
    if not isinstance(cell.method, Eviction) or cell.budget is None:
        return []
    ids = torch.tensor(prompt.ids[: prompt.context])
    prefill = sweep.model.prefill(ids, cell.method.needs)[0]
    total = cell.budget.entries(sweep.model.parent_shape, len(ids), "kv")
    selection = cell.method.compress(prefill, total, score_prefill(cell.method.scorer, prefill))
    return [[[] if row.kept is None else row.kept.tolist() for row in rows] for rows in selection]


def shared(mine: Sequence[Sequence[Sequence[int]]], theirs: Sequence[Sequence[Sequence[int]]]) -> float | None:
    """The share of our positions that they keep too; None where they cannot be told."""
    rows = [(set(a), set(b)) for m, t in zip(mine, theirs, strict=False) for a, b in zip(m, t, strict=True)]
    return sum(len(a & b) for a, b in rows) / sum(len(a) for a, _ in rows) if rows else None


def table(cells: Sequence[Cell], mine: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a cell: bytes, answers that agree, positions that agree."""
    found = []
    for number, cell in enumerate(cells):
        budget = "" if cell.budget is None else str(cell.budget)
        share = 1.0 if cell.budget is None else float(cell.budget.share or 0)
        there = [r for r in theirs["rows"] if (r["method"], round(r["share"], 6)) == (cell.name, round(share, 6))]
        here = {row["prompt"]: row for row in mine["rows"] if row["cell"] == number}
        done = [row for row in there if "failed" not in row]
        line: dict[str, Any] = {"method": cell.name, "budget": budget}
        line |= {"ours_bytes": here[0]["bytes"], "ours_allocated": here[0]["allocated"]}
        if done:
            agree = sum(here[row["prompt"]]["tokens"] == row["tokens"] for row in done)
            line |= {"kvpress_bytes": done[0]["bytes"], "kvpress_s": sum(r["total_s"] for r in done), "answers_equal": agree}
        line |= {"prompts": len(done), "failed": next((row["failed"] for row in there if "failed" in row), "")}
        line["kept_equal"] = shared(mine["kept"][number], theirs["kept"][number]) if cell.name in COMPARED else None
        found.append(line)
    return found


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    head = ("method", "budget", "bytes here", "allocated here", "bytes in kvpress", "same answers", "same positions")
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for line in lines:
        answers = f"{line['answers_equal']} of {line['prompts']}" if "answers_equal" in line else line["failed"] or "-"
        same = "-" if line["kept_equal"] is None else f"{line['kept_equal']:.4%}"
        sizes = [f"{line[name]:,}" if name in line else "-" for name in ("ours_bytes", "ours_allocated", "kvpress_bytes")]
        rows.append(f"| {' | '.join([line['method'], line['budget'] or '-', *sizes, answers, same])} |")
    return "\n".join(rows) + "\n"


def prompts_of(model: Model, task: Task, numbers: range, context: int) -> list[Prompt]:
    """The newest `context` tokens of each context, and its question."""
    found = []
    for number in numbers:
        example = task.example(number, 0, token_counter(model))
        prompt = tokenize(model.tokenizer, example, Protocol(prompt="question_after"), model.max_tokens)
        cut = prompt.context - context
        if cut < 0:
            raise SystemExit(f"the context of prompt {number} has {prompt.context} tokens, {context} were asked for")
        found.append(Prompt(prompt.ids[cut:], context))
    return found


def asked_of(name: str, length: int, count: int, new_tokens: int) -> tuple[Model, list[Prompt]]:
    """The model, and prompts with a context of so many tokens."""
    if name:
        needles = f"needle(haystack=python,shortest={length + 64},longest={length + 64},lengths=1,depths=4)"
        model = load(name, torch.float32, torch.device("cpu"))
        return model, prompts_of(model, BUILTIN.benchmark(needles)[1], range(count), length)
    task = RandomTokens(length=length, question=16, max_new_tokens=new_tokens, vocabulary=4096)
    protocol = Protocol(prompt="question_after")
    return speed_model(), [tokenize(None, task.example(n, 0, len), protocol, 10**6) for n in range(count)]


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model, prompts = asked_of(options.model, options.length, options.prompts, options.new_tokens)
    protocol = Protocol(prompt="question_after", stop="none")
    cells = cells_of(options.methods.split(","), options.budgets.split(","))
    options.out.mkdir(parents=True, exist_ok=True)
    asked = {
        "prompts": [prompt.ids for prompt in prompts],
        "context": prompts[0].context,
        "cells": [(cell.name, float(cell.budget.share or 0) if cell.budget else 1.0) for cell in cells],
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "window": WINDOW,
        "kernel": KERNEL,
    }
    (options.out / "task.json").write_text(json.dumps(asked))
    mine = ours(Sweep(model, protocol, with_fidelity=False), prompts, cells, options.new_tokens)
    model.network.set_attn_implementation("sdpa")
    model.network.save_pretrained(options.out / "model")
    side = Path(__file__).with_name("kvpress_side.py")
    if subprocess.run([options.python, str(side), str(options.out)], check=False).returncode:
        print(f"{options.python} could not run kvpress", file=sys.stderr)
        return 1
    theirs = json.loads((options.out / "kvpress.json").read_text())
    lines = table(cells, mine, theirs)
    (options.out / "table.json").write_text(json.dumps(lines, indent=1))
    print(markdown(lines))
    total = sum(line.get("kvpress_s", 0.0) for line in lines)
    versions = f"kvpress {theirs['version']} on transformers {theirs['transformers']}"
    about = f"{len(cells)} cells, {len(prompts)} prompts of {options.length} tokens, {options.threads} threads"
    print(f"{about}: {mine['seconds']:.1f} s here, {total:.1f} s with {versions}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.peers.compare", description="kvpress beside this suite, same cells")
    parser.add_argument("--python", required=True, help="of an environment that has kvpress")
    parser.add_argument("--model", default="", help="such as smollm2 (default: that of `bench sweep`)")
    parser.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument("--budgets", default="90%,75%,50%,25%,10%", help="(default: 90%%,75%%,50%%,25%%,10%%)")
    parser.add_argument("--prompts", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=4000, help="tokens of a context (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/peers"), help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
