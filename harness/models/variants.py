"""Variants: a parent model, what was done to it, and how it was healed. Made, saved and loaded here.

`reference+mixsga-3:1:6` names one. Shipped healed with the embedded model; a saved one is named by its folder; anything else is
converted on the spot, unhealed, and says so in its revision. A saved variant that its family's config can describe is an ordinary
checkpoint of transformers beside `variant.json`; another keeps its weights in `variant.safetensors`, which only this loads.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from harness.cache import ModelShape
from harness.engine.model import Model
from harness.errors import UserError, first_line
from harness.families import CannotConvert, routers, wrapped
from harness.files import whole
from harness.logits import Chunk
from harness.models.pretrained import check_weights, digest_of, is_tied, read_network, say_untied
from harness.registry import BUILTIN, Registry

ABOUT, WEIGHTS = "variant.json", "variant.safetensors"
FORMAT = "variant/1"
PROBED, SHOWN = 4, 32  # tokens, and logits of each, by which a variant is known again
ALIKE = 0.2  # of their spread: what another dtype may change of them, unless more was seen when they were saved


class BadVariant(UserError):
    """A saved variant that is missing parts, in one line."""


@dataclass(frozen=True)
class About:
    """What `variant.json` says."""

    parent: str
    parent_revision: str
    parent_shape: ModelShape
    conversion: str
    recipe: dict[str, Any] = field(default_factory=dict)  # empty: not healed
    results: dict[str, Any] = field(default_factory=dict)  # of the healing: tokens, seconds, losses, agreement

    @property
    def name(self) -> str:
        return f"{self.parent}+{self.conversion}"


def convert(parent: Model, text: str, registry: Registry = BUILTIN) -> Model:
    """The parent, converted in place and not healed.

    Raises:
        UnknownChoice, CannotConvert: see there.
    """
    conversion = registry.conversion(text)
    if parent.is_variant:
        raise CannotConvert(f"model {parent.name} is a variant already: convert its parent")
    conversion.apply(parent.network)
    return Model(
        parent.network,
        parent.tokenizer,
        f"{parent.name}+{text} (unhealed)",
        f"{parent.revision}-unhealed{registry.mark('CONVERSIONS', text)}",
        parent.parent_shape,
    )


def save(network: PreTrainedModel, tokenizer: Any, about: About, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Writes a variant. `variant.json` comes last: without it the folder is none. It holds a few of the network's logits.

    Args:
        weights: by name, of a network that is spread over processes; None: the network's own.
    """
    say_untied(network)
    own, tied = network.state_dict() if weights is None else weights, _tied(network)
    state = {name: tensor.contiguous() for name, tensor in own.items() if name not in tied}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    if wrapped(network):
        network.config.save_pretrained(folder)
        save_file(state, folder / WEIGHTS)
        network.generation_config.save_pretrained(folder)  # it may name end tokens that the configuration does not
    else:
        network.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    said = {"format": FORMAT, **asdict(about)}
    said["parent_shape"]["windows"] = [
        {"chunk": size} if isinstance(size, Chunk) else size for size in about.parent_shape.windows
    ]
    if weights is None:
        logits = sample_logits(network)
        said["logits"] = [round(float(value), 4) for value in logits.flatten()]
        said["moved"] = round(float(_apart(_in_another_dtype(network), logits).median()), 4)
    text = json.dumps(said, indent=1)
    with whole(folder / ABOUT) as draft:
        draft.write_text(text + "\n")


def _tied(network: PreTrainedModel) -> set[str]:
    """Names of weights that are another's: they are neither written nor missed."""
    return set(getattr(network, "_tied_weights_keys", None) or ()) if is_tied(network) else set()


