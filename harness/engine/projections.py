"""What stands around a layer's attention: the output projection behind it, and the rotation that its queries went through."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.cache import Ahead, ModelShape, Needs

PLAIN = (torch.float32, torch.float16, torch.bfloat16)  # weights of other types need their layer's own arithmetic
OUTPUT = ("o_proj", "out_proj", "dense", "wo")  # names of an output projection, by family
# Families whose every layer turns its queries by `apply_rotary_pos_emb` with what it is given, and families that turn none: each
# is tested. Others (layers without positions, complex numbers, norms behind the rotation) are not known to.
TURNED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")
STILL = ("opt",)
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # queries, keys, cos, sin: transformers' own


@dataclass(frozen=True)
class Projections:
    """Of one attention layer, as far as it was asked for and found."""

    output: Tensor | None = None  # [hidden, Hq * D], the weight behind the attention
    rotated: bool = False  # do its queries bear a position?
    cos: Tensor | None = None  # [1, T, R] of the prompt's positions
    sin: Tensor | None = None
    rotate: Rotate | None = None


def output_weight(attention: nn.Module, width: int) -> Tensor | None:
    """The output projection of an attention layer, [hidden, Hq * D]; None where none of that width is found."""
    for name in OUTPUT:
        weight = getattr(getattr(attention, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == width and weight.dtype in PLAIN:
            return weight
    return None


class Around:
    """Finds what stands around the attention of the layers of one forward pass."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """While the model runs, sees with which cosines and sines each layer turns its queries."""
        asked = network.modules() if self.needs.ahead else ()
        with ExitStack() as hooks:
            for attention in (module for module in asked if hasattr(module, "layer_idx")):
                hook = attention.register_forward_pre_hook(self._see, with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def _see(self, attention: nn.Module, _: Any, options: dict[str, Any]) -> None:
        turns = options.get("position_embeddings")
        if isinstance(turns, tuple) and len(turns) == 2:
            self._turns = {id(attention): turns}  # of the layer that runs, and no longer

    def of(self, attention: nn.Module, width: int) -> Projections:
        """Args:
        width: of what the attention gives, Hq * D.
        """
        output = output_weight(attention, width) if self.needs.output_norms else None
        family = type(attention).__module__.rpartition(".")[2].removeprefix("modeling_")
        if family in STILL:
            return Projections(output)
        if family not in TURNED or id(attention) not in self._turns:
            return Projections(output, rotated=True)
        rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        return Projections(output, True, *self._turns[id(attention)], rotate)


def value_norms(values: Tensor, around: Projections, shape: ModelShape) -> Tensor | None:
    """L1 norm of each value behind each query head's slice of the output projection, head by head: [H, n, D] -> [Hq, n].

    None where no output projection was found.
    """
    if around.output is None:
        return None
    slices = around.output.t().unflatten(0, (shape.query_heads, -1))  # [Hq, D, hidden]
    heads = [(values[head // shape.group] @ part).float().abs().sum(-1) for head, part in enumerate(slices)]
    return torch.stack(heads)


def queries_ahead(queries: Tensor, around: Projections, asked: Ahead) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of the queries to be expected at the next positions: [Hq, T, D] -> [Hq, D], [Hq, D, D], float32.

    The queries are turned back to position 0 by the model's own rotation, their mean and covariance are taken, and turned by
    the average rotation of the positions to come (Devoto et al., "Expected Attention", 2025, section 3). None where the family
    turns its queries in a way that is not found, or the prompt has nothing beyond what is skipped.
    """
    tokens = queries.shape[1]
    if tokens <= max(asked.skipped, 1) or (around.rotated and around.rotate is None):
        return None
    still = queries[:, asked.skipped :].float()  # [Hq, N, D]
    if around.rotate is not None:
        assert around.cos is not None and around.sin is not None
        cos, sin = (turn.reshape(tokens, -1).float() for turn in (around.cos, around.sin))  # [T, R]
        size = (cos[:1] ** 2 + sin[:1] ** 2).clamp(min=1e-20)  # 1, or the square of what YaRN scales by
        back = (cos / size, -sin / size)
        still = _turned(around.rotate, still, *(turn[asked.skipped :] for turn in back))
    mean = still.mean(1)  # [Hq, D]
    centred = still - mean[:, None]
    covariance = centred.transpose(1, 2) @ centred / still.shape[1]
    if around.rotate is None:
        return mean, covariance
    ahead = average_turn(cos, sin, asked.positions)
    mean = _turned(around.rotate, mean[:, None], *ahead)[:, 0]
    half = _turned(around.rotate, covariance, *ahead)  # every row turned: C R'
    return mean, _turned(around.rotate, half.transpose(1, 2), *ahead).transpose(1, 2)


def _turned(rotate: Rotate, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[H, N, D] by [N, R] or [1, R]. float32."""
    found: Tensor = rotate(vectors[None], vectors[None, :1], cos[None], sin[None])[0]
    return found[0]


def average_turn(cos: Tensor, sin: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """The mean cosine and sine over the next positions behind [T, R] of those from 0 on, [1, R] each.

    The angle grows evenly with the position, so each frequency's step follows from the first two.
    """
    size = (cos[:1] ** 2 + sin[:1] ** 2).sqrt().double()  # [1, R]
    angles = torch.atan2(sin.double(), cos.double())
    step = angles[1:2] - angles[:1]
    ahead = torch.arange(1, positions + 1, device=cos.device, dtype=torch.float64)[:, None]
    turns = angles[-1:] + ahead * step  # [P, R]
    return tuple((size * part.mean(0, keepdim=True)).float() for part in (turns.cos(), turns.sin()))  # type: ignore[return-value]
