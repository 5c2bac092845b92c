"""What a run can be asked for, as one frozen value: the command line, `reproduce`, `beta` and Python callers build the same.

Loads nothing: a request is checked as far as it can be without a model, a benchmark or torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from harness.cache import Chat, Granularity, PromptProtocol, Routing
from harness.cluster.options import RayOptions, WorkerOptions
from harness.errors import BadRequest

OUT = Path("results/default")
DTYPES = ("float32", "bfloat16", "float16")
Part = Literal["all", "held_out", "test"]


@dataclass(frozen=True)
class Shard:
    """Every `of`-th of the examples that are asked for, from the `number`-th on."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise BadRequest(f"shard {text!r} is not of the form i/n with 1 <= i <= n")
        return cls(int(number), int(of))

    @classmethod
    def of_array(cls, environment: Mapping[str, str]) -> Shard:
        """The share of a task of a Slurm array; of any other process, everything.

        Raises:
            BadRequest: an array whose numbers are not evenly spaced, which does not say which share is this one's.
        """
        names = ("ID", "COUNT", "MIN", "STEP")
        texts = {name: environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names}
        if not (texts["ID"].isdecimal() and texts["COUNT"].isdecimal()):
            return cls()
        task, count, first, step = (int(texts[name]) if texts[name].isdecimal() else 1 for name in names)
        number = (task - first) // max(1, step) + 1
        if not 1 <= number <= count or (task - first) % max(1, step):
            raise BadRequest(f"task {task} of a Slurm array of {count} is not one of evenly spaced ones: say --shard i/{count}")
        return cls(number, count)


@dataclass(frozen=True)
class JudgeOptions:
    """An OpenAI-compatible endpoint that rates answers to instructions. Its key comes from the environment."""

    url: str
    model: str
    workers: int = 8  # questions under way at once

    def __post_init__(self) -> None:
        if not (self.url and self.model):
            raise BadRequest("a judge needs both --judge-url and --judge-model")
        if self.workers < 1:
            raise BadRequest(f"--judge-workers {self.workers} must be at least 1")


@dataclass(frozen=True)
class RunRequest:
    """A suite, and what is changed of it. What is left empty is the suite's.

    Raises:
        BadRequest: a field that makes no sense by itself.
    """

    suite: str = "default"
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()  # as they are named on the command line: "snapkv(kernel=5)"
    budgets: tuple[str, ...] = ()  # "128" entries a stored head, "25%" of the full cache
    benchmarks: tuple[str, ...] = ()
    prompts: tuple[PromptProtocol, ...] = ()
    limit: int | None = None  # examples of each benchmark
    seeds: tuple[int, ...] = ()  # of generated examples and sampled answers
    temperature: float | None = None
    fidelity: bool | None = None  # compare with the full cache token by token?
    chat: Chat | None = None
    granularity: Granularity = "kv"
    protect: str | None = None  # "4:8": first and last positions that every method protects, beside each at its own; "10%:10%"
    routings: tuple[Routing, ...] = ("expert_choice",)  # of mixSGA prefills
    truncation: int | None = None  # tokens of a prompt; None: what the model has positions for
    max_new_tokens: int | None = None  # of an answer; None: the benchmark's own
    examples: Part = "all"  # or the 15 % held out, or the other 85 %
    shard: Shard = Shard()
    out: Path = OUT
    data_dir: Path | None = None  # looked into before the hub
    head_scores: tuple[Path, ...] = ()  # files or folders
    plugins: tuple[Path, ...] = ()
    revision: str | None = None  # of a hub id
    device: str | None = None  # None: a GPU if there is one
    dtype: str | None = None  # None: float32 on a CPU, bfloat16 on a GPU
    cell_bytes: int | None = None  # rows of the cells decoded together, at most
    judge: JudgeOptions | None = None
    own_rows: bool = False  # rows in files of this process alone, without locks
    cluster: WorkerOptions | None = None  # None: this process

    def __post_init__(self) -> None:
        if isinstance(self.cluster, RayOptions) and self.shard != Shard():
            raise BadRequest("--ray gives every worker its share of the examples itself: leave --shard out")
        tell_apart(self, ("models", "methods", "budgets", "benchmarks", "prompts", "seeds", "routings"))
        for what, asked, known in (
            ("prompt protocol", self.prompts, get_args(PromptProtocol)),
            ("routing", self.routings, get_args(Routing)),
            ("chat", (self.chat,) if self.chat else (), get_args(Chat)),
            ("granularity", (self.granularity,), get_args(Granularity)),
            ("part of the examples", (self.examples,), get_args(Part)),
            ("dtype", (self.dtype,) if self.dtype else (), DTYPES),
        ):
            if unknown := sorted(set(asked) - set(known)):
                raise BadRequest(f"no {what} {unknown[0]!r}; known: {', '.join(known)}")
        at_least(self, limit=1, truncation=2, max_new_tokens=1, cell_bytes=1, temperature=0)
        if self.temperature == math.inf:
            raise BadRequest("--temperature inf must be a number: at 0 the best token is taken")
        if any(seed < 0 for seed in self.seeds):
            raise BadRequest(f"--seed {min(self.seeds)} must not be negative")


def tell_apart(request: Any, names: Sequence[str]) -> None:
    """
    Raises:
        BadRequest: one of these fields names something twice.
    """
    for name in names:
        values = getattr(request, name)
        twice = next((value for number, value in enumerate(values) if value in values[:number]), None)
        if twice is not None:
            raise BadRequest(f"--{option_of(name)} names {twice} twice")


def at_least(request: Any, **least: float) -> None:
    """
    Raises:
        BadRequest: a number below what it must at least be.
    """
    for name, smallest in least.items():
        given = getattr(request, name)
        if given is not None and not given >= smallest:  # so that NaN is refused too
            raise BadRequest(f"--{option_of(name)} {given:g} must be at least {smallest:g}")


SINGULAR = {"models": "model", "prompts": "prompt", "seeds": "seed", "routings": "routing"}


def option_of(field: str) -> str:
    """The option that sets a field."""
    return SINGULAR.get(field, field).replace("_", "-")


def narrowed(request: RunRequest) -> bool:
    """Is anything of the suite's own changed? Then it is no longer that suite."""
    own = ("models", "methods", "budgets", "benchmarks", "prompts")
    return any(getattr(request, field.name) for field in fields(request) if field.name in own)
