"""Healing: trains a converted model on text until it works again. One loop, accelerate inside, for every conversion and loss.

The command is `run_all.py train`, or `torchrun --nproc-per-node N run_all.py train` for several processes: each reads batches
of its own and gradients are averaged (DDP), or weights and optimizers are sharded as well (`--shard-weights`: FSDP2).

A batch is token ids with labels (the next token of each, or -100), weights and documents. Packed documents cannot see each
other: positions restart and no mask is given, from which transformers makes a block-diagonal one (only without a cache). mixSGA
routes each document on its own; its consistency loss is summed before the backward pass, so that checkpointed layers, which
run again in it, do not count twice.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, kl_div
from tqdm import tqdm
from transformers import PreTrainedModel

from harness.engine.model import own_attention
from harness.families import routers
from harness.training.checkpoint import CannotTrain, resume, save, stops_between_steps
from harness.training.distill import attention_outputs, distance
from harness.training.recipes import Recipe
from methods.mixsga_router import Router

IGNORED = -100
MASK_FROM_US = ("opt",)  # families that do not make a block-diagonal mask from positions; none of them has sliding windows


@dataclass(frozen=True)
class Batch:
    """Token ids side by side."""

    ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], the token that follows, or -100
    positions: Tensor  # [B, T], from 0 in every document
    weights: Tensor | None = None  # [B, T] of the labels' losses; None: all equal
    real: Tensor | None = None  # [B, T]: which are no padding; None: all

    @property
    def documents(self) -> Tensor:
        """[B, T], a number for each document of the whole batch, -1 for padding, which no expert takes."""
        starts = (self.positions == 0).long().flatten()
        numbers = (starts.cumsum(0) - 1).view(self.positions.shape)
        return numbers if self.real is None else numbers.masked_fill(~self.real, -1)

    def to(self, device: torch.device) -> Batch:
        weights, real = (None if part is None else part.to(device) for part in (self.weights, self.real))
        return Batch(self.ids.to(device), self.labels.to(device), self.positions.to(device), weights, real)


Batches = Callable[[int], Batch]  # by number: the same number is the same batch, so a resumed run goes on with the right one


@dataclass
class Progress:
    """What came of a training."""

    tokens: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)  # means over ten steps


@dataclass(frozen=True)
class Course:
    """How a network is to be healed, and on what."""

    recipe: Recipe
    batches: Batches
    teacher: PreTrainedModel | None = None  # the parent, if the recipe learns from it (`recipe.taught`)
    about: str = ""  # what beside the recipe tells this training from others: model, conversion, text
    shard: bool = False  # each of several processes holds a part of the weights and of the optimizer (FSDP2)


def heal(network: PreTrainedModel, course: Course, folder: Path) -> Progress:
    """Trains the network in place. Goes on from the last checkpoint in `folder`, if it is of the same training.

    SIGINT and SIGTERM end it behind the step under way, with a checkpoint; of several processes, which may be at different steps,
    at once.

    The last checkpoint stays, so that nothing is lost before the network is saved: `forget` removes it.

    Raises:
        CannotTrain: see there.
        KeyboardInterrupt: it was stopped.
    """
    recipe = course.recipe
    torch.manual_seed(recipe.seed)
    training = _Training(network, course)
    done = resume(folder, training.identity, network, training.plain) or {"progress": {}, "recent": [], "step": 0}
    progress, recent, begin = Progress(**done["progress"]), done["recent"], done["step"]
    steps, quiet = range(begin, recipe.steps), not training.accelerator.is_main_process
    bar = tqdm(steps, initial=begin, total=recipe.steps, desc="train", file=sys.stderr, disable=quiet)
    started = time.perf_counter() - progress.seconds
    with stops_between_steps(alone=training.accelerator.num_processes == 1) as stopped:
        for step in bar:
            recent.append(training.step(step, progress))
            if len(recent) == 10 or step == recipe.steps - 1:
                means = {name: sum(part[name] for part in recent) / len(recent) for name in recent[0]}
                progress.losses.append({"step": step + 1, **{name: round(value, 5) for name, value in means.items()}})
                bar.set_postfix({name: round(value, 3) for name, value in means.items()})
                recent = []
            progress.seconds = time.perf_counter() - started
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps or stopped():
                done = {"progress": asdict(progress), "recent": recent, "step": step + 1}
                save(folder, training.identity, network, training.plain, done)
                training.accelerator.wait_for_everyone()
            if stopped():
                raise KeyboardInterrupt
    for router in routers(network):
        router.approach(1.0)
        router.softness, router.mixed = 0.0, None
    network.eval()
    return progress


class _Training:
    """A network prepared for training: on its device, wrapped for several processes, with optimizers and their rates."""

    def __init__(self, network: PreTrainedModel, course: Course) -> None:
        self.network, self.course, recipe = network, course, course.recipe
        self.accelerator = Accelerator(cpu=network.device.type == "cpu")
        if course.teacher is not None:
            course.teacher.to(self.accelerator.device)  # type: ignore[arg-type]
        network.set_attn_implementation(own_attention(network))
        choose_trained(network, recipe)
        if recipe.checkpointing:
            network.gradient_checkpointing_enable()
        network.float().train()
        if course.shard:
            if recipe.optimizer == "muon":
                raise CannotTrain("Muon needs whole matrices: with --shard-weights use --optimizer adamw")
            _shard(network.to(self.accelerator.device))  # type: ignore[arg-type]
            self.wrapped, self.optimizers = network, _optimizers(network, recipe)
        else:
            self.wrapped, *self.optimizers = self.accelerator.prepare(network, *_optimizers(network, recipe))
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.plain = [getattr(optimizer, "optimizer", optimizer) for optimizer in self.optimizers]  # without accelerate's wrapper

    @property
    def identity(self) -> str:
        """What a checkpoint must have been made by to be gone on with."""
        world = self.accelerator.num_processes
        return json.dumps([asdict(self.course.recipe), self.course.about + (f" on {world} processes" if world > 1 else "")])

    def step(self, step: int, progress: Progress) -> dict[str, float]:
        """One step of the optimizers: the mean parts of its loss over all processes.

        Raises:
            CannotTrain: the loss is no number any more.
        """
        for optimizer, full in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * self.course.recipe.rate(step)
        recipe = self.course.recipe
        for router in routers(self.network) if recipe.ramp else ():
            router.approach(step / (recipe.ramp * recipe.steps))
        for router in routers(self.network) if recipe.soft else ():
            router.softness = max(0.0, 1 - step / (recipe.soft * recipe.steps))
        parts = self._backward(step, progress)
        if not all(math.isfinite(value) for value in parts.values()):
            raise CannotTrain(f"the loss is no number any more at step {step}: lower --lr, and choose another --out")
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.course.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return parts

    def _backward(self, step: int, progress: Progress) -> dict[str, float]:
        """Gradients of all batches of a step."""
        accelerator, recipe = self.accelerator, self.course.recipe
        world, rank = accelerator.num_processes, accelerator.process_index
        parts: dict[str, float] = {}
        for number in range(recipe.accumulate):
            batch = self.course.batches((step * recipe.accumulate + number) * world + rank).to(accelerator.device)
            waits = number + 1 < recipe.accumulate and world > 1 and not self.course.shard  # gradients meet once a step
            with accelerator.no_sync(self.wrapped) if waits else nullcontext():
                total, found = loss_of(self.wrapped, batch, recipe, self.course.teacher)
                accelerator.backward(total / recipe.accumulate)
            progress.tokens += batch.ids.numel() * world
            parts = {name: parts.get(name, 0.0) + value / recipe.accumulate for name, value in found.items()}
        if world > 1:
            mean = accelerator.reduce(torch.tensor(list(parts.values()), device=accelerator.device), "mean").tolist()
            parts = dict(zip(parts, mean, strict=True))
        return parts


def _shard(network: PreTrainedModel) -> None:
    """A decoder layer at a time, then what is left: no process ever holds more than one layer whole."""
    layers = set(network._no_split_modules or ())
    for module in network.modules():
        if type(module).__name__ in layers:
            fully_shard(module)
    fully_shard(network)


def choose_trained(network: PreTrainedModel, recipe: Recipe) -> None:
    """Which weights are trained. A random router never is."""
    lot = {id(weight) for router in routers(network) if not router.learned for weight in router.parameters()}
    kinds = ("k_proj", "v_proj", "k_norm", "router", "kv_grouping.scales")
    if recipe.trains == "kv" and not any("k_proj" in name for name, _ in network.named_parameters()):
        raise CannotTrain(f"{network.config.model_type} projects queries, keys and values at once: --trains kv is not possible")
    for name, weight in network.named_parameters():
        weight.requires_grad_((recipe.trains == "all" or any(kind in name for kind in kinds)) and id(weight) not in lot)


MUON_SHARE = 0.15  # of Muon's rate: AdamW's beside it, whose steps are not orthogonal ones


def _optimizers(network: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Routers have a rate of their own: they start from nothing, the weights do not."""
    mine = [weight for router in routers(network) for weight in router.parameters() if weight.requires_grad]
    known = {id(weight) for weight in mine}
    others = {n: w for n, w in network.named_parameters() if w.requires_grad and id(w) not in known}
    matrices = [w for n, w in others.items() if w.ndim == 2 and "embed" not in n and "lm_head" not in n]
    rate, found = recipe.lr, list[torch.optim.Optimizer]()
    if recipe.optimizer == "muon" and matrices:
        found.append(torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.95))
        known |= {id(weight) for weight in matrices}
        rate = recipe.lr * MUON_SHARE
    groups: list[dict[str, Any]] = [{"params": [w for w in others.values() if id(w) not in known], "lr": rate}]
    groups += [{"params": mine, "lr": recipe.router_lr}] if mine else []
    return [*found, torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, weight_decay=recipe.weight_decay)]


