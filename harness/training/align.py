"""Turns the heads that are to share a mean towards each other first, without changing what the model says: ours, not the papers'.

A value head may be turned at will if its columns of the output projection are turned back; a key head by whatever commutes with
the positions' rotation, if its queries are turned with it. So heads that say the same in other coordinates need not cancel in
their mean. The turns come from what the projections give on text: generalised Procrustes analysis (Gower, 1975), in which each
head in turn goes as near as it can to the sum of the others. For multi-head attention made grouped the same was proposed
for values and keys by Jin et al., "Align Attention Heads Before Merging Them", 2024. arxiv.org/abs/2412.20677
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.engine.projections import STILL, TURNED, output_weight
from harness.errors import BadRequest
from harness.families import Handle, check_groups, key_norms

if TYPE_CHECKING:
    from harness.training.loop import Batches

CALIBRATION = 8192  # tokens that are read, of the training's first batches
ROUNDS = 10  # the sum of a group's inner products grows with each, and settles before


@dataclass
class Seen:
    """What the heads of one layer gave: sums of x y' of every two heads of a group, [G, g, g, D, D], float64."""

    keys: Tensor
    values: Tensor
    rotary: int = 0  # dimensions of a head that positions turn, the first ones, in pairs (i, i + rotary / 2)


@torch.no_grad()
def align(network: Any, group: int, batches: Batches) -> None:
    """Turns the heads of every group of neighbours, in place.

    Keys stay as they are where a norm stands between their projection and the rotation (Qwen3), and in families whose rotation is
    not known here or not seen; values are turned in all. `prepare` checks that the model says what it said: a norm, a gate or a
    clip between attention and its output projection does not allow it. Takes 2 H g D^2 numbers of 8 bytes a layer.

    Raises:
        BadRequest: the output projection is not found.
        CannotConvert: groups that do not divide the heads.
    """
    found = check_groups(network, [group])
    outputs = [output_weight(handle.attention, handle.query_heads * handle.head_dim) for handle in found]
    if any(output is None for output in outputs):
        raise BadRequest("--align needs the output projection of every layer, and one is not found")
    seen = _read(network, found, group, batches)
    family = network.config.model_type
    for handle, output, one in zip(found, outputs, seen, strict=True):
        assert output is not None
        columns = output.data.unflatten(1, (handle.query_heads, handle.head_dim)).permute(1, 2, 0)  # [Hq, D, hidden]
        _turn(handle.values(), [columns], turns(one.values, 0))
        known = family in STILL or (family in TURNED and one.rotary > 0)
        if known and not key_norms(handle.attention):
            _turn(handle.key_values(values=False), handle.queries(), turns(one.keys, one.rotary))


def turns(inner: Tensor, rotary: int) -> Tensor:
    """An orthogonal matrix for each head, after which the heads of a group are as near to each other as they come: [G * g, D, D].

    Args:
        inner: [G, g, g, D, D], sums of x y' of two heads of a group.
        rotary: the first so many dimensions are only turned in their planes (i, i + rotary / 2).
    """
    groups, size, _, dim, _ = inner.shape
    found = torch.eye(dim, dtype=inner.dtype).expand(groups, size, dim, dim).clone()
    for _ in range(ROUNDS):
        for head in range(size):
            others = [other for other in range(size) if other != head]
            towards = (found[:, others] @ inner[:, others, head]).sum(1)
            found[:, head] = _nearest(towards, rotary)
    return found.flatten(0, 1)


def _nearest(towards: Tensor, rotary: int) -> Tensor:
    """The allowed turn R with the largest trace of R' M, for each M of [G, D, D]."""
    found, half = torch.zeros_like(towards), rotary // 2
    if rotary < towards.shape[-1]:
        left, _, right = torch.linalg.svd(towards[:, rotary:, rotary:])
        found[:, rotary:, rotary:] = left @ right
    first, second = torch.arange(half), torch.arange(half, rotary)
    cosines = towards[:, first, first] + towards[:, second, second]
    sines = towards[:, second, first] - towards[:, first, second]
    size = torch.hypot(cosines, sines)
    flat = size == 0  # nothing to turn towards
    cosines, sines = (torch.where(flat, rest, part / size) for part, rest in ((cosines, 1.0), (sines, 0.0)))
    found[:, first, first], found[:, second, second] = cosines, cosines
    found[:, second, first], found[:, first, second] = sines, -sines
    return found


def _turn(heads: list[Tensor], readers: list[Tensor], by: Tensor) -> None:
    """Turns KV heads [H, D, ...] and whatever reads them, [Hq, D, ...], in place."""
    for part in (*heads, *readers):
        mine = by.repeat_interleave(part.shape[0] // len(by), 0).to(part.device)
        rows = part.double().flatten(2) if part.ndim > 2 else part.double()[..., None]
        part.copy_((mine @ rows).view(part.shape))


def _read(network: Any, found: list[Handle], group: int, batches: Batches) -> list[Seen]:
    from harness.training.loop import predictions

    seen = [Seen(_nothing(handle, group), _nothing(handle, group)) for handle in found]
    read = number = 0
    while read < CALIBRATION:
        batch = batches(number).to(network.device)
        real = batch.documents >= 0
        with _watching(found, seen, group, real):
            predictions(network, batch)
        read, number = read + int(real.sum()), number + 1
    return seen


def _nothing(handle: Handle, group: int) -> Tensor:
    dim = handle.head_dim
    return torch.zeros(handle.kv_heads // group, group, group, dim, dim, dtype=torch.float64)


@contextmanager
def _watching(found: list[Handle], seen: list[Seen], group: int, real: Tensor) -> Iterator[None]:
    """Adds up what the projections of every layer give for the tokens [B, T] that are no padding."""

    def inner(heads: Tensor) -> Tensor:
        apart = heads[real].float().unflatten(1, (-1, group))  # [n, G, g, D]
        return torch.einsum("ngad,ngbe->gabde", apart, apart).double().cpu()

    def add(handle: Handle, one: Seen) -> list[tuple[Any, Any]]:
        def keys(_: Any, __: Any, out: Tensor) -> None:
            one.keys += inner(out.unflatten(-1, (-1, handle.head_dim)))

        def values(_: Any, __: Any, out: Tensor) -> None:
            one.values += inner(out.unflatten(-1, (-1, handle.head_dim)))

        def both(_: Any, __: Any, out: Tensor) -> None:
            _, k, v = handle.split(out)
            one.keys += inner(k)
            one.values += inner(v)

        if handle.layout == "apart":
            return list(zip(handle.projections, (keys, values), strict=True))
        return [(handle.fused, both)]

    def turned(one: Seen) -> Any:
        def see(_: Any, __: Any, options: dict[str, Any]) -> None:
            positions = options.get("position_embeddings")
            one.rotary = 0 if positions is None else positions[0].shape[-1]

        return see

    with ExitStack() as hooks:
        for handle, one in zip(found, seen, strict=True):
            hooks.callback(handle.attention.register_forward_pre_hook(turned(one), with_kwargs=True).remove)
            for module, look in add(handle, one):
                hooks.callback(module.register_forward_hook(look).remove)
        yield
