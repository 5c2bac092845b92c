"""Layers that read another layer's keys and values: cross-layer attention (CLA) on models made without it.

Brandon et al., "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention", 2024. arxiv.org/abs/2405.12981

The first layer of a group projects; the others are handed what it projected in the same pass, before RoPE and a key norm, and
have no key or value weights of their own. transformers runs unchanged, so gradients need nothing special. The cache stores a
group once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.cache import ModelShape
from harness.families import CannotConvert, Handle, handles, key_norms

Initial = Literal["mean", "first"]


@dataclass
class Handed:
    """What the layers of one group have in common: the projections of the pass under way."""

    readers: int  # layers behind the first
    held: dict[str, Tensor] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, projected: Tensor) -> Tensor:
        self.held[name], self.taken[name] = projected, 0
        return projected

    def take(self, name: str) -> Tensor:
        """Without gradients the last reader lets go of it; with them it stays, for layers that run again in the backward pass."""
        self.taken[name] += 1
        if self.taken[name] >= self.readers and not torch.is_grad_enabled():
            return self.held.pop(name)
        return self.held[name]


@dataclass(frozen=True)
class Place:
    """Where a layer of the model stands: which cache layer it reads, and whether it is the one that writes it."""

    layer: int
    cache_layer: int
    writes: bool


class Projecting(nn.Module):
    """A key or value projection whose output other layers read too."""

    def __init__(self, inner: nn.Linear, name: str, handed: Handed) -> None:
        super().__init__()
        self.inner, self.name, self._handed = inner, name, (handed,)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._handed[0].put(self.name, self.inner(hidden))


class Reading(nn.Module):
    """In the place of a key or value projection."""

    def __init__(self, name: str, handed: Handed) -> None:
        super().__init__()
        self.name, self._handed = name, (handed,)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._handed[0].take(self.name)


class ProjectingFused(nn.Module):
    """A projection that makes queries, keys and values at once."""

    def __init__(self, handle: Handle, handed: Handed) -> None:
        super().__init__()
        self.inner, self._about = handle.fused, (handle, handed)

    def forward(self, hidden: Tensor) -> Tensor:
        handle, handed = self._about
        out = self.inner(hidden)
        _, keys, values = handle.split(out)
        handed.put("keys", keys)
        handed.put("values", values)
        return out


class ReadingFused(nn.Module):
    """The same with the query weights alone."""

    def __init__(self, handle: Handle, handed: Handed) -> None:
        super().__init__()
        old = handle.fused
        weight = handle.split(old.weight.data.t())[0].flatten(-2).t().contiguous()
        self.inner = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, device="meta")
        self.inner.weight = nn.Parameter(weight)
        if old.bias is not None:
            self.inner.bias = nn.Parameter(handle.split(old.bias.data)[0].flatten(-2).contiguous())
        self._about = (handle, handed)

    def forward(self, hidden: Tensor) -> Tensor:
        handle, handed = self._about
        queries = self.inner(hidden).unflatten(-1, (-1, handle.head_dim))
        return handle.join(queries, handed.take("keys"), handed.take("values"))


class NormOf(nn.Module):
    """Another layer's key norm: keys that are shared are normed alike."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._norm = (norm,)  # in a tuple: it is the other layer's submodule

    def forward(self, keys: Tensor) -> Tensor:
        normed: Tensor = self._norm[0](keys)
        return normed


def share_layers(network: PreTrainedModel, groups: Sequence[Sequence[int]], initial: Initial = "mean") -> None:
    """The layers of each group, ascending, read the keys and values of its first, in place.

    Args:
        initial: the first layer's projection becomes the mean of the group's, or stays.

    Raises:
        CannotConvert: no handles for the family, or a model converted before.
    """
    found = handles(network)
    for number, group in enumerate(groups):
        members = [found[layer] for layer in group]
        if len({getattr(member.attention, "use_rope", True) for member in members}) > 1:
            raise CannotConvert(f"layers {', '.join(map(str, group))} cannot share keys: some turn them by position, some do not")
        if initial == "mean":
            for parts in zip(*(member.key_values() for member in members), strict=True):
                parts[0].copy_(torch.stack([part.float() for part in parts]).mean(0))
        handed = Handed(len(group) - 1)
        for member in members:
            member.attention.kv_place = Place(member.index, number, member is members[0])
            if len(members) > 1:
                _share(member, members[0], handed)


def _share(member: Handle, first: Handle, handed: Handed) -> None:
    attention: Any = member.attention
    if member.layout == "apart":
        for name in ("k_proj", "v_proj"):
            shared = Projecting(getattr(attention, name), name, handed) if member is first else Reading(name, handed)
            setattr(attention, name, shared)
        for name in key_norms(attention) if member is not first else ():
            setattr(attention, name, NormOf(getattr(first.attention, name)))
        return
    fused = ProjectingFused(member, handed) if member is first else ReadingFused(member, handed)
    setattr(attention, member.fused_name, fused)


def mark_shared(network: PreTrainedModel) -> bool:
    """Marks the layers of a model that was made with shared keys and values (Gemma 3n, Gemma 4); is it one?

    There a layer that reuses them is handed those of the last layer of its kind that stored them, keys behind RoPE and norm.
    """
    layers = [module for module in network.get_decoder().modules() if hasattr(module, "is_kv_shared_layer")]
    if not any(layer.is_kv_shared_layer for layer in layers):
        return False
    stored: dict[str, int] = {}
    writers = 0
    for number, layer in enumerate(layers):
        if layer.is_kv_shared_layer:
            layer.kv_place = Place(number, stored[layer.layer_type], writes=False)  # type: ignore[index, assignment]
            continue
        layer.kv_place = Place(number, writers, writes=True)  # type: ignore[assignment]
        if layer.store_full_length_kv:
            stored[layer.layer_type] = writers  # type: ignore[index]
        writers += 1
    return True


def place_of(attention: nn.Module, layer: int) -> Place:
    """Where an attention layer stands: in a model whose layers share nothing, at its own cache layer."""
    found = getattr(attention, "kv_place", None)
    return found if isinstance(found, Place) else Place(layer, layer, writes=True)


def places(network: nn.Module) -> list[Place]:
    """Of every layer, in order; empty for a model whose layers share nothing."""
    found = (getattr(module, "kv_place", None) for module in network.modules())
    return [place for place in found if isinstance(place, Place)]


def stored_shape(network: PreTrainedModel, whole: ModelShape) -> ModelShape:
    """The shape of what is cached: a layer for each that writes. `whole`: the shape of all layers."""
    writers = [place.layer for place in places(network) if place.writes]
    if not writers:
        return whole
    dims = tuple(whole.head_dims[layer] for layer in writers) if whole.head_dims else ()
    windows = tuple(whole.windows[layer] for layer in writers)
    return replace(whole, layers=len(writers), windows=windows, head_dims=dims)
