"""Decoding from static buffers: eager's tokens, nothing of a step on the host, and what happens where it cannot be held."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MAIN, converted, network, tiny, tokens, wide
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.cache import Needs, Selection, keep_all
from harness.cost.cell import CacheSubject, CostCell, measure_cell
from harness.cost.request import run_cell
from harness.engine.attention import attend
from harness.engine.measure import OutOfMemory
from harness.engine.model import Model
from harness.engine.observe import AttentionSettings
from harness.engine.rows import RowCache, Step, compact
from harness.engine.static_decode import CannotCapture, StaticDecode, StaticLayer
from methods import METHODS

VARIANTS = (
    "llama+mixsga-3:1:6",
    "llama+mixsga-3:1:6-random",
    "gpt_neox+mixsga-3:1:6",
    "opt+gqa-2",
    "qwen3+cla-50",
    "phi3+mixsga-1:1",
)
STEPS = 8
COMPILED = (*MAIN, "phi3", "llama+mixsga-3:1:6", "opt+gqa-2", "qwen3+cla-50")
TRACED = ("mistral-window", "gemma2", "phi3", "llama+mixsga-3:1:6", "opt+gqa-2", "qwen3+cla-50")  # every family's code once
INTERPRETED = 3  # of them by the kernels: an interpreter is slow


def model_of(name: str) -> Model:
    family, _, variant = name.partition("+")
    return converted(family, variant) if variant else tiny(family)


def shallow(name: str, layers: int = 2) -> Model:
    """The same of fewer layers: a compiler takes as long for each. Two hold every kind of layer that a family has."""
    family, _, variant = name.partition("+")
    if variant:
        return converted(family, variant, wide(family, num_hidden_layers=layers))
    return Model(network(family, num_hidden_layers=layers), None, f"shallow-{family}", "0")


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
    """Three cells at three places of their answers: one evicted here and there, one whole, one nearly empty.

    In the room behind the rows stands what is no number.
    """
    some, prefill = ragged(model, ids, 9)
    few, _ = ragged(model, ids, 1)
    cache = compact(prefill, [some, keep_all(prefill), few], STEPS)
    model.decode(cache, tokens(6, seed=1).view(3, 2))
    cache.crop([0, 1, 2])
    for layer in cache.layers:
        for start, length, capacity in zip(layer.table.start, layer.table.length, layer.table.capacity, strict=True):
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


def static(model: Model, ids: Tensor, mode: Any = None, steps: int = STEPS) -> list[list[int]]:
    cache, token = cache_of(model, ids)
    decode = StaticDecode(model, cache, token, STEPS, mode)
    return [decode.step().tolist() for _ in range(steps)]


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static layers take the kernels, as on a GPU; here they are interpreted."""
    pytest.importorskip("triton")
    monkeypatch.setattr("harness.engine.static_decode.StaticLayer", lambda *given: StaticLayer(*given[:3], by_kernel=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", [*MAIN, "gpt_neox", *VARIANTS])
def test_static_steps_say_what_eager_ones_say(name: str) -> None:
    """Windows are left, rows of experts grow apart."""
    model, ids = model_of(name), tokens(60)
    wanted = eager(model, ids)
    assert len({tuple(step) for step in wanted}) > 1 or len(set(wanted[0])) > 1
    assert static(model, ids) == wanted


@pytest.mark.parametrize("name", [name for name in (*MAIN, "gpt_neox", *VARIANTS) if name not in TRACED])
def test_so_do_steps_by_the_kernels(name: str, by_kernel: None) -> None:
    """Of those whose steps are not taken by the kernels within one graph below."""
    model, ids = shallow(name), tokens(60)
    assert static(model, ids, steps=INTERPRETED) == eager(model, ids)[:INTERPRETED]


def test_large_numbers_of_half_types_do_not_overflow() -> None:
    """A query times a key is more than float16 holds before it is scaled."""
    layer = cache_of(tiny("llama"), tokens(60))[0].layers[0]
    layer.keys, layer.values = (torch.randn(part.shape).half() * 100 for part in (layer.keys, layer.values))
    mine, queries = StaticLayer(layer, 3, STEPS, by_kernel=False), torch.randn(4, 3, 16).half() * 100
    seen = torch.full((3,), 10**6)
    found = mine.attend(queries, seen, AttentionSettings(0.25))
    assert found.abs().max() > 0 and torch.isfinite(found).all()
    step = Step(np.ones(3, np.int64), np.full(3, 10**6))
    assert torch.allclose(found, attend(layer, queries, step, 0.25), rtol=1e-2, atol=1.0)


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
        assert mine.length.tolist() == other.table.length.tolist() and mine.length.tolist() != layer.table.length.tolist()
        for start, length in zip(other.table.start, other.table.length, strict=True):
            for one, two in zip(
                (layer.keys, layer.values, layer.positions), (other.keys, other.values, other.positions), strict=True
            ):
                assert torch.equal(one[start : start + length], two[start : start + length])


@pytest.fixture
def without_its_last_stage(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """The compiler traces the step and takes its changes in place apart, but makes no code of its own."""
    monkeypatch.setattr("harness.engine.static_decode.torch.compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama+mixsga-3:1:6"])
def test_a_step_is_one_graph(name: str, without_its_last_stage: None) -> None:
    """Without breaks, pools and lengths changed in place. Other families: below, with the kernels."""
    model, ids = shallow(name), tokens(60)
    assert static(model, ids, "compiled") == eager(model, ids)


@pytest.mark.parametrize("name", TRACED)
def test_so_is_one_with_the_kernels(
    name: str, by_kernel: None, without_its_last_stage: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU compiles. Nothing of a prefill is asked there: an import cannot be traced."""
    model, ids = shallow(name), tokens(60)
    wanted = eager(model, ids)[:INTERPRETED]
    cache, token = cache_of(model, ids)
    monkeypatch.setattr("harness.engine.flash.can_run", None)
    decode = StaticDecode(model, cache, token, STEPS, "compiled")
    assert [decode.step().tolist() for _ in range(INTERPRETED)] == wanted


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_says_what_an_eager_one_says(fresh_compiler: None) -> None:
    model, ids = shallow("llama+mixsga-3:1:6", layers=1), tokens(60)
    assert static(model, ids, "compiled") == eager(model, ids)


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


def refuse_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways of bringing numbers that torch does not show to a dispatch mode."""

    def brings(*_: Any, **__: Any) -> Any:
        raise AssertionError("numbers came from the host")

    for name in ("torch.tensor", "torch.as_tensor", "torch.from_numpy", "torch.Tensor.new_tensor"):
        monkeypatch.setattr(name, brings)
    plain = Tensor.__getitem__

    def picked(tensor: Tensor, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        assert not any(isinstance(part, list | np.ndarray) for part in parts), "numbers came from the host"
        out: Tensor = plain(tensor, index)
        return out

    monkeypatch.setattr(Tensor, "__getitem__", picked)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", [*COMPILED, "gpt_neox", "llama+mixsga-3:1:6-random"])
def test_nothing_of_a_step_is_on_the_host(name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph asks for: no number read, none sent."""
    model = model_of(name)
    cache, token = cache_of(model, tokens(60))
    there = Model(copy.deepcopy(model.network).to("meta"), None, "meta", "0", model.parent_shape)
    for layer in cache.layers:
        layer.keys, layer.values, layer.positions = (part.to("meta") for part in (layer.keys, layer.values, layer.positions))
    decode = StaticDecode(there, cache, token.to("meta"), STEPS)
    if kernels:
        decode.layers = [StaticLayer(layer, cache.cells, STEPS, by_kernel=True) for layer in cache.layers]
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # there is none for meta; it is to be off anyway
    refuse_numbers(monkeypatch)
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

    monkeypatch.setattr("harness.engine.static_decode.torch.compile", compile_by_running)
    model, ids = model_of("llama+mixsga-3:1:6"), tokens(60)
    cache, token = cache_of(model, ids)
    decode = StaticDecode(model, cache, token, STEPS, "compiled")
    assert (
        len(made) == 1
        and decode.left == STEPS
        and decode.next.tolist() == token.tolist()
        and decode.seen.tolist() == [62, 61, 60]
    )
    assert [layer.length.tolist() for layer in decode.layers] == [layer.table.length.tolist() for layer in cache.layers]


class PlayedGpu:
    """torch.cuda as a capture needs it: what is recorded is not run, and a replay runs it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.fails = False
        given = inspect.signature(torch.cuda.graph.__init__)
        played = self

        class Stream:
            def __init__(self, *_: Any) -> None: ...

            def wait_stream(self, other: Stream) -> None:
                played.said.append("wait")

        class Graph:
            def replay(self) -> None:
                played.said.append("replay")
                self.decode._once()

        class Recording:
            def __init__(self, *args: Any, **named: Any) -> None:
                self.graph = given.bind(self, *args, **named).arguments["cuda_graph"]

            def __enter__(self) -> None:
                played.said.append("record")
                self.graph.decode = decode = played.decode
                self.state = [decode.seen, decode.next, *(layer.length for layer in decode.layers)]
                self.before = [part.clone() for part in self.state]

            def __exit__(self, *_: Any) -> None:
                for part, was in zip(self.state, self.before, strict=True):
                    part.copy_(was)
                if played.fails:
                    try:
                        raise RuntimeError("operation not permitted when stream is capturing\nmore")
                    except RuntimeError as error:
                        raise RuntimeError("failed because of an earlier error") from error

        for name, part in (("Stream", Stream), ("CUDAGraph", Graph), ("graph", Recording), ("current_stream", Stream)):
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr("harness.engine.static_decode.captures", lambda _: True)
        plain = StaticDecode._captured

        def known(decode: StaticDecode, run: Any) -> Any:
            self.decode = decode
            return plain(decode, run)

        monkeypatch.setattr(StaticDecode, "_captured", known)


@pytest.mark.parametrize("name", ["llama", "llama+mixsga-3:1:6"])
def test_a_captured_step_is_warmed_up_recorded_once_and_replayed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(name), tokens(60)
    wanted = eager(model, ids)
    gpu = PlayedGpu(monkeypatch)
    assert static(model, ids, "graph") == wanted
    assert gpu.said == ["wait", "wait", "record", *["replay"] * STEPS]


def test_a_capture_that_fails_says_what_went_wrong_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    PlayedGpu(monkeypatch).fails = True
    with pytest.raises(CannotCapture, match=r"could not be captured: operation not permitted when stream is capturing$"):
        static(tiny("llama"), tokens(60), "graph")


def test_more_steps_than_there_is_room_for_are_refused() -> None:
    model = tiny("llama")
    cache, token = cache_of(model, tokens(60))
    with pytest.raises(ValueError, match="no slack for 65 more tokens"):
        StaticDecode(model, cache, token, 65)
    decode = StaticDecode(model, cache, token, 1)
    decode.step()
    with pytest.raises(ValueError, match="more steps than"):
        decode.step()
    with pytest.raises(CannotCapture, match="needs a GPU"):
        StaticDecode(model, cache, token, 1, "graph")


def test_what_cannot_be_compiled_says_why(without_its_last_stage: None) -> None:
    model = Model(copy.deepcopy(tiny("llama").network), None, "breaks", "0")
    norm = model.network.model.norm
    plain = norm.forward

    def breaking(hidden: Tensor) -> Tensor:
        assert float(hidden.abs().sum()) >= 0  # a look at a number
        out: Tensor = plain(hidden)
        return out

    norm.forward = breaking
    subject = CacheSubject(model, METHODS["full"], None, tokens(40), 2, STEPS, decode="compiled")
    *before, (name, capture) = subject.phases
    for _, work in before:
        work()
    with pytest.raises(CannotCapture, match="a decode step could not be compiled: ") as found:
        capture()
    assert name == "capture" and len(str(found.value).splitlines()) == 1


def test_too_little_memory_for_a_capture_is_no_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(run: Any, **_: Any) -> Any:
        try:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("backend failed") from error

    monkeypatch.setattr("harness.engine.static_decode.torch.compile", full)
    with pytest.raises(OutOfMemory, match="3 GiB"):
        static(tiny("llama"), tokens(60), "compiled")


def test_a_cell_that_cannot_be_captured_is_measured_eagerly_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CostCell("random:tiny-llama", "full", "", 64, 1, 3, "float32", "cpu", 1, decode="compiled")
    asked = []

    def played(one: CostCell, _: object) -> dict[str, Any]:
        asked.append(one.decode)
        return {"status": "ok", "token": 1.0} if one.decode == "eager" else {"status": "fell back", "reason": "a look"}

    monkeypatch.setattr("harness.cost.request._in_a_process", played)
    assert run_cell(cell) == {"status": "ok", "token": 1.0, "fell_back": "a look"} and asked == ["compiled", "eager"]
    monkeypatch.setattr("harness.engine.static_decode.torch.compile", lambda *_, **__: 1 / 0)
    assert measure_cell(cell) == {"status": "fell back", "reason": "a decode step could not be compiled: division by zero"}


def test_a_captured_cell_is_measured_apart(without_its_last_stage: None) -> None:
    cell = CostCell("random:tiny-llama", "snapkv", "10%", 200, 2, 4, "float32", "cpu", 1, decode="compiled")
    lap = measure_cell(cell)
    assert lap["status"] == "ok" and lap["phases"]["capture"] > 0 and "fell_back" not in lap
    lap = measure_cell(replace(cell, decode="graph"))
    assert (lap["status"], lap["reason"].split(":")[0]) == (
        "skipped",
        "a CUDA graph needs a GPU; without one there are --decode eager and compiled",
    )
