"""Attention logits, in the two steps that every attention of the suite shares: the softcap, and what a query may see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), in place (Gemma 2); without a softcap the logits as they are."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def hidden(held: Tensor, asking: Tensor, window: int | None) -> Tensor:
    """Which entries a query must not see: those behind it, and those that have left its sliding window.

    Args:
        held: positions of the entries. asking: positions of the queries. Their shapes broadcast.
    """
    later = held > asking
    return later if window is None else later | (held <= asking - window)
