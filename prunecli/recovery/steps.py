"""Recovery steps by name, applied to a copy.

Mathematics: ``orthogonal``, ``least_squares``, ``repair`` and ``blocks``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecli.data.images import Images
from prunecli.measure.batch_norm import recalibrate_bn_
from prunecli.measure.calibration import Calibration
from prunecli.measure.jacobian import JacobianSpectrum
from prunecli.measure.stage_spectrum import spectrum_batch
from prunecli.models.build import InputSpec
from prunecli.recipe.settings import FinetuneSettings, RecoverSettings
from prunecli.recovery.blocks import BlockResult, reconstruct_blocks_
from prunecli.recovery.least_squares import reconstruct_
from prunecli.recovery.onepass import reconstruct_in_one_pass_
from prunecli.recovery.orthogonal import blend_, orthogonalize_
from prunecli.recovery.repair import repair_
from prunecli.values.plan import Plan
from prunecli.values.report import RecoveryStep

_CHANGE_STATISTICS: Final = frozenset({"orthp", "blend"})  # steps after which BatchNorm's old statistics are wrong
_NAMED: Final = 3  # layers in a sentence that are named; the rest are counted
UNSURE: Final = 0.5  # rho above which a layer's moments owe more to the shrinkage than to the images


@dataclass(frozen=True, kw_only=True)
class RecoveryContext:
    """What a recovery may look at: values, and two functions of the job.

    Attributes:
        dense: the dense net with the weights that were cut.
        plan: the plan of the cut.
        images: training and validation images; ``None`` without data.
        calibration: unlabelled images and what the dense net makes of them; ``None`` without any.
        spec: size of the model's input.
        settings: the recipe's recovery settings.
        finetune: settings of the fine-tuning to come; a probe takes a few of its steps.
        finetune_steps: length of the fine-tuning to come, in optimiser steps; 0 where nothing will be fine-tuned.
        batch_size: number of images in a batch of BatchNorm re-estimation.
        mirrored: whether a mirror image is as good as an image, as the training's augmentation has it.
        device: the device to compute on.
        seed: seed of probes and of random weights.
        spectrum_of: function from a net to its Jacobian spectrum, ``None`` where spectra are switched off.
        tell: callback for each row of the report, once the row is known.
        notify: callback for each event within a step.
    """

    dense: nn.Module
    plan: Plan
    images: Images | None
    calibration: Calibration | None
    spec: InputSpec
    settings: RecoverSettings
    finetune: FinetuneSettings
    finetune_steps: int
    batch_size: int
    mirrored: bool
    device: torch.device
    seed: int
    spectrum_of: Callable[[nn.Module], JacobianSpectrum | None]
    tell: Callable[[RecoveryStep], None]
    notify: Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class RecoveryResult:
    """A recovered copy of a net.

    Attributes:
        model: the copy, on the context's device.
        residual: largest orthogonality residual, see ``Orthogonalized``; ``None`` where no step has one.
        summary: the changes that the steps made, in words; may be empty.
        shrinkage: rho by layer, where second moments were shrunk, see `prunecli.measure.moments`.
    """

    model: nn.Module
    residual: float | None = None
    summary: str = ""
    shrinkage: Mapping[str, float] = field(default_factory=dict)


def apply_steps(
    context: RecoveryContext, model: nn.Module, steps: Sequence[str], *, after: str | None = None
) -> RecoveryResult:
    """Copy a net to the context's device and apply recovery steps to the copy in turn.

    Orthogonalised and blended weights make the old BatchNorm statistics meaningless, so where there are images these
    steps re-estimate them, unless ``bn`` follows anyway.

    Args:
        context: images, settings and callables of the job.
        model: the pruned net; it is not changed.
        steps: names among ``lstsq``, ``onepass``, ``repair``, ``orthp``, ``blend``, ``bn`` and ``blocks``.
        after: step that was applied to the net before; ``onepass`` meets ``lstsq`` half way.

    Raises:
        PruneError: a layer with NaN or infinite weights.
    """
    model = copy.deepcopy(model).to(context.device)
    done = []
    for before, step, then in zip((after, *steps), steps, (*steps[1:], None), strict=False):
        done.append(_STEPS["mixed" if (before, step) == ("lstsq", "onepass") else step](context, model))
        if step in _CHANGE_STATISTICS and then != "bn" and context.calibration is not None:
            _bn_(context, model)
    return RecoveryResult(
        model=model,
        residual=max((step.residual for step in done if step.residual is not None), default=None),
        summary="; ".join(step.summary for step in done if step.summary),
        shrinkage={layer: rho for step in done for layer, rho in step.shrinkage.items()},
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a net has a BatchNorm, whose statistics can be re-estimated."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What one step did.

    Attributes:
        residual: largest orthogonality residual; ``None`` where the step has none.
        summary: the changes in words; may be empty.
        shrinkage: rho by layer, where second moments were shrunk.
    """

    residual: float | None = None
    summary: str = ""
    shrinkage: Mapping[str, float] = field(default_factory=dict)


def _orthp_(context: RecoveryContext, model: nn.Module) -> _Done:
    settings = context.settings
    example = spectrum_batch(context.images, context.spec, 1, seed=context.seed).to(context.device)
    done = orthogonalize_(model, settings.orthp_method, gain=settings.gain, example=example, seed=context.seed)
    return _Done(residual=done.residual)


