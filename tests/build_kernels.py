"""Builds the kernels for a GPU of compute capability 9.0 without having one, and prints a JSON line for each.

A process of its own: where TRITON_INTERPRET is set, as in the tests, nothing is built.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from harness.engine import kernels
from harness.engine.split_plan import BLOCK, TILE

READER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGET = GPUTarget("cuda", 90, 32)
INTEGERS = ("LENGTH", "ASKING", "ROW", "ITEM", "READER", "PARTS_OF", "SPAN", "SEEN", "EXPERTS")
TYPES = dict.fromkeys(INTEGERS, "*i64") | {"POSITIONS": "*i32", "PART": "*fp32", "WEIGHT": "*fp32", "SINK": "*fp32"}
TYPES |= dict.fromkeys(("rows", "items", "window"), "i32") | dict.fromkeys(("scaling", "softcap"), "fp32")


def build(kernel: Any, numbers: str, constants: dict[str, Any], **options: int) -> None:
    """Pointers are told to be aligned, as the launcher finds them to be."""
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{numbers}") for name in kernel.signature.parameters
    }
    pointers = [place for place, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(place,): [["tt.divisibility", 16]] for place in pointers}
    built = compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)
    found = {"kernel": kernel.__name__, "numbers": numbers, **constants, "shared": built.metadata.shared, **usage(built)}
    print(json.dumps(found | {"asynchronous": built.asm["ptx"].count("cp.async.cg"), "bytes": len(built.asm["cubin"])}))


def usage(built: Any) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where what does not fit them is spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        said = subprocess.run([READER, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    assert found, "cuobjdump says it otherwise now"
    return {"registers": int(found.group(1)), "stack": int(found.group(2))}


def main() -> None:
    partial, merge, append = kernels._kernels()
    for numbers, dim, stages in (("bf16", 128, 2), ("fp16", 80, 2), ("bf16", 256, 2), ("fp32", 128, 1), ("fp32", 256, 1)):
        padded = kernels._power_of_two(dim)
        sizes = {"D": dim, "DP": padded, "TILE": TILE, "BLOCK": BLOCK // 2 if padded > 128 else BLOCK}
        for hides in (False, True):
            how = {"CAP": hides, "MASKED": hides, "WINDOWED": hides, "CHUNKED": hides and dim == 80, "WIDE": False}
            build(partial, numbers, sizes | how, num_stages=stages)
    for sunk in (False, True):
        build(merge, "bf16", {"D": 128, "DP": 128, "PARTS": kernels.PARTS, "SUNK": sunk})
    for routed in (False, True):
        build(append, "bf16", {"D": 128, "DP": 128, "STRIPED": routed}, num_warps=1)


if __name__ == "__main__":
    main()
