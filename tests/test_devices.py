"""Tensors of the host and of the device never meet in one operation. There is no GPU here: `meta` plays the device."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import FAMILIES, SCORED, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.cache import Needs, keep_all
from harness.engine.attention import attend, attend_by_kernel
from harness.engine.model import Model
from harness.engine.rows import compact
from harness.engine.static_decode import CannotCapture, StaticDecode
from methods.base import Eviction

# What scorers look at, but for a second pass: that reads a text of its own, token by token on the host.
NEEDS = replace(reduce(Needs.__or__, (method.needs for method in SCORED.values()), Needs(16)), replays=frozenset())


class Apart(TorchDispatchMode):
    """Refuses what a GPU would: tensors of two devices, but for copies and single numbers."""

    copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        assert func in self.copies or len({tensor.device.type for tensor in tensors}) < 2, f"{func} was given both devices"
        return func(*args, **(kwargs or {}))


class IndexedFromTheHost(Apart):
    """Lets numbers on the host index a tensor of the device, as a GPU does."""

    copies = (*Apart.copies, torch.ops.aten.index.Tensor)


@pytest.fixture(params=FAMILIES)
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model on the device, whose prompt's checksum is not taken, and for whose prefill transformers makes no mask."""
    model = Model(copy.deepcopy(tiny(request.param).network).to("meta"), None, "meta", "0")
    model.softcapped = True
    plain = Tensor.to

    def stays(tensor: Tensor, *given: Any, **named: Any) -> Tensor:
        return torch.zeros(1, dtype=torch.int64) if named.get("device") == "cpu" else plain(tensor, *given, **named)

    monkeypatch.setattr(Tensor, "to", stays)
    return model


@pytest.mark.parametrize("path", [attend, attend_by_kernel])
def test_a_prefill_its_scores_and_decoding_stay_on_the_device(there: Model, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is attend_by_kernel:
        pytest.importorskip("triton")
    monkeypatch.setattr("harness.engine.model.attend", lambda *given: path(*given))
    with Apart():
        prefill = there.prefill(torch.zeros(60, dtype=torch.int64, device="meta"), NEEDS)[0]
        for method in SCORED.values():
            if isinstance(method, Eviction) and not method.needs.replays:
                scores = [method.scorer.score(layer) for layer in prefill.layers]
                assert all(score.device.type == "meta" for score in scores)
        cache = compact(prefill, [keep_all(prefill)] * 2, 16)
        assert there.decode(cache, torch.zeros(2, 1, dtype=torch.int64, device="meta")).device.type == "meta"
        assert there.decode(cache, torch.zeros(2, 3, dtype=torch.int64, device="meta"), keep=2).device.type == "meta"
        assert there.decode_ragged(cache, [[1, 2], [3]]).shape[0] == 3
        cache.crop([1, 0])
        cache.keep([1])
        assert there.decode(cache, torch.zeros(1, 1, dtype=torch.int64, device="meta")).device.type == "meta"


def test_rows_and_observations_live_where_their_layer_lives() -> None:
    """The first layer on the host, the others on the device, as a device map spreads them."""
    net: Any = copy.deepcopy(tiny("qwen3").network)
    for part in (*net.model.layers[1:], net.model.norm, net.lm_head):
        add_hook_to_module(part.to("meta"), AlignDevicesHook(execution_device="meta", place_submodules=False))
    net.hf_device_map = {"the first layer": "cpu", "others": "meta"}
    model = Model(net, None, "spread", "0")
    wanted = ["cpu", "meta", "meta"]
    with IndexedFromTheHost(), torch.no_grad():
        prefill = model.prefill(torch.zeros(60, dtype=torch.int64), NEEDS)[0]
        for layer, where in zip(prefill.layers, wanted, strict=True):
            assert {part.device.type for part in (layer.keys, layer.values, layer.queries, layer.column_sums)} == {where}  # type: ignore[union-attr]
        scores = [
            [method.scorer.score(kv).device.type for kv in prefill.layers]
            for method in SCORED.values()
            if isinstance(method, Eviction) and not method.needs.replays
        ]
        assert all(found == wanted for found in scores)
        part = tuple(
            tuple(replace(row, kept=torch.arange(7)) for row in rows) for rows in keep_all(prefill)
        )  # chosen on the host
        cache = compact(prefill, [part, keep_all(prefill)], 64)
        assert [layer.keys.device.type for layer in cache.layers] == wanted
        model.decode(cache, torch.zeros(2, 3, dtype=torch.int64), keep=2)
        model.decode_ragged(cache, [[1, 2], [3]])
        cache.crop([1, 0])
        assert np.array_equal(cache.seen, [64, 64])
        with pytest.raises(CannotCapture, match="GPU"):
            StaticDecode(model, cache, torch.zeros(2, dtype=torch.int64), 4, "graph")
        static = StaticDecode(model, cache, torch.zeros(2, dtype=torch.int64), 4)
        model.extend(static.next, static.seen, static)
