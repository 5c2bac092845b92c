"""Attention of new queries over the rows of a cache layer: one function, one reference, one fast path.

A query head attends to the union of the rows that it reads. Rows are disjoint, so their softmaxes merge exactly by their
log-sum-exp.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from harness.engine import kernels, packed_kernels
from harness.engine.packed_attention import bounds_of, found_by_readers, logits_of, mix_of, seen_by
from harness.engine.rows import AnyLayer, RowBlock, RowLayer, Step
from harness.logits import earliest, hidden, softcapped, with_sinks


def attend(
    layer: AnyLayer, queries: Tensor, step: Step, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention over the rows of `layer`, into which the new tokens' keys have been written already.

    A query sees no later position than its own, and none that has left the layer's window.

    Args:
        queries: [Hq, N, D], of the tokens of `step`.
        sinks: [Hq], see `harness.logits.with_sinks`.

    Returns:
        [Hq, N, D]
    """
    heads, tokens, dim = queries.shape
    memory = layer.memory
    mass = None if memory is None else memory.mass
    plain = mass is not None or layer.ranks is not None  # what a kernel does not do
    if queries.is_cuda and kernels.can_run(queries.dtype, dim) and not plain and _kernels_can_read(layer):
        outs = [attend_by_kernel(part, queries, step, scaling, softcap, sinks) for part in layer.parts]
        return outs[0] if len(outs) == 1 else torch.stack(outs).sum(0)  # of what reads no row of a part there are zeros
    where = torch.as_tensor(np.concatenate([part.readers(step) for part in layer.parts]), device=queries.device)
    asked = (queries * scaling).reshape(heads * tokens, dim)[where]  # [M, D], in the order of rows
    out = torch.empty_like(asked)
    lse = asked.new_empty(len(asked), dtype=torch.float32) if layer.merges or sinks is not None else None
    given: list[tuple[RowBlock, slice, Tensor]] = []  # each block's readers and weights, where they are remembered
    done = 0
    for part in layer.parts:
        work = _attend_block if part.packed is None else _attend_packed_block
        for block in part.blocks(step):
            mine = slice(done, done + block.count * block.width * block.tokens)
            done = mine.stop
            if mine.stop > mine.start:
                weights = work(part, block, step, asked[mine], softcap, out[mine], None if lse is None else lse[mine])
                if weights is None or memory is None:
                    continue
                if mass is not None:
                    given.append((block, mine, weights))
                if memory.newest is not None:
                    _note(memory.newest, block, weights)
                    memory.noted = True
    beside = None if sinks is None else sinks.float().repeat_interleave(tokens)  # [Hq * N]
    if mass is not None:
        _remember(mass, given, None if lse is None else _share(lse, where, heads * tokens, beside))
    if lse is None:
        return torch.empty_like(out).index_copy_(0, where, out).view(heads, tokens, dim)
    return _merge(out, lse, where, heads * tokens, beside).view(heads, tokens, dim)


def attend_by_kernel(
    layer: RowLayer, queries: Tensor, step: Step, scaling: float, softcap: float | None, sinks: Tensor | None = None
) -> Tensor:
    """All rows of the layer in one launch. queries: [Hq, N, D]. Gives [Hq, N, D]."""
    heads, tokens, dim = queries.shape
    device = queries.device
    flat = queries.reshape(heads * tokens, dim).contiguous()  # a view where queries, keys and values came in one
    length = torch.as_tensor(layer.table.length).to(device, copy=True)  # lengths change in place
    plan = layer.split_plan(step, heads * tokens)
    beside = None if sinks is None else sinks.float().repeat_interleave(tokens)  # [Hq * N]
    hide: tuple[Tensor | None, Tensor | None, int | None] = (None, None, None)
    if layer.window is not None or (step.counts > 1).any():  # a lone new token lies behind all others
        hide = (layer.positions, torch.as_tensor(step.positions).to(device).repeat(heads), layer.window)
    if layer.packed is None:
        out = kernels.attend_split(flat, layer.keys, layer.values, length, plan, scaling, softcap, *hide, sinks=beside)
    else:
        before = torch.as_tensor(found_by_readers(layer, step)).to(device)
        where = (layer.packed.on_device(), length, before, plan)
        out = packed_kernels.attend_packed(flat, layer.packed, *where, scaling, softcap, *hide, sinks=beside)
    return out.view(heads, tokens, dim)


def _kernels_can_read(layer: AnyLayer) -> bool:
    """A query head that reads rows of several storages is merged in plain torch alone."""
    return layer.apart and all(part.packed is None or packed_kernels.can_read(part.packed.storage) for part in layer.parts)


