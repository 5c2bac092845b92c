"""Weights laid out once as the processor's matrix products read them: for sweeps, whose passes are mostly of few tokens.

A product of a few rows with a large matrix is spent on laying out the matrix again at every call. oneDNN takes a matrix that is
laid out already, which is what torch's own compiler does with the weights of a frozen model. Measured on one AVX2 core
(`run_all.py bench linear`): 3 rows run twice as fast, 22 rows 1.4 times, 512 rows 1.1 times; before a large vocabulary more. The
layout is a second copy of the weights, so it is made for models up to a size, from their first sweep on, and never in what is
measured as a model's cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

FEWEST = 2  # tokens of a pass: one reads every weight once either way
LARGEST = 2**30  # bytes of weights
EXACT, STEP = 64, 8  # rows of a product; above, they are filled up to steps: oneDNN builds and keeps code for each number
HINT = 16  # rows that a layout is made for; others read it as fast (see the benchmark)


@dataclass
class Packed:
    """One layer's weight in oneDNN's layout, and of which state of the weight."""

    layer: nn.Linear
    weight: Tensor | None = None
    made_of: tuple[int, int] = (0, 0)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out], as the layer gives it. A weight that was changed is laid out anew, but for changes by `.data`,
        which torch does not count: models are converted before they are swept.
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
    """The linear layers of a network that can run from such a layout."""

    layers: list[Packed] = field(default_factory=list)

    @classmethod
    def of(cls, network: nn.Module) -> Prepacked:
        """Without layers where it cannot or should not be: no CPU, another type than float32, too large, layers that are not
        plain or whose calls are someone else's (accelerate's, of a model that is spread).
        """
        linears = {id(module): module for module in network.modules() if type(module) is nn.Linear}
        found = list(linears.values())
        able = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        alike = all(
            layer.weight.device.type == "cpu"
            and layer.weight.dtype is torch.float32
            and "forward" not in vars(layer)
            and not layer.weight.is_inference()  # of these nobody knows whether they were changed
            for layer in found
        )
        if not (able and alike and sum(layer.weight.nbytes for layer in found) <= LARGEST):
            return cls()
        return cls([Packed(layer) for layer in found])

    @contextmanager
    def serving(self, tokens: int) -> Iterator[None]:
        """Meanwhile the layers compute from their layouts, if a pass of so many tokens gains by it. Without gradients only."""
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
