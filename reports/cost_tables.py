"""What cells cost as tables of phases and peaks beside their floors, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reports.cost import Cost, CostPanel, Row
from reports.formats import Table, TableCell, words
from results.record import DECODES

LATENCY: tuple[str, ...] = ("method", "budget", "context", "batch", "decode", "prefill s", "its floor", "observe", "column sums")
LATENCY += ("score", "select", "compact", "capture")
LATENCY += ("first token ms", "ms a token", "p10 to p90", "rounds", "floor ms", "over the floor", "tokens a second")
MEMORY: tuple[str, ...] = ("method", "budget", "context", "batch", "bytes kept", "allocated", "a token more")
MEMORY += ("prefill peak", "decode peak", "kept at the end")


def cost_tables(found: Sequence[Cost], rows: Sequence[Row]) -> list[Table]:
    """Latency and memory of each model and device, and what could not be measured."""
    made = []
    for panel in dict.fromkeys(cost.panel for cost in found):
        mine = [cost for cost in found if cost.panel == panel]
        made.append(_latency_table(panel, [cost for cost in mine if cost.laps]))
        watched = {(cost.method, cost.budget, cost.context, cost.batch): cost for cost in mine if cost.memory}
        made.append(Table(f"Memory, {panel}", MEMORY, tuple(map(_memory, watched.values())), (PEAKS,), section="Memory"))
    missing = {_missing(row) for row in rows if row["status"] != "ok"}
    header = ("status", "model", "method", "budget", "context", "reason")
    made.append(Table("Costs not measured", header, tuple(words(*what) for what in sorted(missing))))
    return [table for table in made if table.rows]


def _latency_table(panel: CostPanel, timed: Sequence[Cost]) -> Table:
    measured = ""
    if timed:
        rate = timed[0].laps[0]
        measured = f" Measured here: {rate['bandwidth'] / 1e9:.1f} GB/s copied, {rate['flops'] / 1e9:,.0f} GFLOP/s."
    reasons = dict.fromkeys(f"{cost.decode} fell back to eager: {cost.fell_back}" for cost in timed if cost.fell_back)
    captured = any(cost.decode != "eager" for cost in timed)
    shown = tuple(name for name in LATENCY if captured or name not in ("decode", "capture"))
    lines = (dict(zip(LATENCY, _latency(cost), strict=True)) for cost in timed)
    rows = tuple(tuple(line[name] for name in shown) for line in lines)
    return Table(f"Latency, {panel}", shown, rows, (FLOORS + measured, *reasons), section="Latency")


def _missing(row: Row) -> tuple[str, ...]:
    """What is shown of a cell that was not measured."""
    cell = row["cell"]
    asked = (str(cell.get(name, "-")) for name in ("model", "method", "budget"))
    return (row["status"], *(text or "-" for text in asked), f"{cell.get('context', 0):,}", row.get("reason") or "")


FLOORS = (
    "Median over the rounds, each in a process of its own; `rounds` is their spread. Floor of a token: the bytes of the weights "
    "and of the kept entries over the copy bandwidth; of a prefill: its products over their rate."
)
PEAKS = "Bytes above the model's weights; on a CPU what is resident, which includes the allocator's slack."


def _latency(cost: Cost) -> tuple[TableCell, ...]:
    phases = {name: float(np.median([lap["phases"].get(name, 0.0) for lap in cost.laps])) for name in cost.laps[0]["phases"]}
    phases["observe"] = phases.get("observe", 0.0) + phases.get("second pass", 0.0)  # of the few methods that make one
    token, floor = cost.token_ms or 0.0, cost.floor_ms
    first = 1000 * float(np.median([lap["first_token"] for lap in cost.laps]))
    rounds = [1000 * lap["token"] for lap in cost.laps]
    low, high = (1000 * float(np.median([lap[name] for lap in cost.laps])) for name in ("p10", "p90"))
    prefill_floor = float(np.median([lap["prefill_floor"] for lap in cost.laps]))
    return (
        *_asked(cost),
        TableCell(f"eager, not {cost.decode}" if cost.fell_back else cost.decode),
        _number(phases["prefill"], "{:.3f}"),
        _number(prefill_floor, "{:.3f}"),
        *(
            _number(phases.get(name, 0.0), "{:.3f}")
            for name in ("observe", "column sums", "score", "select", "compact", "capture")
        ),
        _number(first, "{:.2f}"),
        _number(token, "{:.2f}"),
        TableCell(f"{low:.2f} to {high:.2f}", low),
        TableCell(f"{min(rounds):.2f} to {max(rounds):.2f}", min(rounds)),
        _number(floor, "{:.2f}"),
        _number(token / floor, "{:.2f}x"),
        _number(1000 * cost.batch / token, "{:.1f}"),
    )


def _memory(cost: Cost) -> tuple[TableCell, ...]:
    memory = cost.memory or {}
    more = (memory["bytes_end"] - memory["bytes_kept"]) / memory["cell"]["new_tokens"]
    kept, allocated, *peaks = (
        _bytes(memory[name]) for name in ("bytes_kept", "bytes_allocated", "prefill_peak", "decode_peak", "bytes_end")
    )
    return (*_asked(cost), kept, allocated, TableCell(f"{more / 2**10:,.1f} KiB", more), *peaks)


def _asked(cost: Cost) -> tuple[TableCell, ...]:
    sizes = (
        TableCell(f"{cost.context:,}", cost.context),
        TableCell(f"{cost.batch} (largest)" if cost.largest else str(cost.batch), cost.batch),
    )
    return (TableCell(cost.method), TableCell(cost.budget or "-"), *sizes)


def _number(value: float, form: str) -> TableCell:
    return TableCell(form.format(value), value)


def _bytes(value: float) -> TableCell:
    return TableCell(f"{value / 2**20:,.1f} MiB", value)


def cost_sentences(found: Sequence[Cost]) -> list[tuple[str, list[str]]]:
    """In words, for a model and its variants on one device: a title, and a line for each way of decoding.

    At the longest context and the smallest batch. A method is called faster only if its slowest round is faster than any of the
    full cache's.
    """
    grouped: dict[CostPanel, list[Cost]] = {}
    for cost in found:
        if cost.laps and not cost.fell_back:
            grouped.setdefault(replace(cost.panel, model=cost.panel.parent), []).append(cost)
    made = []
    for panel, mine in grouped.items():
        context = max(cost.context for cost in mine)
        batch = min(cost.batch for cost in mine if cost.context == context)
        at = [cost for cost in mine if (cost.context, cost.batch) == (context, batch)]
        lines = [line for decode in DECODES if (line := _line([cost for cost in at if cost.decode == decode]))]
        if lines:
            together = f", {batch} at once" if batch > 1 else ""
            made.append((f"{panel}: {context:,} tokens{together}", lines))
    return made


def _line(mine: Sequence[Cost]) -> str:
    """Who is faster than the full cache, and who was not shown to be; empty if there is nothing to compare."""
    full = next((cost for cost in mine if cost.method == "full" and not cost.panel.variant), None)
    others = sorted((cost for cost in mine if cost is not full), key=lambda cost: cost.token_ms or 0.0)
    if full is None or not others:
        return ""
    least = min(lap["token"] for lap in full.laps)
    faster = [cost for cost in others if max(lap["token"] for lap in cost.laps) < least]
    slower = [cost for cost in others if cost not in faster]
    rounds = min(len(cost.laps) for cost in mine)
    shown = "in every round" if rounds > 1 else "in the one round there was, which says nothing of the spread"
    parts = [f"decode {full.decode}: full takes {_said(full)}, {(full.token_ms or 0.0) / full.floor_ms:.1f} times its floor."]
    if faster:
        parts.append(f"Faster {shown}: {'; '.join(map(_named, faster))}.")
    if slower:
        never = "Faster in some rounds at most" if rounds > 1 else "Not faster in it"
        parts.append(f"{never}: {'; '.join(map(_named, slower))}.")
    return " ".join(parts)


def _named(cost: Cost) -> str:
    variant = cost.panel.variant
    return cost.label + (f" on {variant}" if variant else "") + f" ({_said(cost)})"


def _said(cost: Cost) -> str:
    return f"{cost.token_ms:.2f} ms a token with {cost.laps[0]['bytes_kept'] / 2**20:,.1f} MiB kept"
