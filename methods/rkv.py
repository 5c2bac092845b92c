"""R-KV: keep keys that matter to the newest queries and do not repeat what other keys say, again while the answer grows.

Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", 2025. arxiv.org/abs/2505.24133
Settings are those of the authors' code: every 128 tokens, the newest 8 kept, importance weighed by 0.07 (their README and later
comparisons say 0.1). Importance: of a group's query heads the largest logit counts, its softmax over the older keys is averaged
over the last 8 queries and max-pooled over 7. Redundancy: a key's mean cosine similarity to the others, where of all that are
alike (over 0.5) the latest does not count, softmaxed over the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.cache import LayerKV, Needs
from harness.logits import hidden, softcapped
from methods.base import Protected

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**22  # similarities held at once: bounds the memory where a whole prompt is compared with itself
COMPARED = 512  # keys that are looked through at once, at most: what is compared stays in a CPU's cache


@dataclass(frozen=True)
class ImportantAndUnlike:
    importance: float = 0.07  # its weight; redundancy's is what is left of 1
    window: int = 8  # last queries looked at; their own entries are never evicted
    kernel: int = 7  # odd: neighbours pooled
    alike: float = 0.5  # cosine similarity from which on two keys say the same

    def __post_init__(self) -> None:
        if not 0 <= self.importance <= 1:
            raise ValueError(f"importance {self.importance} must lie between 0 and 1")
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window {self.window} must be at least 1 and kernel {self.kernel} odd")

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    @property
    def protected(self) -> Protected:
        return Protected(last=self.window)

    def score(self, layer: LayerKV) -> Tensor:
        import torch

        older = max(0, layer.keys.shape[1] - self.window)
        keys = layer.stored_keys[:, :older].float()
        if older == 0:
            return torch.zeros(layer.stored_keys.shape[:2], device=layer.keys.device)
        scores = self.importance * self._importance(layer, keys) - (1 - self.importance) * self._redundancy(keys)
        return torch.nn.functional.pad(scores, (0, layer.keys.shape[1] - older))  # the newest are protected

    def _importance(self, layer: LayerKV, keys: Tensor) -> Tensor:
        """keys: [S, m, D] -> [S, m]"""
        from torch.nn.functional import max_pool1d

        if layer.queries is None:
            raise ValueError("the last queries were not observed: the method must declare Needs(window=...)")
        import torch

        queries = layer.queries[:, -self.window :].float().unflatten(0, (len(keys), -1))  # [S, readers, W, D]
        logits = softcapped(queries * layer.scaling @ keys.transpose(1, 2)[:, None], layer.softcap)  # [S, readers, W, m]
        asking = torch.arange(layer.tokens - queries.shape[2], layer.tokens, device=keys.device)[:, None]
        unseen = hidden(layer.positions[: keys.shape[1]], asking, layer.window)
        weights = logits.amax(1).masked_fill(unseen, float("-inf")).softmax(-1).nan_to_num(0.0)  # [S, W, m]
        return max_pool1d(weights.mean(1)[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

    def _redundancy(self, keys: Tensor) -> Tensor:
        """keys: [S, m, D] -> [S, m]

        The similarities of a key to all keys sum to its product with the sum of them, so no m x m numbers are added up.
        """
        import torch

        unit = torch.nn.functional.normalize(keys, dim=-1)
        sums = (unit * unit.sum(1, keepdim=True)).sum(-1) - unit.square().sum(-1)  # not with oneself
        for row, head in zip(sums, unit, strict=True):
            latest, similarity = latest_alike(head, self.alike)
            row.index_add_(0, latest, -similarity)
        return (sums / unit.shape[1]).softmax(-1)


def latest_alike(unit: Tensor, alike: float) -> tuple[Tensor, Tensor]:
    """Of each key the latest other one whose similarity to it is over `alike`: its place, and the similarity. [m, D] -> [m], [m]

    Where there is none, the similarity is 0. Looked for from the end on. On a CPU a key that has found its own is compared no
    further; a GPU would have to wait for the numbers to know.
    """
    import torch

    count, width = len(unit), max(1, min(COMPARED, BLOCK // len(unit)))
    asking = places = torch.arange(count, device=unit.device)
    latest, similarity = torch.full_like(places, -1), unit.new_zeros(count)
    for first in reversed(range(0, count, width)):
        there = places[first : first + width]
        found = unit[asking] @ unit[first : first + width].T  # [a, b]
        own = (asking - first).clamp(0, len(there) - 1)[:, None]
        itself = there[own] == asking[:, None]
        found.scatter_(1, own, found.gather(1, own).masked_fill_(itself, float("-inf")))
        if unit.device.type == "cpu":
            over = found.amax(1) > alike
            found, mine, asking = found[over], asking[over], asking[~over]
        else:
            mine = places
        last = torch.where(found > alike, there, -1).amax(1)  # [a]
        fresh = (latest[mine] < 0) & (last >= 0)
        value = found.gather(1, (last - first).clamp_min(0)[:, None])[:, 0]
        latest[mine] = torch.where(fresh, last, latest[mine])
        similarity[mine] = torch.where(fresh, value, similarity[mine])
    return latest.clamp_min_(0), similarity
