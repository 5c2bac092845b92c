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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import latency, memory
from harness.cache import Arena, Budget, LayerKV, Prefill, Selection, keep_all
from harness.choices import choose
from harness.load import load
from harness.measure import OutOfMemory, give_back_freed_memory, memory_errors, peak_resident_bytes, wait_for
from harness.model import Model
from harness.plugins import plugged
from harness.rows import Counts, RowCache, compact_and_free
from methods import METHODS
from methods.base import CannotRun, Eviction, Method, Scores, score_prefill

COPIED = 2**28  # bytes of the buffer that is copied to know the bandwidth
MULTIPLIED = 2048  # rows and columns of the matrices that are multiplied to know the rate


@dataclass(frozen=True)
class CostCell:
    """What is measured. Its JSON is the row's identity, beside the environment."""

    model: str
    method: str
    budget: str  # "" for full
    context: int  # tokens
    batch: int  # 0: the largest that fits
    new_tokens: int
    dtype: str
    device: str
    threads: int  # of the CPU
    what: str = "latency"  # latency | memory
    round: int = 0
    plugins: tuple[str, ...] = ()  # files that the method or model comes from


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
    observed: dict[str, float] = field(default_factory=dict)
    counts: list[Counts] = field(default_factory=list)  # right after compaction

    @property
    def phases(self) -> tuple[tuple[str, Callable[[], None]], ...]:
        return (("prefill", self._read), ("score", self._score), ("select", self._select), ("compact", self._compact))

    @property
    def within(self) -> dict[str, float]:
        return self.observed

    def _read(self) -> None:
        """Every sequence's prefill; the last one's stays."""
        self.observed = {"observe": 0.0, "column sums": 0.0}
        for _ in range(self.reads or self.batch):
            self.prefill = None
            self.prefill, seen = self.model.prefill(self.ids, self.method.needs, Arena())
            self.observed["observe"] += seen.seconds - seen.column_sums
            self.observed["column sums"] += seen.column_sums

    def _score(self) -> None:
        if isinstance(self.method, Eviction):
            assert self.prefill is not None
            for _ in range(self.reads or self.batch):
                self.scores = score_prefill(self.method.scorer, self.prefill)

    def _select(self) -> None:
        assert self.prefill is not None
        if not isinstance(self.method, Eviction) or self.budget is None:
            self.selection = keep_all(self.prefill)
            return
        assert self.scores is not None
        total = self.budget.entries(self.model.parent_shape, len(self.ids), "kv")
        for _ in range(self.reads or self.batch):
            self.selection = self.method.compress(self.prefill, total, self.scores)
        self.scores = None

    def _compact(self) -> None:
        assert self.prefill is not None and self.selection is not None
        selections = [self.selection] * self.batch
        self.next = self.prefill.logits.argmax().expand(self.batch)[:, None]
        held: list[LayerKV | None] = list(self.prefill.layers)
        stripes, shape = self.prefill.stripes, self.prefill.shape
        self.prefill = self.selection = None
        self.cache = compact_and_free(held, stripes, shape, selections, self.new_tokens)
        self.counts = self.cache.counts()

    def step(self) -> None:
        assert self.cache is not None and self.next is not None
        self.next = self.model.decode(self.cache, self.next)[:, -1].argmax(-1, keepdim=True)

    def reset(self) -> None:
        self.prefill = self.scores = self.selection = self.cache = self.next = None
        gc.collect()


class DeviceClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


class CpuMeter:
    """The process's resident memory, from Linux; elsewhere only its peak since the start is known, and peaks stay as they are."""

    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def held(self) -> int:
        give_back_freed_memory()
        return self._field("VmRSS") or peak_resident_bytes()

    def forget_peak(self) -> None:
        give_back_freed_memory()
        try:
            self.refs.write_text("5")
        except OSError:
            return

    def peak(self) -> int:
        return self._field("VmHWM") or peak_resident_bytes()

    def _field(self, name: str) -> int:
        try:
            lines = self.status.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class CudaMeter:
    """What torch's allocator has given out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def held(self) -> int:
        wait_for(self.device)
        return torch.cuda.memory_allocated(self.device)

    def forget_peak(self) -> None:
        wait_for(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        wait_for(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def measure_cell(cell: CostCell) -> dict[str, Any]:
    """What a row holds beside the cell itself; `reason` where nothing could be measured.

    Raises:
        UnknownModel, UnknownChoice, UnsupportedModel: the cell makes no sense.
    """
    device = torch.device(cell.device)
    torch.set_num_threads(cell.threads)
    dtype = getattr(torch, cell.dtype)
    _, method = choose("method", cell.method, METHODS)
    try:
        with memory_errors():
            model = load(cell.model, dtype, device)
            if cell.context + cell.new_tokens > model.max_tokens:
                asked = f"{cell.context} tokens and {cell.new_tokens} more"
                return {"status": "skipped", "reason": f"{asked} are over the model's {model.max_tokens} positions"}
            return _measured(cell, model, method, device)
    except CannotRun as reason:
        return {"status": "skipped", "reason": str(reason)}
    except OutOfMemory as error:
        return {"status": "failed", "reason": str(error)}


def _measured(cell: CostCell, model: Model, method: Method, device: torch.device) -> dict[str, Any]:
    budget = Budget.parse(cell.budget) if cell.budget else None
    if isinstance(method, Eviction) and budget is not None:
        why = method.cannot_run(model.least_shape, budget, cell.context, "kv", model.parent_shape)
        if why:
            return {"status": "skipped", "reason": why}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.network.config.vocab_size, (cell.context,), generator=generator).to(device)
    if cell.batch == 0:
        return _largest(cell, CacheSubject(model, method, budget, ids, 1, cell.new_tokens, reads=1), device)
    return _rows_of(cell, CacheSubject(model, method, budget, ids, cell.batch, cell.new_tokens), device)


KEPT_FREE = 0.05  # of a device's memory, for what an allocator cannot use
SMALLER = 0.9  # of a batch that did not fit after all
TRIES = 8


def _largest(cell: CostCell, subject: CacheSubject, device: torch.device) -> dict[str, Any]:
    """The cell at the largest batch that fits: by the bytes of one sequence, then smaller ones until it really does.

    One prompt is read, since all are alike; phases before the first token are told as if each sequence had read its own.
    """
    free = free_bytes(device)
    for _, work in subject.phases:
        work()
    logits = 3 * 4 * subject.model.network.config.vocab_size
    each = sum(count.bytes_allocated for count in subject.counts) + logits
    prefill = 2 * subject.model.shape.full_entries(cell.context) * subject.model.shape.entry_bytes()  # with what a layer needs
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
            found["phases"] = {name: lap if name == "compact" else lap * batch for name, lap in found["phases"].items()}
        return found | {"batch": batch}
    raise OutOfMemory(f"out of memory: not even {batch} sequences fit")


def free_bytes(device: torch.device) -> int:
    """What a cell may take: of a GPU nearly all that is free, of a machine's memory half."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return int(free - KEPT_FREE * whole)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        raise CannotRun("how much memory is free is not known here: name --batches") from None
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return available // 2


