"""The key and value projections of every family, as handles: read, averaged and replaced in place, one layer at a time.

Beside harness/engine/model.py the only file that knows transformers' modules and configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.cache import ModelShape
from harness.errors import UserError

Layout = Literal["apart", "phi3", "neox"]
LAYOUTS: dict[str, Layout] = {
    "llama": "apart",
    "mistral": "apart",
    "qwen2": "apart",
    "qwen3": "apart",
    "gemma2": "apart",
    "opt": "apart",
    "phi3": "phi3",
    "gpt_neox": "neox",
}
SAYS_GROUPS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")  # a config can say how many KV heads there are
How = Literal["mean", "first", "random"]


class CannotConvert(UserError):
    """No handles for this model, or groups that its heads cannot form."""


@dataclass(frozen=True)
class Handle:
    """One attention layer."""

    index: int
    attention: Any  # the module
    layout: Layout
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def hidden(self) -> int:
        return int((self.attention.k_proj if self.layout == "apart" else self.fused).in_features)

    @property
    def fused(self) -> Any:
        return self.attention.qkv_proj if self.layout == "phi3" else self.attention.query_key_value

    def split(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last axis of a fused projection's output, or its weight's first (moved last): queries, keys, values.

        Views, [..., heads, D] each.
        """
        if self.layout == "neox":
            apart = out.unflatten(-1, (self.kv_heads, 3, self.head_dim))
            return apart[..., 0, :], apart[..., 1, :], apart[..., 2, :]
        sizes = [heads * self.head_dim for heads in (self.query_heads, self.kv_heads, self.kv_heads)]
        queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in out.split(sizes, -1))
        return queries, keys, values

    def join(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self.layout == "neox":
            return torch.stack((queries, keys, values), -2).flatten(-3)
        return torch.cat([part.flatten(-2) for part in (queries, keys, values)], -1)

    def key_values(self) -> list[Tensor]:
        """Weights [H, D, hidden] and biases [H, D] of keys and values: views, to be changed in place."""
        found = []
        if self.layout == "apart":
            for projection in (self.attention.k_proj, self.attention.v_proj):
                found += [
                    part.data.unflatten(0, (-1, self.head_dim))
                    for part in (projection.weight, projection.bias)
                    if part is not None
                ]
            return found
        weight, bias = self.fused.weight.data, self.fused.bias
        for part in self.split(weight.t())[1:]:  # [hidden, H, D]
            found.append(part.permute(1, 2, 0))
        if bias is not None:
            found += list(self.split(bias.data)[1:])
        return found


def shape_of(network: PreTrainedModel) -> ModelShape:
    """The shape of a model as its configuration tells it: every layer attends, and stores what it projects."""
    config = network.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    sliding = [kinds is None or kind == "sliding_attention" for kind in kinds or range(layers)]
    return ModelShape(
        layers=layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        windows=tuple(window if slides else None for slides in sliding),
        itemsize=network.dtype.itemsize,
    )


def handles(network: PreTrainedModel) -> list[Handle]:
    """
    Raises:
        CannotConvert: a family without handles, or a model that was converted before.
    """
    config = network.config
    if config.model_type not in LAYOUTS:
        raise CannotConvert(f"no attention handles for the family {config.model_type!r}; there are for {', '.join(LAYOUTS)}")
    layout, shape = LAYOUTS[config.model_type], shape_of(network)
    wanted = {"apart": "k_proj", "phi3": "qkv_proj", "neox": "query_key_value"}[layout]
    found = [module for module in network.modules() if hasattr(module, wanted)]
    if len(found) != config.num_hidden_layers:
        raise CannotConvert(f"{len(found)} attention layers were found in {config.num_hidden_layers} layers")
    if wrapped(network):
        raise CannotConvert("the model is converted already: convert its parent")
    sizes = (shape.query_heads, shape.kv_heads, shape.head_dim)
    return [Handle(number, module, layout, *sizes) for number, module in enumerate(found)]


def check_groups(network: PreTrainedModel, groups: Sequence[int]) -> list[Handle]:
    """The handles, if every group size divides the KV heads.

    Raises:
        CannotConvert: it does not, or there are no handles.
    """
    found = handles(network)
    for group in groups:
        if group < 1 or found[0].kv_heads % group:
            raise CannotConvert(f"groups of {group} do not divide {found[0].kv_heads} KV heads")
    return found


def group_heads(network: PreTrainedModel, group: int, how: How = "mean", seed: int = 0) -> None:
    """Turns the model into one with a `group`-th of its KV heads, in place, a layer at a time.

    Where the family's config can say so, an ordinary model comes out; elsewhere the projections are wrapped.

    Args:
        how: a group becomes its mean, its first head, or a head drawn anew (the ablations of Ainslie et al., 2023).

    Raises:
        CannotConvert: see `check_groups`.
    """
    found = check_groups(network, [group])
    generator = torch.Generator().manual_seed(seed)
    for handle in found:
        for part in handle.key_values():
            _pool(part, group, how, generator)
        if network.config.model_type in SAYS_GROUPS:
            _shrink(handle, group)
        else:
            wrap(handle, Grouping((group,), None))
    if network.config.model_type in SAYS_GROUPS:
        network.config.num_key_value_heads = found[0].kv_heads // group


def _pool(part: Tensor, group: int, how: How, generator: torch.Generator) -> None:
    """[H, ...], in place: all heads of a group become what they are to become together."""
    grouped = part.unflatten(0, (-1, group))
    if how == "first":
        pooled = grouped[:, :1].clone()
    elif how == "random":
        drawn = torch.randn(grouped[:, :1].shape, generator=generator)
        pooled = (drawn * float(part.float().std())).to(part)
    else:
        pooled = grouped.float().mean(1, keepdim=True).to(part)
    part.copy_(pooled.expand_as(grouped).reshape(part.shape))


def _shrink(handle: Handle, group: int) -> None:
    """Keeps one head of each group."""
    attention = handle.attention
    if handle.layout == "apart":
        for name in ("k_proj", "v_proj"):
            projection = getattr(attention, name)
            setattr(attention, name, _linear_of(projection, lambda part: _first_heads(part, handle.head_dim, group)))
    else:
        attention.qkv_proj = _linear_of(handle.fused, lambda part: _shrunk_fused(handle, part, group))
        attention.num_key_value_heads = handle.kv_heads // group
    attention.num_key_value_groups = handle.query_heads // (handle.kv_heads // group)


def _first_heads(part: Tensor, dim: int, group: int) -> Tensor:
    return part.unflatten(0, (-1, group, dim))[:, 0].flatten(0, 1)


def _shrunk_fused(handle: Handle, part: Tensor, group: int) -> Tensor:
    """A fused weight [out, hidden] or bias [out] with every `group`-th key and value head."""
    moved = part.t() if part.ndim == 2 else part  # heads last
    queries, keys, values = handle.split(moved)
    joined = torch.cat([queries.flatten(-2), keys[..., ::group, :].flatten(-2), values[..., ::group, :].flatten(-2)], -1)
    return joined.t() if part.ndim == 2 else joined


def _linear_of(old: nn.Linear, take: Any) -> nn.Linear:
    weight = take(old.weight.data).contiguous()
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    if old.bias is not None:
        new.bias = nn.Parameter(take(old.bias.data).contiguous(), requires_grad=old.bias.requires_grad)
    return new


class Grouping(nn.Module):
    """How the heads of each token of a layer are averaged: one way for all, or its expert's.

    Args:
        router: a module that is shown the layer's input and then has `assigned`, [B, T]: the expert of each token.
    """

    def __init__(self, groups: Sequence[int], router: Any = None) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.router = router

    @property
    def assigned(self) -> Tensor | None:
        """[B, T], the expert of each token of the last pass; None where there is only one."""
        return None if self.router is None else self.router.assigned

    def route(self, hidden: Tensor) -> None:
        if self.router is not None:
            self.router(hidden)

    def merged(self, heads: Tensor) -> Tensor:
        """[B, T, H, D]: heads averaged in the groups of each token's expert, and repeated back to H."""
        merged = heads
        for number, group in enumerate(self.groups):
            if group == 1:
                continue
            mean = heads.unflatten(-2, (-1, group)).mean(-2, keepdim=True)
            mean = mean.expand(*mean.shape[:-2], group, -1).flatten(-3, -2)
            assigned = self.assigned
            merged = mean if assigned is None else torch.where((assigned == number)[..., None, None], mean, merged)
        return merged


class GroupedProjection(nn.Module):
    """A key or value projection whose heads are averaged token by token."""

    def __init__(self, inner: nn.Linear, grouping: Grouping, head_dim: int, routes: bool) -> None:
        super().__init__()
        self.inner, self.head_dim, self.routes = inner, head_dim, routes
        self._grouping = (grouping,)  # in a tuple: it is the attention's submodule, not this one's

    def forward(self, hidden: Tensor) -> Tensor:
        (grouping,) = self._grouping
        if self.routes:
            grouping.route(hidden)
        return grouping.merged(self.inner(hidden).unflatten(-1, (-1, self.head_dim))).flatten(-2)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    @property
    def in_features(self) -> int:
        return self.inner.in_features


class GroupedFused(nn.Module):
    """The same for a projection that makes queries, keys and values at once."""

    def __init__(self, inner: nn.Linear, grouping: Grouping, handle: Handle) -> None:
        super().__init__()
        self.inner = inner
        self._about = (grouping, handle)

    def forward(self, hidden: Tensor) -> Tensor:
        grouping, handle = self._about
        grouping.route(hidden)
        queries, keys, values = handle.split(self.inner(hidden))
        return handle.join(queries, grouping.merged(keys), grouping.merged(values))


def wrap(handle: Handle, grouping: Grouping) -> None:
    """Puts a grouping around the projections of a layer. A key norm (Qwen3) then sees averaged heads: mean before the norm."""
    attention = handle.attention
    attention.kv_grouping = grouping
    if handle.layout == "apart":  # every family projects keys before values
        attention.k_proj = GroupedProjection(attention.k_proj, grouping, handle.head_dim, routes=True)
        attention.v_proj = GroupedProjection(attention.v_proj, grouping, handle.head_dim, routes=False)
    elif handle.layout == "phi3":
        attention.qkv_proj = GroupedFused(attention.qkv_proj, grouping, handle)
    else:
        attention.query_key_value = GroupedFused(attention.query_key_value, grouping, handle)


def wrapped(network: nn.Module) -> bool:
    """Is it more than an ordinary model of its family?"""
    return any(hasattr(module, mark) for module in network.modules() for mark in ("kv_grouping", "kv_place"))


def grouping_of(attention: nn.Module) -> Grouping | None:
    """How this attention layer's heads are averaged; None: they are not."""
    found = getattr(attention, "kv_grouping", None)
    return found if isinstance(found, Grouping) else None


def groupings(network: nn.Module) -> list[Grouping]:
    """Of every layer, in order; empty for an ordinary model."""
    return [grouping for module in network.modules() if (grouping := grouping_of(module)) is not None]


def routers(network: nn.Module) -> list[Any]:
    return [grouping.router for grouping in groupings(network) if grouping.router is not None]
