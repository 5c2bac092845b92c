"""What a prefill leaves for the scorers: keys, values, last queries, column sums.

Observing is a pass of its own over tensors that attention was given: it never changes what attention returns. Where attention is
computed here together with its column sums (`attention_with_sums`), it is so whether anyone asks for them or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.cache import Ahead, Arena, ExpertGroup, LayerKV, ModelShape, Needs
from harness.engine.measure import Lap, stopwatch
from harness.engine.projections import Projections, queries_ahead, value_norms
from harness.layer_sharing import Place
from harness.logits import Chunk, earliest, hidden, softcapped

Moments = tuple[Tensor, Tensor]  # mean [Hq, D] and covariance [Hq, D, D]
NOTHING_AROUND = Projections()

# Numbers of one block of logits: bounds the memory of the column sums. On a CPU a block that stays in its cache is nine times
# faster than one whose memory the system hands out and takes back each time (8 heads, 2,048 tokens: 20 and 181 ms).
BLOCK_LOGITS = 2**20
GPU_BLOCK_LOGITS = 2**25
STRIP = 192  # queries of one KV head's readers that are looked at together on a CPU
JOINED = 4096  # tokens up to which `attention_with_sums` is about as fast as sdpa: docs/measuring-the-harness.md
LOWEST = 60.0  # below the largest logit, where a weight is 1e-26: float32 loses it beside a sum of 1, and is normal down to 1e-38


@dataclass
class Observer:
    """Collects one `LayerKV` a stored layer, in the order in which the model runs them."""

    shape: ModelShape
    needs: Needs
    arena: Arena = field(default_factory=Arena)
    prompt: int = 0  # checksum of the ids
    reached: list[int] = field(default_factory=list)  # layers that attended so far
    layers: list[LayerKV] = field(default_factory=list)
    expert_groups: list[tuple[ExpertGroup, ...]] = field(default_factory=list)  # of each layer
    lap: Lap = field(default_factory=Lap)
    sums: Lap = field(default_factory=Lap)  # of `lap`, the column sums

    def see(
        self,
        place: Place,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        settings: AttentionSettings,
        around: Projections = NOTHING_AROUND,
        summed: Tensor | None = None,
    ) -> None:
        """queries: [Hq, T, D]; keys, values: [H, T, D], after RoPE. Heads that are averaged come repeated.

        Args:
            around: what of the layer stands before and behind its attention.
            summed: the column sums, [Hq, T], if whoever computed the attention has them.
        """
        expected = (self.shape.query_heads, self.shape.kv_heads, self.shape.dim_of(place.cache_layer))
        if (queries.shape[0], keys.shape[0], keys.shape[2]) != expected or values.shape != keys.shape:
            raise ValueError(
                f"layer {place.layer} has heads {queries.shape[0]}/{keys.shape[0]} of size {_sizes(keys, values)}, "
                f"its configuration says {expected[0]}/{expected[1]} of {expected[2]}"
            )
        tokens, stored = keys.shape[1], place.cache_layer
        self.reached.append(place.layer)
        with stopwatch(keys.device, self.lap):
            candidates = self.shape.candidates(stored, tokens)
            sums = summed
            if self.needs.column_sums and sums is None:
                with stopwatch(keys.device, self.sums):
                    sums = column_sums(queries, keys, settings)
            sums = None if sums is None else sums[:, -candidates:]
            last = queries[:, tokens - min(self.needs.window, tokens) :].clone() if self.needs.window else None
            norms = value_norms(values[:, -candidates:], around, self.shape) if self.needs.output_norms else None
            ahead = {
                asked: moments for asked in self.needs.ahead if (moments := queries_ahead(queries, around, asked)) is not None
            }
            if not place.writes:
                self.layers[stored] = _read_again(self.layers[stored], last, sums, settings.sinks, norms, ahead)
                return
            self.expert_groups.append(_expert_groups(settings, self.shape.group, candidates))
            self.layers.append(
                LayerKV(
                    index=stored,
                    tokens=tokens,
                    keys=self._own(f"prefill keys {stored}", keys[:, -candidates:]),
                    values=self._own(f"prefill values {stored}", values[:, -candidates:]),
                    scaling=settings.scaling,
                    width=self.shape.group,
                    queries=last,
                    column_sums=sums,
                    output_norms=norms,
                    ahead=ahead,
                    softcap=settings.softcap,
                    window=settings.window,
                    query_heads=self.shape.query_heads,
                    prompt=self.prompt,
                    sinks=settings.sinks,
                )
            )

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in memory of its own, [H, n, D] in that order: a view would keep more alive, and gather slowly."""
        heads, candidates, dim = tensor.shape
        return self.arena.take(name, heads * candidates, tensor[0]).view(heads, candidates, dim).copy_(tensor)


