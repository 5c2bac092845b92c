"""What a storage must hold, tried on small random rows: for `run_all.py check`. Each check gives nothing, or what is violated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from harness.cache import ExpertGroup, LayerKV, ModelShape, Prefill, Row
from harness.engine.attention import attend, attend_reference
from harness.engine.rows import RowCache, compact
from harness.storage import Codec, Storage, cannot_hold, row_bytes

SIZES = (64, 128, 32, 16)  # of heads; the first that a storage can hold is tried
CLOSE = 1e-4
FAR = 1.0  # an error as large as the vectors: nothing of them is left
TOKENS, MORE = 40, 12


def _size(storage: Storage) -> int:
    held = [dim for dim in SIZES if cannot_hold(storage, dim) is None]
    if not held:
        raise ValueError(f"it holds heads of none of the sizes {', '.join(map(str, SIZES))}: {cannot_hold(storage, SIZES[0])}")
    return held[0]


def _vectors(codec: Codec, groups: int, dim: int) -> Tensor:
    return torch.randn(groups, codec.tokens, dim, generator=torch.Generator().manual_seed(0))


def fields_are_what_is_promised(storage: Storage) -> str | None:
    dim = _size(storage)
    for which, codec in (("keys", storage.keys), ("values", storage.values)):
        parts, fields = codec.pack(_vectors(codec, 3, dim)), codec.fields(dim)
        found = [(tuple(part.shape), str(part.dtype).removeprefix("torch.")) for part in parts]
        wanted = [((3, field.width), field.dtype) for field in fields]
        if found != wanted:
            return f"{which}: `pack` of 3 groups gives {found}, `fields` promises {wanted}"
    return None


def unpacked_is_near(storage: Storage) -> str | None:
    dim = _size(storage)
    for which, codec in (("keys", storage.keys), ("values", storage.values)):
        given = _vectors(codec, 3, dim)
        found = codec.unpack(codec.pack(given), dim)
        if found.shape != (3 * codec.tokens, dim):
            return f"{which}: `unpack` of 3 groups gives {tuple(found.shape)}, not {(3 * codec.tokens, dim)}"
        error = float((found.view_as(given) - given).norm() / given.norm())
        if not error < FAR:
            return f"{which}: what is unpacked is off by {error:.3g} of the vectors' size"
    return None


def _cache(storage: Storage, lengths: tuple[int, ...]) -> tuple[RowCache, int]:
    dim = _size(storage)
    held = max(TOKENS, storage.residual + TOKENS)
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(2, held, dim, generator=generator) for _ in range(2))
    kv = LayerKV(0, held, keys, values, dim**-0.5, 2, query_heads=4)
    prefill = Prefill(torch.zeros(held), torch.zeros(1), (kv,), ((ExpertGroup(2),),), ModelShape(1, 4, 2, dim, (None,), 4))
    rows = [Row(2 * head, 2, 0, torch.arange(held - cut)) for head, cut in enumerate(lengths)]
    return compact(prefill, [(tuple(replace(row, storage=storage) for row in rows),)], MORE + storage.residual), dim


def _decoded(storage: Storage, pieces: list[tuple[int, int]], reference: bool = False) -> Tensor:
    """Attention of new tokens, appended in pieces of which the last are taken back."""
    cache, dim = _cache(storage, (0, 5))
    total = MORE + storage.residual
    generator = torch.Generator().manual_seed(2)
    new, queries = torch.randn(2, 2, total, dim, generator=generator), torch.randn(4, total, dim, generator=generator)
    (layer,), outs, done = cache.layers, [], 0
    for count, drop in pieces:
        step, mine = cache.step([count]), slice(done, done + count)
        layer.append(new[0][:, mine], new[1][:, mine], step)
        cache.seen = cache.seen + count
        outs.append((attend_reference if reference else attend)(layer, queries[:, mine], step, dim**-0.5)[:, : count - drop])
        cache.crop([drop])
        done += count - drop
    return torch.cat(outs, 1)


def attention_reads_what_is_dequantised(storage: Storage) -> str | None:
    pieces = [(MORE + storage.residual, 0)]
    ours, wanted = _decoded(storage, pieces), _decoded(storage, pieces, reference=True)
    distance = float((ours - wanted).abs().max())
    return None if distance < CLOSE else f"`dot`, `mix` or `turn` differ from `unpack` by {distance:.3g} in attention"


def several_tokens_are_as_one_by_one(storage: Storage) -> str | None:
    total = MORE + storage.residual
    alone = _decoded(storage, [(1, 0)] * total)
    for pieces, how in (([(total, 0)], "at once"), ([(total - 2, total - 5), (total - 3, 0)], "with drafts taken back")):
        distance = float((_decoded(storage, pieces) - alone).abs().max())
        if not distance < CLOSE:
            return f"tokens {how} differ from one by one by {distance:.3g}"
    return None


def bytes_are_counted(storage: Storage) -> str | None:
    cache, dim = _cache(storage, (0, 5))
    lengths = cache.layers[0].parts[0].table.length.tolist()
    wanted = sum(row_bytes(storage, length, dim) for length in lengths)
    found = cache.counts()[0].bytes_kept
    return None if found == wanted else f"the cache holds {found} bytes, the storage promises {wanted}"


STORAGE_CHECKS: dict[str, Callable[[Storage], str | None]] = {
    "fields are what is promised": fields_are_what_is_promised,
    "what is unpacked is near": unpacked_is_near,
    "attention reads what is dequantised": attention_reads_what_is_dequantised,
    "several tokens are as one by one, and drafts leave no trace": several_tokens_are_as_one_by_one,
    "bytes are those counted": bytes_are_counted,
}
