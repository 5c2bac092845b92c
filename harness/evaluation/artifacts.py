"""What a report shows besides rows: data files, head scores that were used, how a mixSGA variant routes a text, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.base import reads_data
from harness.cache import Needs, Routing
from harness.engine.model import Model
from harness.evaluation.plan import Grid, Unit, opened
from results.store import append_line, own_name, slug, write_json

SHOWN = 400  # tokens of a text whose experts are shown


def record_command(out: Path, arguments: Sequence[str]) -> None:
    """Adds the command to `<out>/commands.jsonl`."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(out / "commands.jsonl", json.dumps({"when": when, "command": shlex.join(["python", "run_all.py", *arguments])}))


def record_artifacts(out: Path, grid: Grid) -> None:
    """Writes what belongs to a whole grid: `data/` and `heads/`.

    Raises:
        StoreError: the folder cannot be written to.
    """
    for task in grid.tasks.values():
        if task.data and reads_data(task):
            records = task.records()
            about = {"source": records.source, "sha256": records.sha256, "records": len(records.rows), "licence": records.licence}
            write_json(out / "data" / f"{records.sha256[:12]}.json", about)
    for method in grid.methods.values():
        if (scores := method.given_head_scores) is not None:
            about = {"variant": scores.variant, "kind": scores.kind, "attempts": scores.attempts, "successes": scores.successes}
            write_json(out / "heads" / f"{scores.sha256}.json", {**about, "values": scores.values.tolist()})


def _routing_file(folder: Path, model: Model) -> Path:
    """Named by the model; where another of its name has that file, by its revision too."""
    path = folder / f"{slug(model.name)}.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        theirs = (about["model"], about.get("revision", model.revision))
    except FileNotFoundError:
        return path
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        theirs = ("", "")
    mine = (model.name, model.revision)
    return path if theirs == mine else folder / f"{own_name('@'.join(mine))}.json"


def record_routing(out: Path, model: Model, unit: Unit) -> None:
    """Writes `<out>/routing/<model>.json`, once: the expert of each token of a prompt in words, by routing and layer."""
    if not model.routers or model.tokenizer is None or not unit.example.prompt:
        return
    path = _routing_file(out / "routing", model)
    if path.exists():
        return
    prompts = opened(model, unit).prompts
    if not prompts:
        return
    ids = prompts[0].ids
    experts: dict[str, Any] = {}
    for routing in get_args(Routing):
        model.prefill(torch.tensor(ids, device=model.device), Needs(), routing=routing)
        experts[routing] = [router.assigned[0].tolist() for router in model.routers]
    most = max(len(router.ratios) for router in model.routers)
    shares = {
        name: [[layer.count(expert) / len(layer) for expert in range(most)] for layer in layers]
        for name, layers in experts.items()
    }
    about = {
        "model": model.name,
        "revision": model.revision,
        "benchmark": unit.task.name,
        "tokens": len(ids),
        "words": [model.tokenizer.decode([token]) for token in ids[:SHOWN]],
        "experts": {name: [layer[:SHOWN] for layer in layers] for name, layers in experts.items()},
        "shares": shares,
    }
    write_json(path, about)
