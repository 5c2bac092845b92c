"""Decoding from static buffers: nothing of a step is decided on the host, so a step can be compiled, captured and replayed.

The lengths of a layer's rows stand on the device. A step writes one token of every cell behind its rows, attends to them, and
leaves the likeliest next token where the next step reads it. Where a layer has several expert groups (mixSGA) every row gets the
token's keys and values, and only the rows of its expert become longer: what the others got lies in their slack, is read by
nobody and overwritten by the next.

A step runs as it is, or made by torch.compile without graph breaks; where there is a GPU either is captured once as a CUDA graph
and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness.engine import kernels, packed_kernels
from harness.engine.measure import OutOfMemory
from harness.engine.model import Dense, Model
from harness.engine.observe import AttentionSettings
from harness.engine.rows import RowBlock, RowCache, RowLayer, Step
from harness.engine.split_plan import plan_split, split_length
from harness.engine.static_packed import StaticPacked
from harness.layer_sharing import Place
from harness.logits import earliest, softcapped, with_sinks

Mode = Literal["graph", "compiled"]  # captured as it is; compiled, and captured where there is a GPU
WARM_UP = 3  # steps before a capture: kernels are built, libraries take their workspaces


class CannotCapture(Exception):
    """This model's step cannot be held so, or not on this device: says why in one line."""