def _attend_block(
    layer: RowLayer,
    block: RowBlock,
    step: Step,
    queries: Tensor,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
) -> Tensor | None:
    """Rows of equal length as one strided batch. queries: [rows * width * Q, D]. Writes `out` and, if asked, `lse`.

    Returns:
        the weights [rows, width * Q, length]; None where rows are empty.
    """
    if block.length == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return None
    keys, values = block.entries(layer.keys), block.entries(layer.values)  # [rows, length, D]
    asked = queries.view(block.count, block.width * block.tokens, -1)
    if layer.ranks is not None:
        keys, asked = layer.ranks.keys(block, keys), layer.ranks.queries(block, asked)
    logits = softcapped(torch.bmm(asked, keys.transpose(1, 2)), softcap)  # [rows, width * Q, length]
    _hide(layer, block, step, logits.view(block.count, block.width, block.tokens, block.length))
    weights = _softmax(logits.float(), lse, _hides(layer, block)).to(logits.dtype)
    torch.bmm(weights, values, out=out.view(asked.shape))
    return weights


def _softmax(logits: Tensor, lse: Tensor | None, hides: bool) -> Tensor:
    """Weights [rows, readers, length] in place of float32 logits: a second buffer would be traffic.

    Args:
        lse: where the log-sum-exp of each reader goes, [rows * readers], if several rows are to be merged. The largest logit
            has a weight of exp(logit - lse), so that it takes no exponential of its own.
        hides: may all entries of a row be hidden from a reader? It then weighs nothing: its lse is -inf.
    """
    top = None if lse is None else logits.amax(-1)
    weights = torch.softmax(logits, -1, out=logits)
    if lse is None or top is None:
        return weights
    torch.sub(top.flatten(), weights.amax(-1).flatten().log_(), out=lse)
    if hides:
        lse.nan_to_num_(nan=float("-inf"))
        weights.nan_to_num_()
    return weights


def _note(newest: Tensor, block: RowBlock, weights: Tensor) -> None:
    """Writes down how the last query of a block weighed what its rows hold. newest: [G, P]."""
    last = weights.view(block.count, block.width, block.tokens, block.length)[:, :, -1]
    there = newest[: block.width, block.start : block.start + block.count * block.capacity]
    there.view(block.width, block.count, block.capacity)[..., : block.length] = last.transpose(0, 1)


def _remember(mass: Tensor, given: list[tuple[RowBlock, slice, Tensor]], share: Tensor | None) -> None:
    """Adds what every entry has received to `mass` [P].

    Args:
        share: [M] of each reader's whole attention, where it is spread over several rows.
    """
    for block, mine, weights in given:
        rows, readers, length = weights.shape
        received = weights.float()
        if share is not None:
            received = received * share[mine].view(rows, readers, 1)
        mass[block.start : block.start + rows * block.capacity].view(rows, -1)[:, :length] += received.sum(1)


def _share(lse: Tensor, reader: Tensor, queries: int, sinks: Tensor | None) -> Tensor:
    """[M]: which part of its query's attention each reader's is. sinks: [queries], as for `_merge`."""
    weight, total = _weights(lse, reader, queries, sinks)
    return weight / total[reader]


