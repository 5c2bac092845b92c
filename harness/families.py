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
from harness.logits import Chunk

Layout = Literal["apart", "joined", "interleaved"]  # of query, key and value projections: one each; Q|K|V; head by head
PROJECTIONS: dict[str, Layout] = {"k_proj": "apart", "qkv_proj": "joined", "query_key_value": "interleaved"}
How = Literal["mean", "first", "random"]


class CannotConvert(UserError):
    """No handles for this model, or groups that its heads cannot form."""


class CannotStore(UserError):
    """Keys and values that rows of this suite do not hold."""


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
        return getattr(self.attention, self.fused_name)

    @property
    def fused_name(self) -> str:
        return next(name for name, layout in PROJECTIONS.items() if layout == self.layout)

    @property
    def projections(self) -> list[Any]:
        """Those that make keys and values."""
        return [self.attention.k_proj, self.attention.v_proj] if self.layout == "apart" else [self.fused]

    def split(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last axis of a fused projection's output, or its weight's first (moved last): queries, keys, values.

        Views, [..., heads, D] each.
        """
        if self.layout == "interleaved":
            apart = out.unflatten(-1, (self.kv_heads, 3, self.head_dim))
            return apart[..., 0, :], apart[..., 1, :], apart[..., 2, :]
        sizes = [heads * self.head_dim for heads in (self.query_heads, self.kv_heads, self.kv_heads)]
        queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in out.split(sizes, -1))
        return queries, keys, values

    def join(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self.layout == "interleaved":
            return torch.stack((queries, keys, values), -2).flatten(-3)
        return torch.cat([part.flatten(-2) for part in (queries, keys, values)], -1)

    def key_values(self, values: bool = True) -> list[Tensor]:
        """Weights [H, D, hidden] and biases [H, D] of keys and, if asked for, values: views, to be changed in place."""
        found, last = [], 3 if values else 2
        if self.layout == "apart":
            for projection in (self.attention.k_proj, self.attention.v_proj)[: last - 1]:
                found += [
                    part.data.unflatten(0, (-1, self.head_dim))
                    for part in (projection.weight, projection.bias)
                    if part is not None
                ]
            return found
        weight, bias = self.fused.weight.data, self.fused.bias
        for part in self.split(weight.t())[1:last]:  # [hidden, H, D]
            found.append(part.permute(1, 2, 0))
        if bias is not None:
            found += list(self.split(bias.data)[1:last])
        return found

    def queries(self) -> list[Tensor]:
        """The same of the queries: weight [Hq, D, hidden], and bias [Hq, D] where there is one."""
        return self._part("q_proj", 0)

    def values(self) -> list[Tensor]:
        """The same of the values alone."""
        return self._part("v_proj", 2)

    def _part(self, name: str, place: int) -> list[Tensor]:
        """Args:
        place: of the part among queries, keys and values, where one projection makes all.
        """
        if self.layout == "apart":
            projection = getattr(self.attention, name)
            given = (projection.weight, projection.bias)
            return [part.data.unflatten(0, (-1, self.head_dim)) for part in given if part is not None]
        found = [self.split(self.fused.weight.data.t())[place].permute(1, 2, 0)]
        return found if self.fused.bias is None else [*found, self.split(self.fused.bias.data)[place]]


def text_config(config: Any) -> Any:
    """The configuration of the part that reads and writes text; an ordinary one is its own."""
    return config.get_text_config(decoder=True)


def window_of(config: Any, layer: int) -> int | None:
    """What a layer sees besides itself: a sliding window, a chunk, or all (None), as a text configuration tells it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] == "chunked_attention":
        return Chunk(config.attention_chunk_size)
    window: int | None = getattr(config, "sliding_window", None)
    return window if kinds is None or kinds[layer] == "sliding_attention" else None


