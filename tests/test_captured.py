"""Decoding from static buffers: eager's tokens, nothing of a step on the host, and what happens where it cannot be held."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAIN, VOCABULARY, tiny, tokens
from test_conversions import converted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.cache import Needs, Selection, keep_all
from harness.captured import CannotCapture, StaticDecode, StaticLayer
from harness.cost import CacheSubject, CostCell, measure_cell
from harness.model import Model
from harness.rows import RowCache, compact
from methods import METHODS

VARIANTS = ("llama+mixsga-3:1:6", "gpt_neox+mixsga-3:1:6", "opt+gqa-2", "qwen3+cla-50", "phi3+mixsga-1:1")
STEPS = 8
INTERPRETED = 3  # of them by the kernels: an interpreter is slow


def model_of(name: str) -> Model:
    family, _, variant = name.partition("+")
    return converted(family, variant) if variant else tiny(family)


def ragged(model: Model, ids: Tensor, keep: int) -> tuple[Selection, Any]:
    """Rows of unequal length, some of a few entries."""
    prefill = model.prefill(ids, Needs())[0]
    rows = keep_all(prefill)
    count = prefill.layers[0].keys.shape[1]

    def fewer(number: int, kept: Tensor | None) -> Tensor:
        every = torch.arange(count) if kept is None else kept
        return every[:: 1 + number % 3][: keep + 3 * number]

    return tuple(tuple(replace(row, kept=fewer(n, row.kept)) for n, row in enumerate(layer)) for layer in rows), prefill


def cache_of(model: Model, ids: Tensor) -> tuple[RowCache, Tensor]:
    """Three cells: one evicted here and there, one whole, one nearly empty; room that holds no number at all."""
    some, prefill = ragged(model, ids, 9)
    few, _ = ragged(model, ids, 1)
    cache = compact(prefill, [some, keep_all(prefill), few], STEPS)
    for layer in cache.layers:
        for start, length, capacity in layer.table[:, [4, 6, 5]].tolist():
            layer.keys[start + length : start + capacity] = float("nan")
            layer.values[start + length : start + capacity] = float("nan")
    return cache, torch.tensor([int(prefill.logits.argmax()), 5, 9])


def eager(model: Model, ids: Tensor) -> list[list[int]]:
    cache, token = cache_of(model, ids)
    said = []
    for _ in range(STEPS):
        token = model.decode(cache, token[:, None])[:, -1].argmax(-1)
        said.append(token.tolist())
    return said


def static(model: Model, ids: Tensor, by_kernel: bool = False, mode: Any = None) -> list[list[int]]:
    cache, token = cache_of(model, ids)
    if not by_kernel:
        decode = StaticDecode(model, cache, token, STEPS, mode)
        return [decode.step().tolist() for _ in range(STEPS)]
    decode = StaticDecode(model, cache, token, STEPS)
    decode.layers = [StaticLayer(layer, cache.cells, STEPS, by_kernel=True) for layer in cache.layers]
    return [decode.step().tolist() for _ in range(INTERPRETED)]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", [*MAIN, "gpt_neox", *VARIANTS])
def test_static_steps_say_what_eager_ones_say(name: str) -> None:
    """In plain torch and by the kernels, which are interpreted here. Windows are left, rows of experts grow apart."""
    model, ids = model_of(name), tokens(60)
    wanted = eager(model, ids)
    assert len({tuple(step) for step in wanted}) > 1 or len(set(wanted[0])) > 1
    assert static(model, ids) == wanted
    pytest.importorskip("triton")
    assert static(model, ids, by_kernel=True) == wanted[:INTERPRETED]


def test_a_token_makes_only_its_experts_rows_longer() -> None:
    pytest.importorskip("triton")
    model = converted("llama", "mixsga-3:1:6")
    prefill = model.prefill(tokens(60), Needs())[0]
    for by_kernel in (False, True):
        cache = compact(prefill, [keep_all(prefill)] * 2, 4)
        layer, other = cache.layers[1], copy.deepcopy(cache.layers[1])
        mine = StaticLayer(layer, 2, 4, by_kernel)
        for seen, experts in ((60, [0, 2]), (61, [1, 2])):
            keys, values = torch.randn(2, prefill.shape.kv_heads, 2, prefill.shape.head_dim)
            mine.append(keys, values, torch.tensor([seen, seen]), torch.tensor(experts))
            step = cache.step([1, 1])
            other.append(keys, values, replace(step, positions=np.array([seen, seen])), np.array(experts))
        assert mine.length.tolist() == other.length.tolist() and mine.length.tolist() != layer.length.tolist()
        for start, length in other.table[:, [4, 6]].tolist():
            for one, two in zip(
                (layer.keys, layer.values, layer.positions), (other.keys, other.values, other.positions), strict=True
            ):
                assert torch.equal(one[start : start + length], two[start : start + length])


@pytest.mark.parametrize("name", [*MAIN, "phi3", "llama+mixsga-3:1:6", "opt+gqa-2", "qwen3+cla-50"])
def test_a_step_is_one_graph(name: str, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """Without breaks, pools and lengths changed in place. The compiler's last stage is left out: one real one is below."""
    monkeypatch.setattr("harness.captured.torch.compile", partial(torch.compile, backend="aot_eager"))
    model, ids = model_of(name), tokens(60)
    assert static(model, ids, mode="compiled") == eager(model, ids)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_says_what_an_eager_one_says(fresh_compiler: None) -> None:
    model, ids = converted("llama", "mixsga-3:1:6"), tokens(60)
    assert static(model, ids, mode="compiled") == eager(model, ids)


