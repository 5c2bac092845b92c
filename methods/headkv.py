"""HeadKV: heads that retrieve, or that retrieve and reason, keep more. A static share of the cache for every head.

Fu et al., "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning", ICLR 2025.
arxiv.org/abs/2410.19258
Here are the scores of a run (equations 1 and 2), the scores of a model as an artefact, and the two allocators: `HeadShares`
spends exactly the budget, `PaperHeadShares` follows the authors' integers, which lose what a clamped head cannot hold.
Entries are ranked as by SnapKV. docs/methods/headkv.md explains paper, code and our choices.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness.errors import UserError
from harness.files import whole
from methods.allocators import Uniform
from methods.base import Rows, UsesHeadScores
from methods.sharing import share_out

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["r", "er", "r2", "duo"]
FORMAT = "head-scores/1"
PUBLISHED = {"_retrieval_heads": "r", "_retrieval_reasoning_heads": "r2"}  # endings of the authors' files


def copied(attention: Tensor, span: tuple[int, int], ids: Tensor, said: Tensor) -> Tensor:
    """Equation 1, of one run: how often a head looks most at the token that the model is about to copy out of the span.

    Args:
        attention: [Hq, N, n], probabilities of the N decode steps over the n tokens so far; later ones 0.
        span: [start, stop) of the answer in the context; ids: [n]; said: [N], what came out of each step.

    Returns:
        [Hq], at most 1
    """
    start, stop = span
    top = attention.argmax(-1)  # [Hq, N]
    hit = (top >= start) & (top < stop) & (ids[top] == said)
    return hit[:, : stop - start].sum(1) / (stop - start)


def attended(attention: Tensor, span: tuple[int, int]) -> Tensor:
    """Equation 2, of one run: attention on the span, as far as it is among a head's N most attended, N the span's length.

    Args:
        attention: [Hq, N', n], of which the first N steps count.

    Returns:
        [Hq], at most 1
    """
    start, stop = span
    best = attention[:, : stop - start].topk(min(stop - start, attention.shape[2]), -1)
    inside = (best.indices >= start) & (best.indices < stop)
    return (best.values * inside).sum((1, 2)) / (stop - start)


class BadScores(UserError):
    """Head scores that cannot be used, in one line."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How much each query head of one variant matters. Never inherited by another variant."""

    variant: str  # the model's name, with "+conversion"
    revision: str  # of the weights; "" where the source does not say
    kind: Kind
    runs: np.ndarray  # [R, L, Hq] float64, one score a successful run
    attempts: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = f"{self.kind} head scores of {self.variant}"
        if self.runs.ndim != 3 or not self.runs.size:
            raise BadScores(f"{name}: no run with a score, of {self.attempts} attempts")
        if not np.isfinite(self.runs).all():
            raise BadScores(f"{name}: not all of them are numbers")
        if (self.runs < 0).any():
            raise BadScores(f"{name}: some are below 0")
        if not self.runs.any():
            raise BadScores(f"{name}: all of them are 0")

    @property
    def successes(self) -> int:
        return len(self.runs)

    @cached_property
    def values(self) -> np.ndarray:
        """[L, Hq] float64: the mean over the successful runs."""
        return np.asarray(self.runs.mean(0))

    @cached_property
    def sha256(self) -> str:
        what = f"{self.variant}/{self.revision}/{self.kind}/{self.runs.shape}".encode()
        return hashlib.sha256(what + np.ascontiguousarray(self.values).tobytes()).hexdigest()[:16]

    @property
    def artifact(self) -> tuple[str, dict[str, Any]]:
        """For the record of a run: its place in the output folder, and what stands there."""
        about = {"variant": self.variant, "kind": self.kind, "attempts": self.attempts, "successes": self.successes}
        return f"heads/{self.sha256}.json", {**about, "values": self.values.tolist()}

    def __repr__(self) -> str:
        return f"HeadScores({self.kind}, sha256={self.sha256})"

    def check(self, variant: str, revision: str, layers: int, heads: int) -> None:
        """
        Raises:
            BadScores: these are the scores of another variant or of other weights, or of another shape.
        """
        ours, theirs = self.variant.rsplit("/", 1)[-1], variant.rsplit("/", 1)[-1]
        if ours != theirs or (self.revision and self.revision != revision):
            raise BadScores(
                f"{self.kind} head scores belong to {self.variant} {self.revision}".rstrip()
                + f", the model is {variant} {revision}: scores are not inherited; estimate its own with `run_all.py importance`"
            )
        if self.runs.shape[1:] != (layers, heads):
            found = "{} layers x {} heads".format(*self.runs.shape[1:])
            raise BadScores(f"{self.kind} head scores of {self.variant} are of {found}, the model has {layers} x {heads}")

    def save(self, path: Path) -> None:
        """As JSON, one line a head."""
        heads = {
            f"{layer}-{head}": self.runs[:, layer, head].tolist()
            for layer in range(self.runs.shape[1])
            for head in range(self.runs.shape[2])
        }
        about: dict[str, Any] = {"format": FORMAT, "variant": self.variant, "revision": self.revision, "kind": self.kind}
        about |= {"attempts": self.attempts, "successes": self.successes, "settings": dict(self.settings)}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
        lines.append(' "runs": {\n' + ",\n".join(f'  "{key}": {json.dumps(runs)}' for key, runs in heads.items()) + "\n }")
        with whole(path) as draft:
            draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> HeadScores:
        """Ours, or the authors' published JSON (also .xz), whose name says model and kind.

        Raises:
            BadScores: no such file, not JSON, heads missing, or what the class itself refuses.
        """
        try:
            data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
            found = json.loads(data)
        except (OSError, lzma.LZMAError, ValueError) as error:
            raise BadScores(f"head scores {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if not isinstance(found, dict):
            raise BadScores(f"head scores {path}: a JSON object is expected, of one list a head")
        if "format" not in found:
            return cls._published(path, found)
        if found["format"] != FORMAT:
            raise BadScores(f"head scores {path} are of the format {found['format']!r}, this version reads {FORMAT}")
        try:
            about = (found["variant"], found["revision"], found["kind"])
            return cls(*about, _runs(path, found["runs"]), found["attempts"], found["settings"])
        except KeyError as error:
            raise BadScores(f"head scores {path}: no field {error}") from None

    @classmethod
    def _published(cls, path: Path, found: dict[str, Any]) -> HeadScores:
        stem = path.name.split(".json")[0]
        for ending, kind in PUBLISHED.items():
            if stem.endswith(ending):
                runs = _runs(path, found)
                return cls(stem.removesuffix(ending), "", kind, runs, len(runs), {"source": "published"})  # type: ignore[arg-type]
        raise BadScores(f"head scores {path}: a file without a format is named MODEL{' or MODEL'.join(PUBLISHED)}.json")


def _runs(path: Path, heads: Mapping[str, Any]) -> np.ndarray:
    """{"layer-head": [score, ...]} -> [R, L, Hq], by key and never by order."""
    places = {}
    for key in heads:
        match = re.fullmatch(r"(\d+)-(\d+)", str(key))
        if not match:
            raise BadScores(f"head scores {path}: {key!r} is no head, such as 3-17")
        places[int(match[1]), int(match[2])] = heads[key]
    layers, width = (max((place[axis] for place in places), default=-1) + 1 for axis in (0, 1))
    missing = [f"{at}-{head}" for at in range(layers) for head in range(width) if (at, head) not in places]
    if missing or not places:
        raise BadScores(f"head scores {path}: heads are missing: {', '.join(missing[:3]) or 'all'}")
    try:
        runs = np.array([[places[at, head] for head in range(width)] for at in range(layers)], dtype=np.float64)
    except (TypeError, ValueError):
        raise BadScores(f"head scores {path}: every head needs a list of equally many numbers") from None
    if runs.ndim != 3:
        raise BadScores(f"head scores {path}: every head needs a list of numbers")
    return runs.transpose(2, 0, 1)


@dataclass(frozen=True)
class HeadShares(UsesHeadScores):
    """A guaranteed part for every row, the rest by head scores; what a full row cannot hold goes to the others.

    Of the entries beyond what is protected, the share 1 - 1 / beta goes out evenly and 1 / beta by score: a smaller beta
    trusts the scores more; a large one, or equal scores, is SnapKV. A row weighs as much as the query heads that read it
    together, times its share of the prompt's tokens.
    """

    kind: Kind = "r2"
    beta: float = 1.2
    temperature: float = 1.0  # scores to this power
    base: int = 0  # entries guaranteed to a row beyond the protected ones; 0: beta says how many
    shuffle: int = 0  # a seed that deals the scores out to other heads, as a control; 0: they stay where they belong
    scores: HeadScores | None = None  # those of the model: put in before the method runs

    def __post_init__(self) -> None:
        if self.kind not in ("r", "er", "r2"):
            raise ValueError(f"kind {self.kind!r} is none of r, er, r2")
        if not self.beta > 1:
            raise ValueError(f"beta {self.beta} must be above 1: the share 1 - 1 / beta of a budget is guaranteed to every head")
        if not self.temperature > 0 or self.base < 0:
            raise ValueError(f"temperature {self.temperature} must be above 0 and base {self.base} not below it")

    @property
    def head_score_kind(self) -> str:
        return self.kind

    @property
    def given_head_scores(self) -> HeadScores | None:
        return self.scores

    def with_head_scores(self, scores: HeadScores) -> HeadShares:
        return replace(self, scores=scores)

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        part = Uniform().counts(rows, total, scores) - rows.floor
        least = np.minimum(self.base, part) if self.base else part * (1 - 1 / self.beta)
        return share_out(total, self.weights(rows), rows.floor, rows.length, rows.floor + least)

    def weights(self, rows: Rows) -> np.ndarray:
        """What each row weighs, [R]."""
        until = np.pad(self.shares().cumsum(1), ((0, 0), (1, 0)))  # [L, Hq + 1]
        read_by = until[rows.layer, rows.first + rows.width] - until[rows.layer, rows.first]
        return np.maximum(read_by, 0.0) * rows.length / max(rows.tokens, 1)

    def shares(self) -> np.ndarray:
        """The scores as shares of 1, [L, Hq]."""
        if self.scores is None:
            raise ValueError(f"no {self.kind} head scores were given")
        values = self.scores.values
        if self.shuffle:
            values = np.random.default_rng(self.shuffle).permutation(values.ravel()).reshape(values.shape)
        powered = (values / values.sum()) ** self.temperature
        return np.asarray(powered / powered.sum())


@dataclass(frozen=True)
class PaperHeadShares(HeadShares):
    """The authors' integers: rounded head by head, and what a head cannot hold is lost. Its real share is what it is."""

    def counts(self, rows: Rows, total: int, scores: Sequence[Tensor]) -> np.ndarray:
        beyond = total // len(rows) - rows.floor  # entries a row, without the window
        pool = beyond // self.beta
        least = np.minimum(self.base, beyond) if self.base else beyond - pool
        wanted = np.rint(self.weights(rows) * (beyond - least) * len(rows) + least).astype(np.int64)
        return np.minimum(wanted + rows.floor, rows.length)
