"""Linear layers whose weights are prepacked into oneDNN's blocked layout, for sweeps on a CPU: most of their passes are short.

In a matrix product with few rows much of the time goes into packing the weight, again in every call. oneDNN accepts a weight that
is packed already; torch.compile does the same with frozen weights. `run_all.py bench linear` measures what it gives
(docs/measuring-the-harness.md). The packed weight is a second copy, so it is made only for models up to a size and only once a
sweep runs, never in the processes in which `cost` suites measure latency and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

FEWEST = 2  # tokens of a pass: a single one is bound by reading the weights either way
LARGEST = 2**30  # bytes of weights
EXACT, STEP = 64, 8  # above so many rows they are padded to multiples: oneDNN compiles a kernel for every number of rows
HINT = 16  # number of rows that oneDNN is told to choose the layout for; other numbers run as fast from it


@dataclass
class Packed:
    """A linear layer and its packed weight. `made_of`: address and version of the weight that was packed."""

    layer: nn.Linear
    weight: Tensor | None = None
    made_of: tuple[int, int] = (0, 0)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out], as the layer computes it. A weight that was changed is packed again; changes through `.data`
        are not noticed, since torch does not count them: convert a model before a sweep.
        """
        now = (self.layer.weight.data_ptr(), self.layer.weight._version)
        if self.weight is None or self.made_of != now:
            self.weight, self.made_of = torch.ops.mkldnn._reorder_linear_weight(self.layer.weight.detach(), HINT), now
        rows = hidden.reshape(-1, hidden.shape[-1])
        count = len(rows)
        if count > EXACT and count % STEP:
            rows = pad(rows, (0, 0, 0, -count % STEP))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.layer.bias, "none", [], "")
        return out[:count].view(*hidden.shape[:-1], self.layer.out_features)


@dataclass
class Prepacked:
    """The linear layers of a network that can run from packed weights."""

    layers: list[Packed] = field(default_factory=list)

    @classmethod
    def of(cls, network: nn.Module) -> Prepacked:
        """Empty where packing is impossible or not wanted: not on a CPU, not float32, weights above LARGEST, or layers whose
        forward was replaced already (by accelerate, for a model that is spread over devices).
        """
        linears = {id(module): module for module in network.modules() if type(module) is nn.Linear}
        found = list(linears.values())
        able = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        alike = all(
            layer.weight.device.type == "cpu"
            and layer.weight.dtype is torch.float32
            and "forward" not in vars(layer)
            and not layer.weight.is_inference()  # inference tensors have no version, so a change would not be noticed
            for layer in found
        )
        if not (able and alike and sum(layer.weight.nbytes for layer in found) <= LARGEST):
            return cls()
        return cls([Packed(layer) for layer in found])

    @contextmanager
    def serving(self, tokens: int) -> Iterator[None]:
        """Meanwhile the layers compute from packed weights, if the pass has FEWEST tokens or more and needs no gradients."""
        if tokens < FEWEST or torch.is_grad_enabled():
            yield
            return
        for packed in self.layers:
            vars(packed.layer)["forward"] = packed.forward
        try:
            yield
        finally:
            for packed in self.layers:
                vars(packed.layer).pop("forward", None)
