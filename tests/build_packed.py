"""Builds the kernel over packed rows for a GPU of compute capability 9.0 without having one, a JSON line for each storage."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from build_kernels import TYPES, build

from harness.engine import kernels, packed_kernels
from harness.engine.packed_kernels import Constants, block_of
from harness.engine.split_plan import TILE
from storages import STORAGES

SMALL = dict.fromkeys(("KC", "VC"), "*u8") | dict.fromkeys(("KS", "KL", "VS", "VL"), "*fp16") | {"LEVELS": "*fp32"}
TYPES |= SMALL | dict.fromkeys(("PLACES", "BEFORE"), "*i64") | {"residual": "i32"}
NAMES = ("KIND", "KEY_BITS", "KEY_GROUP", "HAS_VALUES", "VALUE_BITS", "VALUE_GROUP")


def main() -> None:
    for name, hides in (("int8", False), ("int4", True), ("turbo-3", False), ("turbo-k8v4", False), ("kivi-4", True)):
        padded = kernels._power_of_two(128)
        *formats, residual = astuple(Constants.of(STORAGES[name], 128))
        how: dict[str, Any] = {"D": 128, "DP": padded, "TILE": TILE, "BLOCK": block_of(padded), "WIDE": False}
        how |= dict(zip(NAMES, formats, strict=True)) | {"TAILED": residual > 0}
        build(
            packed_kernels._kernel(), "bf16", how | dict.fromkeys(("CAP", "MASKED", "WINDOWED", "CHUNKED"), hides), num_stages=1
        )


if __name__ == "__main__":
    main()
