"""Checkpoints as transformers lays them out: networks and tokenizers, read whole or refused in one line; and their hash."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 3  # names of weights in a refusal


class WeightsDoNotFit(ValueError):
    """A checkpoint has other weights than its configuration asks for."""


def read_network(where: Path | str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """A model whose every weight came from the checkpoint: transformers draws what is missing by chance, and warns.

    Args:
        where: a folder, or a hub id.
        revision: of a hub id.

    Raises:
        WeightsDoNotFit: weights are missing, not the model's, or of another shape. Heads that are tied are not missed, and what
            transformers itself leaves out (buffers of old) is not held against a checkpoint.
        Exception: what transformers, its quantisers and safetensors raise for other faults has no class in common.
    """
    more: dict[str, Any] = {} if revision is None else {"revision": revision}
    with _without_reports():
        both: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",  # until a Model sets its own: a configuration may name one that is not installed here
            local_files_only=isinstance(where, Path),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **more,
        )
    network, found = both
    check_weights(found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
    say_untied(network)
    return network  # type: ignore[no-any-return]


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
    if network.config.tie_word_embeddings and not is_tied(network):
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
