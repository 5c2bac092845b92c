"""From parsed options to requests. Texts become values here; what the values may be is the requests' business."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness.cluster.options import ProcessOptions, RayOptions, WorkerOptions
from harness.errors import BadRequest
from harness.evaluation.request import OUT, JudgeOptions, RunRequest, Shard
from harness.registry import Registry, split

if TYPE_CHECKING:
    from harness.cluster.simulate import Times
    from harness.cost.request import CostRequest
    from harness.papers.calibrate import CalibrationRequest
    from harness.papers.importance import ImportanceRequest
    from harness.papers.reproduce import ReproduceRequest
    from harness.papers.token_importance import TokenImportanceRequest
    from harness.training.request import TrainRequest

T = TypeVar("T")

SPEED_SUITES = {"sweep-speed": "sweep", "attention-speed": "attention", "kernel-speed": "kernel"}  # as they were called


def run_request(options: argparse.Namespace) -> RunRequest:
    """
    Raises:
        BadRequest: an option that makes no sense.
    """
    given = vars(options)
    if given.get("suite") in SPEED_SUITES:
        raise BadRequest(f"{given['suite']} is no suite of scores or costs: run_all.py bench {SPEED_SUITES[given['suite']]}")
    found = _plain(RunRequest, given)
    for option, field in (("model", "models"), ("methods", "methods"), ("budgets", "budgets"), ("benchmarks", "benchmarks")):
        found |= _several(given, option, field)
    found |= _several(given, "prompt", "prompts") | _several(given, "routing", "routings")
    found |= _numbers(given, "seed", "seeds", least=None)
    found |= _paths(given, "head_scores")
    found |= _cluster(given)
    if "shard" in given:
        found["shard"] = Shard.parse(given["shard"])
    elif given.get("command") in ("run", "plan"):
        found["shard"] = _array_shard("ray" in given)
    if "protect" in given:
        found["protect"] = ":".join(part.strip() for part in given["protect"].split(","))
    if "no_fidelity" in given:
        found["fidelity"] = False
    if "judge_url" in given or "judge_model" in given:
        workers = {"workers": given["judge_workers"]} if "judge_workers" in given else {}
        found["judge"] = JudgeOptions(given.get("judge_url", ""), given.get("judge_model", ""), **workers)
    return RunRequest(**found)


def _array_shard(on_ray: bool) -> Shard:
    """The share of the examples that a task of a Slurm array takes."""
    shard = Shard.of_array(os.environ)
    if shard == Shard():
        return shard
    if on_ray:
        raise BadRequest(
            "--ray in a Slurm array: the array's tasks divide the examples already: take a job without --array for Ray"
        )
    print(f"shard {shard.number}/{shard.of}, as the task of a Slurm array", file=sys.stderr)
    return shard


def _cluster(given: dict[str, Any]) -> dict[str, WorkerOptions]:
    """
    Raises:
        BadRequest: options of workers of Ray without Ray.
    """
    sizes = {name: given[name] for name in ("workers", "gpus_per_worker") if name in given}
    if "ray" in given:
        return {"cluster": RayOptions(given["ray"].strip(), **sizes)}
    if "gpus_per_worker" in sizes:
        raise BadRequest("--gpus-per-worker is for workers of Ray: add --ray local, or an address")
    return {"cluster": ProcessOptions(sizes["workers"])} if sizes else {}


def has_cost(options: argparse.Namespace) -> bool:
    """Of several shards the first measures the cost: see `cost_behind`."""
    given = vars(options)
    return (Shard.parse(given["shard"]) if "shard" in given else Shard.of_array(os.environ)).number == 1


def cost_request(options: argparse.Namespace) -> CostRequest:
    """
    Raises:
        BadRequest: an option that makes no sense.
    """
    from harness.cost.request import LARGEST, CostRequest

    given = vars(options)
    if "protect" in given:
        raise BadRequest("--protect is for suites of scores; the cost of one method so: --methods 'snapkv(protect=4:8)'")
    found = _plain(CostRequest, given) | _cluster(given)
    for option, field in (("model", "models"), ("methods", "methods"), ("budgets", "budgets"), ("decode", "decodes")):
        found |= _several(given, option, field)
    found |= _numbers(given, "contexts", "contexts") | _numbers(given, "batches", "batches", {"largest": LARGEST})
    if "max_new_tokens" in given:
        found["new_tokens"] = given["max_new_tokens"]
    return CostRequest(**found)


def train_request(options: argparse.Namespace, registry: Registry) -> TrainRequest:
    from harness.training.request import TrainRequest

    given = vars(options)
    return TrainRequest(**(_plain(TrainRequest, given) | {"conversion": _conversion(given, registry)}))


def _conversion(given: dict[str, Any], registry: Registry) -> str:
    """The conversion as it is written in names."""
    name = given["conversion"]
    if name not in registry.conversions:
        raise BadRequest(f"no conversion {name!r}; known: {', '.join(registry.conversions)}")
    needed = registry.conversions[name].numbers
    numbers = str(given.get(needed) or "") if needed else ""
    if needed and not numbers:
        raise BadRequest(f"--conversion {name} needs --{needed}")
    if "-" in numbers:
        raise BadRequest(f"--{needed} {numbers} must not be negative")
    return "-".join(part for part in (name, numbers, given.get("ablation")) if part)


def importance_request(options: argparse.Namespace) -> ImportanceRequest:
    from harness.papers.importance import ImportanceRequest

    return ImportanceRequest(**(_plain(ImportanceRequest, vars(options)) | _cluster(vars(options))))


def calibration_request(options: argparse.Namespace) -> CalibrationRequest:
    from harness.papers.calibrate import CalibrationRequest

    return CalibrationRequest(**_plain(CalibrationRequest, vars(options)))


def tokens_request(options: argparse.Namespace) -> TokenImportanceRequest:
    from harness.papers.token_importance import TokenImportanceRequest

    return TokenImportanceRequest(**_plain(TokenImportanceRequest, vars(options)))


def reproduce_request(options: argparse.Namespace) -> ReproduceRequest:
    from harness.papers.reproduce import ReproduceRequest

    given = vars(options)
    return ReproduceRequest(**(_plain(ReproduceRequest, given) | _paths(given, "head_scores") | _cluster(given)))


def simulation(given: dict[str, Any]) -> tuple[Times, int, int | None]:
    """Recorded times, how many workers to simulate, and how many units, if that was said.

    Raises:
        BadRequest: nothing was recorded, or a number that makes no sense.
    """
    from harness.cluster.simulate import Times
    from harness.evaluation.spread import TIMES
    from results.lines import json_lines

    for name in ("workers", "units", "scale"):
        if name in given and not given[name] > 0:
            raise BadRequest(f"--{name} {given[name]:g} must be above 0")
    times = Times.of(line for _, line in json_lines(given.get("out", OUT) / TIMES))
    return times.scaled(given.get("scale", 1.0)), given.get("workers", 1000), given.get("units")


def betas_of(options: argparse.Namespace) -> Sequence[float] | None:
    if "betas" not in vars(options):
        return None
    try:
        return [float(text) for text in split(options.betas)]
    except ValueError:
        raise BadRequest(f"--betas {options.betas!r} are not numbers with commas") from None


def report_folders(options: argparse.Namespace) -> list[Path]:
    folders: list[Path] = vars(options).get("out") or [OUT]
    if twice := [folder for number, folder in enumerate(folders) if folder in folders[:number]]:
        raise BadRequest(f"--out names {twice[0]} twice")
    return folders


def picture_formats(options: argparse.Namespace) -> tuple[str, ...]:
    """Empty: the report's own choice."""
    from reports.plots import FORMATS

    if "pictures" not in vars(options):
        return ()
    found = _texts("pictures", options.pictures)
    if unknown := [name for name in found if name not in FORMATS]:
        raise BadRequest(f"--pictures {unknown[0]!r} is no format; known: {', '.join(FORMATS)}")
    return found


