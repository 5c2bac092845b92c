"""transformers behind two calls: `prefill` reads a prompt densely and watches, `decode` runs new tokens over rows.

A model's attention calls the function registered here under transformers' AttentionInterface. What answers for it travels as a
keyword argument of the model's call: in a prefill `PrefillPass`, which shows keys, values and queries to an observer and leaves
the computing to transformers' own attention; in decoding `DecodePass`, which writes the new keys and values into the rows and
attends to them. No transformers cache is involved.
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
from harness.engine.observe import AttentionSettings, Observer, softcapped_attention
from harness.engine.rows import RowCache, RowLayer, Step
from harness.errors import UserError
from harness.families import grouping_of, groupings, routers, shape_of
from harness.layer_sharing import Place, place_of, stored_shape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt_neox")
UNDERSTOOD = {"dropout", "scaling", "position_ids", "sliding_window", "softcap", "use_cache", "is_causal", "rows_pass"}
LENGTH_DEPENDENT = ("longrope", "dynamic")
MATTERS_NOT = {"output_attentions", "output_hidden_states", "return_dict"}

Watch = Callable[[int, Tensor], None]  # given a layer's index and the attention of its new queries, [Hq, N, n]


class UnsupportedModel(UserError):
    """The harness cannot reach this model's attention, so it would run uncompressed."""


def refuse_family(name: str, config: Any) -> None:
    """
    Raises:
        UnsupportedModel: a family that is not reached.
    """
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"model {name!r} is of the family {config.model_type!r}, which the harness does not reach; "
            f"reached: {', '.join(FAMILIES)}"
        )


@dataclass(frozen=True)
class Observed:
    """Seconds of a prefill that were spent on watching it."""

    seconds: float
    column_sums: float  # of these


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
    softcapped: bool
    by_flash: bool  # attention by flash-attn

    @property
    def needs_mask(self) -> bool:
        return not (self.softcapped or self.by_flash)  # for these it would be T x T for nothing

    def attention(
        self, place: Place, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense
    ) -> Tensor:
        """query: [Hq, T, D]; key, value: [H, T, D]. Gives [Hq, T, D]."""
        self.observer.see(place, query, key, value, settings)
        if place.layer < self.depth - 1 or self.all_outputs:
            return self._dense(query, key, value, settings, dense)
        # of the last layer nobody reads more than the last token's output
        last = self._dense(query[:, -1:], key, value, settings, dense)  # [Hq, 1, D]
        out = last.new_zeros(query.shape[1], query.shape[0], last.shape[2])
        return out.index_copy_(0, _last(query), last.transpose(0, 1)).transpose(0, 1)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings, dense: Dense) -> Tensor:
        if self.by_flash:
            return flash.causal_attention(query, key, value, settings)
        return dense(query, key, value) if settings.softcap is None else softcapped_attention(query, key, value, settings)


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
            self.watch(place.layer, probabilities(layer, query, self.step, settings.scaling, settings.softcap))
        return attend(layer, query, self.step, settings.scaling, settings.softcap)


