"""From rows to one table: a line a model, benchmark, protocol, method and budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from reports.statistics import Estimate, estimate, paired_difference, proportion
from results.record import Key, Record

Where = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """What one method at one budget did on one benchmark. Scores are absent where nothing ran, never 0."""

    model: str
    benchmark: str
    prompt: str
    protocol: str
    method: str
    budget: str
    n: int
    skipped: int
    failed: int
    compressed: int  # of n, how many prompts lost entries
    byte_share: float | None  # measured: kept over the full cache of the unconverted model
    allocated_share: float | None
    entries: float | None  # mean, right after compaction
    metric: str | None  # the benchmark's main one: what `score` is
    score: Estimate | None
    score_difference: Estimate | None  # to full, paired
    kl: Estimate | None
    top1: Estimate | None
    loss: Estimate | None
    judge: Estimate | None = None  # 1 to 10
    own: bool = True  # a task of ours, which the embedded model can do

    @property
    def panel(self) -> tuple[str, str, str, str]:
        return (self.model, self.benchmark, self.prompt, self.protocol)


def lines(records: Iterable[Record], ratings: Mapping[str, float] | None = None) -> list[Line]:
    """One line a cell of the suite, in the order: model, benchmark, protocol, method, budget.

    Args:
        ratings: a judge's, by row id.
    """
    groups: dict[Where, list[Record]] = {}
    for record in records:
        key = record.key
        asked = f"{key.revision} {key.benchmark_params} {key.data} {key.max_new_tokens} {key.fidelity}"  # not shown
        method = (key.method, key.params, key.budget)  # `asked` and the parameters tell apart, but are not shown
        where = (key.model, _benchmark(record), key.prompt, _protocol(key), asked, *method)
        groups.setdefault(where, []).append(record)
    return [_line(where, groups[where], _full(where, groups), ratings or {}) for where in sorted(groups, key=_order)]


def _protocol(key: Key) -> str:
    """What of the protocol is no column of its own, in words."""
    routing = f"prefill routed by {key.routing.replace('_', ' ')}" if key.routing else ""
    sampled = f"sampled at temperature {key.temperature:g}" if key.temperature else "greedy"
    stops = "up to an end token" if key.stop == "eos" else "end tokens ignored"
    chat = "raw prompt" if key.chat == "raw" else "chat template"
    rows = f"a row a {'KV' if key.granularity == 'kv' else 'query'} head"
    parts = (chat, f"at most {key.truncation} tokens", rows, sampled, stops, key.dtype, routing)
    return ", ".join(part for part in parts if part)


def _benchmark(record: Record) -> str:
    """The benchmark with the length that its rows carry: lengths are columns, and are not averaged together."""
    length = record.columns.get("length")
    return record.key.benchmark if length is None or "length=" in record.key.benchmark else f"{record.key.benchmark} {length}"


def _full(where: Where, groups: dict[Where, list[Record]]) -> list[Record]:
    return next((rows for other, rows in groups.items() if other[:5] == where[:5] and other[5].startswith("full@")), [])


def _order(where: Where) -> tuple[object, ...]:
    *rest, method, params, budget = where
    size = float(budget.removesuffix("%")) if budget else 0.0
    return (*rest, not method.startswith("full@"), method, params, budget.endswith("%"), size)


def _line(where: Where, records: Sequence[Record], full: Sequence[Record], ratings: Mapping[str, float]) -> Line:
    done = [record for record in records if record.status == "ok"]
    scores, baseline = _by_example(done), _by_example(record for record in full if record.status == "ok")
    metric = next((next(iter(record.metrics)) for record in done if record.metrics), None)
    model, benchmark, prompt, protocol, _, method, _, budget = where
    return Line(
        model,
        benchmark,
        prompt,
        protocol,
        method,
        budget,
        n=len(done),
        skipped=sum(record.status == "skipped" for record in records),
        failed=sum(record.status == "failed" for record in records),
        compressed=sum(bool(record.compressed) for record in done),
        byte_share=_share(done, "bytes_kept"),
        allocated_share=_share(done, "bytes_allocated"),
        entries=float(np.mean([record.entries for record in done])) if done else None,
        metric=metric,
        score=_score(scores.values(), metric),
        score_difference=paired_difference(scores, baseline),
        kl=_estimate(record.fidelity["kl"] for record in done if record.fidelity),
        top1=_estimate(record.fidelity["top1"] for record in done if record.fidelity),
        loss=_estimate(record.fidelity["loss"] for record in done if record.fidelity),
        judge=_estimate(ratings[record.key.id] for record in done if record.key.id in ratings),
        own=records[0].key.benchmark.partition("@")[0].partition("(")[0] in OWN,
    )


def _by_example(records: Iterable[Record]) -> dict[tuple[int, int], float]:
    """The main metric (a benchmark's first) of each example, by seed and number.

    Records of a data set are the same under every seed: there a seed is a draw of the answer, and the draws are averaged.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for record in records:
        if record.metrics:
            where = (0 if record.key.data else record.key.seed, record.key.example)
            found.setdefault(where, []).append(next(iter(record.metrics.values())))
    return {where: float(np.mean(values)) for where, values in found.items()}


def _estimate(values: Iterable[float]) -> Estimate | None:
    found = np.array(list(values), dtype=np.float64)
    found = found[np.isfinite(found)]
    return estimate(found) if len(found) else None


RIGHT_OR_WRONG = ("exact",)  # metrics of which an answer has 0 or 1


def _score(values: Iterable[float], metric: str | None) -> Estimate | None:
    """As `_estimate`; of answers that are right or wrong, a proportion."""
    found = np.array(list(values), dtype=np.float64)
    whole = metric in RIGHT_OR_WRONG and len(found) and bool(np.isin(found, (0.0, 1.0)).all())
    return proportion(found) if whole else _estimate(found)


def _share(records: Sequence[Record], count: str) -> float | None:
    return float(np.mean([getattr(r, count) / r.bytes_full for r in records])) if records else None


ESTIMATES = ("score", "score_difference", "kl", "top1", "loss", "judge")


def frame(found: Sequence[Line]) -> pd.DataFrame:
    """The lines as a table, estimates in columns of their own: the CSV."""
    rows = []
    for line in found:
        row: dict[str, object] = {}
        for name, value in asdict(line).items():
            if name in ESTIMATES:
                row |= {f"{name}_{part}": None if value is None else value[part] for part in ("mean", "low", "high")}
            else:
                row[name] = value
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(found: Sequence[Line]) -> str:
    """One table a model, benchmark and protocol."""
    parts = []
    for panel in dict.fromkeys(line.panel for line in found):
        mine = [line for line in found if line.panel == panel]
        metric = next((line.metric for line in mine if line.metric), None)
        what = f"Score: {metric}. Protocol: {panel[3]}" if metric else f"Protocol: {panel[3]}"
        if panel[0].split("+")[0] == "reference" and not mine[0].own:
            what += f"\n\n{PATH_ONLY}"
        parts += [f"## {panel[1]}, {panel[2]}, {panel[0]}", "", what, "", *_table(mine), ""]
    return "\n".join(parts)


def lm_eval(found: Sequence[Mapping[str, Any]]) -> str:
    """What lm-eval itself makes of the stored answers, cell by cell."""
    if not found:
        return ""
    metrics = sorted({name for cell in found for name in cell["results"] if not name.split(",")[0].endswith("_stderr")})
    header = ("model", "task", "method", "budget", "n", "compressed", *(name.removesuffix(",none") for name in metrics))
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for cell in sorted(found, key=_cell_order):
        routing = f" ({cell['routing']})" if cell["routing"] else ""
        chat = ", chat template" if cell["chat"] == "template" else ""
        name = cell["benchmark"].split("@")[0].removeprefix("lm_eval:") + chat
        values = [f"{cell['results'][metric]:.4g}" if metric in cell["results"] else "-" for metric in metrics]
        asked = (cell["model"] + routing, name, cell["method"].split("@")[0], cell["budget"] or "-")
        text.append(f"| {' | '.join((*asked, str(cell['examples']), format(cell['compressed'], '.0%'), *values))} |")
    return "\n".join(["## lm-eval's own aggregation", "", LM_EVAL, "", *text, "", ""])


def _cell_order(cell: Mapping[str, Any]) -> tuple[object, ...]:
    where = tuple(cell[name] for name in ("model", "routing", "benchmark", "chat"))
    return (*where, cell["method"] != "full@1", cell["method"], cell["budget"])


LM_EVAL = "Compressed: the share of requests whose context lost entries; a short context that fits says nothing about a method."


def not_measured(records: Iterable[Record]) -> str:
    """What was skipped or failed, and why, so that every gap in a table is explained."""
    reasons: dict[tuple[str, str, str], int] = {}
    for record in records:
        if record.status != "ok":
            what = (record.status, f"{record.key.method} {record.key.budget} on {_benchmark(record)}", record.reason or "")
            reasons[what] = reasons.get(what, 0) + 1
    if not reasons:
        return ""
    listed = [f"- {status}: {cell}, {count} examples: {reason}" for (status, cell, reason), count in sorted(reasons.items())]
    return "\n".join(["## Not measured", "", *listed, ""])


OWN = ("recall", "two_hop", "recall_many", "needle_text", "needle_facts", "perplexity_own", "random_tokens")
PATH_ONLY = "The embedded model cannot do this task: these scores prove the path, not the methods, and are not to be ranked on."
HEADER = ("method", "budget", "bytes kept", "allocated", "n", "score", "against full", "KL to full", "same top token")


def _table(found: Sequence[Line]) -> list[str]:
    judged = any(line.judge for line in found)  # without a judge there is no column
    header = (*HEADER, "judge") if judged else HEADER
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for line in found:
        cells = (
            line.method.split("@")[0],
            line.budget or "-",
            "-" if line.byte_share is None else f"{line.byte_share:.1%}",
            "-" if line.allocated_share is None else f"{line.allocated_share:.1%}",
            f"{line.n}"
            + (f" ({line.skipped} skipped)" if line.skipped else "")
            + (f" ({line.failed} failed)" if line.failed else ""),
            _shown(line.score),
            _shown(line.score_difference, mark=True),
            _shown(line.kl),
            _shown(line.top1),
            *([_shown(line.judge)] if judged else []),
        )
        text.append(f"| {' | '.join(cells)} |")
    return text


def _shown(value: Estimate | None, mark: bool = False) -> str:
    if value is None:
        return "-"
    star = "*" if mark and value.excludes_zero else ""
    return f"{value.mean:.3g}{star} [{value.low:.3g}, {value.high:.3g}]"
