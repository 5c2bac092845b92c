"""How variants are healed: the settings of a training, and the recipes of mixSGA's paper by name (sections 3.1 and 3.2).

Any conversion can be healed by either: `train --recipe mixsga-sft --conversion gqa --groups 2`. Where the paper is silent, the
value is ours and docs/methods/mixsga.md says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import UserError

if TYPE_CHECKING:
    import torch

    from methods.mixsga_router import RouterLoss

Loss = Literal["lm", "distill"]


@dataclass(frozen=True)
class Recipe:
    """How a variant is healed. All of it is written into its variant.json."""

    steps: int = 400
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    router_lr: float = 1e-2  # the router starts from nothing, the weights do not
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1  # batches a step
    bf16: bool = True
    checkpointing: bool = False  # of activations
    loss: Loss = "lm"  # of labels, or to the parent's predictions
    trains: Literal["all", "kv"] = "all"  # every weight, or keys, values and routers
    alpha: float = 0.1  # weight of mixSGA's consistency loss
    router_loss: RouterLoss = "logits"
    order: Literal["as_is", "likeness"] = "as_is"  # of the KV heads, before they are grouped
    align: bool = False  # the heads of the widest group are rotated towards each other first; the model stays the same
    agree: float = 0.0  # share of the way that heads are moved to the mean of their widest group before training
    agree_on: Literal["kv", "k"] = "kv"  # keys and values, or keys alone
    ramp: float = 0.0  # share of the steps in which experts go from all tokens at the first to their ratios
    soft: float = 0.0  # share of the steps in which tokens go from all experts' heads, by their scores, to those of one expert
    routing: Literal["expert_choice", "argmax"] = "expert_choice"  # of the training's passes; argmax is what decodes
    layers: float = 0.0  # weight of the distance of every layer's attention output to the parent's
    seed: int = 0
    save_every: int = 100  # steps

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if not (self.lr > 0 and self.router_lr > 0) or not 0 <= self.warmup < 1 or self.alpha < 0:
            raise UserError("--lr and --router-lr must be above 0, the warm-up a share below 1 and --alpha not below 0")
        if not (0 <= min(self.agree, self.ramp, self.soft) <= max(self.agree, self.ramp, self.soft) <= 1 and self.layers >= 0):
            raise UserError("--agree, --ramp and --soft are shares from 0 to 1, --layers is not below 0")

    @property
    def taught(self) -> bool:
        """Is the parent needed beside the model?"""
        return self.loss == "distill" or self.layers > 0

    def rate(self, step: int) -> float:
        """Share of the full rate: warm-up, then a cosine down to a tenth."""
        warm = max(1, int(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class NamedRecipe:
    about: str
    recipe: Recipe
    data: Literal["dolly", "minipile"]
    epochs: float
    batch: int  # rows of a step, over all processes
    rows: int  # of one pass
    length: int  # tokens of a row

    def steps(self, rows_at_hand: int) -> int:
        return max(1, int(self.epochs * rows_at_hand) // self.batch)


RECIPES: dict[str, NamedRecipe] = {
    "mixsga-sft": NamedRecipe(
        "Dolly-15k, 40 epochs at batch 32 and 5e-5, the router too (mixSGA, section 3.1)",
        Recipe(lr=5e-5, router_lr=5e-5, weight_decay=0.0, betas=(0.9, 0.999), save_every=500),
        data="dolly",
        epochs=40,
        batch=32,
        rows=8,
        length=512,
    ),
    "mixsga-pretrain": NamedRecipe(
        "MiniPile once, 256K tokens a batch at 2e-4 (mixSGA, table 7)",
        Recipe(lr=2e-4, router_lr=2e-4, warmup=0.015, weight_decay=0.1, betas=(0.9, 0.95), clip=1.0, save_every=200),
        data="minipile",
        epochs=1,
        batch=128,
        rows=4,
        length=2048,
    ),
}

STARTS: dict[str, tuple[str, dict[str, Any]]] = {  # recipes that say how to begin, and leave data and length to the request
    "mixsga-plus": (
        "ours: heads are aligned by rotations and moved to the mean of their widest group, then healed as asked "
        "(docs/methods/mixsga.md says what that gives)",
        {"align": True, "agree": 1.0},
    )
}


def multiplies_bf16(device: torch.device) -> bool:
    """Elsewhere bfloat16 is imitated: several times slower than float32 (a step of the embedded model on AVX2: 6.5 times)."""
    import torch

    if device.type != "cpu":
        return True
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for it
    return any(getattr(torch.cpu, name, bool)() for name in asked)
