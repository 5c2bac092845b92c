"""transformers behind two calls: `prefill` reads a prompt densely and watches, `decode` runs new tokens over rows.

A model's attention calls the function registered here under transformers' AttentionInterface. What answers for it travels as a
keyword argument of the model's call: in a prefill `PrefillPass`, which shows keys, values and queries to an observer and leaves
the computing to transformers' own attention, but for what that cannot do or another does as fast with more; in decoding
`DecodePass`, which writes the new keys and values into the rows and attends to them. No transformers cache is involved.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness.cache import Arena, ModelShape, Needs, Prefill, Routing
from harness.engine import flash
from harness.engine.attention import attend, probabilities
from harness.engine.measure import Lap, stopwatch
from harness.engine.observe import AttentionSettings, Observer, attention_with_sums, softcapped_attention
from harness.engine.prepacked import Prepacked
from harness.engine.projections import Around
from harness.engine.reach import UnsupportedModel, refuse_network
from harness.engine.rows import RowCache, RowLayer, Step
from harness.engine.second_pass import ReplayPass, replayed, with_replays
from harness.families import grouping_of, groupings, routers, shape_of, text_config, window_of
from harness.layer_sharing import Place, mark_shared, place_of, stored_shape
from harness.logits import Chunk

UNDERSTOOD = {"dropout", "scaling", "position_ids", "sliding_window", "softcap", "use_cache", "is_causal", "s_aux"}
OURS = ("rows_pass", "rows_positions")
CHUNK, TEMPERED = "rows_chunk", "rows_tempered"  # attributes of attention layers, see `_mark`
MATTERS_NOT = {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}

# Given the index of a cache layer and the attention of new queries to it, [Hq, N, n]; of each layer of the model that reads it.
Watch = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Observed:
    """Seconds of a prefill that were spent on watching it."""

    seconds: float
    column_sums: float  # of these
    second_pass: float = 0.0  # of these


Dense = Callable[[Tensor, Tensor, Tensor], Tensor]  # transformers' own attention of the layer that is running


class Pass(Protocol):
    """What answers for the attention of one call of the model."""

    @property
    def needs_mask(self) -> bool:
        """Is transformers to make the mask that its own attention reads?"""
        ...

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        """query: [Hq, N, D]; key, value: [H, N, D]. Gives [Hq, N, D]. `dense` computes the same from scratch."""
        ...


@dataclass
class PrefillPass:
    """A dense pass that is observed."""

    observer: Observer
    depth: int  # layers that attend
    all_outputs: bool  # every token's logits are wanted, not the last one's alone
    softcapped: bool  # or with sinks: sdpa does neither
    by_flash: bool  # attention by flash-attn, where it can
    around: Around
    joined: bool = False  # the attention and its column sums from the same weights, where that is as fast

    @property
    def needs_mask(self) -> bool:
        return not (self.softcapped or self.by_flash)  # for these it would be T x T for nothing

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        """query: [Hq, T, D]; key, value: [H, T, D]. Gives [Hq, T, D]."""
        module = settings.attention
        assert module is not None
        if settings.window is None:  # some families tell their windows by the mask alone (Phimoe)
            settings = replace(settings, window=self.observer.shape.windows[place.cache_layer])
        around = self.around.of(module, query.shape[0] * value.shape[2])
        all_of_it, found = place.layer < self.depth - 1 or self.all_outputs, None
        if all_of_it and self.joined:
            found = attention_with_sums(query, key, value, settings, self.observer.needs.column_sums)
        self.observer.see(place, query, key, value, settings, around, None if found is None else found[1])
        if all_of_it:
            return self._dense(query, key, value, settings, dense) if found is None else found[0]
        # of the last layer nobody reads more than the last token's output
        last = self._dense(query[:, -1:], key, value, settings, dense)  # [Hq, 1, D]
        out = last.new_zeros(query.shape[1], query.shape[0], last.shape[2])
        return out.index_copy_(0, _last(query), last.transpose(0, 1)).transpose(0, 1)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense) -> Tensor:
        if self.by_flash and settings.plain:
            return flash.causal_attention(query, key, value, settings)
        plain = settings.softcap is None and settings.sinks is None and self.needs_mask
        return dense(query, key, value) if plain else softcapped_attention(query, key, value, settings)


@dataclass
class DecodePass:
    """New tokens of the cells of a cache, side by side in one sequence."""

    cache: RowCache
    step: Step
    watch: Watch | None = None
    layers_run: int = 0
    needs_mask = False

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        """query: [Hq, N, D]; key, value: [H, N, D]. Gives [Hq, N, D]."""
        layer = self.cache.layers[place.cache_layer]
        if place.writes:
            experts = None if settings.experts is None else settings.experts.cpu().numpy()
            layer.append(key, value, self.step, experts)
        self.layers_run += 1
        if layer.memory is not None:
            layer.memory.see(query, self.step)
        if self.watch:
            assert isinstance(layer, RowLayer)
            shown = probabilities(layer, query, self.step, settings.scaling, settings.softcap, settings.sinks)
            self.watch(place.cache_layer, shown)
        return attend(layer, query, self.step, settings.scaling, settings.softcap, settings.sinks)


class Model:
    """A causal language model of transformers, evaluated without gradients.

    Args:
        network: any causal language model whose attention goes through transformers' interface; its implementation is set here.
            Whether rows stand for its attention is measured by `self_check`.
        tokenizer: None for machinery that feeds token ids.
        name: what the user asked for; `revision`: what came (a commit, or the hash of the weights).
        parent_shape: of the unconverted model, if this is a variant: budgets and full caches are counted in it.

    Raises:
        UnsupportedModel: its attention is not reached, or it holds more state than keys and values.
        CannotStore: keys and values that rows do not hold.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        revision: str,
        parent_shape: ModelShape | None = None,
    ) -> None:
        self.network, self.tokenizer, self.name, self.revision = network.eval(), tokenizer, name, revision
        refuse_network(name, network)
        self.config = text_config(network.config)
        self.spread = len(set(getattr(network, "hf_device_map", {}).values())) > 1  # over devices, by accelerate
        whole, self.shares = shape_of(network), mark_shared(network)
        self.attending = whole  # the shape of all layers that attend
        self.depth = whole.layers  # of them; those that store may be fewer
        self.shape = stored_shape(network, whole)
        self.parent_shape = parent_shape or (self.shape if self.shares else whole)
        self.is_variant = parent_shape is not None
        sunk = any(isinstance(getattr(module, "sinks", None), Tensor) for module in network.modules())
        self.softcapped = sunk or bool(getattr(self.config, "attn_logit_softcapping", None))
        self.routers = routers(network)
        widest = max((max(grouping.groups) for grouping in groupings(network)), default=1)
        self.least_shape = replace(self.shape, kv_heads=self.shape.kv_heads // widest)  # rows that no token has fewer of
        _mark(network)
        self.prepacked = Prepacked()  # weights packed for short passes, once a sweep asks for them
        self.checked: dict[str, Any] = {}  # what a check of its attention found, when it was loaded
        network.set_attn_implementation(register(own_attention(network)))

    @property
    def device(self) -> torch.device:
        """Where tokens are fed in."""
        hook = getattr(self.network.get_input_embeddings(), "_hf_hook", None)  # accelerate's, of layers that are spread
        place = getattr(hook, "execution_device", None)
        return self.network.device if place is None else torch.device(place)

    @property
    def max_tokens(self) -> int:
        """Positions that the model was made for, by scaling its RoPE too."""
        ropes = getattr(self.config, "rope_parameters", None) or {}
        by_layer = [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]
        return min(_scaled_positions(rope, int(self.config.max_position_embeddings)) for rope in by_layer)

    @property
    def vocabulary(self) -> int:
        """Tokens that it has embeddings for; its tokenizer may have more, or fewer."""
        words: Any = self.network.get_input_embeddings()
        return int(words.weight.shape[0])

    def words(self, tokens: list[int], special: bool = False) -> str:
        """Tokens as text, special ones only if asked for; as numbers where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self.tokenizer.decode(tokens, skip_special_tokens=not special))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every end token that the generation config or the tokenizer names."""
        found: set[int] = set()
        sources = (getattr(self.network, "generation_config", None), self.network.config, self.tokenizer)
        for ids in (getattr(source, "eos_token_id", None) for source in sources):
            found |= set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}
        return frozenset(found)

    @torch.inference_mode()
    def prefill(
        self,
        ids: Tensor,
        needs: Needs,
        arena: Arena | None = None,
        routing: Routing = "expert_choice",
        scored: int = 0,
        turn_end: str = "\n",
        joined: bool = False,
    ) -> tuple[Prefill, Observed]:
        """Reads `ids` [T] densely, and says how much of that was observation. `routing` is for mixSGA variants.

        The prefill lives in the memory of `arena`, until the next one in the same arena.

        Args:
            scored: what follows each of the last so many tokens is to be scored: their logits are kept.
            turn_end: in a second pass, what stands between the instruction and what is repeated.
            joined: attention and column sums come from the same weights where that is as fast, whether sums are asked for or not:
                so who asks changes no bit of the rest. What they take is then no part of what is said of observation.
        """
        checksum = zlib.crc32(ids.to(device="cpu", dtype=torch.int64).numpy().tobytes())
        by_flash = flash.can_run(self.device, self.network.dtype, self.shape.head_dim)
        observer = Observer(self.shape, needs, arena or Arena(), checksum)
        around = Around(needs)
        work = PrefillPass(observer, self.depth, scored > 0, self.softcapped, by_flash, around, joined)
        self.route(routing)
        with around.watching(self.network), self.prepacked.serving(len(ids)):
            logits = self.forward(ids[None], torch.arange(len(ids), device=ids.device)[None], work, max(1, scored))
        if observer.reached != list(range(self.depth)) or len(observer.layers) != self.shape.layers:
            raise UnsupportedModel(
                f"attention of model {self.name!r} was reached in {len(set(observer.reached))} of {self.depth} layers, "
                f"{len(observer.reached)} times: each layer is to attend once, in order"
            )
        tail = logits[0] if scored else None
        prefill = Prefill(ids, logits[0, -1].float(), tuple(observer.layers), tuple(observer.expert_groups), self.shape, tail)
        lap = Lap()
        if needs.replays:
            with stopwatch(self.device, lap):
                prefill = self._replayed(prefill, needs, turn_end, by_flash)
        return prefill, Observed(observer.lap.seconds + lap.seconds, observer.sums.seconds, lap.seconds)

    def _replayed(self, prefill: Prefill, needs: Needs, turn_end: str, by_flash: bool) -> Prefill:
        """The same with what the second passes asked for saw, those for which the model has positions."""
        self.route("argmax")

        def forward(ids: Tensor, positions: Tensor, work: ReplayPass) -> None:
            self.forward(ids[None], positions[None], work, 1)

        setting = (self.depth, self.max_tokens, by_flash)
        found = {asked: replayed(prefill, asked, self.tokenizer, turn_end, forward, setting) for asked in needs.replays}
        return with_replays(prefill, {asked: scores for asked, scores in found.items() if scores is not None})

    @torch.inference_mode()
    def decode(self, cache: RowCache, ids: Tensor, keep: int = 1, watch: Watch | None = None) -> Tensor:
        """Appends the tokens `ids` [C, Q] to the cells, and gives the logits of the last `keep` of them, [C, keep, V].

        Args:
            watch: sees the attention of every layer; for the full cache of one cell only.
        """
        cells, tokens = ids.shape
        last = (torch.arange(cells)[:, None] * tokens + torch.arange(tokens - keep, tokens)).view(-1)
        return self._extend(cache, ids.reshape(-1), [tokens] * cells, last.to(ids.device), watch).view(cells, keep, -1)

    @torch.inference_mode()
    def decode_ragged(self, cache: RowCache, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Appends each cell's own tokens, and gives the logits of all of them side by side, [N, V]."""
        ids = torch.tensor([token for piece in pieces for token in piece], device=self.device)
        return self._extend(cache, ids, [len(piece) for piece in pieces], torch.arange(len(ids), device=self.device))

    def _extend(self, cache: RowCache, ids: Tensor, counts: Sequence[int], keep: Tensor, watch: Watch | None = None) -> Tensor:
        self.route("argmax")
        work = DecodePass(cache, cache.step(counts), watch)
        positions = torch.as_tensor(work.step.positions, device=ids.device)[None]
        if cache.renumbered:
            positions = torch.zeros_like(positions)
        with self.prepacked.serving(len(ids)):
            logits = self.forward(ids[None], positions, work, keep)
        if work.layers_run != self.depth:
            raise UnsupportedModel(f"attention of model {self.name!r} ran in {work.layers_run} layers while decoding")
        cache.seen = cache.seen + work.step.counts
        return logits[0]

    def extend(self, ids: Tensor, positions: Tensor, work: Pass) -> Tensor:
        """One token of each cell, [C], at `positions` [C]. Gives [C, V]. `work` answers for the attention."""
        self.route("argmax")
        return self.forward(ids[None], positions[None], work, 0)[0]

    def route(self, mode: Routing) -> None:
        """How the tokens of the next pass find their experts, where layers have several."""
        for router in self.routers:
            router.mode, router.segments = mode, None

    def forward(self, ids: Tensor, positions: Tensor, work: Pass, keep: int | Tensor) -> Tensor:
        """Logits [1, keep, V] of `ids` [1, N] at `positions` [1, N]; `work` answers for the attention."""
        # transformers passes a 4-D mask through as it is, so that it makes none of its own
        mask = None if work.needs_mask else torch.empty(1, 1, 1, 1, device=ids.device)
        if self.shares and isinstance(keep, int):  # told a number, Gemma 4 drops the other tokens before its shared layers
            keep = torch.arange(ids.shape[1] - (keep or ids.shape[1]), ids.shape[1], device=ids.device)
        if self.spread and isinstance(keep, Tensor):
            keep = keep.to(device="cpu")  # an index of a tensor on any device
        return self.network(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=keep,
            rows_pass=work,
            rows_positions=positions,
        ).logits


def _scaled_positions(rope: dict[str, Any], positions: int) -> int:
    """What a RoPE of these parameters reaches, where `positions` is what the configuration says.

    Model cards switch YaRN on and leave the positions as they were (Qwen), configurations of linear scaling hold those of before
    (Vicuna), and those of Llama 3 have the scaled length.
    """
    kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
    before = rope.get("original_max_position_embeddings") or positions
    if kind in ("linear", "yarn") or (kind == "llama3" and before == positions):
        return max(positions, int(before * factor))
    return positions


def own_attention(network: PreTrainedModel) -> str:
    """transformers' attention for dense passes: sdpa, but for a softcap, which sdpa cannot do, and for families without it:
    some transformers refuse Gemma 2 sdpa even where its softcap is set to null.
    """
    softcapped = getattr(text_config(network.config), "attn_logit_softcapping", None)
    return "sdpa" if not softcapped and getattr(network, "_supports_sdpa", True) else "eager"


def register(base: str) -> str:
    """Registers the attention over rows, with `base` of transformers for dense passes, whose masks it takes. Gives its name."""
    name = f"rows_over_{base}"

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:  # some families name the mask in their calls
        return attention_over(base, module, query, key, value, attention_mask, settings)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def attention_over(
    base: str, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> tuple[Tensor, None]:
    """One layer's attention, [1, H, N, D] as transformers calls it; gives [1, N, Hq, D]."""
    unknown = {k for k, v in settings.items() if v is not None} - UNDERSTOOD - MATTERS_NOT - set(OURS)
    if unknown:
        raise UnsupportedModel(f"{type(module).__name__} uses attention features not known here: {sorted(unknown)}")
    work, positions = (settings.pop(name, None) for name in OURS)
    official = _official(base, module)
    if work is None:  # a call from elsewhere, such as a training step
        found: tuple[Tensor, None] = official(module, query, key, value, mask, **settings)
        return found

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = None if mask is None else mask[..., -q.shape[1] :, :]  # of fewer queries than keys: they are the last
        out: Tensor = official(module, q[None], k[None], v[None], seen, **settings)[0]
        return out[0].transpose(0, 1)

    place = place_of(module, module.layer_idx)  # type: ignore[arg-type]
    asking = _tempered(module, query[0], positions[0])
    out = work.attention(place, asking, key[0], value[0], _settings_of(module, settings), dense)
    return out.transpose(0, 1).contiguous()[None], None


def _settings_of(module: torch.nn.Module, settings: dict[str, Any]) -> AttentionSettings:
    window, sinks = settings.get("sliding_window"), settings.get("s_aux")
    held = None if sinks is None else sinks.detach()  # a weight: what is made of it is no part of a graph of gradients
    found = AttentionSettings(
        settings["scaling"], settings.get("softcap"), module.__dict__.get(CHUNK) or window, sinks=held, attention=module
    )
    grouping = grouping_of(module)
    if grouping is None:
        return found
    return replace(found, groups=grouping.groups, experts=None if grouping.assigned is None else grouping.assigned[0])


def _tempered(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """Queries [Hq, N, D] of `positions` [N]. Llama 4's layers without positions scale theirs by the place in the sequence that
    they are given: right in a prefill; of tokens to be decoded, which stand side by side, it is put right here.
    """
    if not module.__dict__.get(TEMPERED):
        return query

    def scale(at: Tensor) -> Tensor:
        return torch.log1p(torch.floor((at.float() + 1) / module.floor_scale)) * module.attn_scale + 1

    given = torch.arange(len(positions), device=positions.device)
    return (query * (scale(positions) / scale(given))[:, None]).to(query.dtype)


def _mark(network: PreTrainedModel) -> None:
    """Tells attention layers what transformers does not hand to their attention: looked up once, not at every call.

    Families with chunks (Llama 4) tell them by the mask alone, and scale queries of layers without positions.
    """
    for module in network.get_decoder().modules():
        config = getattr(module, "config", None)
        if not hasattr(module, "layer_idx") or getattr(config, "attention_chunk_size", None) is None:
            continue
        window = window_of(config, module.layer_idx)  # type: ignore[arg-type]
        module.__dict__[CHUNK] = window if isinstance(window, Chunk) else None
        module.__dict__[TEMPERED] = getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)


def _last(query: Tensor) -> Tensor:
    """The place of the last token, on the device of `query` [Hq, N, D]."""
    return torch.tensor([query.shape[1] - 1], device=query.device)


def _official(base: str, module: torch.nn.Module) -> Any:
    if base == "eager":  # not in the registry: every family has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]
