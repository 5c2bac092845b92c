"""What is done to a parent's heads before they are grouped and healed: ours, not the papers'.

Averaging heads that have nothing to do with each other loses most of what they say. Three ways around it, in any family:
`reorder` makes heads neighbours that are alike, which changes nothing of what the model says; `agree` moves the heads of a
group to their mean, so that coarse and fine experts start as one model and training pulls the fine ones apart.
`align` (a file of its own) rotates heads towards each other, which changes nothing of what the model says either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.engine.projections import output_weight
from harness.errors import BadRequest
from harness.families import Handle, check_groups, handles
from harness.training.align import align
from harness.training.loop import Batch, Batches, predictions
from harness.training.recipes import Recipe
from methods.base import Converter

MOVED = 1e-2  # share of the largest logit: far above what rounding in float32 does when heads are reordered or aligned


def groups_of(network: Any, conversion: Converter) -> list[int]:
    """Sizes above 1 of the groups that a conversion averages heads in, smallest first; empty, if it averages none.

    Raises:
        CannotConvert: sizes that do not divide the heads.
    """
    named = getattr(conversion, "groups_of", None)
    groups = [] if named is None else sorted(set(named(handles(network)[0].kv_heads)) - {1})
    if groups:
        check_groups(network, groups)
    return groups


@torch.no_grad()
def prepare(network: Any, conversion: Converter, recipe: Recipe, batches: Batches | None = None) -> None:
    """As the recipe says, in place, before the conversion. Heads are aligned on the first of `batches`.

    Raises:
        BadRequest: the conversion does not group heads, the family's output projection is not found, or reordered or aligned
            heads change what the model says.
        CannotConvert: groups that do not divide the heads.
    """
    if recipe.order == "as_is" and not recipe.align and not recipe.agree:
        return
    groups = groups_of(network, conversion)
    if not groups:
        raise BadRequest("--order, --align and --agree are for conversions that group heads: gqa, mqa, mixsga")
    found = handles(network)
    said = None if batches is None else _said(network, batches)
    if recipe.order == "likeness":
        for handle in found:
            reorder(handle, likeness_order(handle, groups))
    if recipe.align:
        assert batches is not None
        align(network, groups[-1], batches)
    if said is not None and batches is not None and (recipe.align or recipe.order == "likeness"):
        moved = float((_said(network, batches) - said).abs().max())
        if not moved <= MOVED * max(1.0, float(said.abs().max())):
            raise BadRequest(
                f"--order likeness and --align would change what this model says (logits moved by {moved:.2g}): the family "
                f"{network.config.model_type!r} does more between attention and its output projection than is known here"
            )
    if recipe.agree:
        for handle in found:
            agree(handle, groups[-1], recipe.agree, recipe.agree_on == "kv")


def _said(network: Any, batches: Batches) -> Tensor:
    """Logits [T, V] of the first row of the first batch."""
    batch = batches(0)
    real = None if batch.real is None else batch.real[:1]
    row = Batch(batch.ids[:1], batch.labels[:1], batch.positions[:1], real=real).to(network.device)
    return predictions(network, row)[0].float()


def agree(handle: Handle, group: int, share: float, values: bool = True) -> None:
    """Moves heads to the mean of their group, all the way where `share` is 1: keys, and values if asked for."""
    for part in handle.key_values(values):
        mean = part.unflatten(0, (-1, group)).mean(1, keepdim=True)
        part.copy_(part.lerp(mean.expand(-1, group, *part.shape[1:]).flatten(0, 1), share))


def likeness_order(handle: Handle, groups: Sequence[int]) -> list[int]:
    """An order of the KV heads in which neighbours are alike: the cosine of their key and value weights, taken together.

    Groups grow from the best free pair, always by the head that is nearest to their mean; where group sizes are multiples of
    each other the wider ones are made of the narrower ones in the same way.
    """
    heads = torch.cat([part.float().flatten(1) for part in handle.key_values()], 1)  # [H, all its weights]
    members = [[head] for head in range(handle.kv_heads)]
    for group in groups:
        size = len(members[0])
        if group % size:
            break  # the sizes do not nest: the narrower ones decide
        members = _together(members, torch.stack([heads[mine].mean(0) for mine in members]), group // size)
    return [head for mine in members for head in mine]


def _together(members: list[list[int]], vectors: Tensor, count: int) -> list[list[int]]:
    """Puts `count` of the members together, again and again; each stays in the order it was found in."""
    free, found, unit = list(range(len(members))), list[list[int]](), normalize(vectors, dim=1)
    while free:
        alike = (unit[free] @ unit[free].T).fill_diagonal_(-torch.inf)
        first, second = divmod(int(alike.argmax()), len(free))
        mine = sorted((free[first], free[second])) if count > 1 else [free[0]]
        while len(mine) < count:
            others = [place for place in free if place not in mine]
            mean = normalize(vectors[mine].mean(0), dim=0)
            mine.append(others[int((unit[others] @ mean).argmax())])
        found.append([head for place in mine for head in members[place]])
        free = [place for place in free if place not in mine]
    return sorted(found)


def reorder(handle: Handle, order: Sequence[int]) -> None:
    """Puts the KV heads of a layer, the queries that read them and their columns of the output projection into another order.

    The model says what it said.

    Raises:
        BadRequest: the output projection is not found.
    """
    output = output_weight(handle.attention, handle.query_heads * handle.head_dim)
    if output is None:
        raise BadRequest("--order likeness needs the output projection of every layer, and one is not found")
    each = handle.query_heads // handle.kv_heads
    readers = [head * each + number for head in order for number in range(each)]
    for part in handle.key_values():
        part.copy_(part[list(order)].clone())
    for part in handle.queries():
        part.copy_(part[readers].clone())
    columns = output.data.unflatten(1, (-1, handle.head_dim))
    columns.copy_(columns[:, readers].clone())
