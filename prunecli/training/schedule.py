"""Optimiser and learning rate of the fine-tuning: timm's factories, told exactly what to do at each step.

The schedule counts optimiser steps, not epochs, and keeps no state of its own: the learning rate of step ``t`` follows
from ``t`` alone, so that a resumed run needs only its position.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from timm.layers import RmsNorm
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from prunecli.errors import UsageError
from prunecli.recipe.schedules import ConstantSchedule, CosineSchedule, RetrainingSchedule, StepSchedule
from prunecli.recipe.settings import FinetuneSettings

_CLIMB: Final = 0.1  # share of the steps in which slr, clr and allr rise to their peak
_CLIMB_FROM: Final = 0.01  # what slr and clr start from, as a share of the peak (1e-3 of the authors' 0.1)


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
    """Sets the learning rate of a step; ``floor`` holds from step ``floor_from`` on.

    Before step ``climb`` the rate rises along half a cosine from ``climb_from`` times the peak; timm's scheduler, which
    knows no such warm-up, begins at step ``start`` (a negative one: it is already that many steps old at step 0).
    """

    optimizer: Optimizer
    scheduler: Scheduler
    floor: float = 0.0
    floor_from: int = 0
    climb: int = 0
    climb_from: float = 0.0
    start: int = 0

    def set_(self, step: int) -> float:
        """Give the optimiser the learning rate of optimiser step ``step`` (from 0); returns it."""
        self.scheduler.step_update(max(step - self.start, 0))
        for group in self.optimizer.param_groups:
            if step < self.climb:
                risen = (1 - math.cos(math.pi * step / self.climb)) / 2
                group["lr"] *= self.climb_from + (1 - self.climb_from) * risen
            elif step >= self.floor_from:
                group["lr"] = max(group["lr"], self.floor)
        return float(self.optimizer.param_groups[0]["lr"])


def build_schedule(
    optimizer: Optimizer, settings: FinetuneSettings, *, lr: float, steps_per_epoch: int, epochs: int
) -> Schedule:
    """The schedule that the settings name, with the peak ``lr`` and ``steps_per_epoch * epochs`` = T steps.

    * ``cosine``, ``step``, ``constant``: linear warm-up to ``lr`` over ``warmup_epochs``, then as named. The last step
      of a cosine runs at ``min_lr`` exactly; a stepped rate never falls below it. A milestone is a share of all steps,
      warm-up included: share 0.5 of 120 epochs drops at the start of epoch 61.
    * ``rewind``: the last T steps of the base's own schedule, ``settings.original`` (Renda et al. 2020, arXiv
      2003.02389, learning-rate rewinding); ``lr`` is not read.
    * ``slr``: over the first W = T / 10 steps half a cosine from ``lr`` / 100 up to ``lr``, then a tenth of it after
      half, and a hundredth after three quarters, of the other steps (Le and Hua 2021, arXiv 2105.03193).
    * ``clr``: the same rise, then half a cosine down to ``lr`` / 10,000 at the last step: one cycle (same source).
    * ``allr``: half a cosine from 0 to ``lr``, then ``lr`` (T - t) / (T - W) at step t, linear towards 0 (Zimmer et
      al. 2023, arXiv 2111.00843); ``retraining.adaptive_peak`` gives its ``lr``.

    Raises:
        UsageError: ``rewind`` over more epochs than the original schedule has.
    """
    total = steps_per_epoch * epochs
    match settings.schedule:
        case RetrainingSchedule(kind="rewind"):
            return _rewind(optimizer, settings, steps_per_epoch=steps_per_epoch, epochs=epochs)
        case RetrainingSchedule(kind=("slr" | "clr" | "allr") as name):
            return _climb_and_fall(optimizer, name, lr=lr, total=total)
        case named:
            assert not isinstance(named, RetrainingSchedule)
            return _plain(optimizer, named, lr=lr, steps_per_epoch=steps_per_epoch, total=total)


def _plain(
    optimizer: Optimizer,
    schedule: CosineSchedule | StepSchedule | ConstantSchedule,
    *,
    lr: float,
    steps_per_epoch: int,
    total: int,
) -> Schedule:
    warmup = min(round(schedule.warmup_epochs * steps_per_epoch), total - 1)
    shared = {"warmup_t": warmup, "warmup_lr_init": lr / max(warmup, 1), "t_in_epochs": False}
    lowest = 0.0 if isinstance(schedule, ConstantSchedule) else min(schedule.min_lr or 0.0, lr)
    if isinstance(schedule, CosineSchedule):
        cosine = CosineLRScheduler(
            optimizer,
            t_initial=max(total - warmup - 1, 1),  # so that the last step, not the one after it, is at the end
            lr_min=lowest,
            warmup_prefix=True,
            **shared,
        )
        return Schedule(optimizer=optimizer, scheduler=cosine)
    drops = schedule if isinstance(schedule, StepSchedule) else StepSchedule(milestones=())
    stepped = _steps(optimizer, drops.milestones, drops.gamma, total=total, **shared)
    return Schedule(optimizer=optimizer, scheduler=stepped, floor=lowest, floor_from=warmup)


def _steps(
    optimizer: Optimizer, milestones: Iterable[float], gamma: float, *, total: int, **shared: Any
) -> MultiStepLRScheduler:
    """Timm's steps, its milestones as shares of ``total``: it applies milestone m at step m - 1."""
    at = [round(share * total) + 1 for share in sorted(milestones)]
    return MultiStepLRScheduler(optimizer, decay_t=at, decay_rate=gamma, **shared)


def _rewind(optimizer: Optimizer, settings: FinetuneSettings, *, steps_per_epoch: int, epochs: int) -> Schedule:
    original = settings.original
    assert original is not None  # the settings see to it
    if epochs > original.epochs:
        raise UsageError(
            f"finetune.schedule rewind cannot replay {epochs} epochs of a schedule that had {original.epochs}."
        )
    for group in optimizer.param_groups:
        group["lr"] = original.lr
    plain = (
        CosineSchedule(min_lr=original.min_lr)
        if original.schedule == "cosine"
        else StepSchedule(milestones=original.milestones, gamma=original.gamma, min_lr=original.min_lr)
    )
    total = original.epochs * steps_per_epoch
    whole = _plain(optimizer, plain, lr=original.lr, steps_per_epoch=steps_per_epoch, total=total)
    return replace(whole, start=(epochs - original.epochs) * steps_per_epoch)


def _climb_and_fall(optimizer: Optimizer, name: Literal["slr", "clr", "allr"], *, lr: float, total: int) -> Schedule:
    climb = round(_CLIMB * total)
    rest = total - climb
    scheduler: Scheduler
    if name == "slr":
        scheduler = _steps(optimizer, (0.5, 0.75), 0.1, total=rest, t_in_epochs=False)
    elif name == "clr":
        scheduler = CosineLRScheduler(
            optimizer, t_initial=max(rest - 1, 1), lr_min=lr * _CLIMB_FROM**2, t_in_epochs=False
        )
    else:
        scheduler = PolyLRScheduler(optimizer, t_initial=max(rest, 2), power=1.0, t_in_epochs=False)
    start = 0.0 if name == "allr" else _CLIMB_FROM
    return Schedule(optimizer=optimizer, scheduler=scheduler, climb=climb, climb_from=start, start=climb)
