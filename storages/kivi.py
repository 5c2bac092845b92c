"""KIVI: keys by channel in groups of tokens, values by token in groups of numbers, the newest entries in full precision.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024. arxiv.org/abs/2402.02750
Outlier channels are a key's, so its scales run along tokens; values have none. A row keeps its newest `residual` values in 16
bits, and of its keys what exceeds a multiple of `residual`, so that whole blocks are packed at once: while decoding, when the
tail is full, as the authors' code does. docs/methods/quantised.md says where paper and code differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.storage import Codec, wrong_with
from storages.integers import ByChannel, ByToken, check_bits


@dataclass(frozen=True)
class Kivi:
    bits: int = 4
    group: int = 32  # tokens that share a channel's scale, and numbers of a value that share one
    residual: int = 128  # newest entries of a row in 16 bits
    spared: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 1 or self.residual < self.group:
            raise ValueError(f"a residual of {self.residual} entries cannot hold a group of {self.group}")
        if reason := wrong_with(self):
            raise ValueError(reason)

    @property
    def keys(self) -> Codec:
        return ByChannel(self.bits, self.group)

    @property
    def values(self) -> Codec:
        return ByToken(self.bits, self.group)
