"""Attention logits, in the steps that every attention of the suite shares: the softcap, what a query may see, and sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), in place (Gemma 2); without a softcap the logits as they are."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class Chunk(int):
    """A window that does not slide: a query sees its own block of so many positions, up to itself (Llama 4)."""


def earliest(asking: Any, window: int) -> Any:
    """The first position that a query at `asking` sees; a number, or a tensor of them. Below 0: all of them."""
    return asking - asking % window if isinstance(window, Chunk) else asking - window + 1


def hidden(held: Tensor, asking: Tensor, window: int | None) -> Tensor:
    """Which entries a query must not see: those behind it, and those that have left its window.

    Args:
        held: positions of the entries. asking: positions of the queries. Their shapes broadcast.
    """
    later = held > asking
    return later if window is None else later | (held < earliest(asking, window))


def with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of `logits` [Hq, ..., n], to which each head adds a learned logit that reads no value.

    Agarwal et al., "gpt-oss-120b & gpt-oss-20b Model Card", 2025, section 2.2. arxiv.org/abs/2508.10925

    Args:
        sinks: [Hq]; None: an ordinary softmax. The weights of a head then sum to less than 1.
    """
    import torch

    if sinks is None:
        return logits.softmax(-1)
    beside = sinks.to(logits.dtype).view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, beside], -1).softmax(-1)[..., :-1]
