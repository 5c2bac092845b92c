"""Models by name: a hub id, a local folder, a GGUF file, `smollm2`, `reference`, or a published shape with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file, extract_commit_hash, find_adapter_config_file
from transformers.utils import logging as transformers_logging

from harness.engine.model import Model
from harness.engine.reach import UnsupportedModel
from harness.engine.self_check import self_check
from harness.errors import BadRequest, UserError, first_line
from harness.models.gguf import SMOLLM2, converted, file_of, is_gguf
from harness.models.pretrained import ADAPTER, Placement, Spread, digest_of, read_network, read_tokenizer, why_no_checkpoint
from harness.models.shapes import SHAPES
from harness.models.variants import convert, is_variant, open_variant
from harness.registry import BUILTIN, Registry

transformers_logging.disable_progress_bar()  # a bar a checkpoint, amid our own
REFERENCE = Path(__file__).parents[1] / "reference"


SPREAD = "auto"  # the device of models that are spread over several


class UnknownModel(UserError):
    """No such model, or no way to get it from here."""


def device_of(name: str | None) -> torch.device:
    """
    Args:
        name: cpu, cuda, cuda:1; None: a GPU if there is one; auto: the same, and models are spread over all of them.

    Raises:
        BadRequest: no such device here.
    """
    if name in (None, SPREAD):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(f"device {name!r} is not here: {first_line(error)}") from None
    return device


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """By name; None: float32 on a CPU, bfloat16 on a GPU."""
    found: torch.dtype = getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))
    return found


class LoadOptions(Protocol):
    """The part of a request that says how models are loaded."""

    @property
    def device(self) -> str | None: ...

    @property
    def dtype(self) -> str | None: ...

    @property
    def revision(self) -> str | None: ...


def load_model(name: str, options: LoadOptions, registry: Registry = BUILTIN) -> Model:
    """See `load`."""
    device = device_of(options.device)
    dtype = dtype_of(options.dtype, device)
    return load(name, dtype, device, options.revision, registry, None if options.device != SPREAD else "auto")


def one_device(name: str | None, what: str) -> torch.device:
    """The device of what runs on one.

    Raises:
        BadRequest: no such device here, or several are asked for.
    """
    if name == SPREAD:
        raise BadRequest(f"{what} runs on one device: name it, as --device cuda:0")
    return device_of(name)


def _on(network: Any, device: torch.device) -> Any:
    """`to` of transformers is wrapped in a way that hides its argument from type checkers. What has its devices stays there."""
    return network if hasattr(network, "hf_device_map") else network.to(device)


def check_name(name: str, registry: Registry = BUILTIN) -> None:
    """Refuses what can be refused before anything is loaded.

    Raises:
        UnknownModel, UnknownChoice: no such shape, folder or conversion.
    """
    name, conversion = parted(name)
    if conversion is not None:
        registry.conversion(conversion)
    shape = name.removeprefix("random:")
    if shape != name and shape not in SHAPES:
        raise UnknownModel(f"no shape {shape!r}; known: {', '.join(SHAPES)}")
    if is_gguf(name):
        file_of(name)
        return
    if Path(name).is_file():
        raise UnknownModel(f"model {name!r} is a file: name the folder that holds its config.json")
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UnknownModel(f"model {name!r}: no such folder")


def parted(name: str) -> tuple[str, str | None]:
    """A model, and the conversion named behind it, if there is one. The path of a folder may have a plus of its own."""
    if Path(name).is_dir():
        return name, None
    parent, plus, conversion = name.rpartition("+")
    return (parent, conversion) if plus and "/" not in conversion else (name, None)


def source_of(name: str) -> str:
    """What tells a folder's or hub id's weights from others of that name; "" for models that are the suite's own."""
    parent, _ = parted(name)
    if parent == "reference" or parent.startswith("random:"):
        return ""
    if is_gguf(parent):
        return converted(parent).revision
    if Path(parent).is_dir():
        return digest_of(Path(parent))
    try:
        return _commit(parent, None)
    except OSError:
        return ""  # not reachable, so that nothing of it can be measured either


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    registry: Registry = BUILTIN,
    spread: Spread = None,
) -> Model:
    """
    Args:
        name: `reference`, `smollm2`, `random:<shape>`, a folder with a config and safetensors, a .gguf file, or a hub id.
        revision: of a hub id; None: its main branch, whose commit is then the record's.
        spread: over which devices the layers of a folder's or hub id's checkpoint are spread, `auto` or accelerate's map; None:
            all of it on `device`.

    Raises:
        UnknownModel: nothing there, or not reachable.
        UnsupportedModel: a model that the harness does not reach, as its configuration tells or as was measured.
    """
    check_name(name, registry)
    model = _load(name, dtype, Placement(device, spread), revision, registry)
    self_check(model)
    if len(where := devices_of(model.network)) > 1:
        model.checked["devices"] = where
    return model


