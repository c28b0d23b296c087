"""One optimisation step: device and processes by accelerate, mixed precision, clipping, EMA, and its own randomness.

Every random number of a step (dropout, drop path, mixup) follows from (seed, epoch, step, process) alone, which is what
makes a resumed run equal to an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DataLoaderConfiguration
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from prunecli.data.loader import Companion
from prunecli.errors import PruneError
from prunecli.models.outputs import logits_of
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.objective import Objective
from prunecli.training.optimizer import build_optimizer
from prunecli.training.penalty import Penalty
from prunecli.training.schedule import Schedule, build_schedule


class TrainingImages(Protocol):
    """The part of ``data.images.Images`` that training reads."""

    @property
    def num_classes(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    def train_loader(self, *, epoch: int, skip_batches: int = 0, companion: Companion = "none") -> DataLoader[Any]: ...
    def val_loader(self) -> DataLoader[Any]: ...
    def calibration(self, count: int) -> tuple[Tensor, Tensor]: ...


class _Shell(nn.Module):
    """Takes the wrapping for several processes, so that the model itself stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a model is trained, whatever it is trained for.

    Attributes:
        settings: optimiser, schedule, clipping, precision, memory format and weight average; ``lr`` and ``epochs`` are
            not read from it, the resolved values stand here.
        lr: peak learning rate.
        steps: optimiser steps in all; the last epoch ends with them, complete or not.
        steps_per_epoch: optimiser steps in one pass over the training images.
        checkpoint_every: optimiser steps between two checkpoints within an epoch; ``None`` saves at its end only.
    """

    settings: FinetuneSettings
    lr: float
    steps: int
    steps_per_epoch: int
    checkpoint_every: int | None = None

    @property
    def epochs(self) -> int:
        """Epochs in all, the last one perhaps not complete."""
        return math.ceil(self.steps / self.steps_per_epoch)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model with everything one step needs. ``step_`` is the only thing that changes the model.

    Attributes:
        plan: settings and length of the training.
        model: the module being trained.
        shell: ``model`` behind a module that returns logits, wrapped for several processes where there are any.
        optimizer: SGD or AdamW over the trainable parameters of ``model``.
        schedule: learning rate of each optimiser step.
        objective: loss of a batch.
        penalty: what is minimised, added to the gradients or enforced beside the objective.
        ema: weight average, or ``None`` where none is kept.
        accelerator: processes and gradient scaling.
        device: device of ``model``, the process's own where there are several.
        bf16: whether the forward pass runs in bfloat16.
        channels_last: whether images and weights lie in memory as ``[B, H, W, C]``.
        seed: seed of the steps' random numbers.
    """

    plan: TrainingPlan
    model: nn.Module
    shell: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    objective: Objective
    penalty: Penalty
    ema: ModelEmaV3 | None
    accelerator: Accelerator
    device: torch.device
    bf16: bool
    channels_last: bool
    seed: int

    @property
    def exported(self) -> nn.Module:
        """The module that is evaluated and exported: the weight average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def shared(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The loader, or this process's part of each of its batches where there are several processes."""
        if self.accelerator.num_processes == 1:
            return loader
        part: DataLoader[Any] = self.accelerator.prepare_data_loader(loader)
        return part

    def step_(self, images: Tensor, labels: Tensor, *, epoch: int, step: int) -> tuple[Tensor, float]:
        """One optimiser step on one batch.

        The loss is taken before the step and leaves out the penalty.

        Args:
            images: batch ``[B, C, H, W]`` on any device, with companions where the objective has them.
            labels: class numbers ``[B]``.
            epoch: number of epochs completed before this one.
            step: number of steps taken in this epoch; with ``epoch`` it names the step's random numbers.

        Returns:
            The objective's loss, a scalar on the device, and the learning rate.
        """
        total = epoch * self.plan.steps_per_epoch + step
        lr = self.schedule(total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _seed_(self.seed, epoch, step, self.accelerator.process_index, self.device)
        layout = torch.channels_last if self.channels_last and images.ndim == 4 else torch.preserve_format
        images = images.to(self.device, non_blocking=True, memory_format=layout)
        labels = labels.to(self.device, non_blocking=True)
        self.shell.train()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.objective.loss(self.shell, images, labels)
        extra = self.penalty.loss(total)
        self.accelerator.backward(loss if extra is None else loss + extra)
        self.penalty.add_gradients_(total)
        if self.plan.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.plan.settings.clip_grad)
        self.optimizer.step()
        self.penalty.project_(total)
        if self.ema is not None:
            self.ema.update(self.model, step=total + 1)
        return loss.detach(), lr


def build_trainer(
    model: nn.Module,
    plan: TrainingPlan,
    *,
    device: torch.device,
    seed: int,
    make_objective: Callable[[torch.device], Objective],
    make_penalty: Callable[[nn.Module], Penalty] = lambda _: Penalty(),
) -> Trainer:
    """Move the model to its device and put optimiser, schedule, penalty and average around it.

    The average (``settings.ema``) warms up its decay, 1 - (1 + step)^(-2/3) up to the decay asked for: a plain one
    would keep the just-pruned weights in it for 1 / (1 - decay) steps. Mixed precision is plain autocast, since
    accelerate holds its own in process-wide state that a second call with other settings cannot change.

    Args:
        model: module to train; it is moved in place.
        plan: settings and length of the training.
        device: device to train on, unless accelerate gives each of several processes its own.
        seed: seed of the steps' random numbers.
        make_objective: function from that device to the loss.
        make_penalty: function from the model, on its device, to what is done beside minimising the loss.

    Raises:
        PruneError: no parameter can be trained.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PruneError("No parameter of the model can be trained (all are frozen).", hint="Use finetune.epochs=0.")
    settings = plan.settings
    accelerator = Accelerator(
        cpu=device.type == "cpu" and not is_initialized(),
        device_placement=False,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if accelerator.num_processes > 1:
        device = accelerator.device
    channels_last = _wants_channels_last(model, settings, device)
    model.to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, settings, lr=plan.lr)
    return Trainer(
        plan=plan,
        model=model,
        shell=accelerator.prepare_model(_Shell(model)),
        optimizer=optimizer,
        schedule=build_schedule(settings, lr=plan.lr, steps_per_epoch=plan.steps_per_epoch, epochs=plan.epochs),
        objective=make_objective(device),
        penalty=make_penalty(model),
        ema=ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema is not None else None,
        accelerator=accelerator,
        device=device,
        bf16=wants_bf16(settings, device),
        channels_last=channels_last,
        seed=seed,
    )


def wants_bf16(settings: FinetuneSettings, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16: as asked, or on a GPU that computes in it."""
    if settings.amp == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return settings.amp == "bf16"


def _wants_channels_last(model: nn.Module, settings: FinetuneSettings, device: torch.device) -> bool:
    if settings.channels_last == "auto":
        return device.type == "cuda" and any(isinstance(module, nn.Conv2d) for module in model.modules())
    return settings.channels_last == "on"


def _seed_(seed: int, epoch: int, step: int, process: int, device: torch.device) -> None:
    word = int(np.random.SeedSequence((seed, epoch, step, process)).generate_state(1)[0])
    torch.default_generator.manual_seed(word)  # torch.manual_seed also asks every absent accelerator, 1 ms each time
    if device.type == "cuda":
        torch.cuda.manual_seed_all(word)
    np.random.seed(word)  # noqa: NPY002 - timm's Mixup draws from numpy's global generator
    random.seed(word)
