"""Which models rows can stand for, by what a model holds: refused here is what no measurement is needed for.

That attention of the rest comes out right is measured when a model is loaded (`self_check`), never concluded from a name.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from harness.errors import UserError
from harness.families import text_config

LENGTH_DEPENDENT = ("longrope", "dynamic")
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers whose state is keys and values


class UnsupportedModel(UserError):
    """The harness cannot reach this model's attention, so it would run uncompressed, or wrongly."""


def refuse_config(name: str, config: Any) -> None:
    """Refuses what a configuration tells before any weight is read.

    Raises:
        UnsupportedModel: no causal language model, or one whose state is not keys and values by head.
    """
    text = text_config(config)
    told = f"model {name!r} is of the family {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{told}, which reads by an encoder: only decoders have a cache that all of this suite is about")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModel(
            f"{told}, whose cache holds one latent of {text.kv_lora_rank} numbers a token (MLA) and not keys and values by head"
        )
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if kinds - ATTENDING:
        raise UnsupportedModel(
            f"{told}, whose layers hold state outside of keys and values: {', '.join(sorted(kinds - ATTENDING))}"
        )
    if any(kind in str(getattr(text, "rope_parameters", "")) for kind in LENGTH_DEPENDENT):
        raise UnsupportedModel(
            f"model {name!r} turns its keys by an angle that depends on the prompt's length ({' or '.join(LENGTH_DEPENDENT)} "
            "RoPE): keys kept from before would not match those that come later"
        )


def refuse_network(name: str, network: PreTrainedModel) -> None:
    """
    Raises:
        UnsupportedModel: what its configuration tells, state outside of attention, or attention that is not reached.
    """
    refuse_config(name, network.config)
    told = f"model {name!r} is of the family {network.config.model_type!r}"
    decoder = network.get_decoder()
    convolutions = [type(module).__name__ for module in decoder.modules() if isinstance(module, nn.Conv1d)]
    if getattr(network, "_is_stateful", False) or convolutions:
        held = f"{len(convolutions)} convolutions over tokens" if convolutions else "a recurrent state"
        raise UnsupportedModel(f"{told}, whose layers hold state outside of keys and values: {held}")
    if not getattr(network, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{told}: its attention cannot be reached through transformers' interface")
