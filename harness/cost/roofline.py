"""The roofline of a cell: bytes over the bandwidth of a copy, products over the rate of a large one, measured in its process.

A copy reads and writes. What only reads may be a little faster on some devices, and weights that fit a processor's cache are
not read from memory at all: a small model's time can be below its roofline.
"""

from __future__ import annotations

import torch

from harness.engine.measure import seconds_of
from harness.engine.model import Model
from harness.logits import Chunk

# bytes of the buffer that is copied to know the bandwidth; rows and columns of the matrices that are multiplied to know the rate.
# On a GPU so much that a launch and a wait are nothing beside it.
COPIED = {"cpu": 2**28, "cuda": 2**30}
MULTIPLIED = {"cpu": 2048, "cuda": 8192}


def weight_bytes(model: Model) -> int:
    """Of the weights that a decode step reads: all but the rows of the embedding that no token asks for."""
    network = model.network
    embedding = network.get_input_embeddings().weight
    tied = embedding is getattr(network.get_output_embeddings(), "weight", None)
    every = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    return every if tied else every - embedding.numel() * embedding.element_size()


def rooflines(sizes: dict[str, int], rate: dict[str, float], model: Model, context: int, batch: int) -> dict[str, float]:
    """Seconds, as rows name them (`token_floor`, `prefill_floor`): a token's bytes over the bandwidth, a prompt's products."""
    token = (sizes["weights"] + sizes["bytes_kept"]) / rate["bandwidth"]
    head = model.network.get_output_embeddings().weight.numel()  # only the last token's logits are made
    parameters = sizes["weights"] / model.network.dtype.itemsize - head
    shape = model.shape
    whole = model.parent_shape  # every layer attends, stored or not
    pairs = sum(pairs_of(context, window) * whole.dim_of(layer) for layer, window in enumerate(whole.windows))
    products = 2 * (parameters * context + head) + 4 * pairs * shape.query_heads
    return {"token_floor": token, "prefill_floor": batch * products / rate["flops"]}


def pairs_of(tokens: int, window: int | None) -> int:
    """Query and key pairs of causal attention."""
    if isinstance(window, Chunk):
        whole, rest = divmod(tokens, window)
        return whole * (window * (window + 1) // 2) + rest * (rest + 1) // 2
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def copy_bandwidth(device: torch.device, laps: int = 5) -> float:
    """Bytes read and written a second, the best of a few copies of a large buffer."""
    copied = COPIED[device.type]
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copied / min(seconds_of(lambda: target.copy_(source), device) for _ in range(laps + 1))


def matmul_rate(device: torch.device, dtype: torch.dtype, laps: int = 3) -> float:
    """Floating-point operations a second of a large product, the best of a few."""
    size = MULTIPLIED[device.type]
    left = torch.rand(size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(left, left, out=out), device) for _ in range(laps + 1))
