"""One recovery step of a job: by name, on a copy (mathematics: ``recover``, ``reconstruction``, ``repair``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecli.data.images import Images
from prunecli.measure.batch_norm import recalibrate_bn_
from prunecli.measure.jacobian import JacobianSpectrum
from prunecli.measure.stage_spectrum import spectrum_batch
from prunecli.models.build import InputSpec
from prunecli.recipe.settings import FinetuneSettings, RecoverSettings
from prunecli.recovery.least_squares import reconstruct_
from prunecli.recovery.orthogonal import blend_, orthogonalize_
from prunecli.recovery.repair import repair_
from prunecli.training.probe import HELD_OUT
from prunecli.values.plan import Plan
from prunecli.values.report import RecoveryStep

_CHANGE_STATISTICS: Final = frozenset({"orthp", "blend"})  # BatchNorm's old ones mean nothing after them
_NAMED: Final = 3  # layers left alone that are named; the rest are counted


@dataclass(frozen=True, kw_only=True)
class RecoveryContext:
    """What a recovery may look at: values, and two functions of the job.

    Attributes:
        dense: the weights that were cut.
        plan: the cut.
        images: training and validation images; ``None`` without data.
        spec: size of the model's input.
        settings: of the recovery.
        finetune: settings of the fine-tuning to come; a probe takes a few steps of it.
        finetune_steps: length of that, in optimiser steps; 0 where nothing will be fine-tuned.
        batch_size: calibration images a forward pass.
        device: where to compute.
        seed: of probes and of random weights.
        spectrum_of: the Jacobian spectrum of a net, ``None`` where it is switched off.
        tell: called with each row of the report once it is known.
    """

    dense: nn.Module
    plan: Plan
    images: Images | None
    spec: InputSpec
    settings: RecoverSettings
    finetune: FinetuneSettings
    finetune_steps: int
    batch_size: int
    device: torch.device
    seed: int
    spectrum_of: Callable[[nn.Module], JacobianSpectrum | None]
    tell: Callable[[RecoveryStep], None]

    @cached_property
    def calibration(self) -> Tensor:
        """Calibration images [N, C, H, W], read once: behind those of the probes as far as there are so many."""
        assert self.images is not None
        settings = self.settings
        count = max(settings.lstsq_images, settings.bn_images if has_batch_norm(self.dense) else 0)
        images, _ = self.images.calibration(HELD_OUT + count)
        return images[-min(count, len(images)) :]

    def batches(self, count: int) -> tuple[Tensor, ...]:
        """At most ``count`` calibration images, in batches on the device."""
        return self.calibration[:count].to(self.device).split(self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A recovered copy, the orthogonality residual where there is one, and what was done in words."""

    model: nn.Module
    residual: float | None = None
    said: str = ""


def apply_steps(context: RecoveryContext, model: nn.Module, steps: Sequence[str]) -> Applied:
    """A copy of ``model``, on the context's device, with these steps applied in turn.

    Orthogonalised and blended weights make the old BatchNorm statistics meaningless, so where there are images these
    steps re-estimate them, unless ``bn`` follows anyway.
    """
    model = copy.deepcopy(model).to(context.device)
    residuals, said = [], []
    for step, then in zip_longest(steps, steps[1:]):
        residual, words = _STEPS[step](context, model)
        residuals += [] if residual is None else [residual]
        said += [words] if words else []
        if step in _CHANGE_STATISTICS and then != "bn" and context.images is not None:
            _bn_(context, model)
    return Applied(model=model, residual=max(residuals, default=None), said="; ".join(said))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there are statistics to re-estimate."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


_Did = tuple[float | None, str]


def _orthp_(context: RecoveryContext, model: nn.Module) -> _Did:
    settings = context.settings
    example = spectrum_batch(context.images, context.spec, 1, seed=context.seed).to(context.device)
    done = orthogonalize_(model, settings.orthp_method, gain=settings.gain, example=example, seed=context.seed)
    return done.residual, ""


def _blend_(context: RecoveryContext, model: nn.Module) -> _Did:
    blend_(model, context.settings.blend)
    return None, ""


def _lstsq_(context: RecoveryContext, model: nn.Module) -> _Did:
    settings = context.settings
    images = context.batches(settings.lstsq_images)
    dense = context.dense.to(context.device)
    done = reconstruct_(model, dense, context.plan, images, ridge=settings.ridge)
    return None, f"{_count(len(done.layers), 'layer')} solved from {_count(_images(images), 'image')}{_left(done.left)}"


def _repair_(context: RecoveryContext, model: nn.Module) -> _Did:
    images = context.batches(context.settings.lstsq_images)
    done = repair_(model, context.dense.to(context.device), context.plan, images)
    dead = f", {_count(done.dead, 'dead channel')} left alone" if done.dead else ""
    words = f"{_count(len(done.layers), 'layer')} repaired, {done.norms} of them in the BatchNorm behind"
    return None, f"{words}{dead}{_left(done.left)}"


def _bn_(context: RecoveryContext, model: nn.Module) -> _Did:
    if has_batch_norm(model):
        batches = context.batches(context.settings.bn_images)
        whole = [batch for batch in batches if len(batch) == len(batches[0])]  # each counts alike in the mean
        recalibrate_bn_(model, whole, device=context.device)
    return None, ""


_STEPS: Final[Mapping[str, Callable[[RecoveryContext, nn.Module], _Did]]] = {
    "lstsq": _lstsq_,
    "repair": _repair_,
    "orthp": _orthp_,
    "blend": _blend_,
    "bn": _bn_,
}


def _images(batches: Sequence[Tensor]) -> int:
    return sum(len(batch) for batch in batches)


def _left(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    named = [f"{name}: {reason}" for name, reason in list(reasons.items())[:_NAMED]]
    more = [f"{len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else []
    return f", {_count(len(reasons), 'layer')} left alone ({'; '.join(named + more)})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
