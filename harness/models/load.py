"""Models by name: a hub id, a local folder, `reference`, or a published shape with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from harness.engine.model import Model, UnsupportedModel
from harness.models.shapes import SHAPES
from harness.models.variants import conversion_of, convert, digest_of, is_variant, open_variant

transformers_logging.disable_progress_bar()  # a bar a checkpoint, amid our own
REFERENCE = Path(__file__).parents[1] / "reference"


class UnknownModel(ValueError):
    """No such model, or no way to get it from here."""


def _on(network: Any, device: torch.device) -> Any:
    """`to` of transformers is wrapped in a way that hides its argument from type checkers."""
    return network.to(device)


def check_name(name: str) -> None:
    """Refuses what can be refused before anything is loaded.

    Raises:
        UnknownModel: no such shape or folder.
    """
    whole, (name, plus, conversion) = name, name.partition("+")
    if plus and not Path(whole).is_dir():
        conversion_of(conversion)
    shape = name.removeprefix("random:")
    if shape != name and shape not in SHAPES:
        raise UnknownModel(f"no shape {shape!r}; known: {', '.join(SHAPES)}")
    if not Path(whole).is_dir() and not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UnknownModel(f"model {name!r}: no such folder")


def load(name: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> Model:
    """
    Args:
        name: `reference`, `random:<shape>`, a folder with a config and safetensors, or a hub id.
        revision: of a hub id; None: its main branch, whose commit is then the record's.

    Raises:
        UnknownModel: nothing there, or not reachable.
        UnsupportedModel: a family that the harness does not reach.
    """
    check_name(name)
    parent, plus, conversion = name.partition("+")
    if plus and not Path(name).is_dir():
        shipped = REFERENCE / "variants" / conversion.replace(":", "_")
        if parent == "reference" and is_variant(shipped):
            return _variant(shipped, dtype, device)
        return convert(load(parent, dtype, device, revision), conversion)
    if is_variant(Path(name)):
        return _variant(Path(name), dtype, device)
    if name.startswith("random:"):
        return _random(name, dtype, device)
    folder = REFERENCE if name == "reference" else Path(name)
    if folder.is_dir():
        return _from_folder(folder, name, dtype, device)
    return _from_hub(name, dtype, device, revision)


def _variant(folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
    network, about, digest = open_variant(folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if _has_tokenizer(folder) else None
    if tokenizer is None and about.parent == "reference":
        tokenizer = AutoTokenizer.from_pretrained(REFERENCE, local_files_only=True)
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


def _from_folder(folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> Model:
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists() or not weights:
        raise UnknownModel(f"model {name!r}: {folder} holds no config.json with *.safetensors")
    try:
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if _has_tokenizer(folder) else None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnknownModel(f"model {name!r} cannot be read from {folder}: {reason}") from None
    shown = name if name == "reference" else folder.name
    return Model(_on(network, device), tokenizer, shown, digest_of(folder))


def _from_hub(name: str, dtype: torch.dtype, device: torch.device, revision: str | None) -> Model:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        commit = getattr(config, "_commit_hash", None) or revision or "main"
        network = AutoModelForCausalLM.from_pretrained(name, revision=commit, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=commit)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        advice = "give a folder that holds it, or go online; a gated model needs its licence accepted and `hf auth login`"
        raise UnknownModel(f"model {name!r} is neither a folder here nor reachable on the hub: {reason} ({advice})") from None
    return Model(_on(network, device), tokenizer, name, str(commit))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, no files needed: lets random weights read any benchmark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


__all__ = ["UnknownModel", "UnsupportedModel", "byte_tokenizer", "check_name", "load"]
