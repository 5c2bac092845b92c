"""What a report shows besides rows: head scores that were used, how a mixSGA variant routes a text, commands that were run."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from harness.cache import Needs
from harness.engine.model import Model
from harness.evaluation.plan import Work, left_to_do
from harness.evaluation.prompts import CannotPrompt, tokenize
from methods.base import Eviction
from results.store import append_line, slug, write_json

SHOWN = 400  # tokens of a text whose experts are shown


def record_command(out: Path, arguments: list[str]) -> None:
    """Adds the command to `<out>/commands.jsonl`."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(out / "commands.jsonl", json.dumps({"when": when, "command": shlex.join(["python", "run_all.py", *arguments])}))


def record_heads(out: Path, work: Work) -> None:
    """Writes `<out>/heads/<sha256>.json` for the head scores of every method."""
    for method in work.methods.values():
        scores = getattr(method.allocator, "scores", None) if isinstance(method, Eviction) else None
        if scores is None:
            continue
        about = {"variant": scores.variant, "kind": scores.kind, "attempts": scores.attempts, "successes": scores.successes}
        write_json(out / "heads" / f"{scores.sha256}.json", {**about, "values": scores.values.tolist()})


def record_routing(out: Path, model: Model, work: Work) -> None:
    """Writes `<out>/routing/<model>.json`: the expert of each token of a prompt in words, by routing and layer."""
    path = out / "routing" / f"{slug(model.name)}.json"
    if not model.routers or model.tokenizer is None or path.exists():
        return
    found = _first_prompt(model, work)
    if found is None:
        return
    benchmark, ids = found
    experts: dict[str, Any] = {}
    for routing in ("expert_choice", "argmax"):
        model.prefill(torch.tensor(ids, device=model.device), Needs(), routing=routing)  # type: ignore[arg-type]
        experts[routing] = [router.assigned[0].tolist() for router in model.routers]
    groups = [len(router.ratios) for router in model.routers]
    words = [model.tokenizer.decode([token]) for token in ids[:SHOWN]]
    shown = {name: [layer[:SHOWN] for layer in layers] for name, layers in experts.items()}
    shares = {
        name: [[layer.count(expert) / len(layer) for expert in range(max(groups))] for layer in layers]
        for name, layers in experts.items()
    }
    about = {"model": model.name, "benchmark": benchmark, "tokens": len(ids), "words": words, "experts": shown, "shares": shares}
    write_json(path, about)


def _first_prompt(model: Model, work: Work) -> tuple[str, list[int]] | None:
    for todo in left_to_do(model, work, None):
        if todo.example.prompt:
            try:
                return todo.task.name, tokenize(model.tokenizer, todo.example, todo.protocol, todo.limit, todo.task.forced).ids
            except CannotPrompt:
                continue
    return None
