"""The environment of a run: what could move a time, and which code it was. No names of machines or people."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.base import Task
from results.store import write_json

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "accelerate", "datasets", "lm-eval", "triton", "flash-attn")


def environment(device: torch.device) -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **_commit(),
    }


def record_environment(out: Path, device: torch.device) -> str:
    """Writes `<out>/env/<id>.json` if it is not there, and gives the id.

    Raises:
        StoreError: the folder cannot be written to.
    """
    found = environment(device)
    name = environment_id(found)
    if not (path := out / "env" / f"{name}.json").exists():
        write_json(path, found)
    return name


def environment_id(environment: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(environment, indent=1, sort_keys=True).encode()).hexdigest()[:12]


def record_data(out: Path, tasks: Mapping[str, Task]) -> None:
    """Writes `<out>/data/<sha256>.json` for every data file: where it came from, its records, its licence.

    Raises:
        StoreError: the folder cannot be written to.
    """
    for task in tasks.values():
        if not task.data:
            continue
        records = task.records()  # type: ignore[attr-defined]
        about = {"source": records.source, "sha256": records.sha256, "records": len(records.rows), "licence": records.licence}
        write_json(out / "data" / f"{records.sha256[:12]}.json", about)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def _commit() -> dict[str, object]:
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        what = ["git", "status", "--porcelain", "--", ":/", ":!/results", ":!/reports/reference"]  # what a run writes is no code
        changed = subprocess.run(what, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": None}
    return {"commit": head.stdout.strip(), "clean": not changed.stdout.strip()}
