"""TriAttention: keep keys that the model's usual query will meet with a large logit, told from statistics that are made once.

Mao et al., "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression", 2026. arxiv.org/abs/2604.04921
Queries before their rotation lie close to a mean that depends on the head and hardly on the text. RoPE turns each pair of a
vector's numbers as a complex number by its own frequency, so the logit that the mean query at a distance would give a key is a
sum of cosines of that distance. Score: that sum, averaged over the distances 1, 2, 4, ... 65,536 from now, plus, pair by pair,
the key's size times how much larger queries are than their mean, for what the mean does not tell. By head it is set to mean 0
and deviation 1; of a group's heads the largest counts. Nothing of the prompt's own queries is looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from harness.cache import LayerKV, Needs
from harness.errors import UserError
from harness.files import whole
from methods.base import CannotRun, Protected
from methods.declared import UsesHeadScores

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "query-statistics/1"
KIND = "queries"
LEAST = 1e-12  # deviation of scores that are all alike


class BadStatistics(UserError):
    """Statistics of queries that cannot be used, in one line."""


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """What is usual of the queries of one variant, before their rotation. Made by `run_all.py calibrate`."""

    variant: str
    revision: str
    tokens: int  # that they were taken from
    mean: tuple[np.ndarray, ...]  # of each cache layer, [Hq, D] float32, heads as in `LayerKV`
    size: tuple[np.ndarray, ...]  # [Hq, F]: the mean length of each rotated pair
    pairs: np.ndarray  # [F, 2]: the numbers of a vector that are turned together, the first towards the second
    frequencies: np.ndarray  # [F] float64, radians a position
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind = KIND

    @cached_property
    def sha256(self) -> str:
        parts = (*self.mean, *self.size, self.pairs, self.frequencies)
        what = f"{self.variant}/{self.revision}".encode() + b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        return hashlib.sha256(what).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"QueryStatistics(sha256={self.sha256})"

    @property
    def artifact(self) -> tuple[str, dict[str, Any]]:
        """For the record of a run: its place in the output folder, and what stands there."""
        about = {"variant": self.variant, "kind": self.kind, "tokens": self.tokens, "settings": dict(self.settings)}
        return f"queries/{self.sha256}.json", about

    def check(self, variant: str, revision: str, layers: int) -> None:
        """
        Raises:
            BadStatistics: these are of another variant, of other weights, or of another shape.
        """
        if self.variant != variant or self.revision != revision:
            raise BadStatistics(
                f"statistics of queries belong to {self.variant} {self.revision}, the model is {variant} {revision}: they are "
                "not inherited; make its own with `run_all.py calibrate`"
            )
        if len(self.mean) != layers:
            raise BadStatistics(f"statistics of queries of {self.variant} are of {len(self.mean)} layers, the model has {layers}")

    def save(self, path: Path) -> None:
        about = {"format": FORMAT, "variant": self.variant, "revision": self.revision, "tokens": self.tokens}
        parts = {f"mean_{layer}": part for layer, part in enumerate(self.mean)}
        parts |= {f"size_{layer}": part for layer, part in enumerate(self.size)}
        text = json.dumps(about | {"settings": dict(self.settings)})
        with whole(path) as draft, draft.open("wb") as handle:
            np.savez_compressed(handle, about=text, pairs=self.pairs, frequencies=self.frequencies, **parts)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> QueryStatistics:
        """
        Raises:
            BadStatistics: no such file, or none that `save` wrote.
        """
        try:
            with np.load(path, allow_pickle=False) as held:
                about = json.loads(str(held["about"]))
                if about["format"] != FORMAT:
                    raise ValueError(f"it is of the format {about['format']!r}, this version reads {FORMAT}")
                layers = range(sum(name.startswith("mean_") for name in held.files))
                mean, size = (tuple(held[f"{part}_{layer}"] for layer in layers) for part in ("mean", "size"))
                rest = (held["pairs"], held["frequencies"], about["settings"])
            return cls(about["variant"], about["revision"], about["tokens"], mean, size, *rest)
        except (OSError, ValueError, KeyError, TypeError, BadZipFile, EOFError) as error:
            raise BadStatistics(
                f"statistics of queries {path} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None


@dataclass(frozen=True)
class Trigonometric(UsesHeadScores):
    offsets: int = 17  # distances 1, 2, 4, ... that are averaged over
    window: int = 0  # newest entries that are never evicted
    scores: QueryStatistics | None = None  # those of the model: put in before the method runs
    positional = True  # it asks where entries stand: positions cannot be renumbered under it

    def __post_init__(self) -> None:
        if not 1 <= self.offsets <= 40 or self.window < 0:
            raise ValueError(f"offsets {self.offsets} must lie between 1 and 40, and window {self.window} not below 0")

    @property
    def head_score_kind(self) -> str:
        return KIND

    @property
    def wanted(self) -> str:
        return "statistics of the queries"

    @property
    def made_by(self) -> str:
        return "run_all.py calibrate"

    @property
    def given_head_scores(self) -> QueryStatistics | None:
        return self.scores

    def with_head_scores(self, scores: QueryStatistics) -> Trigonometric:
        return replace(self, scores=scores)

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def protected(self) -> Protected:
        return Protected(last=self.window)

    def score(self, layer: LayerKV) -> Tensor:
        """Of every entry. Products of keys with one vector a query head: n x D x Hq operations."""
        import torch

        if self.scores is None:
            raise ValueError("no statistics of queries were given")
        mean, size = self.scores.mean[layer.index], self.scores.size[layer.index]
        heads = slice(None) if layer.heads is None else layer.heads.cpu().numpy()
        mean, size = mean[heads], size[heads]  # [Hq, D], [Hq, F]
        if mean.shape != (layer.query_heads, layer.keys.shape[2]):
            raise CannotRun(f"statistics of {mean.shape[0]} heads of size {mean.shape[1]} do not fit layer {layer.index}")
        first, second = self.scores.pairs.T
        usual = mean[:, first] + 1j * mean[:, second]  # [Hq, F]
        beyond = torch.tensor(size - np.abs(usual), dtype=torch.float32, device=layer.keys.device)
        towards = torch.tensor(self._ahead(mean, usual, layer.tokens), dtype=torch.float32, device=layer.keys.device)

        keys = layer.keys.float()  # [H, n, D]
        group = layer.query_heads // len(keys)
        parts = [keys[..., torch.as_tensor(side.copy(), device=keys.device)] for side in (first, second)]
        length = torch.hypot(*parts)  # [H, n, F]
        found = keys @ towards.unflatten(0, (-1, group)).mT + length @ beyond.unflatten(0, (-1, group)).mT  # [H, n, G]
        found = found.mT.flatten(0, 1)  # [Hq, n]
        found = (found - found.mean(1, keepdim=True)) / found.std(1, keepdim=True, correction=0).clamp_min(LEAST)
        return found.unflatten(0, (-1, layer.width)).amax(1)

    def _ahead(self, mean: np.ndarray, usual: np.ndarray, tokens: int) -> np.ndarray:
        """The mean query, turned to where the next ones stand and averaged over the distances, [Hq, D]."""
        assert self.scores is not None
        where = tokens - 1 + 2.0 ** np.arange(self.offsets)
        turns = np.exp(1j * where[:, None] * self.scores.frequencies).mean(0)  # [F]
        first, second = self.scores.pairs.T
        turned = np.array(mean, dtype=np.float64)
        turned[:, first], turned[:, second] = (usual * turns).real, (usual * turns).imag
        return turned
