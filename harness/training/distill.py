"""Distillation from the parent: its predictions, and what every layer's attention gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from harness.families import attention_layers


@contextmanager
def attention_outputs(network: PreTrainedModel) -> Iterator[list[Tensor]]:
    """While it lasts, what every attention layer gives, [B, T, hidden], in the order in which layers run."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    hooks = [module.register_forward_hook(keep) for module in attention_layers(network)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def distance(ours: list[Tensor], theirs: list[Tensor], real: Tensor) -> Tensor:
    """Mean over the layers of the squared distance in units of the parent's mean square. `real`: [B, T], tokens that count."""
    parts = []
    for mine, wanted in zip(ours, theirs, strict=True):
        mine, wanted = mine[real].float(), wanted[real].float()
        parts.append(mse_loss(mine, wanted) / wanted.square().mean().clamp(min=1e-12))
    return torch.stack(parts).mean()