def devices_of(network: Any) -> list[str]:
    """Where its layers lie, by name; `disk` too."""
    return sorted({str(place) for place in getattr(network, "hf_device_map", {}).values()})


def _load(name: str, dtype: torch.dtype, place: Placement, revision: str | None, registry: Registry) -> Model:
    device = place.device
    parent, conversion = parted(name)
    if conversion is not None:
        if parent == "reference" and is_variant(shipped_variant(conversion)):
            return _variant(shipped_variant(conversion), dtype, device, registry)
        return convert(_load(parent, dtype, place, revision, registry), conversion, registry)
    if is_variant(Path(name)):
        return _variant(Path(name), dtype, device, registry)
    if name.startswith("random:"):
        return _random(name, dtype, device)
    if is_gguf(name):
        return _from_gguf(name, dtype, device)
    folder = REFERENCE if name == "reference" else Path(name)
    if folder.is_dir():
        return _from_folder(folder, name, dtype, place)
    return _from_hub(name, dtype, place, revision)


def shipped_variant(conversion: str) -> Path:
    """Where a variant of the embedded model lies, if it is shipped with it."""
    return REFERENCE / "variants" / conversion.replace(":", "_")


def _variant(folder: Path, dtype: torch.dtype, device: torch.device, registry: Registry) -> Model:
    network, about, digest = open_variant(folder, dtype, registry)
    tokenizer = _tokenizer(folder, about.name)
    if tokenizer is None and about.parent == "reference":
        tokenizer = _tokenizer(REFERENCE, about.name)
    shape = replace(about.parent_shape, itemsize=dtype.itemsize)
    return Model(_on(network, device), tokenizer, about.name, digest, shape)


def _random(name: str, dtype: torch.dtype, device: torch.device) -> Model:
    shape = name.removeprefix("random:")
    config = AutoConfig.for_model(**SHAPES[shape])
    torch.manual_seed(0)
    with device:
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    network.config.eos_token_id = network.generation_config.eos_token_id = None  # no token of theirs means an end
    return Model(network, byte_tokenizer(), name, "seed-0")


def _from_folder(folder: Path, name: str, dtype: torch.dtype, place: Placement) -> Model:
    if (why := why_no_checkpoint(folder)) is not None:
        raise UnknownModel(f"model {name!r}: {folder} {why}")
    try:
        network = read_network(folder, dtype, place=place)
    except UnsupportedModel:
        raise
    except Exception as error:  # see read_network
        raise UnknownModel(f"model {name!r} cannot be read from {folder}: {first_line(error)}") from None
    tokenizer = _tokenizer(folder, name)
    shown = name if name == "reference" else folder.name if folder.name not in ("", "..") else folder.resolve().name
    shown = shown.replace("+", "_")  # in a row's name a plus begins a conversion
    return Model(_on(network, place.device), tokenizer, shown, digest_of(folder))


def _from_gguf(name: str, dtype: torch.dtype, device: torch.device) -> Model:
    found = converted(name)
    try:
        network = read_network(found.folder, dtype)
    except UnsupportedModel:
        raise
    except Exception as error:  # see read_network
        raise UnknownModel(f"model {name!r} cannot be read from {found.folder}: {first_line(error)}") from None
    shown = name if name == SMOLLM2 else Path(name).stem
    return Model(_on(network, device), _tokenizer(found.folder, name), shown, found.revision)


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase | None:
    try:
        return read_tokenizer(folder)
    except Exception as error:  # see read_tokenizer
        raise UnknownModel(f"model {name!r}: its tokenizer cannot be read from {folder}: {first_line(error)}") from None


def _from_hub(name: str, dtype: torch.dtype, place: Placement, revision: str | None) -> Model:
    try:
        commit = _commit(name, revision)
        if find_adapter_config_file(name, revision=commit) is not None:
            raise ValueError(ADAPTER)
        network = read_network(name, dtype, commit, place)
        tokenizer = read_tokenizer(name, commit)
    except OSError as error:
        advice = "give a folder that holds it, or go online; a gated model needs its licence accepted and `hf auth login`"
        raise UnknownModel(
            f"model {name!r} is neither a folder here nor reachable on the hub: {first_line(error)} ({advice})"
        ) from None
    except UnsupportedModel:
        raise
    except Exception as error:  # see read_network
        raise UnknownModel(f"model {name!r} of the hub cannot be read: {first_line(error)}") from None
    return Model(_on(network, place.device), tokenizer, name, commit)


def _commit(name: str, revision: str | None) -> str:
    """
    Raises:
        OSError: no such model, or not reachable.
    """
    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None) or revision or "main"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, no files needed: lets random weights read any benchmark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