def _rows_of(cell: CostCell, subject: CacheSubject, device: torch.device) -> dict[str, Any]:
    """What one measurement says."""
    model = subject.model
    found: dict[str, Any] = {"status": "ok", "reason": None, "revision": model.revision}
    if cell.what == "memory":
        meter: memory.Meter = CudaMeter(device) if device.type == "cuda" else CpuMeter()
        peaks = memory.measure(subject, meter, cell.new_tokens)
        assert subject.cache is not None
        end = sum(count.bytes_kept for count in subject.cache.counts())
        return found | asdict(peaks) | _bytes(subject, model, cell) | {"bytes_end": end}
    lap = latency.measure(subject, DeviceClock(device), cell.new_tokens)
    found |= {"phases": lap.phases, "first_token": lap.first_token, "token": lap.median, "p10": lap.p10, "p90": lap.p90}
    sizes = _bytes(subject, model, cell)
    rate = {"bandwidth": copy_bandwidth(device), "flops": matmul_rate(device, model.network.dtype)}
    return found | sizes | rate | floors(sizes, rate, model, cell)


def _bytes(subject: CacheSubject, model: Model, cell: CostCell) -> dict[str, int]:
    counts = subject.counts
    full = model.parent_shape.full_entries(cell.context) * model.parent_shape.entry_bytes() * cell.batch
    return {
        "bytes_kept": sum(count.bytes_kept for count in counts),
        "bytes_allocated": sum(count.bytes_allocated for count in counts),
        "bytes_full": full,
        "weights": weight_bytes(model),
    }


def weight_bytes(model: Model) -> int:
    """Of the weights that a decode step reads: all but the rows of the embedding that no token asks for."""
    network = model.network
    embedding = network.get_input_embeddings().weight
    tied = embedding is getattr(network.get_output_embeddings(), "weight", None)
    every = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    return every if tied else every - embedding.numel() * embedding.element_size()


def floors(sizes: dict[str, int], rate: dict[str, float], model: Model, cell: CostCell) -> dict[str, float]:
    """Seconds that no implementation can go below: a token's bytes over the bandwidth, a prompt's products over their rate."""
    token = (sizes["weights"] + sizes["bytes_kept"]) / rate["bandwidth"]
    head = model.network.get_output_embeddings().weight.numel()  # only the last token's logits are made
    parameters = sizes["weights"] / model.network.dtype.itemsize - head
    shape = model.shape
    pairs = sum(_pairs(cell.context, window) for window in model.parent_shape.windows)  # every layer attends, stored or not
    products = 2 * (parameters * cell.context + head) + 4 * pairs * shape.query_heads * shape.head_dim
    return {"token_floor": token, "prefill_floor": cell.batch * products / rate["flops"]}


def _pairs(tokens: int, window: int | None) -> int:
    """Query and key pairs of causal attention."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def copy_bandwidth(device: torch.device, laps: int = 5) -> float:
    """Bytes read and written a second, the best of a few copies of a large buffer."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / min(_lap(lambda: target.copy_(source), device) for _ in range(laps + 1))


def matmul_rate(device: torch.device, dtype: torch.dtype, laps: int = 3) -> float:
    """Floating-point operations a second of a large product, the best of a few."""
    left = torch.randn(MULTIPLIED, MULTIPLIED, device=device, dtype=dtype)
    out = torch.empty_like(left)
    return 2 * MULTIPLIED**3 / min(_lap(lambda: torch.mm(left, left, out=out), device) for _ in range(laps + 1))


def _lap(work: Callable[[], Any], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def main(arguments: list[str]) -> int:
    cell = CostCell(**json.loads(arguments[0]))
    with plugged(cell.plugins):
        print(json.dumps(measure_cell(cell)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
