"""mixSGA once more, small and slow, from the paper's text alone: routing, logits and loss agree with the suite's.

Song et al., EMNLP 2025 (arxiv.org/abs/2506.13541), section 3. Nothing of methods/mixsga.py, its router or harness/families.py is
used here: weights are taken out of a tiny Llama by name, and every token is handled by itself.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import BASE, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from harness.families import routers
from harness.registry import BUILTIN
from harness.training.loop import Batch, loss_of
from harness.training.recipes import Recipe

LENGTH, SIZE = 23, 16


def experts_of(scores: list[list[float]], ratios: list[int]) -> list[int]:
    """Each expert in turn takes its share of the tokens that are left, those that it rates highest (section 3.2)."""
    left, found = list(range(len(scores))), [-1] * len(scores)
    for number, ratio in enumerate(ratios):
        room = len(left) if number == len(ratios) - 1 else math.ceil(len(scores) * ratio / sum(ratios))
        for token in sorted(left, key=lambda token: -scores[token][number])[:room]:
            found[token] = number
        left = [token for token in left if found[token] < 0]
    return found


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean() + 1e-6).sqrt()


def turned(head: Tensor, position: int) -> Tensor:
    half = len(head) // 2
    angle = position * 10000.0 ** -(torch.arange(half) / half)
    first, second = head[:half], head[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


class Slow:
    """A tiny Llama in which every token is given an expert in every layer."""

    def __init__(
        self, weights: dict[str, Tensor], scores: list[tuple[Tensor, Tensor]], groups: list[int], ratios: list[int]
    ) -> None:
        self.weights, self.scores, self.groups, self.ratios = weights, scores, groups, ratios
        self.losses: list[float] = []
        self.routed: list[list[int]] = []

    def averaged(self, heads: Tensor, group: int) -> list[Tensor]:
        """The key or value that each head reads: the mean of its group."""
        return [heads[head // group * group : head // group * group + group].mean(0) for head in range(len(heads))]

    def layer(self, number: int, hidden: list[Tensor], queries: int) -> list[Tensor]:
        w = {name.split(".", 3)[3]: weight for name, weight in self.weights.items() if name.startswith(f"model.layers.{number}.")}
        inside = [norm(x, w["input_layernorm.weight"]) for x in hidden]
        rate, bias = self.scores[number]
        rated = [(rate @ x + bias).tolist() for x in inside]
        chosen = experts_of(rated, self.ratios)
        self.routed.append(chosen)
        self.losses.append(
            sum(math.log(sum(math.exp(s) for s in row)) - row[expert] for row, expert in zip(rated, chosen, strict=True))
            / len(rated)
        )
        keys, values = [], []
        for place, (x, expert) in enumerate(zip(inside, chosen, strict=True)):
            group = self.groups[expert]
            key, value = (self.averaged((w[f"self_attn.{n}_proj.weight"] @ x).view(-1, SIZE), group) for n in "kv")
            keys.append([turned(head, place) for head in key])
            values.append(value)
        out = []
        for place, x in enumerate(inside):
            asked = (w["self_attn.q_proj.weight"] @ x).view(queries, SIZE)
            parts = []
            for head in range(queries):
                mine = head * len(keys[0]) // queries
                query = turned(asked[head], place)
                weights = torch.stack([query @ keys[j][mine] / math.sqrt(SIZE) for j in range(place + 1)]).softmax(0)
                parts.append(sum(weights[j] * values[j][mine] for j in range(place + 1)))
            after = hidden[place] + w["self_attn.o_proj.weight"] @ torch.cat(parts)  # type: ignore[arg-type]
            y = norm(after, w["post_attention_layernorm.weight"])
            gate = w["mlp.gate_proj.weight"] @ y
            out.append(after + w["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * (w["mlp.up_proj.weight"] @ y)))
        return out

    def logits(self, ids: Tensor, layers: int, queries: int) -> Tensor:
        """[T, V]"""
        hidden = [self.weights["model.embed_tokens.weight"][token] for token in ids.tolist()]
        for number in range(layers):
            hidden = self.layer(number, hidden, queries)
        return torch.stack([self.weights["lm_head.weight"] @ norm(x, self.weights["model.norm.weight"]) for x in hidden])


@pytest.mark.parametrize(
    ("heads", "text", "groups", "ratios"),
    [(4, "mixsga-3:1:6", [1, 2, 4], [3, 1, 6]), (3, "mixsga-1x1:2x3", [1, 3], [1, 2]), (2, "mixsga-2x1:3x2", [1, 2], [2, 3])],
)
@torch.no_grad()
def test_an_implementation_from_the_papers_text_alone_agrees(heads: int, text: str, groups: list[int], ratios: list[int]) -> None:
    sizes = {"hidden_size": SIZE * heads, "num_attention_heads": 2 * heads, "num_key_value_heads": heads, "head_dim": SIZE}
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**BASE, "model_type": "llama", **sizes})
    net: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.15)
    weights = {name: weight.clone() for name, weight in net.state_dict().items()}
    BUILTIN.conversion(text).apply(net)
    found = [(router.score.weight, router.score.bias) for router in routers(net)]
    for rate, bias in found:
        rate.mul_(3.0)
        bias.normal_(std=0.2)
    slow, ids = Slow(weights, found, groups, ratios), tokens(LENGTH + 1, seed=5)
    wanted = slow.logits(ids[:-1], config.num_hidden_layers, 2 * heads)
    batch = Batch(ids[None, :-1], ids[None, 1:], torch.arange(LENGTH)[None])
    total, parts = loss_of(net, batch, Recipe(bf16=False, alpha=0.25))
    assert [router.assigned[0].tolist() for router in routers(net)] == slow.routed
    assert all(len(set(routed)) == len(groups) for routed in slow.routed)
    assert (net(input_ids=ids[None, :-1], use_cache=False).logits[0] - wanted).abs().max() < 1e-4
    entropy = -wanted.log_softmax(-1).gather(1, ids[1:, None]).mean()
    assert parts["router"] == pytest.approx(sum(slow.losses) / len(slow.losses), abs=1e-4)
    assert float(total) == pytest.approx(float(entropy) + 0.25 * sum(slow.losses) / len(slow.losses), abs=1e-4)


def test_the_routers_gradient_is_that_of_finite_differences() -> None:
    from helpers import batches, trainable

    net, batch = trainable("llama", "mixsga-3:1:6").double(), batches(1)(0)
    recipe = Recipe(bf16=False, alpha=1.0)
    loss_of(net, batch, recipe)[0].backward()
    router = routers(net)[1]
    grad, step = router.score.weight.grad, 3e-3  # routers count in float32
    before = router.assigned.clone()
    for expert, place in ((0, 3), (1, 40), (2, 17)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                router.score.weight[expert, place] += sign * step
                ends.append(float(loss_of(net, batch, recipe)[0]))
                router.score.weight[expert, place] -= sign * step
            assert torch.equal(router.assigned, before), "the choice is held"
        assert float(grad[expert, place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)
