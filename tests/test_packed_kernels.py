"""The kernel that unpacks in registers, under triton's interpreter, against the path in plain torch; and built for a GPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packed_rows import HEADS, KV_HEADS, PACKED, cache_of, poison

from harness.engine.attention import attend, attend_by_kernel
from harness.engine.packed_kernels import can_read
from storages.integers import ByToken, Integers

pytest.importorskip("triton")
DIM = 16


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("routed", "window", "softcap"), [(False, None, None), (True, 30, 5.0)])
def test_the_kernel_reads_what_plain_torch_reads(name: str, routed: bool, window: int | None, softcap: float | None) -> None:
    if routed and name not in ("kivi-4", "turbo-3"):
        pytest.skip("an interpreter is slow: experts and windows are the same code for all")
    rng = random.Random(f"{name}/{routed}")
    cache = cache_of(rng, [PACKED[name], PACKED[name]], window, routed)
    poison(cache)
    (layer,) = cache.layers
    for counts in ((1, 1), (5, 2)) if name == "kivi-4" else ((1, 2),):
        step, sinks = cache.step(counts), torch.randn(HEADS) if window else None
        new, queries = torch.randn(2, KV_HEADS, sum(counts), DIM), torch.randn(HEADS, sum(counts), DIM)
        experts = np.array([rng.randrange(3) for _ in range(sum(counts))]) if routed else None
        layer.append(new[0], new[1], step, experts)
        cache.seen = cache.seen + step.counts
        wanted = attend(layer, queries, step, 0.25, softcap, sinks)
        assert torch.allclose(attend_by_kernel(layer, queries, step, 0.25, softcap, sinks), wanted, atol=1e-5)  # type: ignore[arg-type]


def test_a_codec_without_a_format_is_read_in_plain_torch() -> None:
    class Own(ByToken):
        kernel = None

    class Held(Integers):
        keys = Own()

    assert all(can_read(storage) for storage in PACKED.values()) and not can_read(Held())


def test_it_is_built_for_a_gpu_that_is_not_here() -> None:
    """For each format of keys and values that a storage has, within a program's shared memory and registers."""
    root = Path(__file__).parent
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join((str(root.parent), str(root)))}
    ran = subprocess.run([sys.executable, root / "build_packed.py"], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    built = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(built) >= 5 and all(found["bytes"] and found["shared"] <= 227 * 1024 for found in built)
    assert all(found["stack"] <= 16 for found in built), "more than a few registers are spilled"