@torch.no_grad()
def sample_logits(network: PreTrainedModel) -> Tensor:
    """A few numbers that tell whether two networks are the same model, [PROBED, SHOWN] on the host.

    Where tokens are routed each is a sequence of its own, so that it takes the same expert however the numbers are rounded.
    """
    found, vocabulary, training = routers(network), network.config.vocab_size, network.training
    for router in found:
        router.mode, router.segments = "expert_choice", None
    ids = torch.arange(PROBED, device=network.device) * (vocabulary // PROBED)
    logits = network.eval()(input_ids=ids[:, None] if found else ids[None], use_cache=False).logits
    network.train(training)
    return logits.reshape(PROBED, -1)[:, :: max(1, vocabulary // SHOWN)][:, :SHOWN].float().cpu()


def _in_another_dtype(network: PreTrainedModel) -> Tensor:
    """The same few logits, computed in float32 where the network is of 16 bits, else in bfloat16. The network stays as it is."""
    own = network.dtype
    if own == torch.float32:
        return sample_logits(copy.deepcopy(network).to(torch.bfloat16))  # type: ignore[arg-type]
    found = sample_logits(network.float())
    network.to(own)  # type: ignore[arg-type]
    return found


def _apart(ours: Tensor, theirs: Tensor) -> Tensor:
    """[PROBED]: how far logits are from others, in units of how far these spread."""
    return (ours - theirs).square().mean(1).sqrt() / theirs.std(1)


def _check_logits(network: PreTrainedModel, saved: list[float], moved: float, folder: Path) -> None:
    """
    Args:
        moved: what another dtype changed of the saved logits, in units of their spread; a model that healed badly can be touchy.

    Raises:
        BadVariant: the network says something else than the one that was saved, beyond what another dtype does.
    """
    ours = sample_logits(network)
    if len(saved) != ours.numel():
        raise BadVariant(f"variant {folder}: {ABOUT} tells {len(saved)} logits, and the model has {ours.numel()}; train it again")
    theirs = torch.tensor(saved).view_as(ours)
    off = _apart(ours, theirs)
    if torch.isfinite(off).all() and off.median() > max(ALIKE, 2 * moved):
        raise BadVariant(
            f"variant {folder}: its logits differ by up to {(ours - theirs).abs().max():.3g} from those that it was saved with: "
            "its files, or what transformers makes of them, have changed; train it again"
        )


def is_variant(folder: Path) -> bool:
    return (folder / ABOUT).exists() or (folder / WEIGHTS).exists()


def read_about(folder: Path) -> About:
    """
    Raises:
        BadVariant: no whole variant.json there.
    """
    try:
        found = json.loads((folder / ABOUT).read_text())
        if found.pop("format") != FORMAT:
            raise ValueError(f"of another format than {FORMAT}")
        for name in ("logits", "moved"):
            found.pop(name, None)
        shape = found["parent_shape"]
        windows = (Chunk(size["chunk"]) if isinstance(size, dict) else size for size in shape["windows"])
        shape |= {"windows": tuple(windows), "head_dims": tuple(shape.get("head_dims", ()))}
        if missing := {field.name for field in fields(About)} - set(found):
            raise KeyError(*sorted(missing))
        return About(**{**found, "parent_shape": ModelShape(**shape)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadVariant(
            f"variant {folder}: {ABOUT} is missing or torn ({type(error).__name__}: {error}); train it again"
        ) from None


def open_variant(folder: Path, dtype: torch.dtype, registry: Registry = BUILTIN) -> tuple[PreTrainedModel, About, str]:
    """The network of a saved variant, what it says of itself, and the hash of its weights.

    Raises:
        BadVariant: parts are missing or do not fit together.
        UnknownChoice: its conversion is not known.
    """
    about = read_about(folder)
    conversion = registry.conversion(about.conversion)
    weights = folder / WEIGHTS
    try:
        if weights.exists():
            network: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, local_files_only=True), dtype=dtype
            )
            conversion.apply(network)
            absent, extra = network.load_state_dict(load_file(weights), strict=False)
            check_weights(set(absent) - _tied(network), extra)
            network.tie_weights()
            if (folder / "generation_config.json").exists():
                network.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
            network.to(dtype)
        else:
            network = read_network(folder, dtype)
    except Exception as error:  # see read_network
        raise BadVariant(f"variant {folder} cannot be read: {first_line(error)}") from None
    said = json.loads((folder / ABOUT).read_text())
    if saved := said.get("logits"):
        _check_logits(network, saved, said.get("moved", 0.0), folder)
    return network.eval(), about, digest_of(folder, about.conversion + registry.mark("CONVERSIONS", about.conversion))


def bytes_a_token(shape: ModelShape, text: str, registry: Registry = BUILTIN) -> float:
    """Bytes that a token adds to the cache of a variant, windows aside, with the bits that name its experts.

    mixSGA's Table 9 cuts the fraction of a byte off.
    """
    conversion = registry.conversion(text)
    every = shape.layers * shape.kv_heads * shape.entry_bytes()
    return every * conversion.share(shape) + shape.layers * conversion.index_bits / 8
