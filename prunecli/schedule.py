"""Optimiser and learning rate of the fine-tuning: timm's factories, told exactly what to do at each step.

The schedule counts optimiser steps, not epochs, and keeps no state of its own: the learning rate of step ``t`` follows
from ``t`` alone, so that a resumed run needs only its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from timm.layers import RmsNorm
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from prunecli.errors import UsageError
from prunecli.recipe import FinetuneSettings


def optimizer_name(settings: FinetuneSettings, model: nn.Module) -> Literal["sgd", "adamw"]:
    """The optimiser asked for; else SGD for nets with BatchNorm or no norm at all, AdamW for those that have only
    LayerNorm or RMSNorm, as their authors trained them.
    """
    if settings.optimizer is not None:
        return settings.optimizer
    modules = list(model.modules())
    if any(isinstance(module, _BatchNorm) for module in modules):
        return "sgd"
    return "adamw" if any(isinstance(module, nn.LayerNorm | nn.RMSNorm | RmsNorm) for module in modules) else "sgd"


def build_optimizer(model: nn.Module, settings: FinetuneSettings, *, lr: float) -> Optimizer:
    """SGD or AdamW over the trainable parameters, by timm's factory.

    Weight decay follows timm's default: none on tensors with one axis (biases, norm scales) nor on what the model
    itself exempts (``no_weight_decay``). With ``decay_norms`` it is on all parameters, as in the papers' SGD.

    Raises:
        UsageError: Nesterov without momentum.
    """
    name: str = optimizer_name(settings, model)
    if name == "sgd":
        if settings.nesterov and settings.momentum == 0:
            raise UsageError("finetune.nesterov needs finetune.momentum above 0.")
        name = "sgd" if settings.nesterov else "momentum"  # timm's "sgd" is the Nesterov one
    optimizer: Optimizer = create_optimizer_v2(
        model,
        name,
        lr=lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        filter_bias_and_bn=not settings.decay_norms,
    )
    return optimizer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sets the learning rate of a step; ``floor`` holds from step ``floor_from`` on."""

    optimizer: Optimizer
    scheduler: Scheduler
    floor: float
    floor_from: int

    def set_(self, step: int) -> float:
        """Give the optimiser the learning rate of optimiser step ``step`` (from 0); returns it."""
        self.scheduler.step_update(step)
        if step >= self.floor_from:
            for group in self.optimizer.param_groups:
                group["lr"] = max(group["lr"], self.floor)
        return float(self.optimizer.param_groups[0]["lr"])


def build_schedule(
    optimizer: Optimizer, settings: FinetuneSettings, *, lr: float, steps_per_epoch: int, epochs: int
) -> Schedule:
    """Linear warm-up to ``lr`` over ``warmup_epochs``, then cosine, steps or a constant.

    The last step of a cosine runs at ``min_lr`` exactly; a stepped rate never falls below it. A milestone is a share
    of all steps, warm-up included: share 0.5 of 120 epochs drops at the start of epoch 61.
    """
    total = steps_per_epoch * epochs
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total - 1)
    shared = {"warmup_t": warmup, "warmup_lr_init": lr / max(warmup, 1), "t_in_epochs": False}
    floor = 0.0
    scheduler: Scheduler
    if settings.schedule == "cosine":
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(total - warmup - 1, 1),  # so that the last step, not the one after it, is at the end
            lr_min=min(settings.min_lr or 0.0, lr),
            warmup_prefix=True,
            **shared,
        )
    else:
        shares = sorted(settings.milestones) if settings.schedule == "step" else []
        floor = min(settings.min_lr or 0.0, lr) if settings.schedule == "step" else 0.0
        scheduler = MultiStepLRScheduler(
            optimizer,
            decay_t=[round(share * total) + 1 for share in shares],  # timm applies milestone m at step m - 1
            decay_rate=settings.gamma,
            warmup_prefix=False,
            **shared,
        )
    return Schedule(optimizer=optimizer, scheduler=scheduler, floor=floor, floor_from=warmup)
