"""Whether decoding over rows says what a model says itself: measured on a few dozen tokens whenever a model is loaded.

Four short passes of the network: its own attention over a text; the text's first part as a prompt, read by `Model.prefill`; the
rest decoded over rows by three cells at once, one with the full cache, one with a part of every row evicted, one evicted and far
behind the prompt; and a dense pass in which what these cells evicted is masked. A text of a few dozen tokens is shorter than a
window, so what each layer may see is compared as a rule: the function by which transformers makes the layer's mask is asked at
positions around its window's edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from harness.cache import Needs, Prefill, Row, Selection, keep_all
from harness.engine.model import Dense, Model, attention_over, own_attention, register
from harness.engine.observe import AttentionSettings
from harness.engine.reach import UnsupportedModel
from harness.engine.rows import compact
from harness.errors import UserError, first_line
from harness.layer_sharing import Place
from harness.logits import hidden, softcapped, with_sinks

READ, SAID = 20, 3  # tokens of the prompt, and behind it
FURTHEST = 2**17  # where the far cell stands, if the model reaches there
ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}  # of the logits' spread
EXACT = (torch.float64, torch.float32)  # elsewhere some tokens may fall to another expert, and the middle one counts


@dataclass
class OwnPass:
    """Leaves the computing to transformers, and notes the rule by which it masks each layer."""

    needs_mask = True
    rules: dict[int, Any] = field(default_factory=dict)  # by layer

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        return dense(query, key, value)


@dataclass
class MaskedPass:
    """The obvious attention: every query against every key, and what it must not see masked.

    Args:
        positions: [N] of the tokens: a prompt's, and those of several texts behind it, SAID each, that do not see each other.
        seen: of each cache layer, which of the prompt's entries stay for those behind it, [Hq, READ].
    """

    positions: Tensor
    seen: list[Tensor]
    needs_mask = False

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        group, kept = query.shape[0] // key.shape[0], self.seen[place.cache_layer].to(query.device)
        positions = self.positions.to(query.device)
        keys, values = (part.float().repeat_interleave(group, 0) for part in (key, value))
        logits = softcapped(query.float() @ keys.transpose(1, 2) * settings.scaling, settings.softcap)  # [Hq, N, N]
        unseen = hidden(positions, positions[:, None], settings.window).repeat(len(logits), 1, 1)
        first = kept.shape[1]
        unseen[:, first:, :first] |= ~kept[:, None]
        text = (torch.arange(len(positions), device=query.device) - first) // SAID  # below 0: the prompt
        unseen |= (text >= 0) & (text != text[:, None])
        return (with_sinks(logits.masked_fill(unseen, float("-inf")), settings.sinks) @ values).to(query.dtype)


def self_check(model: Model) -> dict[str, Any]:
    """What was found, for the environment of a run; also left in `model.checked`.

    Raises:
        UnsupportedModel: decoding over rows is not this model's own attention, with the number by which it is off.
    """
    try:
        found = _measured(model)
    except UserError:
        raise
    except Exception as error:  # a family that takes other arguments than the rest fails in its own way
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UnsupportedModel(f"{_told(model)}, which does not run over rows: {kind}{first_line(error, 200)}") from error
    model.checked = found
    return found


def _told(model: Model) -> str:
    return f"model {model.name!r} is of the family {model.network.config.model_type!r}"


@torch.inference_mode()
def _measured(model: Model) -> dict[str, Any]:
    read = min(READ, model.max_tokens // 2)
    words = min(model.config.vocab_size, model.vocabulary, getattr(model.config, "vocab_size_per_layer_input", model.vocabulary))
    ids = torch.randint(min(3, words - 1), words, (read + SAID,), generator=torch.Generator().manual_seed(0)).to(model.device)
    own = _own(model, ids)
    prefill, _ = model.prefill(ids[:read], Needs(), routing="argmax")
    full = keep_all(prefill)
    part = _thinned(full, prefill, torch.Generator().manual_seed(1))
    cache = compact(prefill, [full, part, part], SAID)
    far = max(read, min(model.max_tokens, FURTHEST) - SAID)
    cache.seen[2] = far
    said = model.decode(cache, ids[read:].expand(3, -1), keep=SAID)  # [3, SAID, V]
    wanted = [own[read:], *_masked(model, ids, (read, far), part, prefill)]
    parts = {"prefill": (prefill.logits[None], own[read - 1 : read])}
    parts |= {name: (ours, theirs) for name, ours, theirs in zip(("full", "evicted", "far"), said, wanted, strict=True)}
    off = {name: _difference(ours, theirs) for name, (ours, theirs) in parts.items()}
    _refuse_nan(model, own)
    most, dtype = ALIKE.get(model.network.dtype, ALIKE[torch.bfloat16]), model.network.dtype
    for name, difference in off.items():
        if not difference <= most:
            raise UnsupportedModel(
                f"{_told(model)}, and {MEANING[name]} differ from its own by {difference:.2g} of their spread, over {most:g} for "
                f"{str(dtype).removeprefix('torch.')}: the harness does not reach its attention"
            )
    found: dict[str, Any] = {"model": model.name, "logits_within": _rounded(max(off.values()))}
    both: Any = getattr(model.network, "text_part_of", None)  # set where the text part was taken out
    if both or model.config is not model.network.config:
        found["text_part_of"] = both or type(model.network).__name__
    return found


MEANING = {
    "prefill": "logits of a prefill",
    "full": "logits of decoding with the full cache",
    "evicted": "logits of decoding with a part evicted",
    "far": "logits of decoding far behind its prompt",
}


def _own(model: Model, ids: Tensor) -> Tensor:
    """The model's own logits [N, V].

    Raises:
        UnsupportedModel: a layer's mask is another than its configuration tells, or follows no rule.
    """
    base = own_attention(model.network)
    work = OwnPass()
    name = _register_rules(base, work)
    positions = torch.arange(len(ids), device=ids.device)[None]
    model.network.set_attn_implementation(name)
    model.route("argmax")
    try:
        logits = model.forward(ids[None], positions, work, len(ids))[0]
    finally:
        model.network.set_attn_implementation(register(base))
    for layer, rule in sorted(work.rules.items()):
        if rule is None:
            raise UnsupportedModel(f"{_told(model)}, whose layer {layer} makes a mask of its own: rows do not know what it hides")
        _compare(model, layer, rule, ids.device)
    return logits


MADE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}  # masks that are there to be looked at


def _register_rules(base: str, work: OwnPass) -> str:
    """Registers attention by `base` whose masks bring the function that made them, for `work` to note. Gives its name."""
    name = f"rules_of_{base}"

    def mask(*given: Any, **named: Any) -> Any:
        made = ALL_MASK_ATTENTION_FUNCTIONS[base](*given, **{**named, **MADE})
        made.rule = named.get("mask_function")
        return made

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any) -> Any:
        work.rules[module.layer_idx] = getattr(attention_mask, "rule", None)
        return attention_over(base, module, query, key, value, attention_mask, settings)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def _compare(model: Model, layer: int, rule: Callable[..., Any], device: torch.device) -> None:
    """
    Raises:
        UnsupportedModel: a layer's mask shows other positions than the harness takes it to show.
    """
    window = model.attending.windows[layer]
    size = window or model.max_tokens // 4
    edges = [0, 1, size // 2, size - 1, size, size + 1, 2 * size - 1, 2 * size, 3 * size + 5]
    asking = torch.tensor(edges, device=device).clamp_(max=max(size, model.max_tokens - 1))[:, None]
    steps = torch.tensor([1, 0, -1, -(size // 2), 1 - size, -size, -size - 1], device=device)
    held = torch.cat([asking + steps, asking - asking % size + steps, steps.clamp_min(0) + 0 * asking], 1).clamp_(min=0)  # [q, k]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    shown = torch.as_tensor(rule(zero, zero, asking, held), device=device).expand(held.shape)
    if not torch.equal(shown, ~hidden(held, asking, window)):
        what = "all before it" if window is None else f"{window} positions"
        raise UnsupportedModel(
            f"{_told(model)}, whose layer {layer} has another mask than that of {what}, which its configuration tells"
        )


def _thinned(full: Selection, prefill: Prefill, generator: torch.Generator) -> Selection:
    """A part of the entries of every row, other ones and other numbers in each."""

    def thin(row: Row, candidates: int) -> Row:
        held = torch.arange(candidates) if row.kept is None else row.kept.cpu()
        count = int(torch.randint(min(1, len(held)), len(held) + 1, (), generator=generator))
        kept = held[torch.randperm(len(held), generator=generator)[:count].sort().values]
        return replace(row, kept=kept.to(prefill.ids.device))

    return tuple(tuple(thin(row, kv.keys.shape[1]) for row in rows) for rows, kv in zip(full, prefill.layers, strict=True))


def _masked(model: Model, ids: Tensor, starts: Sequence[int], part: Selection, prefill: Prefill) -> Iterable[Tensor]:
    """Logits [SAID, V] of the tokens behind the prompt, at each of `starts`, when they see of the prompt only `part`."""
    read = prefill.tokens
    seen = []
    for rows, kv in zip(part, prefill.layers, strict=True):
        mine = torch.zeros(model.shape.query_heads, read, dtype=torch.bool, device=ids.device)
        for row in rows:
            mine[row.first : row.first + row.width, read - kv.keys.shape[1] + row.kept.to(ids.device)] = True  # type: ignore[union-attr]
        seen.append(mine)
    positions = torch.cat(
        [torch.arange(begin, end, device=ids.device) for begin, end in [(0, read), *((start, start + SAID) for start in starts)]]
    )
    texts = torch.cat([ids[:read], *[ids[read:]] * len(starts)])
    model.route("argmax")
    logits = model.forward(texts[None], positions[None], MaskedPass(positions, seen), SAID * len(starts))[0]
    return logits.unflatten(0, (len(starts), SAID))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """How far logits [N, V] lie apart, as a share of their spread: the worst token's, or the middle one's of half types."""
    off, spread = (ours.float() - theirs.float()), theirs.float()
    fine = torch.isfinite(off) & torch.isfinite(spread)
    if not fine.any():
        return math.nan
    off, spread = torch.where(fine, off, 0.0), torch.where(fine, spread, 0.0)
    share = off.square().mean(-1).sqrt() / spread.std(-1).clamp_min(1e-9)  # [N]
    return float(share.max() if theirs.dtype in EXACT else share.median())


def _refuse_nan(model: Model, own: Tensor) -> None:
    """
    Raises:
        UnsupportedModel: weights that are no numbers, or logits none of which is one.
    """
    if torch.isfinite(own).all():
        return
    broken = [name for name, weight in model.network.named_parameters() if bool(torch.isnan(weight).any())]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UnsupportedModel(f"model {model.name!r} has weights that are no numbers: {broken[0]}{more}")
    if not torch.isfinite(own).any():
        kind = str(model.network.dtype).removeprefix("torch.")
        raise UnsupportedModel(f"the logits of model {model.name!r} are no numbers in {kind}: choose another --dtype")


def _rounded(difference: float) -> float:
    """The power of ten above it: what the last bits of a sum do must not make another environment."""
    return 0.0 if difference == 0 else float(f"1e{math.ceil(math.log10(difference))}") if math.isfinite(difference) else math.inf
