"""Quantised rows beside optimum-quanto, which transformers' quantised cache computes with: codes, and answers of a real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache

from benchmarks.facts import Recall
from harness.engine.model import Model
from harness.evaluation.prompts import Protocol, tokenize
from harness.evaluation.sweep import Cell, Sweep
from harness.models.load import load
from harness.registry import BUILTIN
from harness.storage import Codec
from storages.integers import ByChannel, ByToken

quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
cpp = pytest.importorskip("optimum.quanto.library.extensions.cpp")
REFERENCE = Path(__file__).parent.parent / "harness" / "reference"
ANSWER = 12  # tokens


@pytest.fixture(autouse=True, scope="module")
def unbuilt() -> Iterator[None]:
    """What quanto has packed is unpacked here: its extension for that takes a compiler a minute."""

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    held = cpp.ext._lib
    cpp.ext._lib = SimpleNamespace(unpack=unpack)
    yield
    cpp.ext._lib = held


def dequantised(tensor: Tensor, bits: int, axis: int, group: int) -> Tensor:
    """What quanto makes of a tensor; axis 0: groups along the head, -1: groups of tokens by channel.

    Scales and shifts are rounded to 16 bits, as they are held here: codes are counted from them.
    """
    kind = {2: quanto.qint2, 4: quanto.qint4}[bits]
    scale, shift = (part.half().float() for part in quanto.MaxOptimizer()(tensor, kind, axis, group))
    return quanto.quantize_weight(tensor, kind, axis, scale, shift, group).dequantize()


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_by_token_and_by_channel_are_quantos(bits: int) -> None:
    heads = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(bits))
    heads *= torch.where(torch.arange(64) % 7 == 3, 10.0, 1.0)  # some channels are larger, as keys have them
    for group in (32, 64):
        codec: Codec = ByToken(bits, group)
        ours = codec.unpack(codec.pack(heads.reshape(-1, 1, 64)), 64).view_as(heads)
        assert torch.allclose(ours, dequantised(heads, bits, 0, group), atol=1e-5)
    codec = ByChannel(bits, 32)
    ours = codec.unpack(codec.pack(heads.reshape(-1, 32, 64)), 64).view_as(heads)
    assert torch.allclose(ours, dequantised(heads, bits, -1, 32), atol=1e-5)
    assert not torch.allclose(ours, heads, atol=0.05)


class ByQuanto(DynamicLayer):
    """A layer of transformers' cache that shows attention what quanto makes of its entries, from the second pass on.

    residual 0: every token is quantised as it comes. Otherwise KIVI as its code has it: keys by channel in complete blocks of
    `residual`, values by token when they are no longer among the newest `residual`, each as found before the pass.
    """

    def __init__(self, bits: int, group: int, residual: int) -> None:
        super().__init__()
        self.bits, self.group, self.residual = bits, group, residual

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.keys.shape[-2] if self.is_initialized else 0
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not before:
            return keys, values
        if not self.residual:
            return tuple(dequantised(part.contiguous(), self.bits, 0, self.group) for part in (keys, values))  # type: ignore[return-value]
        keys, values = keys.half().float(), values.half().float()  # the residual is held in 16 bits, and packed from there
        blocks, old = before // self.residual * self.residual, max(before - self.residual, 0)
        shown = (
            dequantised(keys[..., :blocks, :].contiguous(), self.bits, -1, self.group) if blocks else keys[..., :0, :],
            dequantised(values[..., :old, :].contiguous(), self.bits, 0, self.group) if old else values[..., :0, :],
        )
        return torch.cat([shown[0], keys[..., blocks:, :]], -2), torch.cat([shown[1], values[..., old:, :]], -2)


@pytest.fixture(scope="module")
def model() -> Model:
    return load("reference", torch.float32, torch.device("cpu"))


def answers(model: Model, texts: tuple[str, ...]) -> list[dict[str, list[int]]]:
    """Of six prompts with their question, 600 tokens each: this suite's, by storage; and the prompt itself."""
    cells = [Cell(text, BUILTIN.method(text)[1], None) for text in texts]
    sweep, task, found = Sweep(model, Protocol("question_in"), with_fidelity=False), Recall(length=600), []
    for index in range(6):
        example = task.example(index, 5, lambda text: len(model.tokenizer(text)["input_ids"]))
        prompt = tokenize(model.tokenizer, example, Protocol("question_in"), 4096)
        own = {cell.name: outcome.answer.tokens for cell, outcome in sweep.example(prompt, cells, ANSWER) if outcome.answer}
        found.append(own | {"prompt": prompt.ids})
    return found


def generated(network: Any, prompt: list[int], cache: Cache) -> list[int]:
    ids = network.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


def test_answers_of_a_real_model_are_those_of_transformers_over_quanto(model: Model) -> None:
    """Token by token. transformers' own quantised cache, with a group of the whole head and no residual to speak of, is `int4`
    but for its scales of 32 bits and the newest token, which it still reads in full.
    """
    settings = {"int4": (4, 32, 0), "kivi-4(residual=64)": (4, 32, 64), "kivi-2": (2, 32, 128), "full": None}
    network = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    differ = agree = 0
    for found in answers(model, tuple(settings)):
        for text, setting in settings.items():
            cache = (
                Cache(layers=[ByQuanto(*setting) for _ in range(network.config.num_hidden_layers)]) if setting else DynamicCache()
            )
            assert generated(network, found["prompt"], cache) == found[text], text
        stock = QuantizedCache("quanto", network.config, nbits=4, q_group_size=model.shape.head_dim, residual_length=1)
        agree += sum(a == b for a, b in zip(generated(network, found["prompt"], stock), found["int4"], strict=True))
        differ += found["kivi-2"] != found["full"]
    assert differ >= 2 and agree >= 0.9 * 6 * ANSWER
