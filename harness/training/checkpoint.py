"""Checkpoints of a training: model, optimizer and RNG state, written by the first process, resumed by the same training only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from harness.errors import UserError, first_line
from harness.files import whole

CHECKPOINT = "checkpoint.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class CannotTrain(UserError):
    """The loss is no number any more, or the checkpoint is another training's: in one line."""


def sharded(network: torch.nn.Module) -> bool:
    """Does each process hold a part of the weights (FSDP2)?"""
    return any(isinstance(weight, DTensor) for weight in network.parameters())


def whole_weights(network: PreTrainedModel) -> dict[str, Any]:
    """All weights on the host, wherever they lie; of sharded ones only in the first process. Every process has to call it."""
    return get_model_state_dict(network, options=WHOLE) if sharded(network) else network.state_dict()


@contextmanager
def stops_between_steps(alone: bool) -> Iterator[Callable[[], bool]]:
    """Holds SIGINT and SIGTERM back until the loop asks whether one has come. A second one interrupts at once.

    Args:
        alone: False leaves signals as they are: other processes of the training would wait for a checkpoint that this one writes.
    """
    come: list[int] = []

    def hold(number: int, _: Any) -> None:
        if come:
            raise KeyboardInterrupt
        come.append(number)

    if not alone or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(come)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def forget(folder: Path) -> None:
    """Removes the checkpoint of a training that is saved."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def save(folder: Path, training: str, network: PreTrainedModel, optimizers: Sequence[Any], done: dict[str, Any]) -> None:
    """Every process has to call it.

    Args:
        training: what tells it from others. done: what else the training goes on from, of plain numbers.
    """
    if sharded(network):
        states = [get_optimizer_state_dict(network, optimizer, options=WHOLE) for optimizer in optimizers]
    else:
        states = [optimizer.state_dict() for optimizer in optimizers]
    state = {
        "training": training,
        "luck": torch.get_rng_state(),
        "network": whole_weights(network),
        "optimizers": states,
        "done": done,
    }
    if not PartialState().is_main_process:
        return
    with whole(folder / CHECKPOINT) as draft:
        torch.save(state, draft)


def resume(folder: Path, training: str, network: PreTrainedModel, optimizers: Sequence[Any]) -> dict[str, Any] | None:
    """Restores model, optimizer and RNG state, and gives what else was saved; None: there is no checkpoint.

    Raises:
        CannotTrain: it is another training's, or torn.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location=network.device)
        if state["training"] != training:
            raise CannotTrain(f"{path} is a checkpoint of another training: remove it, or choose another folder with --out")
        if sharded(network):
            set_model_state_dict(network, state["network"], options=WHOLE)
            for optimizer, held in zip(optimizers, state["optimizers"], strict=True):
                set_optimizer_state_dict(network, optimizer, held, options=WHOLE)
        else:
            network.load_state_dict(state["network"])
            for optimizer, held in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(held)
        torch.set_rng_state(state["luck"].cpu())
        done: dict[str, Any] = state["done"]
        return done
    except (OSError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        raise CannotTrain(f"{path} is torn ({first_line(error, 100)}): remove it, or choose another folder with --out") from None
