"""A second pass over a prompt that was read: it is repeated behind itself, and what the repetition attends to is noted.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", 2025 (arxiv.org/abs/2505.23416), section 3.
The first pass's keys and values are read and never written; the pass is made once for all methods and budgets of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from harness.cache import LayerKV, Prefill, Replay
from harness.engine import flash
from harness.engine.observe import AttentionSettings, beside, block_numbers, softcapped_attention
from harness.layer_sharing import Place
from harness.logits import hidden, softcapped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPEAT = "\n\nRepeat the previous context exactly."  # the authors' words, so that scores are those of their prompts
GO_ON = "\n\nRepeat the part of the previous context exactly, starting with"
STARTING_WITH = 8  # last tokens of the chunk before, which the second instruction ends with
Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
Forward = Callable[[Tensor, Tensor, "ReplayPass"], None]  # ids [N], their positions [N]


@dataclass(frozen=True)
class Repeated:
    """One chunk [start, stop) of the prompt, and the tokens by which it is repeated, instruction and all."""

    start: int
    stop: int
    ids: tuple[int, ...]


def repetitions(ids: Sequence[int], chunk: int, tokenizer: PreTrainedTokenizerBase | None, turn_end: str) -> Iterator[Repeated]:
    """A prompt's chunks, the last one shorter; of a prompt shorter than a chunk there is one.

    Args:
        tokenizer: None: chunks are repeated without an instruction.
        turn_end: what stands between the instruction and the repetition.
    """

    def words(text: str) -> list[int]:
        return [] if tokenizer is None else list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end = words(turn_end)
    for start in range(0, len(ids), chunk):
        mine = ids[start : start + chunk]
        asked = words(GO_ON) + list(ids[start - STARTING_WITH : start]) if start else words(REPEAT)
        yield Repeated(start, start + len(mine), (*asked, *end, *mine))


@dataclass
class ReplayPass:
    """New tokens behind a prompt whose keys and values stay as they are; scores of one chunk's entries."""

    layers: Sequence[LayerKV]
    chunk: Repeated
    sinks: int
    depth: int  # layers that attend
    by_flash: bool
    found: dict[int, list[Tensor]] = field(default_factory=dict)  # by cache layer, of each layer that reads it: [Hq, c]
    needs_mask = False

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        """query: [Hq, N, D]; key, value: [H, N, D]. Gives [Hq, N, D]."""
        layer = self.layers[place.cache_layer]
        self.found.setdefault(place.cache_layer, []).append(self._most(layer, query, key, settings))
        if place.layer == self.depth - 1:  # nobody reads what the last layer makes of it
            return torch.zeros_like(query)
        keys, values = torch.cat([layer.keys, key], 1), torch.cat([layer.values, value], 1)
        if self.by_flash and settings.plain:
            return flash.causal_attention(query, keys, values, settings)
        if settings.softcap is not None or settings.sinks is not None:
            return softcapped_attention(query, keys, values, settings)
        positions = torch.arange(layer.tokens - layer.keys.shape[1], layer.tokens + query.shape[1], device=query.device)
        seen = ~hidden(positions, positions[-query.shape[1] :, None], settings.window)
        grouped = query.shape[0] != key.shape[0]
        parts = (query[None], keys[None], values[None])
        return scaled_dot_product_attention(*parts, seen, scale=settings.scaling, enable_gqa=grouped)[0]

    def _most(self, layer: LayerKV, query: Tensor, key: Tensor, settings: AttentionSettings) -> Tensor:
        """The most that any repeated token attends to each of the chunk's candidates, [Hq, c].

        The softmax runs over the first positions, the chunk and the repetition so far, near or far.
        """
        begin = layer.tokens - layer.keys.shape[1]  # the first candidate's position
        start, stop = max(self.chunk.start - begin, 0), max(self.chunk.stop - begin, 0)
        sinks = max(0, min(self.sinks, self.chunk.start) - begin)
        keys = torch.cat([layer.keys[:, start:stop], layer.keys[:, :sinks], key], 1).float().transpose(1, 2)  # [H, D, c + s + N]
        heads, news, old = key.shape[0], query.shape[1], stop - start + sinks
        most = query.new_full((query.shape[0], stop - start), float("-inf"), dtype=torch.float32)
        step = max(1, block_numbers(query.device) // (query.shape[0] * (old + news)))
        for first in range(0, news, step):
            last = min(first + step, news)
            asking = query[:, first:last].float().unflatten(0, (heads, -1)).flatten(1, 2) * settings.scaling
            logits = (asking @ keys[..., : old + last]).unflatten(1, (-1, last - first)).flatten(0, 1)  # [Hq, q, old + last]
            later = torch.ones(last - first, last - first, dtype=torch.bool, device=query.device).triu(1)
            softcapped(logits, settings.softcap)[..., old + first :].masked_fill_(later, float("-inf"))
            total = logits.logsumexp(-1, keepdim=True)
            if settings.sinks is not None:
                total = total.logaddexp(settings.sinks.float()[:, None, None])
            share = logits[..., : stop - start] - total
            torch.maximum(most, share.amax(1), out=most)
        return most.exp()


def replayed(
    prefill: Prefill,
    asked: Replay,
    tokenizer: PreTrainedTokenizerBase | None,
    turn_end: str,
    forward: Forward,
    setting: tuple[int, int, bool],
) -> list[Tensor] | None:
    """Of each stored layer [Hq, n], the most attention that each candidate received; None where positions run out.

    Args:
        setting: layers that attend, positions that the model has, and whether attention is flash-attn's.
    """
    depth, most, by_flash = setting
    chunks = list(repetitions(prefill.ids.tolist(), asked.chunk, tokenizer, turn_end))
    if prefill.tokens + max(len(chunk.ids) for chunk in chunks) > most:
        return None
    sums = [layer.keys.new_zeros(layer.query_heads, layer.keys.shape[1], dtype=torch.float32) for layer in prefill.layers]
    for chunk in chunks:
        work = ReplayPass(prefill.layers, chunk, asked.sinks, depth, by_flash)
        ids = torch.tensor(chunk.ids, device=prefill.ids.device)
        forward(ids, prefill.tokens + torch.arange(len(ids), device=ids.device), work)
        for layer, into in zip(prefill.layers, sums, strict=True):
            parts = work.found[layer.index]
            scores = parts[0]
            for part in parts[1:]:
                scores = beside(layer.keys.shape[0], scores, part)
            begin = layer.tokens - layer.keys.shape[1]
            stop = max(chunk.stop - begin, 0)
            into[:, stop - scores.shape[1] : stop] = scores
    return sums


def with_replays(prefill: Prefill, found: Mapping[Replay, list[Tensor]]) -> Prefill:
    layers = [
        replace(layer, replayed={asked: scores[number] for asked, scores in found.items()})
        for number, layer in enumerate(prefill.layers)
    ]
    return replace(prefill, layers=tuple(layers))
