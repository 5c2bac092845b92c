"""Captured steps over packed rows: the tokens of eager decoding, by the kernel and in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import converted, tiny, tokens

from harness.cache import Needs, keep_all
from harness.engine.model import Model
from harness.engine.rows import RowCache, compact
from harness.engine.static_decode import StaticDecode, StaticLayer
from harness.storage import Storage, of_layer
from storages.integers import Integers
from storages.kivi import Kivi
from storages.turbo import Turbo

STEPS = 20
HELD = {"int4": Integers(4), "turbo-3, spared": Turbo(3, 3, spared=1), "kivi-4": Kivi(4, group=4, residual=8)}


def cache_of(model: Model, storage: Storage) -> tuple[RowCache, torch.Tensor]:
    """Three cells with rows of unequal length, at three places of their answers."""
    prefill = model.prefill(tokens(45), Needs())[0]
    cells = []
    for cell in range(3):
        layers = [
            tuple(
                replace(
                    row,
                    kept=(torch.arange(kv.keys.shape[1]) if row.kept is None else row.kept)[: 7 + 12 * cell + 3 * number],
                    storage=of_layer(storage, index, len(prefill.layers)),
                )
                for number, row in enumerate(rows)
            )
            for index, (kv, rows) in enumerate(zip(prefill.layers, keep_all(prefill), strict=True))
        ]
        cells.append(tuple(layers))
    cache = compact(prefill, cells, STEPS + 6)
    model.decode(cache, tokens(18, seed=1).view(3, 6))
    cache.crop([0, 1, 2])
    return cache, torch.tensor([3, 5, 9])


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("which", ["llama", "llama+mixsga-3:1:6", "mistral-window"])
def test_a_static_step_gives_eagers_logits(name: str, which: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_kernel and (which != "llama" or name != "kivi-4"):
        pytest.skip("an interpreter is slow: the kernel is compared with plain torch elsewhere")
    family, _, variant = which.partition("+")
    model = converted(family, variant) if variant else tiny(family)
    if family == "mistral-window" and name != "kivi-4":
        return
    cache, first = cache_of(model, HELD[name])
    steps = 2 if by_kernel else STEPS
    wanted, token = [], first
    for _ in range(steps):
        token = model.decode(cache, token[:, None])[:, -1].argmax(-1)
        wanted.append(token)
    cache, first = cache_of(model, HELD[name])
    if by_kernel:
        made = StaticLayer.__init__
        monkeypatch.setattr(StaticLayer, "__init__", lambda self, layer, cells, steps, _: made(self, layer, cells, steps, True))
    static = StaticDecode(model, cache, first, steps)
    found = [static.step().clone() for _ in range(steps)]
    assert torch.equal(torch.stack(found), torch.stack(wanted))
