"""Prepacked weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny, tokens
from torch import nn

from harness.cache import Needs, keep_all
from harness.engine import prepacked
from harness.engine.prepacked import Prepacked
from harness.engine.rows import compact


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 40, bias=False))


def test_layers_say_the_same_from_a_layout_and_follow_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net, hidden = network(), torch.randn(1, 7, 48)
    ours, ran = Prepacked.of(net), list[int]()
    whole = prepacked.Packed.forward
    monkeypatch.setattr(prepacked.Packed, "forward", lambda one, rows: ran.append(rows.shape[1]) or whole(one, rows))
    with torch.inference_mode():
        for _ in range(2):
            plain = net(hidden)
            with ours.serving(7):
                assert torch.allclose(net(hidden), plain, atol=1e-5)
            assert ran and "forward" not in vars(net[0]), "afterwards layers are as they were"
            with torch.no_grad():
                net[0].weight.mul_(2.0)  # a layout of other weights is not used
    count = len(ran)
    assert count == 4
    with torch.inference_mode(), ours.serving(1):
        net(hidden)
    with ours.serving(7):
        net(hidden).sum().backward()
    assert len(ran) == count and net[0].weight.grad is not None, "a single token and training run as ever"


def test_rows_that_are_filled_up_are_cut_off_again() -> None:
    net = network()
    (first, _), hidden = Prepacked.of(net).layers, torch.randn(2, 41, 48)
    with torch.inference_mode():
        assert torch.allclose(first.forward(hidden), net[0](hidden), atol=1e-5)


def test_what_cannot_be_laid_out_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Prepacked.of(network()).layers) == 2
    assert not Prepacked.of(network().bfloat16()).layers
    spread = network()
    spread[0].forward = spread[0].forward  # as accelerate does
    assert not Prepacked.of(spread).layers
    monkeypatch.setattr(prepacked, "LARGEST", 1000)
    assert not Prepacked.of(network()).layers


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_a_model_decodes_from_layouts(family: str) -> None:
    model = tiny(family)
    prefill = model.prefill(tokens(30), Needs())[0]
    logits = []
    for laid_out in (False, True):
        model.prepacked = Prepacked.of(model.network) if laid_out else Prepacked()
        assert bool(model.prepacked.layers) == laid_out
        cache = compact(prefill, [keep_all(prefill)] * 3, 8)
        logits.append(model.decode_ragged(cache, [[5, 6], [7], [8, 9, 3]]))
    assert all(packed.weight is not None for packed in model.prepacked.layers)
    assert torch.allclose(*logits, atol=1e-4)
