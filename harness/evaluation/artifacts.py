"""What a report shows besides rows: data files, head scores that were used, how a mixSGA variant routes a text, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
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


def artifacts_of(grid: Grid) -> dict[str, Any]:
    """What belongs to a whole grid: the files of `data/` and `heads/`, by their place in the output folder."""
    found: dict[str, Any] = {}
    for task in grid.tasks.values():
        if task.data and reads_data(task):
            records = task.records()
            about = {"source": records.source, "sha256": records.sha256, "records": len(records.rows), "licence": records.licence}
            found[f"data/{records.sha256[:12]}.json"] = about
    for method in grid.methods.values():
        if (scores := method.given_head_scores) is not None:
            place, about = scores.artifact
            found[place] = about
    return found


def write_artifacts(out: Path, found: Mapping[str, Any]) -> None:
    """
    Raises:
        StoreError: the folder cannot be written to.
    """
    for place, about in found.items():
        write_json(out / place, about)


def routing_file(folder: Path, model: str, revision: str) -> Path:
    """Named by the model; where another of its name has that file, by its revision too."""
    path = folder / f"{slug(model)}.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        theirs = (about["model"], about.get("revision", revision))
    except FileNotFoundError:
        return path
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        theirs = ("", "")
    return path if theirs == (model, revision) else folder / f"{own_name(f'{model}@{revision}')}.json"


def record_routing(out: Path, model: Model, unit: Unit) -> None:
    """Writes `<out>/routing/<model>.json`, once: see `routing_of`."""
    if not has_routing(model, unit) or (path := routing_file(out / "routing", model.name, model.revision)).exists():
        return
    about = routing_of(model, unit)
    if about is not None:
        write_json(path, about)


def has_routing(model: Model, unit: Unit) -> bool:
    """Is the prompt a text that the model routes?"""
    return bool(model.routers) and model.tokenizer is not None and bool(unit.example.prompt)


def routing_of(model: Model, unit: Unit) -> dict[str, Any] | None:
    """The expert of each token of a prompt in words, by routing and layer; None where the unit has no prompt."""
    prompts = opened(model, unit).prompts
    if not prompts or model.tokenizer is None:
        return None
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
    return {
        "model": model.name,
        "revision": model.revision,
        "benchmark": unit.task.name,
        "tokens": len(ids),
        "words": [model.tokenizer.decode([token]) for token in ids[:SHOWN]],
        "experts": {name: [layer[:SHOWN] for layer in layers] for name, layers in experts.items()},
        "shares": shares,
    }
