"""Cost cells: latency and memory of one model, method, budget, context and batch, each in a process of its own.

A cost cell never shares anything: it pays for its own prefill, which is consumed layer by layer, so that no more than the full
cache and one layer lie in memory. A batch of B sequences is read one after the other and decoded together; its sequences are of
equal length, so one prompt stands for all of them (each has rows of its own).

`python -m harness.cost '<cell as JSON>'` measures one cell and prints a JSON line: that is what `run --suite cost-small` starts.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import latency, memory
from harness.cache import Arena, Budget, LayerKV, Prefill, Selection, renumbers
from harness.cost.meters import CpuMeter, CudaMeter, DeviceClock, free_bytes
from harness.cost.request import CostCell
from harness.cost.roofline import copy_bandwidth, matmul_rate, rooflines, weight_bytes
from harness.engine.evict import Turns, remember, without_entries
from harness.engine.measure import OutOfMemory, memory_errors
from harness.engine.model import Model
from harness.engine.renumber import cannot_renumber, renumber
from harness.engine.rows import Counts, RowCache, compact_and_free
from harness.engine.static_decode import CannotCapture, Mode, StaticDecode, captures
from harness.models.load import load
from harness.registry import BUILTIN, Registry, registry_of
from harness.storage import HALF
from methods.base import CannotRun, Method, Scores, scores_for


@dataclass
class CacheSubject:
    """A cell as `benchmarks.latency` wants it: phases, then tokens."""

    model: Model
    method: Method
    budget: Budget | None
    ids: Tensor
    batch: int
    new_tokens: int
    prefill: Prefill | None = None
    scores: Scores | None = None
    selection: Selection | None = None
    cache: RowCache | None = None
    next: Tensor | None = None
    reads: int | None = None  # prompts really read, if not one a sequence: they are alike
    decode: str = "eager"
    static: StaticDecode | None = None
    observed: dict[str, float] = field(default_factory=dict)
    counts: list[Counts] = field(default_factory=list)  # right after compaction
    turns: Turns | None = None  # of a method that evicts while decoding
    packed: bool = False  # does a storage hold its rows? Then they are counted against the full cache in 16 bits

    @property
    def phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        return self.to_a_cache if self.decode == "eager" else (*self.to_a_cache, ("capture", self._capture))

    @property
    def to_a_cache(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        return (("prefill", self._read), ("score", self._score), ("select", self._select), ("compact", self._compact))

    @property
    def within(self) -> dict[str, float]:
        return self.observed

    @property
    def total(self) -> int:
        """Entries that the cache of one sequence may hold."""
        if self.budget is None:
            return self.model.shape.full_entries(len(self.ids))
        return self.budget.entries(self.model.parent_shape, len(self.ids), "kv")

    def _read(self) -> None:
        """Every sequence's prefill; the last one's stays."""
        self.observed = {"observe": 0.0, "column sums": 0.0}
        for _ in range(self.reads or self.batch):
            self.prefill = None
            self.prefill, seen = self.model.prefill(self.ids, self.method.needs, Arena())
            self.observed["observe"] += seen.seconds - seen.column_sums - seen.second_pass
            self.observed["column sums"] += seen.column_sums
            if self.method.needs.replays:
                self.observed["second pass"] = self.observed.get("second pass", 0.0) + seen.second_pass

    def _score(self) -> None:
        assert self.prefill is not None
        for _ in range(self.reads or self.batch):
            self.scores = scores_for(self.method, self.prefill)

    def _select(self) -> None:
        assert self.prefill is not None
        for _ in range(self.reads or self.batch):
            self.selection = self.method.compress(self.prefill, self.total, self.scores)
        self.scores = None

    def _compact(self) -> None:
        assert self.prefill is not None and self.selection is not None
        selections = [self.selection] * self.batch
        self.next = self.prefill.logits.argmax().expand(self.batch)[:, None]
        held: list[LayerKV | None] = list(self.prefill.layers)
        expert_groups, shape = self.prefill.expert_groups, self.prefill.shape
        keeper = None if self.budget is None else self.method.while_decoding(self._cap)
        if renumbers(keeper) and (why := cannot_renumber(self.model)):
            raise CannotRun(why)
        seen = [without_entries(kv) for kv in self.prefill.layers] if keeper else []
        self.prefill = self.selection = None
        if keeper is None:
            self.cache = compact_and_free(held, expert_groups, shape, selections, self.new_tokens)
        else:
            grown = self._cap(len(self.ids) + self.new_tokens) - self.total
            room = keeper.every - (-grown // (shape.layers * shape.kv_heads))
            self.cache = compact_and_free(held, expert_groups, shape, selections, min(self.new_tokens, room))
            remember(self.cache, seen, [keeper] * self.batch)
            if renumbers(keeper):
                renumber(self.model, self.cache)
            self.turns = Turns(self.cache, [keeper] * self.batch)
        self.counts = self.cache.counts()
        self.packed = any(part.packed is not None for layer in self.cache.layers for part in layer.parts)

    def _cap(self, tokens: int) -> int:
        assert self.budget is not None
        return self.budget.entries(self.model.parent_shape, tokens, "kv")

    def _capture(self) -> None:
        assert self.cache is not None and self.next is not None
        if self.turns is not None:
            raise CannotCapture("what a method evicts while decoding is chosen outside of captured steps")
        mode: Mode = "compiled" if self.decode == "compiled" else "graph"
        self.static = StaticDecode(self.model, self.cache, self.next[:, 0], self.new_tokens, mode)

    def step(self) -> None:
        assert self.cache is not None and self.next is not None
        if self.static is not None:
            self.static.step()
            return
        self.next = self.model.decode(self.cache, self.next)[:, -1].argmax(-1, keepdim=True)
        if self.turns is not None:
            self.turns.took(1)

    def reset(self) -> None:
        self.prefill = self.scores = self.selection = self.cache = self.next = self.static = self.turns = None
        gc.collect()


def measure_cell(cell: CostCell, registry: Registry = BUILTIN) -> dict[str, Any]:
    """What a row holds beside the cell itself; `reason` where nothing could be measured.

    Raises:
        UnknownModel, UnknownChoice, UnsupportedModel: the cell makes no sense.
    """
    device = torch.device(cell.device)
    torch.set_num_threads(cell.threads)
    dtype = getattr(torch, cell.dtype)
    if cell.decode == "graph" and not captures(device):
        return {"status": "skipped", "reason": "a CUDA graph needs a GPU; without one there are --decode eager and compiled"}
    _, method = registry.method(cell.method)
    try:
        with memory_errors():
            model = load(cell.model, dtype, device, registry=registry)
            if cell.context + cell.new_tokens > model.max_tokens:
                asked = f"{cell.context} tokens and {cell.new_tokens} more"
                return {"status": "skipped", "reason": f"{asked} are over the model's {model.max_tokens} positions"}
            return _measured(cell, model, method, device)
    except CannotRun as reason:
        return {"status": "skipped", "reason": str(reason)}
    except CannotCapture as reason:  # to be measured eagerly, in another process: this one may be unfit for it
        return {"status": "fell back", "reason": str(reason)}
    except OutOfMemory as error:
        return {"status": "failed", "reason": str(error)}


def _measured(cell: CostCell, model: Model, method: Method, device: torch.device) -> dict[str, Any]:
    budget = Budget.parse(cell.budget) if cell.budget else None
    if budget is not None:
        why = method.cannot_run(model.least_shape, budget, cell.context, "kv", model.parent_shape)
        if why:
            return {"status": "skipped", "reason": why}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (cell.context,), generator=generator).to(device)
    if cell.batch == 0:
        return _largest(cell, CacheSubject(model, method, budget, ids, 1, cell.new_tokens, reads=1, decode=cell.decode), device)
    return _rows_of(cell, CacheSubject(model, method, budget, ids, cell.batch, cell.new_tokens, decode=cell.decode), device)


SMALLER = 0.9  # of a batch that did not fit after all
TRIES = 8
ONCE = ("compact", "capture")  # phases that are no sequence's own


def _largest(cell: CostCell, subject: CacheSubject, device: torch.device) -> dict[str, Any]:
    """The cell at the largest batch that fits: by the bytes of one sequence, then smaller ones until it really does.

    One prompt is read, since all are alike; phases before the first token are told as if each sequence had read its own.
    """
    free = free_bytes(device)
    for _, work in subject.to_a_cache:
        work()
    logits = 3 * 4 * subject.model.config.vocab_size
    each = sum(count.bytes_allocated for count in subject.counts) + logits
    prefill = 2 * subject.model.shape.full_bytes(cell.context)  # with what a layer needs
    subject.reset()
    batch = max(1, int((free - prefill) // each))
    for _ in range(TRIES):
        subject.batch = batch
        try:
            with memory_errors():
                found = _rows_of(replace(cell, batch=batch), subject, device)
        except OutOfMemory:
            subject.reset()
            if batch == 1:
                raise
            batch = max(1, int(SMALLER * batch))
            continue
        if "phases" in found:
            found["phases"] = {name: lap if name in ONCE else lap * batch for name, lap in found["phases"].items()}
        return found | {"batch": batch}
    raise OutOfMemory(f"out of memory: not even {batch} sequences fit")


def _rows_of(cell: CostCell, subject: CacheSubject, device: torch.device) -> dict[str, Any]:
    """What one measurement says."""
    model = subject.model
    found: dict[str, Any] = {"status": "ok", "reason": None, "revision": model.revision}
    if cell.what == "memory":
        meter: memory.Meter = CudaMeter(device) if device.type == "cuda" else CpuMeter()
        peaks = memory.measure(subject, meter, cell.new_tokens)
        assert subject.cache is not None
        end = sum(count.bytes_kept for count in subject.cache.counts())
        sizes = _bytes(subject, model, cell)
        points = footprint(model, cell, sizes["bytes_kept"], end)
        return found | asdict(peaks) | sizes | {"bytes_end": end, "footprint": points}
    lap = latency.measure(subject, DeviceClock(device), cell.new_tokens)
    found |= {"phases": lap.phases, "first_token": lap.first_token, "token": lap.median, "p10": lap.p10, "p90": lap.p90}
    sizes = _bytes(subject, model, cell)
    rate = {"bandwidth": copy_bandwidth(device), "flops": matmul_rate(device, model.network.dtype)}
    return found | sizes | rate | rooflines(sizes, rate, model, cell.context, cell.batch)


READ_IN = 8  # points of a footprint's prompt


def footprint(model: Model, cell: CostCell, kept: int, end: int) -> list[list[int]]:
    """Tokens and bytes of keys and values over the time of an answer.

    While the prompts are read, dense and a sequence at a time, whatever the layers project; compressed; and at the last token.
    """
    last = cell.context + cell.new_tokens
    read = [number * cell.context // READ_IN for number in range(READ_IN + 1)]
    dense = [[tokens, model.shape.full_bytes(tokens)] for tokens in read]
    return [*dense, [cell.context, kept], [last, end]]


def _bytes(subject: CacheSubject, model: Model, cell: CostCell) -> dict[str, int]:
    counts = subject.counts
    whole = model.parent_shape.full_bytes(cell.context)
    full = (whole * HALF // model.parent_shape.itemsize if subject.packed else whole) * cell.batch
    return {
        "bytes_kept": sum(count.bytes_kept for count in counts),
        "bytes_allocated": sum(count.bytes_allocated for count in counts),
        "bytes_full": full,
        "weights": weight_bytes(model),
    }


def main(arguments: list[str]) -> int:
    cell = CostCell(**json.loads(arguments[0]))
    print(json.dumps(measure_cell(cell, registry_of(cell.plugins))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