class NothingOnTheHost(TorchDispatchMode):
    """Refuses whatever reads a device's number, or brings numbers from the host. `meta` plays the device."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read on the host"
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if tensor.device.type != "meta"]
        assert not away, f"{func} works on the host: {[tuple(tensor.shape) for tensor in away]}"
        return out


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("name", [*MAIN, "phi3", "gpt_neox", "llama+mixsga-3:1:6", "opt+gqa-2", "qwen3+cla-50"])
def test_nothing_of_a_step_is_on_the_host(name: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph asks for: no number read, none sent."""
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # there is none for meta; it is to be off anyway
    model = model_of(name)
    cache, token = cache_of(model, tokens(60))
    there = Model(copy.deepcopy(model.network).to("meta"), None, "meta", "0", model.parent_shape)
    for layer in cache.layers:
        layer.keys, layer.values, layer.positions = (part.to("meta") for part in (layer.keys, layer.values, layer.positions))
    decode = StaticDecode(there, cache, token.to("meta"), STEPS)
    if by_kernel:
        decode.layers = [StaticLayer(layer, cache.cells, STEPS, by_kernel=True) for layer in cache.layers]
    with NothingOnTheHost() as watch:
        decode.step()
        decode.step()
    assert watch.calls > 50


def test_what_making_a_step_does_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture runs steps first; the tokens after it must be the first ones."""
    made: list[Callable[[], None]] = []

    def compile_by_running(run: Callable[[], None], **_: Any) -> Callable[[], None]:
        made.append(run)
        return run

    monkeypatch.setattr("harness.captured.torch.compile", compile_by_running)
    model, ids = model_of("llama+mixsga-3:1:6"), tokens(60)
    cache, token = cache_of(model, ids)
    decode = StaticDecode(model, cache, token, STEPS, "compiled")
    assert len(made) == 1 and decode.next.tolist() == token.tolist() and decode.seen.tolist() == [60] * 3
    assert [layer.length.tolist() for layer in decode.layers] == [layer.length.tolist() for layer in cache.layers]


def test_more_steps_than_there_is_room_for_are_refused() -> None:
    model = tiny("llama")
    cache, token = cache_of(model, tokens(60))
    with pytest.raises(ValueError, match="no room for 65 more tokens"):
        StaticDecode(model, cache, token, 65)
    decode = StaticDecode(model, cache, token, 1)
    decode.step()
    with pytest.raises(ValueError, match="more steps than"):
        decode.step()
    with pytest.raises(CannotCapture, match="needs a GPU"):
        StaticDecode(model, cache, token, 1, "graph")


def test_what_cannot_be_compiled_is_decoded_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    monkeypatch.setattr("harness.captured.torch.compile", partial(torch.compile, backend="aot_eager"))
    model = Model(copy.deepcopy(tiny("llama").network), None, "breaks", "0")
    norm = model.network.model.norm
    plain = norm.forward

    def breaking(hidden: Tensor) -> Tensor:
        assert float(hidden.abs().sum()) >= 0  # a look at a number
        out: Tensor = plain(hidden)
        return out

    norm.forward = breaking
    found = {}
    for decode in ("eager", "compiled"):
        subject = CacheSubject(model, METHODS["full"], None, tokens(40), 2, STEPS, decode=decode)
        for _, work in subject.phases:
            work()
        said = []
        for _ in range(STEPS):
            subject.step()
            assert subject.next is not None
            said.append(subject.next[:, 0].tolist())
        found[decode] = said
        assert (subject.fell_back is None) == (decode == "eager")
    assert found["eager"] == found["compiled"] and "could not be compiled" in str(subject.fell_back)
    assert len(str(subject.fell_back).splitlines()) == 1 and max(map(max, said)) < VOCABULARY


def test_a_captured_cell_is_measured_apart(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    monkeypatch.setattr("harness.captured.torch.compile", partial(torch.compile, backend="aot_eager"))
    cell = CostCell("random:tiny-llama", "snapkv", "10%", 200, 2, 4, "float32", "cpu", 1, decode="compiled")
    lap = measure_cell(cell)
    assert lap["status"] == "ok" and lap["phases"]["capture"] > 0 and "fell_back" not in lap
    lap = measure_cell(replace(cell, decode="graph"))
    assert (lap["status"], lap["reason"].split(":")[0]) == (
        "skipped",
        "a CUDA graph needs a GPU; without one there are --decode eager and compiled",
    )