def _sizes(keys: Tensor, values: Tensor) -> str:
    return " and ".join(map(str, dict.fromkeys((keys.shape[2], values.shape[2]))))


def _read_again(
    layer: LayerKV,
    queries: Tensor | None,
    sums: Tensor | None,
    sinks: Tensor | None,
    norms: Tensor | None,
    ahead: Mapping[Ahead, Moments],
) -> LayerKV:
    """The stored layer as another layer's query heads see it too: beside those that read the same stored head."""
    heads, readers, group = layer.keys.shape[0], layer.readers + 1, layer.width // layer.readers
    return replace(
        layer,
        queries=joined(heads, layer.queries, queries),
        column_sums=joined(heads, layer.column_sums, sums),
        output_norms=joined(heads, layer.output_norms, norms),
        ahead={
            asked: (beside(heads, layer.ahead[asked][0], mean), beside(heads, layer.ahead[asked][1], covariance))
            for asked, (mean, covariance) in ahead.items()
        },
        sinks=joined(heads, layer.sinks, sinks),
        readers=readers,
        width=group * readers,
        query_heads=layer.query_heads // layer.readers * readers,
    )


def joined(heads: int, before: Tensor | None, new: Tensor | None) -> Tensor | None:
    return None if before is None or new is None else beside(heads, before, new)


def beside(heads: int, before: Tensor, new: Tensor) -> Tensor:
    """[Hq, ...] of the layers before and of another one: of each stored head the first layer's readers, then the next one's."""
    return torch.cat([before.unflatten(0, (heads, -1)), new.unflatten(0, (heads, -1))], 1).flatten(0, 1)


@dataclass(frozen=True)
class AttentionSettings:
    scaling: float
    softcap: float | None = None
    window: int | None = None
    groups: tuple[int, ...] = (1,)  # KV heads averaged, by each of the layer's experts
    experts: Tensor | None = None  # [N] the expert of each new token; None where there is only one
    attention: torch.nn.Module | None = field(default=None, repr=False)  # the layer's, for what stands around it
    sinks: Tensor | None = None  # [Hq], see `harness.logits.with_sinks`

    @property
    def unbounded(self) -> bool:
        """Does every query see all before it, by nothing but its product with the keys?"""
        return self.window is None and self.softcap is None and self.sinks is None

    @property
    def plain(self) -> bool:
        """Is it what sdpa and flash-attn compute, a softcap aside?"""
        return self.sinks is None and not isinstance(self.window, Chunk)


def _expert_groups(settings: AttentionSettings, width: int, candidates: int) -> tuple[ExpertGroup, ...]:
    if settings.experts is None:
        return (ExpertGroup(width * settings.groups[0]),)
    mine = settings.experts[-candidates:]
    return tuple(ExpertGroup(width * group, (mine == number).nonzero()[:, 0]) for number, group in enumerate(settings.groups))


def block_numbers(device: torch.device) -> int:
    return BLOCK_LOGITS if device.type == "cpu" else GPU_BLOCK_LOGITS


def column_sums(queries: Tensor, keys: Tensor, settings: AttentionSettings) -> Tensor:
    """Causal attention that each key received, summed over all queries, blockwise: no T x T tensor is made.

    Args:
        queries: [Hq, T, D], keys: [H, T, D].

    Returns:
        [Hq, T], float32
    """
    if keys.device.type == "cpu" and settings.unbounded:
        _, found = _in_strips(queries.float() * settings.scaling, keys.float(), None, summed=True)
        assert found is not None
        return found
    sums = torch.zeros(queries.shape[:2], device=keys.device)
    for _, seen, weights, total in _exponentials(queries, keys, settings):
        sums[:, seen] += (total.reciprocal_()[:, None] @ weights)[:, 0]
    return sums