def loss_of(
    network: Any, batch: Batch, recipe: Recipe, teacher: PreTrainedModel | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch, and its parts: of the labels or to the teacher, and mixSGA's consistency."""
    found = routers(network)
    for router in found:
        router.mode, router.segments = recipe.routing, batch.documents
    bare = getattr(network, "module", network)  # under DDP the model is a module of its wrapper
    with _seen(bare, recipe) as ours, torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=recipe.bf16):
        logits = predictions(network, batch)
    wanted, theirs = _of_teacher(teacher, batch, recipe)
    task = _task_loss(logits, batch, recipe, wanted)
    parts: dict[str, float] = {recipe.loss: float(task.detach())}
    if recipe.layers:
        apart = distance(ours, theirs, batch.documents >= 0)
        parts["layers"] = float(apart.detach())
        task = task + recipe.layers * apart
    if found and found[0].learned:
        consistency = torch.stack([router.loss(recipe.router_loss) for router in found]).mean()
        parts["router"] = float(consistency.detach())
        task = task + recipe.alpha * consistency
    return task, parts


@torch.no_grad()
def _of_teacher(teacher: PreTrainedModel | None, batch: Batch, recipe: Recipe) -> tuple[Tensor | None, list[Tensor]]:
    """Its logits, and what its attention layers give, as far as the recipe asks."""
    if teacher is None:
        return None, []
    with _seen(teacher, recipe) as given, torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=recipe.bf16):
        return predictions(teacher, batch), given


