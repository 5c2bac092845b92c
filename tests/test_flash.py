"""Prefill by flash-attn, played by a module that computes its definition: what it is given, and that nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MAIN, network, tiny, tokens
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from harness.cache import Needs
from harness.cost.microbench import kernel_speed, varlen_peers
from harness.engine import flash
from harness.engine.model import Model


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float
) -> Tensor:
    """flash_attn_func: q [B, N, Hq, D], k, v [B, T, H, D]; the window counts positions before the query's own."""
    assert causal and window_size[1] in (0, -1)
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(heads, 2), v.repeat_interleave(heads, 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = behind < 0
    if window_size[0] >= 0:
        hidden |= behind > window_size[0]
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("family", [*MAIN, "phi3"])
def test_a_prefill_by_flash_attn_is_the_same_and_makes_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, needs = tokens(60), Needs(8, column_sums=True)
    wanted = tiny(family).prefill(ids, needs, scored=4)[0]
    played = ModuleType("flash_attn")
    played.flash_attn_func = by_definition  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", played)
    monkeypatch.setattr(flash, "can_run", lambda *_: True)
    for scored in (0, 4):
        model = Model(network(family), None, "flash", "0")
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, model.network.config._attn_implementation, None)  # is not asked
        found = model.prefill(ids, needs, scored=scored)[0]
        assert torch.allclose(found.logits, wanted.logits, atol=1e-4)
        for mine, other in zip(found.layers, wanted.layers, strict=True):
            assert torch.allclose(mine.keys, other.keys, atol=1e-4) and torch.allclose(mine.values, other.values, atol=1e-4)


def test_it_is_used_on_a_gpu_for_half_types(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(flash, "installed", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    assert flash.can_run(gpu, torch.bfloat16, 128)
    assert not flash.can_run(torch.device("cpu"), torch.bfloat16, 128)
    assert not flash.can_run(gpu, torch.float32, 128) and not flash.can_run(gpu, torch.float16, 512)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    assert not flash.can_run(gpu, torch.float16, 128)
    monkeypatch.undo()


@pytest.mark.parametrize(("text", "said"), [("", ""), ("raise ImportError('undefined symbol')", "undefined symbol"), (None, "")])
def test_what_does_not_load_is_not_used(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is None:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    else:
        (tmp_path / "flash_attn.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    flash.installed.cache_clear()
    assert flash.installed() == (text == "") and flash.installed() == (text == "")
    printed = capsys.readouterr().err
    assert said in printed and printed.count("does not load") == bool(said)
    flash.installed.cache_clear()
    sys.modules.pop("flash_attn", None)


def test_the_kernel_is_timed_on_rows_of_a_given_size() -> None:
    pytest.importorskip("triton")
    found = kernel_speed(torch.device("cpu"), torch.float32, size=2**18, rows=6)
    assert found["rows_gb"] == pytest.approx(2**18 / 1e9, rel=0.02) and found["kernel_ms"] > 0
    assert set(found) == {"rows_gb", "copy_gb_s", "kernel_ms", "kernel_share_of_copy"}, "no other kernel runs on a CPU"
    rate = found["rows_gb"] / (found["kernel_ms"] / 1000)
    assert found["kernel_share_of_copy"] == pytest.approx(rate / found["copy_gb_s"], rel=1e-2)


def test_peers_are_timed_and_compared_or_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")

    def absent() -> Tensor:
        raise TypeError("enable_gqa is not known\nmore")

    def right(queries: Tensor, keys: Tensor, values: Tensor, length: np.ndarray, width: int) -> Tensor:
        rows = zip(queries.view(len(length), width, -1), keys.split(length.tolist()), values.split(length.tolist()), strict=True)
        return torch.cat([(q @ k.T * q.shape[1] ** -0.5).softmax(-1) @ v for q, k, v in rows])

    def peers(*given: Any) -> dict[str, Any]:
        return {"absent": absent, "right": lambda: right(*given), "wrong": lambda: right(*given) + 1}

    monkeypatch.setattr("harness.cost.microbench.varlen_peers", peers)
    found = kernel_speed(torch.device("cpu"), torch.float32, size=2**18, rows=6)
    assert found["right_apart"] < 1e-5 and found["wrong_apart"] == pytest.approx(1, rel=1e-3) and found["right_ms"] > 0
    assert "absent_ms" not in found and "absent does not run here: enable_gqa is not known\n" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="other kernels for unequal lengths need a GPU")
def test_other_kernels_say_the_same() -> None:
    """flash-attn's and torch's own, where they are."""
    device = torch.device("cuda")
    found = kernel_speed(device, torch.bfloat16, size=2**24, rows=40)
    assert {name for name in found if name.endswith("_apart")}, "torch has one of its own"
    assert all(value < 2e-2 for name, value in found.items() if name.endswith("_apart"))


def test_without_a_gpu_there_are_no_peers() -> None:
    queries = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert varlen_peers(queries, queries, queries, np.array([4]), 4) == {}