def attention_with_sums(
    queries: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings, summed: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Causal attention, and from the same weights its column sums: on a CPU in float32, where that takes about as long as sdpa.

    Args:
        queries: [Hq, T, D], keys and values: [H, T, D].
        summed: are column sums wanted?

    Returns:
        The attention [Hq, T, D], and the sums [Hq, T] or None. None altogether where sdpa or flash-attn is faster by more than
        the sums are worth, wanted or not: on a GPU, in other types, above JOINED tokens, with a window, a softcap or sinks.
    """
    if keys.device.type != "cpu" or keys.dtype is not torch.float32 or keys.shape[1] > JOINED or not settings.unbounded:
        return None
    out, sums = _in_strips(queries * settings.scaling, keys, values, summed)
    assert out is not None
    return out, sums


def _in_strips(queries: Tensor, keys: Tensor, values: Tensor | None, summed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Attention to values, if there are any, and column sums: in strips of one KV head's scaled queries, in few passes.

    No logit is left more than LOWEST below its query's largest, so that no weight is subnormal: MKL's exponential is up to
    sixty times slower where its result is, and products with such weights are slow too. Beside the largest they weigh nothing.
    """
    heads, tokens, _ = keys.shape
    asked = queries.unflatten(0, (heads, -1))  # [H, G, T, D]
    group = asked.shape[1]
    step = max(1, min(STRIP // group, BLOCK_LOGITS // (group * tokens)))
    later = torch.ones(step, step, dtype=torch.bool).triu(1)
    each = queries.new_ones(1, step)
    sums = queries.new_zeros(heads, group, tokens) if summed else None
    out = None if values is None else torch.empty_like(asked)
    buffer = queries.new_empty(group * step * tokens)
    for number, (mine, head) in enumerate(zip(asked, keys, strict=True)):
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            rows = mine[:, start:stop].flatten(0, 1)  # [G * q, D]
            logits = buffer[: len(rows) * stop].view(len(rows), stop)
            weights = logits.view(group, -1, stop)
            newest, unseen = weights[..., start:], later[: stop - start, : stop - start]
            torch.mm(rows, head[:stop].t(), out=logits)
            newest.masked_fill_(unseen, float("-inf"))
            torch.maximum(logits, logits.amax(-1, keepdim=True).sub_(LOWEST), out=logits)
            torch.softmax(logits, -1, out=logits)
            newest.masked_fill_(unseen, 0.0)
            if out is not None and values is not None:
                out[number, :, start:stop] = (logits @ values[number, :stop]).view(group, stop - start, -1)
            if sums is not None:
                sums[number, :, :stop] += (each[:, : stop - start] @ weights)[:, 0]
    return None if out is None else out.flatten(0, 1), None if sums is None else sums.flatten(0, 1)


def softcapped_attention(queries: Tensor, keys: Tensor, values: Tensor, settings: AttentionSettings) -> Tensor:
    """Causal attention with a softcap, sinks or chunks, which sdpa cannot do, without transformers' T x T of logits and masks.

    Args:
        queries: [Hq, N, D], the last N of the T tokens; keys, values: [H, T, D].

    Returns:
        [Hq, N, D]
    """
    out = torch.empty_like(queries)
    heads = keys.shape[0]
    for asking, seen, weights, total in _exponentials(queries, keys, settings):
        shares = weights.div_(total[..., None]).to(values.dtype)
        grouped = shares.unflatten(0, (heads, -1)).flatten(1, 2)  # [H, G * q, k]
        out[:, asking] = (grouped @ values[:, seen]).unflatten(1, (-1, weights.shape[1])).flatten(0, 1)
    return out


def _exponentials(queries: Tensor, keys: Tensor, settings: AttentionSettings) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Softmax in blocks of queries [Hq, N, D], the last N of T: which queries, which keys, its numerators [Hq, q, k] and
    denominators [Hq, q], in float32.
    """
    heads, asked, _ = queries.shape
    tokens, group = keys.shape[1], heads // keys.shape[0]
    step = max(1, block_numbers(keys.device) // (heads * tokens))
    positions = torch.arange(tokens, device=keys.device)
    before = tokens - asked
    for start in range(before, tokens, step):
        stop = min(start + step, tokens)
        first = 0 if settings.window is None else max(0, earliest(start, settings.window))
        block = queries[:, start - before : stop - before].float().unflatten(0, (-1, group)).flatten(1, 2) * settings.scaling
        logits = block @ keys[:, first:stop].float().transpose(1, 2)  # [H, G * q, k]
        logits = logits.unflatten(1, (group, stop - start)).flatten(0, 1)  # [Hq, q, k]
        begin = start if settings.window is None else first  # without a window older keys are seen by all of the block
        unseen = hidden(positions[begin:stop], positions[start:stop, None], settings.window)
        softcapped(logits, settings.softcap)[..., begin - first :].masked_fill_(unseen, float("-inf"))
        top = logits.amax(-1, keepdim=True)
        logits.sub_(top)  # in place: a second buffer would be traffic
        if logits.device.type == "cpu":  # as in `_in_strips`
            weights = logits.clamp_(min=-LOWEST).exp_()
            weights[..., begin - first :].masked_fill_(unseen, 0.0)
        else:
            weights = logits.exp_()
        total = weights.sum(-1)
        if settings.sinks is not None:
            total += torch.exp(settings.sinks.float()[:, None] - top[..., 0])  # the sink is no key: no more than float32 holds
        yield slice(start - before, stop - before), slice(first, stop), weights, total
