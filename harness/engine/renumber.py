"""Positions inside the cache: an entry's is its rank in its row, a query's the number of entries before it (StreamingLLM).

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, section 3.2. arxiv.org/abs/2309.17453
Rows hold keys before their rotation, as the paper's code does, and each step rotates them to where they stand by then: nothing
is rounded twice, and no position exceeds what a row holds. The model itself is fed position 0, which rotates nothing. Original
positions stay beside the entries: methods choose by them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.engine.model import Model
from harness.engine.projections import TURNED, Rotate
from harness.engine.rows import RowBlock, RowCache, RowLayer

EVEN = ("default", "linear", "llama3", "yarn")  # kinds of RoPE whose frequencies do not depend on the length of a text


@dataclass(frozen=True)
class Rotation:
    """How a model turns queries and keys by their position: a table of positions from 0 on, without YaRN's scale."""

    cos: Tensor  # [P, R] float32
    sin: Tensor
    rotate: Rotate  # transformers' own, of the family

    def turn(self, vectors: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        """[S, n, D] from position 0 to `positions` [S, n] or [n], or from there back to 0."""
        where = positions.long().expand(vectors.shape[:2])
        cos, sin = self.cos[where], self.sin[where]  # [S, n, R]
        given = vectors.float()[:, None]  # [S, 1, n, D]
        turned: Tensor = self.rotate(given, given[:, :0], cos, -sin if back else sin)[0]
        return turned[:, 0].to(vectors.dtype)

    def on(self, device: torch.device) -> Rotation:
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device))


def unknown_rotation(model: Model) -> str | None:
    """Why it is not known how this model turns its keys by their position; None: it is."""
    attending = [module for module in model.network.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    families = sorted({_family(module) for module in attending} - set(TURNED))
    if families or not attending:
        return f"how the family {', '.join(families) or model.network.config.model_type} turns keys by position is not known here"
    kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in EVEN or not hasattr(model.network.get_decoder(), "rotary_emb"):
        return f"its rotary positions of the kind {kind!r} depend on the length of the text"
    return None


def _family(attention: torch.nn.Module) -> str:
    return type(attention).__module__.rpartition(".")[2].removeprefix("modeling_")


def cannot_renumber(model: Model) -> str | None:
    """Why positions inside the cache make no sense for a model; None: they do."""
    if model.routers:
        return "a head's entries lie in rows of several experts, so they have no one rank: positions cannot be renumbered"
    if any(window is not None for window in model.shape.windows):
        return "layers with a window hide entries by their position: it cannot be renumbered"
    return unknown_rotation(model)


@torch.inference_mode()
def rotation_of(model: Model, positions: int) -> Rotation:
    """A table of so many positions, of a model whose rotation is known."""
    decoder: Any = model.network.get_decoder()
    like = torch.zeros(1, dtype=torch.float32, device=model.device)
    cos, sin = decoder.rotary_emb(like, torch.arange(positions, device=model.device)[None])
    size = (cos[0] ** 2 + sin[0] ** 2).sqrt()  # 1, or what YaRN scales by: the model has scaled its queries and keys itself
    attention = next(module for module in model.network.modules() if _family(module) in TURNED and hasattr(module, "layer_idx"))
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    return Rotation(cos[0] / size, sin[0] / size, rotate)


@dataclass
class Ranks:
    """Where the entries of a layer's rows stand among those of their row."""

    of: Tensor  # [P] int32, by original position
    rotation: Rotation

    def keys(self, block: RowBlock, keys: Tensor) -> Tensor:
        """The keys [rows, length, D] of a block, each at its rank."""
        return self.rotation.turn(keys, block.entries(self.of[:, None])[..., 0])

    def queries(self, block: RowBlock, asked: Tensor) -> Tensor:
        """Queries [rows, width * Q, D] of a block, each at the rank of its own token's entry, which is there already."""
        ranks = torch.arange(block.length - block.tokens, block.length, device=asked.device)
        return self.rotation.turn(asked, ranks.repeat(block.width))

    def newest(self, queries: Tensor, entries: int) -> Tensor:
        """The newest queries [Hq, W, D] of a cell, where its rows hold so many entries; those of before the first at rank 0."""
        ranks = torch.arange(entries - queries.shape[1], entries, device=queries.device).clamp_min(0)
        return self.rotation.turn(queries, ranks)

    def leave(self, starts: Tensor, stays: Tensor) -> None:
        """Survivors close ranks. stays: [S, n], of rows that begin at `starts` [S] in the pool, as they lie."""
        where = starts[:, None] + torch.arange(stays.shape[1], device=starts.device)
        ranks = self.of[where].long()  # [S, n]
        staying = torch.zeros_like(ranks).scatter_(1, ranks, stays.long())
        self.of[where] = (staying.cumsum(1) - 1).gather(1, ranks).int()


def renumber(model: Model, cache: RowCache) -> None:
    """Turns the entries, and the queries remembered, of a cache that was just compacted back to before their rotation."""
    longest = max(int(cache.seen.max()), *(int(part.table.capacity.max()) for part in cache.parts))
    rotation = rotation_of(model, longest)
    for layer in cache.parts:
        _turn_back(layer, rotation.on(layer.keys.device))
        if layer.memory is not None and layer.memory.queries is not None:
            queries = layer.memory.queries  # [C, Hq, W, D]
            last = int(cache.seen[0]) + torch.arange(-queries.shape[2], 0, device=queries.device).clamp_min(-int(cache.seen[0]))
            ranks = layer.ranks
            assert ranks is not None
            layer.memory.queries = torch.stack([ranks.rotation.turn(cell, last, back=True) for cell in queries])


def _turn_back(layer: RowLayer, rotation: Rotation) -> None:
    ranks = torch.zeros_like(layer.positions)
    for start, length in zip(layer.table.start.tolist(), layer.table.length.tolist(), strict=True):
        where = slice(start, start + length)
        layer.keys[where] = rotation.turn(layer.keys[where][None], layer.positions[where], back=True)[0]
        ranks[where] = torch.arange(length, device=ranks.device, dtype=ranks.dtype)
    layer.ranks = Ranks(ranks, rotation)
