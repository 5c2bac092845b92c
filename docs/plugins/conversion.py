"""keep_first: of every group of KV heads the first is kept and read by all, as `keep_first-2` on the command line.

A conversion changes a model's keys and values in place; `train` heals it, and every evicting method runs on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.cache import ModelShape
from harness.families import group_heads
from methods.base import Conversion


@dataclass(frozen=True)
class KeepFirst:
    group: int
    index_bits = 0  # that name the expert of a token: only where tokens are routed

    @classmethod
    def of(cls, numbers: tuple[int, ...], option: str) -> KeepFirst:
        """From `keep_first-2`: numbers (2,), option "". Raises ValueError with what is wrong."""
        if len(numbers) != 1 or numbers[0] < 1 or option:
            raise ValueError("one group size of at least 1 is expected")
        return cls(numbers[0])

    def share(self, shape: ModelShape) -> float:
        """Of the parent's bytes that a token adds to the cache."""
        return 1 / self.group

    def apply(self, network: Any, seed: int = 0) -> None:
        """In place, for every family that `harness.families` knows; raises CannotConvert where heads cannot be grouped."""
        group_heads(network, self.group, "first", seed)


CONVERSIONS = {"keep_first": Conversion("keep_first-2: of two KV heads the first", KeepFirst.of, "groups")}