def _seen(network: PreTrainedModel, recipe: Recipe) -> AbstractContextManager[list[Tensor]]:
    """What attention layers give meanwhile, where the recipe asks for it; else nothing."""
    return attention_outputs(network) if recipe.layers else nullcontext([])


def predictions(network: Any, batch: Batch) -> Tensor:
    """Logits [B, T, V] in which no document sees another."""
    family = getattr(network, "module", network).config.model_type  # under DDP the model is a module of its wrapper
    mask = _block_mask(batch) if family in MASK_FROM_US else None
    return network(input_ids=batch.ids, position_ids=batch.positions, attention_mask=mask, use_cache=False).logits


def _block_mask(batch: Batch) -> Tensor:
    """[B, 1, T, T] bool: causal, within documents."""
    documents, place = batch.documents, torch.arange(batch.ids.shape[1], device=batch.ids.device)
    same = documents[:, :, None] == documents[:, None, :]
    return (same & (place[:, None] >= place[None, :]))[:, None]


def _task_loss(logits: Tensor, batch: Batch, recipe: Recipe, wanted: Tensor | None) -> Tensor:
    if recipe.loss == "distill":
        assert wanted is not None
        scored = batch.labels != IGNORED
        ours, theirs = (part[scored].float().log_softmax(-1) for part in (logits, wanted))
        return kl_div(ours, theirs, log_target=True, reduction="batchmean")
    losses = cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=IGNORED)
    if batch.weights is None:
        return losses.sum() / (batch.labels != IGNORED).sum().clamp(min=1)
    return (losses * batch.weights.flatten()).sum()


@torch.no_grad()
def routing_of(network: PreTrainedModel, batches: Iterator[Batch]) -> dict[str, Any]:
    """How far argmax agrees with expert choice on these batches, and which share of the tokens it gives each expert, by layer."""
    found: list[Router] = routers(network)
    agreed, real = [0] * len(found), [0] * len(found)
    taken = [torch.zeros(len(router.ratios)) for router in found]
    for batch in batches:
        for router in found:
            router.mode, router.segments = "expert_choice", batch.documents
        predictions(network, batch)
        for number, router in enumerate(found):
            same, of = router.agreement()
            agreed[number] += same
            real[number] += of
            assert router.scores is not None and router.assigned is not None
            real_ones = router.scores.argmax(-1)[router.assigned >= 0]
            taken[number] += torch.bincount(real_ones, minlength=len(router.ratios)).cpu()
    layers = [round(same / of, 4) for same, of in zip(agreed, real, strict=True)]
    shares = [[round(float(part), 4) for part in counts / counts.sum()] for counts in taken]
    mean = [round(sum(layer[e] for layer in shares) / len(shares), 4) for e in range(len(shares[0]))] if shares else []
    return {
        "agreement": round(sum(agreed) / max(1, sum(real)), 4),
        "agreement_by_layer": layers,
        "decode_shares": mean,
        "decode_shares_by_layer": shares,
    }
