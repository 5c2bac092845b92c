"""Checkpoints as transformers lays them out: networks and tokenizers, read whole or refused in one line; and their hash."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from harness.engine.reach import UnsupportedModel, refuse_config
from harness.families import text_config

SHOWN = 3  # names of weights in a refusal


NO_WRITERS = (  # how architectures end that read, and embed or classify
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
NO_WRITER = "no model that writes text token by token"


class WeightsDoNotFit(ValueError):
    """A checkpoint has other weights than its configuration asks for."""


Spread = str | dict[str, Any] | None


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model go: to one device, or by accelerate's map of modules, which may name the disk."""

    device: torch.device
    spread: Spread = None

    def settings(self, config: Any) -> dict[str, Any]:
        """For `from_pretrained`. Quantised weights are made on their device: they cannot be moved there afterwards."""
        if self.spread is not None:
            return {"device_map": self.spread}
        return {"device_map": {"": self.device}} if getattr(config, "quantization_config", None) else {}


def read_network(
    where: Path | str, dtype: torch.dtype, revision: str | None = None, place: Placement | None = None
) -> PreTrainedModel:
    """A model whose every weight came from the checkpoint: transformers draws what is missing by chance, and warns.

    Args:
        where: a folder, or a hub id.
        revision: of a hub id.
        place: where its weights go; None: to the host.

    Raises:
        WeightsDoNotFit: weights are missing, not the model's, or of another shape. Heads that are tied are not missed, and what
            transformers itself leaves out (buffers of old) is not held against a checkpoint.
        Exception: what transformers, its quantisers and safetensors raise for other faults has no class in common.
    """
    more: dict[str, Any] = {} if revision is None else {"revision": revision}
    more["local_files_only"] = isinstance(where, Path)
    config = AutoConfig.from_pretrained(where, trust_remote_code=False, **more)
    reader = reader_of(str(where), config)
    more |= place.settings(config) if place else {}
    with _without_reports():
        both: Any = reader.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",  # until a Model sets its own: a configuration may name one that is not installed here
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **more,
        )
    network, found = both
    check_weights(found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
    network = _text_part(network)
    _refuse_without_head(str(where), network)
    say_untied(network)
    return network  # type: ignore[no-any-return]


def _text_part(network: Any) -> Any:
    """The language model inside of a checkpoint that sees too, where it is one of its own (Llama 4); else the whole."""
    inner = getattr(network, "language_model", None)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        return network
    inner.generation_config = network.generation_config
    inner.text_part_of = type(network).__name__  # type: ignore[assignment]
    return inner


def reader_of(name: str, config: Any) -> Any:
    """The class of transformers that reads a checkpoint of this configuration. One that sees and reads is read whole, and runs
    on text.

    Raises:
        UnsupportedModel: what it describes writes no text, or not by a cache of keys and values.
    """
    refuse_config(name, config)
    readers = (AutoModelForCausalLM, AutoModelForImageTextToText)
    of_text = text_config(config) is config or any(kind.endswith("ForCausalLM") for kind in config.architectures or ())
    for reader in readers if of_text else reversed(readers):
        if type(config) in reader._model_mapping:
            return reader
    raise UnsupportedModel(f"model {name!r} is a {_architecture(config)}: {NO_WRITER}")


def _architecture(config: Any) -> str:
    return ", ".join(config.architectures or (type(config).__name__,))


def _refuse_without_head(name: str, network: PreTrainedModel) -> None:
    """Whatever a configuration calls its model, it is one that writes if a head came with it; an embedding lent as one is none.

    Raises:
        UnsupportedModel: a model that embeds or classifies, to which transformers would tie a head.
    """
    kinds = network.config.architectures or ()
    reads = [kind for kind in kinds if kind.endswith(NO_WRITERS) and not kind.endswith("LMHeadModel")]
    if reads and len(reads) == len(kinds) and is_tied(network):
        raise UnsupportedModel(f"model {name!r} is a {_architecture(network.config)}: {NO_WRITER}")


def check_weights(missing: Collection[str], unexpected: Collection[str], misshapen: Collection[Any] = ()) -> None:
    """
    Args:
        misshapen: names, or tuples that begin with one.

    Raises:
        WeightsDoNotFit: any of them is there.
    """
    shapes = [found if isinstance(found, str) else _shapes(*found) for found in misshapen]
    parts = (("missing", missing), ("not the model's", unexpected), ("of another shape", shapes))
    said = [f"{what}: {_named(names)}" for what, names in parts if names]
    if said:
        raise WeightsDoNotFit(f"its weights do not fit its configuration; {'; '.join(said)}")


def _shapes(name: str, *sizes: Any) -> str:
    return f"{name} {' for '.join(str(list(size)) for size in sizes)}".strip()


def _named(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def say_untied(network: PreTrainedModel) -> None:
    """Corrects a configuration that calls the head tied where the checkpoint has one of its own: transformers then leaves it
    apart, but a configuration that says otherwise would tie it when the model is saved and opened again.
    """
    if getattr(network.config, "tie_word_embeddings", False) and not is_tied(network):
        network.config.tie_word_embeddings = False


def is_tied(network: PreTrainedModel) -> bool:
    """Is the head the embedding itself?"""
    head, words = network.get_output_embeddings(), network.get_input_embeddings()
    return head is not None and words is not None and head.weight is words.weight


ADAPTER = "holds an adapter (adapter_config.json), which is not applied here: merge it into its base model and save that"
POINTER = b"version https://git-lfs"


def why_no_checkpoint(folder: Path) -> str | None:
    """What people name for a checkpoint that is none, in words; None for a configuration with its weights."""
    if (folder / "adapter_config.json").exists():
        return ADAPTER
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").exists() and weights:
        pointers = [path.name for path in weights if path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER)]
        return f"holds {pointers[0]} as a pointer of Git LFS, not the weights: run `git lfs pull` there" if pointers else None
    said = "holds no config.json with *.safetensors"
    if inner := sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir()):
        return f"{said}, but checkpoints of a training: name one of them, such as {inner[-1]}"
    if pickles := [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]:
        return f"{said}, but {pickles[0]}: a pickle can run code, so save the model as safetensors"
    return said