def _weights(lse: Tensor, reader: Tensor, queries: int, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of parts [M] the weights, and of queries their sums, sinks included, to one base a query."""
    top = (lse.new_full((queries,), float("-inf")) if sinks is None else sinks.clone()).scatter_reduce_(0, reader, lse, "amax")
    weight = torch.exp(lse - top[reader])  # [M]
    total = lse.new_zeros(queries) if sinks is None else torch.exp(sinks - top)
    return weight, total.index_add_(0, reader, weight)


def _attend_packed_block(
    layer: RowLayer,
    block: RowBlock,
    step: Step,
    queries: Tensor,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
) -> Tensor | None:
    """As `_attend_block`, over packed rows and in float32."""
    if block.length == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return None
    assert layer.packed is not None
    keys, values = bounds_of(layer, layer.packed, block)
    asked = queries.view(block.count, block.width * block.tokens, -1)
    logits = softcapped(logits_of(layer, block, asked.float(), keys), softcap)
    _hide(layer, block, step, logits.view(block.count, block.width, block.tokens, block.length))
    weights = _softmax(logits, lse, _hides(layer, block))
    out.view(asked.shape).copy_(mix_of(layer, block, weights, values))
    return weights


def _hides(layer: RowLayer, block: RowBlock) -> bool:
    """Is there anything that a query of this block may not see? A lone new token lies behind all others."""
    return layer.window is not None or block.tokens > 1


def _hide(layer: RowLayer, block: RowBlock, step: Step, logits: Tensor) -> None:
    """Masks what a query must not see, in place. logits: [rows, width, Q, length]."""
    tokens = block.tokens
    if layer.window is None and (tokens == 1 or not layer.routed):  # a lone new token lies behind all others
        if tokens > 1:  # the new tokens are the last entries of every row
            logits[..., -tokens:].masked_fill_(_later(tokens, logits.device), float("-inf"))
        return
    held = block.entries(layer.positions[:, None])[:, None, None, :, 0]  # [rows, 1, 1, length]
    new = step.starts[layer.table.cell[block.rows]][:, None] + np.arange(tokens)
    asking = torch.as_tensor(step.positions[new], device=logits.device)[:, None, :, None]  # [rows, 1, Q, 1]
    logits.masked_fill_(hidden(held, asking, layer.window), float("-inf"))


@lru_cache(maxsize=64)
def _later(tokens: int, device: torch.device) -> Tensor:
    """Which of the new tokens lie behind which, [Q, Q]. Nobody writes to it."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)


def probabilities(
    layer: RowLayer, queries: Tensor, step: Step, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention probabilities over the full cache of a single cell, by original position: what an observer of decoding sees.

    Args:
        queries: [Hq, N, D], as for `attend`.

    Returns:
        [Hq, N, n] float32, n positions so far; 0 for those that have left the window.
    """
    positions = torch.as_tensor(step.positions, device=layer.positions.device)
    logits = queries.new_full((*queries.shape[:2], int(positions[-1]) + 1), float("-inf"), dtype=torch.float32)
    for block in layer.blocks(step):  # one, but where the tokens are shared out among expert groups
        keys, first = block.entries(layer.keys), layer.table.first[block.rows]  # [rows, length, D]
        heads = torch.as_tensor(first[:, None] + np.arange(block.width), device=keys.device).flatten()
        asked = (queries[heads].float() * scaling).unflatten(0, (block.count, -1)).flatten(1, 2)  # [rows, width * N, D]
        found = softcapped((asked @ keys.float().transpose(1, 2)).view(len(heads), queries.shape[1], block.length), softcap)
        held = block.entries(layer.positions[:, None])[..., 0].long().repeat_interleave(block.width, 0)  # [rows * width, length]
        logits[heads] = logits[heads].scatter(2, held[:, None].expand_as(found), found)
    unseen = hidden(torch.arange(logits.shape[2], device=positions.device), positions[:, None], layer.window)
    return with_sinks(logits.masked_fill_(unseen, float("-inf")), sinks)


def _merge(out: Tensor, lse: Tensor, reader: Tensor, queries: int, sinks: Tensor | None = None) -> Tensor:
    """The partial softmaxes of each query as one.

    Args:
        out: [M, D], lse: [M], reader: [M], the query of each part.
        sinks: [queries], of each query's head: one more part, whose value is 0.

    Returns:
        [queries, D]
    """
    weight, total = _weights(lse, reader, queries, sinks)
    merged = lse.new_zeros((queries, out.shape[1])).index_add_(0, reader, out.float() * weight[:, None])
    return (merged / total[:, None]).to(out.dtype)


def attend_reference(
    layer: AnyLayer, queries: Tensor, step: Step, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The same, the obvious way: one query at a time, over the entries of the rows that its head reads."""
    out = torch.zeros_like(queries)
    cells = np.repeat(np.arange(len(step.counts)), step.counts).tolist()
    for token, (cell, position) in enumerate(zip(cells, step.positions.tolist(), strict=True)):
        for head in range(queries.shape[0]):
            found = [_entries_of(part, step, token, cell, head) for part in layer.parts]
            keys, values, held = (torch.cat(parts) for parts in zip(*found, strict=True))
            seen = held <= position
            if layer.window is not None:
                seen &= held >= earliest(position, layer.window)
            logits = keys[seen].float() @ queries[head, token].float() * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            weights = with_sinks(logits[None], None if sinks is None else sinks[head : head + 1])[0]
            out[head, token] = (weights @ values[seen].float()).to(out.dtype)
    return out


def _entries_of(layer: RowLayer, step: Step, token: int, cell: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [k, D], values [k, D] and positions [k] that a token of a cell reads by one query head; packed ones dequantised."""
    table = layer.table
    mine = (table.cell == cell) & (table.first <= head) & (head < table.first + table.width)
    starts, lengths = table.start[mine].tolist(), table.length[mine].tolist()
    spans = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    where = torch.cat([torch.zeros(0, dtype=torch.long), *spans]).to(layer.positions.device)
    if layer.packed is None:
        return layer.keys[where], layer.values[where], layer.positions[where]
    found = [seen_by(layer, int(row), step, token) for row in np.flatnonzero(mine)] or [layer.packed.none]
    keys, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return keys, values, layer.positions[where]
