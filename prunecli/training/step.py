"""One optimisation step: device and processes by accelerate, mixed precision, clipping, EMA, and its own randomness.

Every random number of a step (dropout, drop path, mixup) follows from (seed, epoch, step, process) alone, which is what
makes a resumed run equal to an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """What training needs of ``data.Images``."""

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
class Trainer:
    """A model with everything one step needs. ``step_`` is the only thing that changes the model."""

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
    clip_grad: float | None
    seed: int
    steps_per_epoch: int

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
        """One optimiser step on one batch; the objective's loss and the learning rate used.

        The loss is that before the step, on the device; the penalty is not in it.

        Args:
            images: ``[B, C, H, W]`` on any device, with companions where the objective has them.
            labels: ``[B]`` class numbers.
            epoch: epochs completed before this one.
            step: steps taken in this epoch; with ``epoch`` it names the step's random numbers.
        """
        total = epoch * self.steps_per_epoch + step
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
        if self.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.penalty.project_(total)
        if self.ema is not None:
            self.ema.update(self.model, step=total + 1)
        return loss.detach(), lr


def build_trainer(
    model: nn.Module,
    settings: FinetuneSettings,
    *,
    lr: float,
    epochs: int,
    steps_per_epoch: int,
    device: torch.device,
    seed: int,
    make_objective: Callable[[torch.device], Objective],
    make_penalty: Callable[[nn.Module], Penalty] = lambda _: Penalty(),
) -> Trainer:
    """Move the model to its device and put optimiser, schedule, penalty and average around it.

    The average (``settings.ema``) warms up its decay, 1 - (1 + step)^(-2/3) up to the decay asked for: a plain one
    would keep the just-pruned weights in it for 1 / (1 - decay) steps. Mixed precision is plain autocast, since
    accelerate holds its own in process-wide state that a second call with other settings cannot change.

    Raises:
        PruneError: no parameter can be trained.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PruneError("No parameter of the model can be trained (all are frozen).", hint="Use finetune.epochs=0.")
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
    optimizer = build_optimizer(model, settings, lr=lr)
    return Trainer(
        model=model,
        shell=accelerator.prepare_model(_Shell(model)),
        optimizer=optimizer,
        schedule=build_schedule(settings, lr=lr, steps_per_epoch=steps_per_epoch, epochs=epochs),
        objective=make_objective(device),
        penalty=make_penalty(model),
        ema=ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema is not None else None,
        accelerator=accelerator,
        device=device,
        bf16=wants_bf16(settings, device),
        channels_last=channels_last,
        clip_grad=settings.clip_grad,
        seed=seed,
        steps_per_epoch=steps_per_epoch,
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


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the process's random generators as they were found."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state timm's Mixup changes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
