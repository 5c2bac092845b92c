"""Statistics of a model's queries before their rotation, for TriAttention: the driver of `run_all.py calibrate`.

Texts are read a piece at a time; the queries of each are observed after RoPE, as scorers see them, and turned back by the model's
own rotation. What is kept are sums, so memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from benchmarks.haystack import Haystack
from harness.cache import Needs
from harness.engine.model import Model
from harness.engine.renumber import Rotation, rotation_of, unknown_rotation
from harness.errors import BadRequest
from harness.files import check_writable
from harness.models.load import load_model
from harness.registry import Registry
from methods.triattention import QueryStatistics
from results.store import slug


@dataclass(frozen=True)
class CalibrationRequest:
    """Whose queries, and over which text."""

    model: str
    haystack: Path | None = None  # folder of .txt files; None: generated prose
    tokens: int = 16_384
    length: int | None = None  # tokens of a piece; None: 2,048, or what the model has positions for
    seed: int = 0
    out: Path | None = None  # a .npz file; None: results/head_scores/<model>_queries.npz
    plugins: tuple[Path, ...] = ()
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None

    @property
    def path(self) -> Path:
        return self.out or Path("results/head_scores") / f"{slug(self.model)}_queries.npz"


def calibrate(request: CalibrationRequest, registry: Registry) -> QueryStatistics:
    """Writes the artefact.

    Raises:
        BadRequest: the request makes no sense on this model, or the file cannot be written.
    """
    if request.path.suffix != ".npz":
        raise BadRequest(f"--out {request.path} must name a .npz file")
    check_writable(request.path.parent)
    haystack = Haystack.of(request.haystack)
    model = load_model(request.model, request, registry)
    if model.tokenizer is None:
        raise BadRequest(f"model {model.name} has no tokenizer, so it cannot read a text")
    if reason := unknown_rotation(model):
        raise BadRequest(f"{model.name}: {reason}, and statistics are of queries before that")
    length = request.length or min(2048, model.max_tokens)
    if not 2 <= length <= model.max_tokens or request.tokens < length:
        raise BadRequest(
            f"--length {length} must lie between 2 and the {model.max_tokens} positions of {model.name}, and --tokens "
            f"{request.tokens} not below it"
        )
    pieces = request.tokens // length
    texts = tqdm(_pieces(model.tokenizer, haystack, request.seed, length, pieces), model.name, pieces, unit="piece")
    settings = {"haystack": haystack.sha256, "length": length, "seed": request.seed}
    found = statistics(model, [torch.tensor(ids) for ids in texts], settings)
    try:
        found.save(request.path)
    except OSError as error:
        raise BadRequest(f"cannot write {request.path}: {error.strerror}") from None
    return found


def _pieces(tokenizer: PreTrainedTokenizerBase, haystack: Haystack, seed: int, length: int, count: int) -> Iterator[list[int]]:
    for number in range(count):
        ids: list[int] = []
        for line in haystack.sentences(f"calibrate/{seed}/{number}"):
            ids += tokenizer(f"{line} ", add_special_tokens=False)["input_ids"]
            if len(ids) >= length:
                break
        yield ids[:length]


@torch.inference_mode()
def statistics(model: Model, texts: list[Tensor], settings: dict[str, object]) -> QueryStatistics:
    """Of texts of ids, each read on its own."""
    rotation = rotation_of(model, max(map(len, texts)))
    pairs, frequencies = pairs_of(rotation, model.shape.head_dim)
    first, second = torch.as_tensor(pairs.T.copy(), device=model.device)
    sums: list[list[Tensor]] = []
    for ids in texts:
        prefill = model.prefill(ids.to(model.device), Needs(window=len(ids)))[0]
        for layer, kv in enumerate(prefill.layers):
            assert kv.queries is not None
            still = rotation.on(kv.queries.device).turn(kv.queries, torch.arange(len(ids)), back=True).double()
            size = torch.hypot(still[..., first], still[..., second])
            new = [still.sum(1).cpu(), size.sum(1).cpu()]
            if layer == len(sums):
                sums.append(new)
            else:
                sums[layer] = [old + more for old, more in zip(sums[layer], new, strict=True)]
    count = sum(map(len, texts))
    mean, size_of = (tuple((layer[part] / count).float().numpy() for layer in sums) for part in (0, 1))
    return QueryStatistics(model.name, model.revision, count, mean, size_of, pairs, frequencies, settings)


def pairs_of(rotation: Rotation, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Which numbers of a vector are turned together, [F, 2], and by how many radians a position, [F]: asked of the rotation."""
    device = rotation.cos.device
    turned = (
        rotation.turn(torch.eye(dim, device=device)[None], torch.ones(1, dtype=torch.long, device=device))[0]
        .double()
        .cpu()
        .numpy()
    )
    others = turned - np.diag(np.diag(turned))  # row: where a unit vector goes besides itself
    partner = np.abs(others).argmax(1)
    sine = others[np.arange(dim), partner]
    first = np.flatnonzero(sine > 0)  # the first of a pair is turned towards the second
    return np.stack([first, partner[first]], 1), np.arctan2(sine[first], np.diag(turned)[first])