def _plain(kind: Callable[..., T], given: dict[str, Any]) -> dict[str, Any]:
    """Options that are fields of the request as they are."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    found = {name: value for name, value in given.items() if name in names}
    for name, value in found.items():
        if value == "":
            raise BadRequest(f"--{name.replace('_', '-')} is empty")
    if given.get("plugin"):
        found["plugins"] = tuple(Path(path) for path in given["plugin"])
    return found


def _texts(option: str, text: str) -> tuple[str, ...]:
    parts = tuple(split(text))
    if not parts:
        raise BadRequest(f"--{option.replace('_', '-')} is empty: leave it out, or name something")
    return parts


def _several(given: dict[str, Any], option: str, field: str) -> dict[str, tuple[str, ...]]:
    return {field: _texts(option, given[option])} if option in given else {}


def _paths(given: dict[str, Any], option: str) -> dict[str, tuple[Path, ...]]:
    return {option: tuple(map(Path, _texts(option, given[option])))} if option in given else {}


def _numbers(
    given: dict[str, Any], option: str, field: str, words: dict[str, int] | None = None, least: int | None = 1
) -> dict[str, tuple[int, ...]]:
    """Whole numbers with commas; a word may stand for one."""
    if option not in given:
        return {}
    found = []
    for text in _texts(option, given[option]):
        try:
            number = (words or {}).get(text)
            found.append(int(text) if number is None else number)
        except ValueError:
            above = "" if least is None else f" of at least {least}"
            raise BadRequest(f"--{option} {given[option]!r} must be whole numbers{above}, with commas") from None
        if least is not None and number is None and found[-1] < least:
            raise BadRequest(f"--{option} {text} must be at least {least}")
    return {field: tuple(found)}