def shape_of(network: PreTrainedModel) -> ModelShape:
    """The shape of a model as its configuration tells it: every layer attends, and stores what it projects.

    Raises:
        CannotStore: its layers have different numbers of heads.
    """
    config = text_config(network.config)
    layers = config.num_hidden_layers
    per_layer = list(getattr(config, "per_layer_config", None) or ()) or [config] * layers
    heads = {(one.num_attention_heads, getattr(one, "num_key_value_heads", None) or one.num_attention_heads) for one in per_layer}
    if len(heads) > 1:
        raise CannotStore(f"its layers have different numbers of query and KV heads: {sorted(heads)}")
    ((query_heads, kv_heads),) = heads
    dims = tuple(getattr(one, "head_dim", None) or config.hidden_size // query_heads for one in per_layer)
    return ModelShape(
        layers=layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=max(dims),
        windows=tuple(window_of(config, layer) for layer in range(layers)),
        itemsize=network.dtype.itemsize,
        head_dims=dims if len(set(dims)) > 1 else (),
    )


def handles(network: PreTrainedModel) -> list[Handle]:
    """Found by what attention modules hold, whatever the family is called.

    Raises:
        CannotConvert: projections that are not known here, or a model that was converted before.
    """
    shape, family = shape_of(network), network.config.model_type
    modules = list(network.get_decoder().modules())
    if any(getattr(module, "is_kv_shared_layer", False) for module in modules):
        raise CannotConvert(f"layers of the family {family!r} share keys and values already")
    if shape.head_dims:
        raise CannotConvert(f"heads of the family {family!r} differ in size by layer")
    if wrapped(network):
        raise CannotConvert("the model is converted already: convert its parent")
    found = [(module, name) for module in modules for name in PROJECTIONS if _holds(module, name)]
    if len(found) != shape.layers:
        raise CannotConvert(
            f"no attention handles for the family {family!r}: projections by the names {', '.join(PROJECTIONS)} were found in "
            f"{len(found)} of {shape.layers} layers"
        )
    sizes = (shape.query_heads, shape.kv_heads, shape.head_dim)
    made = [Handle(number, module, PROJECTIONS[name], *sizes) for number, (module, name) in enumerate(found)]
    for handle in made:
        _check_handle(handle, family)
    return made


def attention_layers(network: PreTrainedModel) -> list[nn.Module]:
    """The modules that project keys, in order; of a converted model too."""
    return [module for module in network.get_decoder().modules() if any(_holds(module, name) for name in PROJECTIONS)]


def _holds(module: nn.Module, name: str) -> bool:
    """Queries, keys and values in one, and of fewer KV heads, are of a layer that says how many queries read a head (Phi-3)."""
    return hasattr(module, name) and (PROJECTIONS[name] != "joined" or hasattr(module, "num_key_value_groups"))


def _check_handle(handle: Handle, family: str) -> None:
    """
    Raises:
        CannotConvert: heads of one group would not be alike behind these projections.
    """
    both = handle.query_heads + 2 * handle.kv_heads
    wanted = (handle.kv_heads if handle.layout == "apart" else both) * handle.head_dim
    for projection in handle.projections:
        if type(projection) is not nn.Linear:
            raise CannotConvert(f"projections of the family {family!r} are {type(projection).__name__}, not plain weights")
        if projection.out_features != wanted:
            raise CannotConvert(f"a projection of the family {family!r} has {projection.out_features} outputs, not {wanted}")
    for name in key_norms(handle.attention):
        weight = getattr(getattr(handle.attention, name), "weight", None)
        if weight is not None and weight.numel() != handle.head_dim:
            raise CannotConvert(f"{name} of the family {family!r} has {weight.numel()} weights, not one head's {handle.head_dim}")


def key_norms(attention: Any) -> list[str]:
    """Names of the modules that norm keys, of one attention layer."""
    names = (name for name, _ in attention.named_children())
    return [name for name in names if name.startswith("k") and "norm" in name]


def _says_groups(handle: Handle, config: Any) -> bool:
    """Can the configuration say how many KV heads there are, and does the layer follow it?"""
    known = handle.layout != "interleaved" and hasattr(handle.attention, "num_key_value_groups")
    return known and isinstance(getattr(config, "num_key_value_heads", None), int)


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
    found, config = check_groups(network, [group]), text_config(network.config)
    says = all(_says_groups(handle, config) for handle in found)
    generator = torch.Generator().manual_seed(seed)
    for handle in found:
        for part in handle.key_values():
            _pool(part, group, how, generator)
        if says:
            _shrink(handle, group)
        else:
            wrap(handle, Grouping((group,), None))
    if says:
        config.num_key_value_heads = found[0].kv_heads // group


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
        setattr(attention, handle.fused_name, _linear_of(handle.fused, lambda part: _shrunk_fused(handle, part, group)))
    for name in ("num_key_value_heads", "num_kv_heads"):
        if hasattr(attention, name):
            setattr(attention, name, handle.kv_heads // group)
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
        router: a module that is shown the layer's input and then has `assigned`, [B, T]: the expert of each token. One that can
            be trained soft has `mixed` too, [B, T, E] or None: the shares in which tokens have all experts' heads.
        scaled: are averaged keys multiplied by a number that is learned, one an expert?
    """

    def __init__(self, groups: Sequence[int], router: Any = None, scaled: bool = False) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.router = router
        self.scales = nn.Parameter(torch.ones(len(self.groups))) if scaled else None

    @property
    def assigned(self) -> Tensor | None:
        """[B, T], the expert of each token of the last pass; None where there is only one."""
        return None if self.router is None else self.router.assigned

    def route(self, hidden: Tensor) -> None:
        if self.router is not None:
            self.router(hidden)

    def merged(self, heads: Tensor, keys: bool = False) -> Tensor:
        """[B, T, H, D]: heads averaged in the groups of each token's expert, and repeated back to H.

        In a training whose router is soft, all experts' heads, in the shares that it says.
        """
        weights = getattr(self.router, "mixed", None)
        if weights is not None:
            ways = [
                self._of(number, heads, keys).expand(*heads.shape[:-2], -1, group, -1) for number, group in enumerate(self.groups)
            ]
            return torch.stack([way.flatten(-3, -2) for way in ways], -1).mul(weights[..., None, None, :]).sum(-1).to(heads.dtype)
        merged, assigned = heads, self.assigned
        for number, group in enumerate(self.groups):
            if group == 1:
                continue
            mean = self._of(number, heads, keys)
            apart = merged.unflatten(-2, (-1, group))
            if assigned is not None:
                mean = torch.where((assigned == number)[..., None, None, None], mean, apart)
            merged = mean.expand_as(apart).flatten(-3, -2)
        return merged

    def _of(self, number: int, heads: Tensor, keys: bool) -> Tensor:
        """What an expert makes of heads [B, T, H, D]: [B, T, H / g, 1, D]."""
        mean = heads.unflatten(-2, (-1, self.groups[number])).mean(-2, keepdim=True)
        return mean if not keys or self.scales is None else mean * self.scales[number].to(mean.dtype)


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
        heads = self.inner(hidden).unflatten(-1, (-1, self.head_dim))
        return grouping.merged(heads, keys=self.routes).flatten(-2)  # keys are projected first

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
        return handle.join(queries, grouping.merged(keys, keys=True), grouping.merged(values))


def wrap(handle: Handle, grouping: Grouping) -> None:
    """Puts a grouping around the projections of a layer. A key norm (Qwen3) then sees averaged heads: mean before the norm."""
    attention = handle.attention
    attention.kv_grouping = grouping
    if handle.layout == "apart":  # every family projects keys before values
        attention.k_proj = GroupedProjection(attention.k_proj, grouping, handle.head_dim, routes=True)
        attention.v_proj = GroupedProjection(attention.v_proj, grouping, handle.head_dim, routes=False)
    else:
        setattr(attention, handle.fused_name, GroupedFused(handle.fused, grouping, handle))


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
