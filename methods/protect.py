"""Equal protection: any scorer with the first and last positions that are asked for instead of its own.

"Protection Is (Nearly) All You Need", 2026 (arxiv.org/abs/2605.18053) finds that most of the difference between eviction
policies goes once all of them keep the same ends of the prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.cache import LayerKV, Needs
from methods.declared import Protected, Scorer, Staged, Stages

if TYPE_CHECKING:
    from torch import Tensor

END = re.compile(r"(\d+)|(\d+(?:\.\d+)?)%")


def ends_of(text: str) -> Protected:
    """First and last positions: `"4:8"`, or shares of the prompt, `"10%:10%"`.

    Raises:
        ValueError: anything else, or shares of more than the whole.
    """
    found = [END.fullmatch(part.strip()) for part in text.split(":")]
    if len(found) != 2 or None in found:
        raise ValueError(f"{text!r} is not first and last positions, such as 4:8 or 10%:10%")
    first, last = (int(match[1] or 0) for match in found if match)
    shares = [float(match[2] or 0) / 100 for match in found if match]
    if sum(shares) > 1:
        raise ValueError(f"{text!r} protects more than the whole prompt")
    return Protected(first, last, first_share=shares[0], last_share=shares[1])


@dataclass(frozen=True)
class Protecting:
    over: Scorer
    ends: Protected

    @property
    def needs(self) -> Needs:
        return self.over.needs

    @property
    def blind(self) -> bool:
        return bool(getattr(self.over, "blind", False))

    @property
    def protected(self) -> Protected:
        return self.ends

    def score(self, layer: LayerKV) -> Tensor:
        return self.over.score(layer)


@dataclass(frozen=True)
class ProtectingStages(Protecting, Staged):
    """The same around a scorer in stages."""

    over: Any  # a scorer and Staged

    @property
    def shares_after_first(self) -> bool:  # type: ignore[override]
        return bool(self.over.shares_after_first)

    def stages(self, layer: LayerKV) -> Stages:
        found: Stages = self.over.stages(layer)
        return found

    def first_counts(self, counts: np.ndarray, floors: np.ndarray, most: np.ndarray) -> np.ndarray:
        return np.asarray(self.over.first_counts(counts, floors, most))


def protecting(scorer: Scorer, ends: Protected) -> Scorer:
    return ProtectingStages(scorer, ends) if isinstance(scorer, Staged) else Protecting(scorer, ends)
