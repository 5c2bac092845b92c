"""What a method, a benchmark and a conversion must hold, tried on small random models: `run_all.py check my_plugin.py`.

Each check gives nothing, or says in plain words what is violated, with the numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.base import Task
from harness.cache import Ahead, Budget, Needs, Prefill, Replay, Selection, keep_all
from harness.engine.model import Model
from harness.engine.rows import compact
from harness.errors import first_line
from harness.evaluation.prompts import CannotPrompt, Protocol, tokenize
from harness.evaluation.storage_checks import STORAGE_CHECKS
from harness.families import CannotConvert, shape_of
from harness.models.load import byte_tokenizer
from harness.registry import BadPlugin, Plugin
from methods.base import CannotRun, Conversion, Eviction, Method, Protected, Scores, scores_for
from methods.headkv import HeadScores
from methods.ranking import row_sizes
from methods.snapkv import WindowAttention
from methods.triattention import KIND, QueryStatistics

TOKENS = 60  # of a prompt, or more where a method protects many
SMALL = 14  # entries a head, likewise
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": {"model_type": "llama", "num_key_value_heads": 2},
    "a sliding window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 24},
    "a head a query head": {"model_type": "llama", "num_key_value_heads": 4},
}
MORE = Needs(48, True, True, frozenset({Ahead(16, 2)}), frozenset({Replay(30, 2)}))  # than any one method asks for
CLOSE = 3e-5  # of logits: float32, in another order of sums


@dataclass(frozen=True)
class Finding:
    """One check of one entry; `wrong` is None where it holds."""

    entry: str
    check: str
    wrong: str | None


def check_plugin(plugin: Plugin) -> Iterator[Finding]:
    """Every check of everything that a plugin brings."""
    methods = dict(plugin.tables.get("METHODS", {}))
    methods |= {name: Eviction(WindowAttention(), allocator) for name, allocator in plugin.tables.get("ALLOCATORS", {}).items()}
    for name, method in methods.items():
        yield from _findings(name, METHOD_CHECKS, method)
    for name, storage in plugin.tables.get("STORAGES", {}).items():
        yield from _findings(name, {"its settings are on record": _settings_are_on_record} | STORAGE_CHECKS, storage)
    for name, task in plugin.tables.get("BENCHMARKS", {}).items():
        yield from _findings(name, TASK_CHECKS, task)
    for name, conversion in plugin.tables.get("CONVERSIONS", {}).items():
        yield from _findings(name, CONVERSION_CHECKS, conversion)


def _findings(name: str, checks: Mapping[str, Callable[[Any], str | None]], entry: Any) -> Iterator[Finding]:
    for check, run in checks.items():
        try:
            yield Finding(name, check, run(entry))
        except Exception as error:  # the user's code
            reason = first_line(error)
            if "Inplace update to inference tensor" in reason:  # torch guards what came out of the model
                reason = "it writes to the prefill, which other methods read too: work on a copy"
            yield Finding(name, check, f"{type(error).__name__}: {reason}")


def _protected(method: Method) -> Protected:
    return Protected() if method.scorer is None else method.scorer.protected


def _sizes(method: Method) -> tuple[int, int]:
    """Tokens of a prompt, and a small budget, that leave the method something to choose."""
    protected = _protected(method)
    small = max(SMALL, protected.first + protected.last + 4)
    return max(TOKENS, 4 * small), small


def _model(which: str, window: int = 24) -> Model:
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = {**sizes, "max_position_embeddings": 8192, **MODELS[which]}
    config = AutoConfig.for_model(**(settings | {"sliding_window": window} if "sliding_window" in settings else settings))
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15)  # far from uniform attention
    return Model(network, byte_tokenizer(), which, "0")


def _prefills(method: Method, more: Needs | None = None) -> Iterator[tuple[str, Model, Prefill]]:
    tokens, small = _sizes(method)
    ids = torch.randint(3, 250, (tokens,), generator=torch.Generator().manual_seed(1))
    for which in MODELS:
        model = _model(which, 2 * small)
        yield which, model, model.prefill(ids, method.needs | (more or Needs()))[0]


def drawn_statistics(layers: int = 3, heads: int = 4, dim: int = 16) -> QueryStatistics:
    """Of queries drawn at random; numbers i and i + dim / 2 are turned together."""
    drawn, half = np.random.default_rng(5), dim // 2
    mean = tuple(drawn.normal(size=(heads, dim)).astype(np.float32) for _ in range(layers))
    size = tuple(np.hypot(part[:, :half], part[:, half:]) * 1.5 for part in mean)
    pairs = np.stack([np.arange(half), np.arange(half) + half], 1)
    return QueryStatistics("check", "0", 100, mean, size, pairs, 10_000.0 ** -(np.arange(half) / half))


def _ready(method: Method) -> Method:
    """With head scores and statistics of queries, if it wants any."""
    while method.head_scores and method.given_head_scores is None:
        method = _given(method)
    return method


def _given(method: Method) -> Method:
    if method.head_scores == KIND:
        return method.with_head_scores(drawn_statistics())
    runs = 1.0 / (1 + np.random.default_rng(0).permutation(12)).reshape(1, 3, 4)
    return method.with_head_scores(HeadScores("check", "0", method.head_scores, runs, attempts=1))  # type: ignore[arg-type]


def _ready_eviction(method: Eviction) -> Eviction:
    found = _ready(method)
    assert isinstance(found, Eviction)
    return found


def _selections(method: Method) -> Iterator[tuple[str, Model, Prefill, Scores | None, int, Selection]]:
    method = _ready(method)
    for which, model, prefill in _prefills(method):
        scores = scores_for(method, prefill)
        for text in (str(_sizes(method)[1]), "60%", "100%"):
            total = Budget.parse(text).entries(prefill.shape, prefill.tokens, "kv")
            try:
                yield f"{which}, budget {text}", model, prefill, scores, total, method.compress(prefill, total, scores)
            except CannotRun as reason:
                raise ValueError(f"{which}, budget {text}: it cannot run: {reason}") from None


def _scores_are_numbers(method: Method) -> str | None:
    method = _ready(method)
    for _, _, prefill in _prefills(method):
        scores_for(method, prefill)  # raises with layer, shape, and what was expected
    return None


def _spends_the_budget(method: Method) -> str | None:
    for where, _, prefill, _, total, kept in _selections(method):
        held = _entries(prefill, kept)
        everything = _entries(prefill, keep_all(prefill))
        wanted = min(total, everything) if method.takes_budget else everything
        if held != wanted:
            return f"{where}: {held} entries kept, {wanted} were asked for"
    return None


def _entries(prefill: Prefill, kept: Selection) -> int:
    return sum(row.entries(kv.keys.shape[1]) for kv, rows in zip(prefill.layers, kept, strict=True) for row in rows)


def _keeps_the_best(method: Method) -> str | None:
    for where, _, prefill, scores, total, kept in _selections(method):
        if scores is None:
            return None  # it ranks nothing
        ranked = scores.values
        if isinstance(method, Eviction):  # by what its rows are ranked in the end: in stages, or a part of each by age
            ranked = _ready_eviction(method).ranking(prefill, row_sizes(prefill, _protected(method)), total, scores).scores.values
        for kv, rows, values in zip(prefill.layers, kept, ranked, strict=True):
            for number, row in enumerate(rows):
                if row.kept is None:
                    continue
                mine = values[row.expert_group][number]
                evicted = torch.ones(len(mine), dtype=torch.bool)
                evicted[row.kept] = False
                if evicted.any() and len(row.kept) and float(mine[evicted].max()) > float(mine[row.kept].min()):
                    worst, best = float(mine[row.kept].min()), float(mine[evicted].max())
                    return (
                        f"{where}, layer {kv.index}, row {number}: an entry of score {best:.4g} went, one of {worst:.4g} stayed"
                    )
    return None


def _leaves_the_prefill_alone(method: Method) -> str | None:
    method = _ready(method)
    for which, _, prefill in _prefills(method):
        before = [tensor.clone() for tensor in _tensors(prefill)]
        total = _sizes(method)[1] * prefill.shape.layers * prefill.shape.kv_heads
        method.compress(prefill, total, scores_for(method, prefill))
        for number, (old, new) in enumerate(zip(before, _tensors(prefill), strict=True)):
            if not torch.equal(old, new):
                changed = float((old - new).abs().max())
                return (
                    f"{which}: tensor {number} of the prefill was written to (by up to {changed:.4g}): other methods read it too"
                )
    return None


def _tensors(prefill: Prefill) -> list[Tensor]:
    parts = [part for kv in prefill.layers for part in (kv.keys, kv.values, kv.queries, kv.column_sums, kv.output_norms)]
    parts += [part for kv in prefill.layers for part in (*kv.replayed.values(), *(p for pair in kv.ahead.values() for p in pair))]
    return [part for part in parts if part is not None]


def _says_the_same_again(method: Method) -> str | None:
    method = _ready(method)
    alone = [_kept(method, prefill) for _, _, prefill in _prefills(method)]
    again = [_kept(method, prefill) for _, _, prefill in _prefills(method)]
    if alone != again:
        return "two calls with the same prompt keep different entries: draw from `layer.prompt`, not from a clock or a global"
    shared = [_kept(method, prefill) for _, _, prefill in _prefills(method, MORE)]
    if alone != shared:
        return "beside methods that observe more it keeps other entries: read no more than `needs` asks for"
    return None


def _kept(method: Method, prefill: Prefill) -> list[list[int]]:
    torch.seed()  # whoever draws from a global generator draws something else each time
    random.seed()
    np.random.seed()
    total = _sizes(method)[1] * prefill.shape.layers * prefill.shape.kv_heads
    rows = method.compress(prefill, total, scores_for(method, prefill))
    return [[] if row.kept is None else row.kept.tolist() for layer in rows for row in layer]


def _whole_budget_is_full_attention(method: Method) -> str | None:
    for where, model, prefill, _, total, kept in _selections(method):
        if total < _entries(prefill, keep_all(prefill)):
            continue
        ids = torch.randint(3, 250, (1, 4), generator=torch.Generator().manual_seed(2))
        ours, full = (model.decode(compact(prefill, [rows], 8), ids, keep=4) for rows in (kept, keep_all(prefill)))
        if (distance := float((ours - full).abs().max())) > CLOSE:
            return f"{where}: logits differ from those of the full cache by {distance:.4g}"
    return None


def _settings_are_on_record(entry: Any) -> str | None:
    parts = [entry] + [getattr(entry, field.name) for field in fields(entry)] if is_dataclass(entry) else [entry]
    for part in parts:
        if part is None or isinstance(part, str | int | float | tuple | Path):
            continue
        settings: Any = getattr(part, "__dataclass_params__", None)
        if settings is None or not settings.frozen:
            return f"{type(part).__name__} is no frozen dataclass: its settings would not be part of a row"
        if " at 0x" in repr(part):
            return f"the repr of {type(part).__name__} is not the same from run to run: {repr(part)[:80]}"
    return None


def _examples_stand_alone(task: Task) -> str | None:
    def count(text: str) -> int:
        return len(text.split())

    alone = task.example(3, 7, count)
    for number in range(3):
        if task.size is None and task.example(number, 7, count).prompt == alone.prompt and alone.prompt:
            return f"examples {number} and 3 are the same prompt"
    if task.example(3, 7, count) != alone:
        return "example 3 is another one once examples 0 to 2 were made"
    return None


def _prompts_can_be_cut(task: Task) -> str | None:
    tokenizer = byte_tokenizer()
    example = task.example(0, 0, lambda text: len(text.encode()))
    if example.requests:
        return None
    if example.ids is None and not 0 <= example.context_end <= len(example.prompt):
        return f"context_end is {example.context_end}, the prompt has {len(example.prompt)} characters"
    try:
        tokenize(tokenizer, example, Protocol(), 10**6, task.forced)
    except CannotPrompt as reason:
        return str(reason)
    return None


def _scores_every_metric(task: Task) -> str | None:
    if task.forced:
        return None
    example = task.example(0, 0, lambda text: len(text.split()))
    named = [metric.name for metric in task.metrics]
    for answer in ("", "nothing like it", *example.answers):
        found = task.score(answer, example)
        if sorted(found) != sorted(named):
            return f"the answer {answer!r} gets the metrics {sorted(found)}, {sorted(named)} are promised"
        if not all(np.isfinite(value) for value in found.values()):
            return f"the answer {answer!r} gets {found}, which is no number"
        if unsure := [metric.name for metric in task.metrics if metric.right_or_wrong and found[metric.name] not in (0, 1)]:
            return f"the answer {answer!r} gets {found[unsure[0]]:g} as {unsure[0]}, which is said to be right or wrong: 0 or 1"
    if named and example.answers:
        sign = 1 if task.metrics[0].higher_is_better else -1
        right, wrong = (sign * task.score(text, example)[named[0]] for text in (example.answers[0], "nothing like it"))
        if right <= wrong:
            return f"the right answer {example.answers[0]!r} scores {right:g}, a wrong one {wrong:g}"
    return None


def _converts_and_decodes(conversion: Conversion) -> str | None:
    examples = {"": (), "groups": (2,), "percent": (50,), "ratios": (3, 1)}
    made = conversion.make(examples.get(conversion.numbers, (2,)), "")
    for which in MODELS:
        model = _model(which)
        parent = shape_of(model.network)
        try:
            made.apply(model.network)
        except CannotConvert as reason:
            return f"{which}: {reason}"
        variant = Model(model.network, None, which, "0", parent)
        ids = torch.randint(3, 250, (TOKENS,), generator=torch.Generator().manual_seed(1))
        prefill = variant.prefill(ids[:-4], Needs())[0]
        cache = compact(prefill, [keep_all(prefill)], 8)
        kept, share = cache.counts()[0].bytes_kept, made.share(parent)
        wanted = share * parent.full_entries(TOKENS - 4) * parent.entry_bytes()
        if parent.windows[0] is None and abs(kept - wanted) > 0.03 * wanted + 64:
            return f"{which}: the cache holds {kept} bytes, `share` promises {wanted:.0f}"
        ours = variant.decode(cache, ids[None, -4:], keep=4)[0]
        if not torch.isfinite(ours).all():
            return f"{which}: logits that are no numbers"
        whole = variant.network(ids[None], use_cache=False).logits[0, -4:]
        if not variant.routers and (distance := float((ours - whole).abs().max().detach())) > CLOSE:
            return f"{which}: logits over the cache differ from those of one dense pass by {distance:.4g}"
    return None


METHOD_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "its settings are on record": _settings_are_on_record,
    "scores are numbers of the right shape": _scores_are_numbers,
    "it leaves the prefill alone": _leaves_the_prefill_alone,
    "it spends exactly the budget": _spends_the_budget,
    "no evicted entry outscores a kept one": _keeps_the_best,
    "the same prompt keeps the same entries": _says_the_same_again,
    "100 % of the budget is full attention": _whole_budget_is_full_attention,
}
TASK_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "its settings are on record": _settings_are_on_record,
    "examples do not depend on each other": _examples_stand_alone,
    "its prompts can be cut": _prompts_can_be_cut,
    "it scores every metric": _scores_every_metric,
}
CONVERSION_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "the variant decodes what it reads, in the bytes it promises": _converts_and_decodes,
}


def first_fault(plugin: Plugin) -> str | None:
    """In one line, or None: asked before a plugin is run."""
    broken = next((finding for finding in check_plugin(plugin) if finding.wrong), None)
    return None if broken is None else f"{broken.entry}: {broken.check}: {broken.wrong}"


def check_all(plugins: Iterable[Plugin]) -> None:
    """Tries the files among them before they are run; installed packages are their authors' to check.

    Raises:
        BadPlugin: the first thing that is violated.
    """
    for plugin in plugins:
        if plugin.path.is_file() and (fault := first_fault(plugin)):
            raise BadPlugin(f"plugin {plugin.path}: {fault} (run `run_all.py check {plugin.path}` for all of it)")
