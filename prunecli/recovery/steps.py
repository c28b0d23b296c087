"""Recovery steps by name, applied to a copy (mathematics: ``orthogonal``, ``least_squares``, ``repair``)."""

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

_CHANGE_STATISTICS: Final = frozenset({"orthp", "blend"})  # steps after which BatchNorm's old statistics are wrong
_NAMED: Final = 3  # layers left alone that are named; the rest are counted


@dataclass(frozen=True, kw_only=True)
class RecoveryContext:
    """What a recovery may look at: values, and two functions of the job.

    Attributes:
        dense: the dense net with the weights that were cut.
        plan: the plan of the cut.
        images: training and validation images; ``None`` without data.
        spec: size of the model's input.
        settings: the recipe's recovery settings.
        finetune: settings of the fine-tuning to come; a probe takes a few of its steps.
        finetune_steps: length of the fine-tuning to come, in optimiser steps; 0 where nothing will be fine-tuned.
        batch_size: number of calibration images in a forward pass.
        device: the device to compute on.
        seed: seed of probes and of random weights.
        spectrum_of: function from a net to its Jacobian spectrum, ``None`` where spectra are switched off.
        tell: callback for each row of the report, once the row is known.
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
        """Calibration images ``[N, C, H, W]``, read once: images after the probes' own, as far as there are so many."""
        assert self.images is not None
        settings = self.settings
        count = max(settings.lstsq_images, settings.bn_images if has_batch_norm(self.dense) else 0)
        images, _ = self.images.calibration(HELD_OUT + count)
        return images[-min(count, len(images)) :]

    def batches(self, count: int) -> tuple[Tensor, ...]:
        """At most ``count`` calibration images, in batches ``[B, C, H, W]`` on the device."""
        return self.calibration[:count].to(self.device).split(self.batch_size)


@dataclass(frozen=True, kw_only=True)
class RecoveryResult:
    """A recovered copy of a net.

    Attributes:
        model: the copy, on the context's device.
        residual: largest orthogonality residual, see ``Orthogonalized``; ``None`` where no step has one.
        summary: the changes that the steps made, in words; may be empty.
    """

    model: nn.Module
    residual: float | None = None
    summary: str = ""


def apply_steps(context: RecoveryContext, model: nn.Module, steps: Sequence[str]) -> RecoveryResult:
    """Copy a net to the context's device and apply recovery steps to the copy in turn.

    Orthogonalised and blended weights make the old BatchNorm statistics meaningless, so where there are images these
    steps re-estimate them, unless ``bn`` follows anyway.

    Args:
        context: images, settings and callables of the job.
        model: the pruned net; it is not changed.
        steps: names among ``lstsq``, ``repair``, ``orthp``, ``blend`` and ``bn``.

    Raises:
        PruneError: a layer with NaN or infinite weights.
    """
    model = copy.deepcopy(model).to(context.device)
    residuals, summaries = [], []
    for step, then in zip_longest(steps, steps[1:]):
        residual, summary = _STEPS[step](context, model)
        residuals += [] if residual is None else [residual]
        summaries += [summary] if summary else []
        if step in _CHANGE_STATISTICS and then != "bn" and context.images is not None:
            _bn_(context, model)
    return RecoveryResult(model=model, residual=max(residuals, default=None), summary="; ".join(summaries))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a net has a BatchNorm, whose statistics can be re-estimated."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


#: Orthogonality residual, if the step has one, and what the step changed, in words.
_StepResult = tuple[float | None, str]


def _orthp_(context: RecoveryContext, model: nn.Module) -> _StepResult:
    settings = context.settings
    example = spectrum_batch(context.images, context.spec, 1, seed=context.seed).to(context.device)
    done = orthogonalize_(model, settings.orthp_method, gain=settings.gain, example=example, seed=context.seed)
    return done.residual, ""


def _blend_(context: RecoveryContext, model: nn.Module) -> _StepResult:
    blend_(model, context.settings.blend)
    return None, ""


def _lstsq_(context: RecoveryContext, model: nn.Module) -> _StepResult:
    settings = context.settings
    images = context.batches(settings.lstsq_images)
    dense = context.dense.to(context.device)
    done = reconstruct_(model, dense, context.plan, images, ridge=settings.ridge)
    number = sum(map(len, images))
    return None, f"{_count(len(done.layers), 'layer')} solved from {_count(number, 'image')}{_left(done.left)}"


def _repair_(context: RecoveryContext, model: nn.Module) -> _StepResult:
    images = context.batches(context.settings.lstsq_images)
    done = repair_(model, context.dense.to(context.device), context.plan, images)
    dead = f", {_count(done.dead, 'dead channel')} left alone" if done.dead else ""
    words = f"{_count(len(done.layers), 'layer')} repaired, {done.norms} of them in the BatchNorm behind"
    return None, f"{words}{dead}{_left(done.left)}"


def _bn_(context: RecoveryContext, model: nn.Module) -> _StepResult:
    if has_batch_norm(model):
        batches = context.batches(context.settings.bn_images)
        whole = [
            batch for batch in batches if len(batch) == len(batches[0])
        ]  # a mean over batches weighs a smaller last one too much
        recalibrate_bn_(model, whole, device=context.device)
    return None, ""


_STEPS: Final[Mapping[str, Callable[[RecoveryContext, nn.Module], _StepResult]]] = {
    "lstsq": _lstsq_,
    "repair": _repair_,
    "orthp": _orthp_,
    "blend": _blend_,
    "bn": _bn_,
}


def _left(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    named = [f"{name}: {reason}" for name, reason in list(reasons.items())[:_NAMED]]
    more = [f"{len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else []
    return f", {_count(len(reasons), 'layer')} left alone ({'; '.join(named + more)})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
