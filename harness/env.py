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

from results.store import write_json

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "accelerate", "datasets", "lm-eval", "triton", "flash-attn", "gguf")


def environment(device: torch.device, checked: Mapping[str, object] | None = None) -> dict[str, object]:
    """`checked`: what the check of a model's attention found, where one is there."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **_commit(),
        **({"attention": dict(checked)} if checked else {}),
    }


def record_environment(out: Path, device: torch.device) -> str:
    """As `write_environment`, of this process on a device."""
    return write_environment(out, environment(device))


def write_environment(out: Path, found: dict[str, object]) -> str:
    """Writes `<out>/env/<id>.json` if it is not there, and gives the id.

    Raises:
        StoreError: the folder cannot be written to.
    """
    name = environment_id(found)
    if not (path := out / "env" / f"{name}.json").exists():
        write_json(path, found)
    return name


def environment_id(environment: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(environment, indent=1, sort_keys=True).encode()).hexdigest()[:12]


def available_bytes() -> int | None:
    """Of the machine's memory, what may still be taken without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


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
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():  # installed: a checkout around it is not ours
        return {"commit": None, "clean": None}
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        what = ["git", "status", "--porcelain", "--", ":/", ":!/results", ":!/reports/reference"]  # what a run writes is no code
        changed = subprocess.run(what, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean": None}
    return {"commit": head.stdout.strip(), "clean": not changed.stdout.strip()}
