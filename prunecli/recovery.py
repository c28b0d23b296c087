"""Which recovery steps a net gets: named in the recipe, or kept by a measured rule (mathematics: ``recover``)."""

from __future__ import annotations

import copy
import time
from typing import Any, Final

from torch import nn

from prunecli import recover
from prunecli.evaluation import recalibrate_bn_
from prunecli.job import Job, jacobian
from prunecli.probe import ProbeResult, probe_loss
from prunecli.report import RecoveryStep
from prunecli.stages import spectrum_batch

_MARGIN: Final = 0.01


def recover_stage(job: Job, model: nn.Module, learning_rate: float) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Apply the recovery steps of the recipe.

    ``auto`` tries what fits the net and keeps a step only by a measured rule: from copies with and without it, run the
    same short fine-tuning (``probe_steps``; none where nothing will be fine-tuned), and keep it if the loss on held-out
    training images is lower by more than 1 %. Not by the loss before fine-tuning, which hardly predicts the one after
    it (arXiv 2412.00143); but BN re-estimation is, since it leaves the weights alone and training steps read batch
    statistics: it can only change what is seen before. Steps named in the recipe are applied without asking.
    """
    steps, asked = _recovery_steps(job, model)
    done: list[RecoveryStep] = []
    for name in steps:
        began = time.perf_counter()
        candidate, residual = _recovered(job, model, name)
        step = RecoveryStep(name=name, kept=True, rule="asked for in the recipe", residual=residual)
        step = _with_effect(job, step, model, candidate)
        if not asked:
            step = _judged(job, step, model, candidate, learning_rate)
        step = step.model_copy(update={"seconds": round(time.perf_counter() - began, 3)})
        job.say("recovery", name=name, kept=step.kept, rule=step.rule)
        done.append(step)
        if step.kept:
            model = candidate
    return model, tuple(done)


def _recovery_steps(job: Job, model: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Which steps to try, and whether the user named them."""
    steps = job.recipe.recover.steps
    if "auto" not in steps:
        return steps, True
    if job.images is None:
        return (), False
    return (("bn", "orthp") if _has_batch_norm(model) else ("orthp",)), False


def _recovered(job: Job, model: nn.Module, step: str) -> tuple[nn.Module, float | None]:
    """A copy with one step applied, and the orthogonality residual where it has one."""
    settings = job.recipe.recover
    candidate = copy.deepcopy(model)
    residual = None
    if step == "orthp":
        example = spectrum_batch(job.images, job.source.spec, 1, seed=job.recipe.seed)
        done = recover.orthogonalize_(candidate.cpu(), settings.orthp_method, gain=settings.gain, example=example)
        residual = done.residual
    if job.images is not None and _has_batch_norm(candidate):
        # Orthogonalised weights make the old running statistics meaningless, so OrthP on a BN net includes this.
        inputs, _ = job.images.calibration(settings.bn_images)
        batches = inputs.split(job.recipe.data.batch_size)
        whole = [batch for batch in batches if len(batch) == len(batches[0])]  # each counts alike in the mean
        recalibrate_bn_(candidate, whole, device=job.device)
    return candidate, residual


def _with_effect(job: Job, step: RecoveryStep, before: nn.Module, after: nn.Module) -> RecoveryStep:
    """What the step itself did to accuracy and spectrum."""
    spectra = [jacobian(job, model) for model in (before, after)]
    changes: dict[str, Any] = {
        f"jsv_{when}": values.summary if values else None
        for when, values in zip(("before", "after"), spectra, strict=True)
    }
    if job.images is not None:
        for when, model in (("before", before), ("after", after)):
            result = _probe(job, model, steps=0, learning_rate=0.0)
            changes |= {f"loss_{when}": result.val_loss, f"top1_{when}": result.val_top1}
    return step.model_copy(update=changes)


def _judged(job: Job, step: RecoveryStep, before: nn.Module, after: nn.Module, learning_rate: float) -> RecoveryStep:
    """Keep the step if the same short fine-tuning ends lower with it."""
    assert job.images is not None
    budget = job.epochs * job.images.steps_per_epoch
    steps = min(job.recipe.recover.probe_steps, budget) if step.name != "bn" else 0
    without, with_it = (
        _probe(job, model, steps=steps, learning_rate=learning_rate).val_loss for model in (before, after)
    )
    kept = with_it < without * (1 - _MARGIN)
    how = f"after {steps} optimiser steps at LR {learning_rate:g}" if steps else "without fine-tuning"
    rule = (
        f"{'kept' if kept else 'left out'}: held-out loss {how} is {with_it:.4g} with it, {without:.4g} without it "
        f"(kept if lower by more than {_MARGIN:.0%})"
    )
    return step.model_copy(update={"kept": kept, "rule": rule})


def _probe(job: Job, model: nn.Module, *, steps: int, learning_rate: float) -> ProbeResult:
    assert job.images is not None
    return probe_loss(
        model,
        job.images,
        steps=steps,
        lr=learning_rate,
        settings=job.recipe.finetune,
        device=job.device,
        seed=job.recipe.seed,
    )


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())  # noqa: SLF001
