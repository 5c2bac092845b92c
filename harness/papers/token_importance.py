"""How much each token needs heads of its own: its keys and values averaged over all heads, and what becomes of the perplexity.

The first figure of mixSGA's paper, for any model with attention handles. One token at a time is averaged, in every layer; the
change of the sequence's perplexity says how much it mattered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.data import words
from harness.engine.model import Model, own_attention
from harness.errors import BadRequest
from harness.evaluation.tokens import tokens_of
from harness.families import Grouping, handles, wrap
from harness.files import check_writable
from harness.models.load import check_name, load_model
from harness.registry import Registry
from harness.training.data import BadText

AVERAGED_NUMBERS = 2**26  # logits held at once when tokens are averaged one by one


@dataclass(frozen=True)
class TokenImportanceRequest:
    """Whose tokens to average, one by one."""

    model: str
    text: Path  # its first tokens are read as one sequence
    tokens: int = 128
    out: Path = Path("results/token_importance")  # of .csv and .png
    plugins: tuple[Path, ...] = ()
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class TokenImportance:
    """What averaging each token does."""

    model: str
    words: list[str]
    changes: list[float]  # of the perplexity, by token
    plain: float  # the perplexity as it is


def token_importance(request: TokenImportanceRequest, registry: Registry) -> TokenImportance:
    """
    Raises:
        UserError: the model or the text cannot be used.
    """
    check_name(request.model, registry)
    check_writable(request.out.parent)
    model = load_model(request.model, request, registry)
    if not 2 <= request.tokens <= model.max_tokens:
        raise BadRequest(f"--tokens {request.tokens} must lie between 2 and the model's {model.max_tokens} positions")
    ids = first_tokens(model, request.text, request.tokens)
    rows = max(1, min(16, AVERAGED_NUMBERS // (len(ids) * model.config.vocab_size)))
    with tqdm(total=len(ids), unit="token", desc=model.name, file=sys.stderr) as bar:
        plain, changes = perplexity_changes(model, torch.tensor(ids, device=model.device), rows, bar.update)
    assert model.tokenizer is not None
    return TokenImportance(model.name, [str(model.tokenizer.decode([token])) for token in ids], changes, plain)


class One(nn.Module):
    """Routes one token of each row to the second way, all others to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.assigned: Tensor | None = None

    def forward(self, hidden: Tensor) -> None:
        """The rows of a batch are set before each pass."""


@torch.inference_mode()
def perplexity_changes(model: Model, ids: Tensor, rows: int, progress: Callable[[int], Any]) -> tuple[float, list[float]]:
    """Perplexity of the sequence as it is, and how much it changes when each of its tokens is averaged.

    Args:
        ids: [T]; rows: sequences in a pass.
    """
    network = model.network
    found = handles(network)
    one = One()
    for handle in found:
        wrap(handle, Grouping((1, handle.kv_heads), one))  # type: ignore[arg-type]
    network.set_attn_implementation(own_attention(network))
    tokens = len(ids)

    def perplexities(averaged: Tensor) -> Tensor:
        """averaged: [R, T], 1 where a token is. Gives [R]."""
        one.assigned = averaged.long()
        logits = network(input_ids=ids.expand(len(averaged), -1), use_cache=False).logits[:, :-1].float()
        wanted = ids[1:].expand(len(averaged), -1)
        losses = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        return losses.mean(1).exp()

    plain = float(perplexities(torch.zeros(1, tokens, device=ids.device))[0])
    changes: list[float] = []
    for start in range(0, tokens, rows):
        chosen = torch.eye(tokens, device=ids.device)[start : start + rows]
        changes += [float(value) - plain for value in perplexities(chosen)]
        progress(len(chosen))
    return plain, changes


def first_tokens(model: Model, path: Path, tokens: int) -> list[int]:
    """
    Raises:
        BadText: no such file, or too little text in it.
    """
    text = words(path)
    if model.tokenizer is None:
        raise BadText(f"model {model.name} has no tokenizer")
    ids = tokens_of(model.tokenizer, text)[:tokens]
    if len(ids) < 2:
        raise BadText(f"--text {path}: less than two tokens")
    return ids
