"""Aligns the KV heads of a group by rotations before they are averaged; the model computes the same function. Ours.

A value head may be rotated by any orthogonal matrix if its columns of the output projection are rotated back. A key head may be
rotated in the planes of RoPE (by any orthogonal matrix where there is no RoPE) if the queries that read it are rotated with it.
Two heads that hold the same information in different coordinates cancel in their mean; aligned, they do not. The rotations are
found by generalised Procrustes analysis (Gower, 1975) on the outputs of the key and value projections over some text: each head
is rotated as near as possible to the sum of the others of its group, several times over.

Jin et al., "Align Attention Heads Before Merging Them", 2024 (arxiv.org/abs/2412.20677) align keys and values before they turn
multi-head attention into GQA.
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

CALIBRATION = 8192  # tokens that are read at least, of the training's first batches
ROUNDS = 10  # over the heads of a group; a round never makes the heads' agreement smaller


@dataclass
class Statistics:
    """Of one layer, over the tokens that were read: sums of the outer products of every two heads of a group, [G, g, g, D, D],
    float64. G groups of g heads.
    """

    keys: Tensor
    values: Tensor
    rotary: int = 0  # leading dimensions of a head that RoPE rotates, in planes (i, i + rotary / 2)


@torch.no_grad()
def align(network: Any, group: int, batches: Batches) -> None:
    """Rotates the heads of every group of neighbours, in place.

    Keys are left alone where a norm stands between their projection and RoPE (Qwen3), and in families whose RoPE is not known
    here; values are rotated in all families. `starts.prepare` checks that the model still computes the same, which it does not
    with a norm, a gate or a clip between attention and its output projection. Statistics take 16 H g D^2 bytes a layer.

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
        _rotate(handle.values(), [columns], rotations(one.values, 0))
        known = family in STILL or (family in TURNED and one.rotary > 0)
        if known and not key_norms(handle.attention):
            _rotate(handle.key_values(values=False), handle.queries(), rotations(one.keys, one.rotary))


def rotations(inner: Tensor, rotary: int) -> Tensor:
    """An orthogonal matrix for each head, [G * g, D, D], that brings the heads of a group near to each other.

    Args:
        inner: [G, g, g, D, D], see `Statistics`.
        rotary: the first so many dimensions are rotated within the planes (i, i + rotary / 2) only.
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
    """Of the allowed rotations R the one with the largest trace of R^T M, for each M of `towards`, [G, D, D]."""
    found, half = torch.zeros_like(towards), rotary // 2
    if rotary < towards.shape[-1]:
        left, _, right = torch.linalg.svd(towards[:, rotary:, rotary:])
        found[:, rotary:, rotary:] = left @ right
    first, second = torch.arange(half), torch.arange(half, rotary)
    cosines = towards[:, first, first] + towards[:, second, second]
    sines = towards[:, second, first] - towards[:, first, second]
    size = torch.hypot(cosines, sines)
    flat = size == 0  # no direction to rotate to
    cosines, sines = (torch.where(flat, rest, part / size) for part, rest in ((cosines, 1.0), (sines, 0.0)))
    found[:, first, first], found[:, second, second] = cosines, cosines
    found[:, second, first], found[:, first, second] = sines, -sines
    return found


def _rotate(heads: list[Tensor], readers: list[Tensor], by: Tensor) -> None:
    """Rotates KV heads [H, D, ...] by [H, D, D], and what reads them, [Hq, D, ...], in place."""
    for part in (*heads, *readers):
        mine = by.repeat_interleave(part.shape[0] // len(by), 0).to(part.device)
        rows = part.double().flatten(2) if part.ndim > 2 else part.double()[..., None]
        part.copy_((mine @ rows).view(part.shape))


def _read(network: Any, found: list[Handle], group: int, batches: Batches) -> list[Statistics]:
    from harness.training.loop import predictions

    seen = [Statistics(_nothing(handle, group), _nothing(handle, group)) for handle in found]
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
def _watching(found: list[Handle], seen: list[Statistics], group: int, real: Tensor) -> Iterator[None]:
    """Meanwhile adds the outputs of every layer's projections to its statistics. `real`: [B, T], tokens that are no padding."""

    def inner(heads: Tensor) -> Tensor:
        apart = heads[real].float().unflatten(1, (-1, group))  # [n, G, g, D]
        return torch.einsum("ngad,ngbe->gabde", apart, apart).double().cpu()

    def add(handle: Handle, one: Statistics) -> list[tuple[Any, Any]]:
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

    def rotary_of(one: Statistics) -> Any:
        def see(_: Any, __: Any, options: dict[str, Any]) -> None:
            positions = options.get("position_embeddings")
            one.rotary = 0 if positions is None else positions[0].shape[-1]

        return see

    with ExitStack() as hooks:
        for handle, one in zip(found, seen, strict=True):
            hooks.callback(handle.attention.register_forward_pre_hook(rotary_of(one), with_kwargs=True).remove)
            for module, look in add(handle, one):
                hooks.callback(module.register_forward_hook(look).remove)
        yield