@contextmanager
def _without_reports() -> Iterator[None]:
    """transformers prints tables of what did not fit; here that is one line."""
    logger = logging.getLogger("transformers.modeling_utils")  # its level is left alone: transformers asks for it
    logger.addFilter(_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_no_report)


def _no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def read_tokenizer(where: Path | str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """None where a folder has none.

    Raises:
        Exception: as above; `tokenizers` raises the class itself.
    """
    if isinstance(where, Path):
        has = any((where / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
        return _quiet(AutoTokenizer.from_pretrained(where, local_files_only=True)) if has else None
    return _quiet(AutoTokenizer.from_pretrained(where, revision=revision))


def _quiet(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Without the warning about texts longer than `model_max_length`: prompts are cut to the positions of the model."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MORE_FILES = (  # these with their names, since several of them look alike
    "*.safetensors.index.json",
    "adapter_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "additional_chat_templates/*.jinja",
)


def digest_of(folder: Path, conversion: str = "") -> str:
    """Of everything in a checkpoint that answers depend on: weights, configuration, tokenizer; and of what was done to it.

    What is not there adds nothing, so that a list that grows changes no digest of before.
    """
    digest = hashlib.sha256(conversion.encode())
    for path in [*sorted(folder.glob("*.safetensors")), *(folder / name for name in FILES if (folder / name).exists())]:
        digest.update(_hash(path))
    for path in sorted({path for pattern in MORE_FILES for path in folder.glob(pattern)}):
        digest.update(str(path.relative_to(folder)).encode() + _hash(path))
    return digest.hexdigest()[:16]


def _hash(path: Path) -> bytes:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