def _blend_(context: RecoveryContext, model: nn.Module) -> _Done:
    blend_(model, context.settings.blend)
    return _Done()


def _lstsq_(context: RecoveryContext, model: nn.Module) -> _Done:
    assert context.calibration is not None
    dense = context.dense.to(context.device)
    statistics = context.calibration.statistics(dense, context.plan.groups)
    done = reconstruct_(model, dense, context.plan, statistics, ridge=context.settings.ridge)
    words = f"{_count(len(done.layers), 'layer')} solved from {_count(statistics.images, 'image')}"
    return _Done(summary=f"{words}{_unsure(done.shrinkage)}{_left(done.left)}", shrinkage=done.shrinkage)


def _onepass_(context: RecoveryContext, model: nn.Module, *, mix: float) -> _Done:
    assert context.calibration is not None
    dense, batches = context.dense.to(context.device), context.calibration.batches
    statistics = context.calibration.statistics(dense, context.plan.groups)
    done = reconstruct_in_one_pass_(
        model, dense, context.plan, statistics, batches, ridge=context.settings.ridge, mix=mix
    )
    words = f"{_count(len(done.layers), 'layer')} solved in one pass from {_count(statistics.images, 'image')}"
    return _Done(summary=f"{words}{_unsure(done.shrinkage)}{_left(done.left)}", shrinkage=done.shrinkage)


def _repair_(context: RecoveryContext, model: nn.Module) -> _Done:
    assert context.calibration is not None
    done = repair_(model, context.dense.to(context.device), context.plan, context.calibration.batches)
    dead = f", {_count(done.dead, 'dead channel')} left alone" if done.dead else ""
    words = f"{_count(len(done.layers), 'layer')} repaired, {done.norms} of them in the BatchNorm behind"
    return _Done(summary=f"{words}{dead}{_left(done.left)}")


def _bn_(context: RecoveryContext, model: nn.Module) -> _Done:
    if has_batch_norm(model):
        assert context.calibration is not None
        batches = context.calibration.first(context.settings.bn_images).split(context.batch_size)
        whole = [
            batch for batch in batches if len(batch) == len(batches[0])
        ]  # a mean over batches weighs a smaller last one too much
        recalibrate_bn_(model, whole, device=context.device)
    return _Done()


def _blocks_(context: RecoveryContext, model: nn.Module) -> _Done:
    assert context.calibration is not None

    def notify(number: int, count: int, block: BlockResult) -> None:
        errors = {"before": block.before, "after": block.after}
        context.notify({"event": "block", "block": number, "blocks": count, "name": block.name, **errors})

    done = reconstruct_blocks_(
        model,
        context.dense.to(context.device),
        context.plan,
        torch.cat(context.calibration.batches),
        steps=context.settings.block_steps,
        mirrored=context.mirrored,
        seed=context.seed,
        tell=notify,
    )
    images = f"{_count(done.images, 'image')}{' and their mirror images' if context.mirrored else ''}"
    return _Done(summary=f"{_trained(done.blocks)} from {images}")


_STEPS: Final[Mapping[str, Callable[[RecoveryContext, nn.Module], _Done]]] = {
    "lstsq": _lstsq_,
    "onepass": partial(_onepass_, mix=1.0),
    "mixed": partial(_onepass_, mix=0.5),  # ``onepass`` right behind ``lstsq``
    "repair": _repair_,
    "orthp": _orthp_,
    "blend": _blend_,
    "bn": _bn_,
    "blocks": _blocks_,
}


def _trained(blocks: Sequence[BlockResult]) -> str:
    """Words on the blocks that were trained, their steps, rates and errors."""
    trained = [block for block in blocks if block.rate is not None]
    words = f"{len(trained)} of {_count(len(blocks), 'block')} trained"
    if not trained:
        return words
    rates = " or ".join(f"{rate:g}" for rate in sorted({block.rate for block in trained if block.rate is not None}))
    words += f" in {_count(sum(block.steps for block in trained), 'step')} at LR {rates}"
    *inner, last = blocks
    if inner:
        before = math.fsum(block.before for block in inner) / len(inner)
        after = math.fsum(block.after for block in inner) / len(inner)
        words += f", mean held-out error {before:.3g} to {after:.3g} of the variance"
    return f"{words}, KL divergence of the logits {last.before:.3g} to {last.after:.3g},"


def _unsure(shrinkage: Mapping[str, float]) -> str:
    """Words on the layers whose moments owe more to the shrinkage than to the images."""
    unsure = [f"{name} {rho:.2f}" for name, rho in shrinkage.items() if rho > UNSURE]
    if not unsure:
        return ""
    return f", too few images for {_count(len(unsure), 'layer')} (shrinkage above {UNSURE}: {_some(unsure, ', ')})"


def _left(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    named = [f"{name}: {reason}" for name, reason in reasons.items()]
    return f", {_count(len(reasons), 'layer')} left alone ({_some(named, '; ')})"


def _some(entries: Sequence[str], between: str) -> str:
    """The first entries, and how many more there are."""
    more = [f"{len(entries) - _NAMED} more"] if len(entries) > _NAMED else []
    return between.join([*entries[:_NAMED], *more])


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
