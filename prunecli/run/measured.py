"""The measurements of a stage."""

from __future__ import annotations

import time

from torch import nn

from prunecli.measure import accuracy as measure_accuracy
from prunecli.measure import cost
from prunecli.measure.jacobian import JacobianSpectrum
from prunecli.measure.stage_spectrum import jacobian_spectrum
from prunecli.models.tensors import state_digest
from prunecli.run.job import Job
from prunecli.values.report import Accuracy, Stage, StageName


def jacobian(job: Job, model: nn.Module) -> JacobianSpectrum | None:
    """The Jacobian spectrum of a model, or None where it is switched off or would cost too much.

    Equal weights are measured once: a stage's model is the next step's beginning.
    """
    key = state_digest(model.state_dict())
    if key not in job.spectra:
        job.spectra[key] = jacobian_spectrum(job.recipe, job.source, model, job.images, job.device)
    return job.spectra[key]


def evaluate(job: Job, model: nn.Module) -> Accuracy | None:
    """Accuracy on the validation split, or None without data."""
    if job.images is None:
        return None
    return measure_accuracy.evaluate(model.to(job.device), job.images.val_loader(), device=job.device)


def measured_stage(
    job: Job, name: StageName, model: nn.Module, began: float, *, notes: tuple[str, ...] = ()
) -> tuple[Stage, tuple[float, ...] | None]:
    """Everything the report says about the model as this stage left it, and the Jacobian's singular values."""
    size = cost.measure(model, job.source.spec.size)
    accuracy = evaluate(job, model)
    jacobians = jacobian(job, model)
    stage = Stage(
        name=name,
        seconds=round(time.perf_counter() - began, 3),
        params=size.params,
        macs=size.macs,
        bytes=size.bytes,
        top1=accuracy.top1 if accuracy else None,
        top5=accuracy.top5 if accuracy else None,
        loss=accuracy.loss if accuracy else None,
        jsv=jacobians.summary if jacobians else None,
        notes=notes,
    )
    values = tuple(jacobians.values.flatten().tolist()) if jacobians else None
    job.say("stage", name=name, seconds=stage.seconds, top1=stage.top1, jsv=stage.jsv.mean if stage.jsv else None)
    return stage, values