def captures(device: torch.device) -> bool:
    """Can steps be captured there?"""
    return device.type == "cuda"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what led to it, back to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class StaticLayer:
    """The rows of one layer, into which one token of each cell is written a step.

    Args:
        layer: its memory is used from here on; its table is not kept up.
        steps: to come, at most; there must be slack for them.
        by_kernel: attend with the Triton kernel; else in plain torch, over entries and slack, masked.
    """

    def __init__(self, layer: RowLayer, cells: int, steps: int, by_kernel: bool) -> None:
        if layer.packed is not None:
            by_kernel = by_kernel and packed_kernels.can_read(layer.packed.storage)
        self.layer, self.window, self.routed, self.by_kernel = layer, layer.window, layer.routed, by_kernel
        self.packed = None if layer.packed is None else StaticPacked(layer.packed, layer.table)
        self.heads = layer.shape.query_heads
        device = layer.keys.device
        self.length = torch.as_tensor(layer.table.length.copy()).to(device)  # [R]
        self.before = self.length.clone()  # [R], when the step's token came
        table = layer.table
        source = table.cell * layer.shape.kv_heads + table.first // layer.shape.group
        self.row = torch.as_tensor(np.stack([table.start, source, table.cell, table.expert_group])).to(device)  # [4, R]
        step = Step(np.ones(cells, np.int64), np.zeros(cells, np.int64))
        head, cell = np.divmod(layer.readers(step), cells)
        query = cell * self.heads + head  # [M] cell by cell, its heads side by side
        self.read = torch.as_tensor(np.repeat(np.arange(len(table)), table.width)).to(device)  # [M], the row
        if by_kernel:
            longest = table.length + steps
            split = split_length(longest, table.width, device)
            self.plan = plan_split(table.start, longest, table.width, query, cells * self.heads, split).on(device)
        else:
            self._without_kernel(query, step)

    def _without_kernel(self, query: np.ndarray, step: Step) -> None:
        device = self.layer.keys.device
        self.blocks: list[RowBlock] = self.layer.blocks(step)
        for block in self.blocks if self.packed is None else ():  # weights of 0 must not meet what is no number
            for pool in (self.layer.keys, self.layer.values):
                block.slack(pool).zero_()
        self.query = torch.as_tensor(query).to(device)  # [M]
        order = np.argsort(query, kind="stable").reshape(len(step.counts) * self.heads, -1)
        self.parts = torch.as_tensor(order).to(device)  # [N, expert_groups], where in M

    def append(self, keys: Tensor, values: Tensor, seen: Tensor, experts: Tensor | None) -> None:
        """keys, values: [H, C, D]; seen: [C], the new tokens' positions; experts: [C], the expert group that takes each."""
        pool = (self.layer.keys, self.layer.values, self.layer.positions)
        new = [part.transpose(0, 1).reshape(-1, part.shape[2]).contiguous() for part in (keys, values)]  # [C * H, D]
        taken_by = seen if experts is None else experts
        if self.by_kernel and self.packed is None:
            kernels.append_rows(*new, *pool, self.length, self.row, seen, taken_by, self.routed)
            return
        start, source, cell, expert_group = self.row
        where = start + self.length
        self.before.copy_(self.length)
        if self.packed is not None:
            self.packed.write(new[0][source], new[1][source], self.length)
        else:
            for part, into in zip(new, pool, strict=False):
                into.index_copy_(0, where, part[source])
        self.layer.positions.index_copy_(0, where, seen[cell].int())
        self.length.add_((taken_by[cell] == expert_group).long() if self.routed else 1)

    def attend(self, queries: Tensor, seen: Tensor, settings: AttentionSettings) -> Tensor:
        """queries: [Hq, C, D] of the tokens just written. Gives [Hq, C, D]."""
        flat = queries.transpose(0, 1).reshape(-1, queries.shape[2]).contiguous()  # [C * Hq, D]; of fused projections a view
        asking = None if self.window is None else seen.repeat_interleave(self.heads)  # without a window a new token sees all
        beside = None if settings.sinks is None else settings.sinks.float().repeat(len(seen))  # [C * Hq]
        out = (self._kernel if self.by_kernel else self._plain)(flat, asking, settings.scaling, settings.softcap, beside)
        return out.view(-1, *queries.shape[::2]).transpose(0, 1)

    def _kernel(
        self, queries: Tensor, asking: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        hide: tuple[Tensor | None, Tensor | None, int | None] = (None, None, None)
        if asking is not None:
            hide = (self.layer.positions, asking, self.window)
        if self.packed is not None:
            where = (self.packed.places, self.length, self.before[self.read], self.plan)
            return packed_kernels.attend_packed(queries, self.packed.packed, *where, scaling, softcap, *hide, sinks=sinks)
        pool = (self.layer.keys, self.layer.values, self.length)
        return kernels.attend_split(queries, *pool, self.plan, scaling, softcap, *hide, sinks=sinks)

    def _plain(
        self, queries: Tensor, asking: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        asked = (queries * scaling)[self.query]  # [M, D]
        at = None if asking is None else asking[self.query]  # [M]
        outs, weights, done = [], [], 0
        for block in self.blocks:
            mine = slice(done, done + block.count * block.width)
            done = mine.stop
            grouped = asked[mine].view(block.count, block.width, -1)
            if self.packed is not None:
                logits = self.packed.logits(block, grouped.float(), self.before)
            else:
                keys, values = (block.whole(pool) for pool in (self.layer.keys, self.layer.values))  # [rows, capacity, D]
                logits = (grouped @ keys.transpose(1, 2)).float()
            logits = softcapped(logits, softcap)
            there = torch.arange(block.capacity, device=logits.device) < self.length[block.rows, None, None]
            if at is not None and self.window is not None:
                held = block.whole(self.layer.positions[:, None])[:, None, :, 0]  # [rows, 1, capacity]
                there = there & (held >= earliest(at[mine].view(block.count, block.width, 1), self.window))
            logits = logits.masked_fill(~there, float("-inf"))
            weights.append(torch.logsumexp(logits, -1).flatten())
            shares = logits.softmax(-1).masked_fill(~there.any(-1, keepdim=True), 0.0)  # of a row without entries nothing
            if self.packed is not None:
                mixed = self.packed.mix(block, shares, self.before).to(queries.dtype)
            else:
                mixed = shares.to(values.dtype) @ values
            outs.append(mixed.flatten(0, 1))
        out = torch.cat(outs)[self.parts]  # [N, expert_groups, D]
        if sinks is None and not self.routed:
            return out[:, 0]
        shares = with_sinks(torch.cat(weights)[self.parts], sinks)  # of queries here, not of heads
        return (shares[..., None] * out.float()).sum(1).to(out.dtype)


class StaticDecode:
    """Greedy decoding of all cells of a cache, one token a step.

    Args:
        cache: its memory is used from here on; what it says of itself is not kept up.
        first: [C], the tokens that are read first.
        steps: how many there will be, at most.
        mode: None: a step runs as it is.

    Raises:
        CannotCapture: see there. Where a capture failed, the process may be unfit for another.
        OutOfMemory: while the step was compiled or captured.
        ValueError: no slack for so many tokens.
    """

    def __init__(self, model: Model, cache: RowCache, first: Tensor, steps: int, mode: Mode | None = None) -> None:
        device = model.device
        if mode == "graph" and not captures(device):
            raise CannotCapture("a CUDA graph needs a GPU")
        layers = [layer for layer in cache.layers if isinstance(layer, RowLayer)]
        if len(layers) < len(cache.layers):
            raise CannotCapture("the rows of a layer are held by several storages")
        if mode == "graph" and len({layer.keys.device for layer in layers}) > 1:
            raise CannotCapture("a CUDA graph is captured on one device, and this model's layers lie on several")
        if any((layer.table.length + steps > layer.table.capacity).any() for layer in layers):
            raise ValueError(f"no slack for {steps} more tokens: make the cache with more")
        self.model, self.left = model, steps
        by_kernel = device.type == "cuda" and kernels.can_run(model.network.dtype, model.shape.head_dim)  # the widest of them
        self.layers = [StaticLayer(layer, cache.cells, steps, by_kernel) for layer in layers]
        self.seen = torch.as_tensor(cache.seen.copy()).to(device)  # [C], the position of the next token
        self.next = first.clone()  # [C]
        self._run = self._once if mode is None else self._made(mode)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Reads every cell's token, and gives those that follow, [C]: memory that the next step writes to."""
        if not self.left:
            raise ValueError("more steps than were asked for")
        self.left -= 1
        self._run()
        return self.next

    needs_mask = False

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        """query: [Hq, C, D]; key, value: [H, C, D]. Gives [Hq, C, D]."""
        layer = self.layers[place.cache_layer]
        seen = self.seen.to(query.device)  # the same, but for layers that lie elsewhere
        if place.writes:
            layer.append(key, value, seen, settings.experts)
        return layer.attend(query, seen, settings)

    def _once(self) -> None:
        self.next.copy_(self.model.extend(self.next, self.seen, self).argmax(-1))
        self.seen.add_(1)

    @torch.inference_mode()
    def _made(self, mode: Mode) -> Callable[[], None]:
        """The step as it will be run. What it changes while it is compiled and captured is restored."""
        self._taken_back(self._once)  # what is wrong with the step itself is said by itself
        run, stage = self._once, "compiled"
        try:
            if mode == "compiled":
                run = torch.compile(self._once, fullgraph=True, dynamic=False)
                self._taken_back(run)
            stage = "captured"
            return self._captured(run) if captures(self.model.device) else run
        except Exception as error:  # compilers and drivers fail in many ways
            chain = list(_chain(error))
            for one in chain:
                if isinstance(one, torch.OutOfMemoryError) or "out of memory" in _line(one):
                    raise OutOfMemory(f"out of memory: {_line(one)}") from error
            said = error if stage == "compiled" else chain[-1]  # a capture that fails ends with a complaint about its end
            raise CannotCapture(f"a decode step could not be {stage}: {_line(said)}") from error

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        device = self.model.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._taken_back(run)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # records, and does nothing
            run()
        return graph.replay

    def _taken_back(self, run: Callable[[], None]) -> None:
        """Runs it, and sets back what says where decoding stands; what was written lies in the slack."""
        state = [self.seen, self.next, *(layer.length for layer in self.layers)]
        before = [part.clone() for part in state]
        run()
        for part, was in zip(state, before, strict=True):
            part.copy_(was)
