"""Attention of new queries over the rows of a cache layer: one function, one reference, one fast path.

A query head attends to the union of the rows that it reads. Rows are disjoint, so their softmaxes merge exactly by their
log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.rows import Group, RowLayer


def attend(layer: RowLayer, queries: Tensor, positions: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """Attention over the rows of `layer`, into which the queries' own keys have been written already.

    Args:
        queries: [C, Hq, Q, D].
        positions: [C, Q], original positions: a query sees no later position, and none that left the layer's window.

    Returns:
        [C, Hq, Q, D]
    """
    cells, heads, tokens, dim = queries.shape
    flat = (queries * scaling).reshape(cells * heads, tokens, dim)[layer.reader_list]  # [sum of widths, Q, D]
    out = torch.empty_like(flat)
    lse = flat.new_empty(flat.shape[:2], dtype=torch.float32) if layer.merges else None
    seen_from = 0
    for group in layer.groups:
        readers = slice(seen_from, seen_from + (group.rows.stop - group.rows.start) * group.width)
        seen_from = readers.stop
        _attend_group(layer, group, flat[readers], positions, softcap, out[readers], None if lse is None else lse[readers])
    if lse is None:
        result = torch.empty_like(flat)
        result.index_copy_(0, layer.reader_list, out)
    else:
        result = _merge(out, lse, layer.reader_list, cells * heads)
    return result.view(cells, heads, tokens, dim)


def _attend_group(
    layer: RowLayer,
    group: Group,
    queries: Tensor,
    positions: Tensor,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Rows of equal length as one strided batch. Writes `out` [rows * width, Q, D] and, if asked, `lse` [rows * width, Q]."""
    tokens, dim = queries.shape[1:]
    rows = group.rows.stop - group.rows.start
    if group.length == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    keys, values = group.block(layer.keys), group.block(layer.values)  # [rows, length, D]
    asked = queries.reshape(rows, group.width * tokens, dim)
    logits = torch.bmm(asked, keys.transpose(1, 2))  # [rows, width * Q, length]
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    _hide(layer, group, logits.view(rows, group.width, tokens, group.length), positions)
    if lse is not None:
        lse.copy_(torch.logsumexp(logits.float(), -1).view(lse.shape))
    if logits.dtype == torch.float32:
        weights = torch.softmax(logits, -1, out=logits)  # in place: a second buffer would be traffic
    else:
        weights = logits.float().softmax(-1).to(logits.dtype)
    if lse is not None:
        weights = weights.nan_to_num_()  # a row whose entries are all hidden weighs nothing: its lse is -inf
    torch.bmm(weights, values, out=out.view(rows, group.width * tokens, dim))


def _hide(layer: RowLayer, group: Group, logits: Tensor, positions: Tensor) -> None:
    """Masks what a query must not see, in place. logits: [rows, width, Q, length]."""
    tokens = positions.shape[1]
    if layer.window is None and not layer.striped:
        if tokens > 1:  # the new tokens are the last entries of every row
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=logits.device).triu(1)
            logits[..., -tokens:].masked_fill_(later, float("-inf"))
        return
    held = group.block(layer.positions[:, None])[:, None, None, :, 0]  # [rows, 1, 1, length]
    asking = positions[layer.cells[group.rows]][:, None, :, None]  # [rows, 1, Q, 1]
    hidden = held > asking
    if layer.window is not None:
        hidden |= held <= asking - layer.window
    logits.masked_fill_(hidden, float("-inf"))


def _merge(out: Tensor, lse: Tensor, reader: Tensor, heads: int) -> Tensor:
    """The partial softmaxes of each query head as one.

    Args:
        out: [N, Q, D], lse: [N, Q], reader: [N], the query head of each part.

    Returns:
        [heads, Q, D]
    """
    index = reader[:, None].expand_as(lse)
    top = lse.new_full((heads, lse.shape[1]), float("-inf")).scatter_reduce_(0, index, lse, "amax")
    weight = torch.exp(lse - top[reader])  # [N, Q]
    total = lse.new_zeros(top.shape).index_add_(0, reader, weight)
    merged = lse.new_zeros((heads, *out.shape[1:])).index_add_(0, reader, out.float() * weight[..., None])
    return (merged / total[..., None]).to(out.dtype)


def attend_reference(layer: RowLayer, queries: Tensor, positions: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """The same, the obvious way: one query at a time, over the entries of the rows that its head reads."""
    out = torch.zeros_like(queries)
    for cell in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            keys, values, held = _entries_of(layer, cell, head)
            for token, position in enumerate(positions[cell].tolist()):
                seen = held <= position
                if layer.window is not None:
                    seen &= held > position - layer.window
                logits = keys[seen].float() @ queries[cell, head, token].float() * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                out[cell, head, token] = (logits.softmax(0) @ values[seen].float()).to(out.dtype)
    return out


def _entries_of(layer: RowLayer, cell: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [k, D], values [k, D] and positions [k] that one query head of one cell reads."""
    rows = [
        torch.arange(row[4], row[4] + row[6], device=layer.keys.device)
        for row in layer.table.tolist()
        if row[0] == cell and row[2] <= head < row[2] + row[3]
    ]
    where = torch.cat(rows)
    return layer.keys[where], layer.values[where], layer.positions[where]