class Model:
    """A causal language model of transformers, evaluated without gradients.

    Args:
        network: any model of `FAMILIES`; its attention implementation is set here.
        tokenizer: None for machinery that feeds token ids.
        name: what the user asked for; `revision`: what came (a commit, or the hash of the weights).
        parent_shape: of the unconverted model, if this is a variant: budgets and full caches are counted in it.

    Raises:
        UnsupportedModel: the family, or an attention feature of this checkpoint, is not one the harness reaches.
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
        config = network.config
        refuse_family(name, config)
        if not getattr(network, "_supports_attention_backend", False):
            raise UnsupportedModel(f"model {name!r}: its attention cannot be reached through transformers' interface")
        if any(kind in str(getattr(config, "rope_parameters", "")) for kind in LENGTH_DEPENDENT):
            raise UnsupportedModel(
                f"model {name!r} turns its keys by an angle that depends on the prompt's length ({' or '.join(LENGTH_DEPENDENT)} "
                "RoPE): keys kept from before would not match those that come later"
            )
        whole = shape_of(network)
        self.depth = whole.layers  # that attend; those that store may be fewer
        self.shape = stored_shape(network, whole)
        self.parent_shape, self.is_variant = parent_shape or whole, parent_shape is not None
        self.softcapped = bool(getattr(config, "attn_logit_softcapping", None))
        self.routers = routers(network)
        widest = max((max(grouping.groups) for grouping in groupings(network)), default=1)
        self.least_shape = replace(self.shape, kv_heads=self.shape.kv_heads // widest)  # rows that no token has fewer of
        network.set_attn_implementation(register(own_attention(network)))

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def max_tokens(self) -> int:
        """Positions that the model was made for, by scaling its RoPE too."""
        config = self.network.config
        ropes = getattr(config, "rope_parameters", None) or {}
        by_layer = [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]
        return min(_scaled_positions(rope, int(config.max_position_embeddings)) for rope in by_layer)

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
        self, ids: Tensor, needs: Needs, arena: Arena | None = None, routing: Routing = "expert_choice", scored: int = 0
    ) -> tuple[Prefill, Observed]:
        """Reads `ids` [T] densely, and says how much of that was observation. `routing` is for mixSGA variants.

        The prefill lives in the memory of `arena`, until the next one in the same arena.

        Args:
            scored: what follows each of the last so many tokens is to be scored: their logits are kept.
        """
        checksum = zlib.crc32(ids.to(device="cpu", dtype=torch.int64).numpy().tobytes())
        by_flash = flash.can_run(self.device, self.network.dtype, self.shape.head_dim)
        observer = Observer(self.shape, needs, arena or Arena(), checksum)
        work = PrefillPass(observer, self.depth, scored > 0, self.softcapped, by_flash)
        self._route(routing)
        logits = self._forward(ids[None], torch.arange(len(ids), device=ids.device)[None], work, max(1, scored))
        if observer.reached != list(range(self.depth)) or len(observer.layers) != self.shape.layers:
            raise UnsupportedModel(
                f"attention of model {self.name!r} was reached in {len(observer.reached)} of {self.depth} layers"
            )
        tail = logits[0] if scored else None
        prefill = Prefill(ids, logits[0, -1].float(), tuple(observer.layers), tuple(observer.expert_groups), self.shape, tail)
        return prefill, Observed(observer.lap.seconds, observer.sums.seconds)

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
        self._route("argmax")
        work = DecodePass(cache, cache.step(counts), watch)
        positions = torch.as_tensor(work.step.positions, device=ids.device)[None]
        logits = self._forward(ids[None], positions, work, keep)
        if work.layers_run != self.depth:
            raise UnsupportedModel(f"attention of model {self.name!r} ran in {work.layers_run} layers while decoding")
        cache.seen = cache.seen + work.step.counts
        return logits[0]

    def extend(self, ids: Tensor, positions: Tensor, work: Pass) -> Tensor:
        """One token of each cell, [C], at `positions` [C]. Gives [C, V]. `work` answers for the attention."""
        self._route("argmax")
        return self._forward(ids[None], positions[None], work, 0)[0]

    def _route(self, mode: Routing) -> None:
        for router in self.routers:
            router.mode, router.segments = mode, None

    def _forward(self, ids: Tensor, positions: Tensor, work: Pass, keep: int | Tensor) -> Tensor:
        # transformers passes a 4-D mask through as it is, so that it makes none of its own
        mask = None if work.needs_mask else torch.empty(1, 1, 1, 1, device=ids.device)
        return self.network(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=keep,
            rows_pass=work,
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
    softcapped = getattr(network.config, "attn_logit_softcapping", None)
    return "sdpa" if not softcapped and getattr(network, "_supports_sdpa", True) else "eager"


def register(base: str) -> str:
    """Registers the attention over rows, with `base` of transformers for dense passes, whose masks it takes. Gives its name."""
    name = f"rows_over_{base}"

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        return _attention(base, module, query, key, value, mask, settings)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _attention(
    base: str, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> tuple[Tensor, None]:
    """One layer's attention, [1, H, N, D] as transformers calls it; gives [1, N, Hq, D]."""
    unknown = {k for k, v in settings.items() if v is not None} - UNDERSTOOD - MATTERS_NOT
    if unknown:
        raise UnsupportedModel(f"{type(module).__name__} uses attention features not known here: {sorted(unknown)}")
    work: Pass | None = settings.pop("rows_pass", None)
    official = _official(base, module)
    if work is None:  # a call from elsewhere, such as a training step
        found: tuple[Tensor, None] = official(module, query, key, value, mask, **settings)
        return found

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = None if mask is None else mask[..., -q.shape[1] :, :]  # of fewer queries than keys: they are the last
        out: Tensor = official(module, q[None], k[None], v[None], seen, **settings)[0]
        return out[0].transpose(0, 1)

    place = place_of(module, module.layer_idx)  # type: ignore[arg-type]
    out = work.attention(place, query[0], key[0], value[0], _settings_of(module, settings), dense)
    return out.transpose(0, 1).contiguous()[None], None


def _settings_of(module: torch.nn.Module, settings: dict[str, Any]) -> AttentionSettings:
    plain = (settings["scaling"], settings.get("softcap"), settings.get("sliding_window"))
    grouping = grouping_of(module)
    if grouping is None:
        return AttentionSettings(*plain)
    return AttentionSettings(*plain, grouping.groups, None if grouping.assigned is None else grouping.assigned[0])


def _last(query: Tensor) -> Tensor:
    """The place of the last token, on the device of `query` [Hq, N, D]."""
    return torch.tensor([query.shape[1] - 1], device=query.device)


def _official(base: str, module: torch.nn.Module) -> Any:
    if base == "eager":  # not in the registry: every family has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]
