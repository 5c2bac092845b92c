"""CLA: neighbouring layers share one key and value projection and one cache layer.

Brandon et al., "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention", 2024. arxiv.org/abs/2405.12981
mixSGA's paper compares with it (figure 3, table 2) without saying how a trained model is converted; docs/methods/cla.md says
what is chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.cache import ModelShape

if TYPE_CHECKING:
    from harness.layer_sharing import Initial


@dataclass(frozen=True)
class SharedLayers:
    """As many cache layers as come nearest to `percent` of the layers."""

    percent: int
    initial: Initial = "mean"
    index_bits = 0

    @classmethod
    def of(cls, numbers: tuple[int, ...], option: str) -> SharedLayers:
        """
        Raises:
            ValueError: not one share of 1 to 100, or an option that is not there.
        """
        if len(numbers) != 1 or not 1 <= numbers[0] <= 100:
            raise ValueError("one share of the cache, 1 to 100 percent, is expected")
        if option not in ("", "first"):
            raise ValueError(f"{option!r} is no ablation of it; first is")
        return cls(numbers[0], "first" if option else "mean")

    def groups(self, shape: ModelShape) -> list[list[int]]:
        """Layers that share, in the order of their first: runs of nearly equal length among layers of one window.

        A layer with a sliding window and one without do not hold the same entries, so they share nothing.
        """
        found = []
        for window in dict.fromkeys(shape.windows):
            mine = [layer for layer, its in enumerate(shape.windows) if its == window]
            count = min(len(mine), max(1, int(self.percent * len(mine) / 100 + 0.5)))
            runs: list[list[int]] = [[] for _ in range(count)]
            for place, layer in enumerate(mine):
                runs[place * count // len(mine)].append(layer)
            found += runs
        return sorted(found)

    def share(self, shape: ModelShape) -> float:
        return len(self.groups(shape)) / shape.layers

    def apply(self, network: Any, seed: int = 0) -> None:
        from harness.families import shape_of
        from harness.layer_sharing import share_layers

        share_layers(network, self.groups(shape_of(network)), self.initial)
