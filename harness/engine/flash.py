"""Prefill attention by flash-attn, where it is installed: no T x T mask of a sliding window, and a softcap at full speed.

Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023. arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from harness.engine.observe import AttentionSettings

TYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


@lru_cache(maxsize=1)
def installed() -> bool:
    """Says so once where it is there and does not load: it was compiled for another torch."""
    try:
        import flash_attn  # noqa: F401
    except ModuleNotFoundError:
        return False
    except (ImportError, OSError) as error:
        print(f"flash-attn does not load, so it is not used: {error}", file=sys.stderr)
        return False
    return True


def can_run(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    if device.type != "cuda" or dtype not in TYPES or dim > LARGEST_HEAD:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and installed()


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
    """
    Args:
        queries: [Hq, N, D], the last N of the T tokens; keys, values: [H, T, D].

    Returns:
        [Hq, N, D]
    """
    from flash_attn import flash_attn_func

    window = -1 if settings.window is None else settings.window - 1  # it counts those before the query's own
    q, k, v = (part.transpose(0, 1)[None] for part in (queries, keys, values))
    out: Tensor = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=settings.scaling,
        causal=True,  # of fewer queries than keys: they are the last
        window_size=(window, 0 if window >= 0 else -1),
        softcap=settings.softcap or 0.0,
    )
    return out[0].transpose(0, 1)
