"""The report of a finished job, from its progress and its final model."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from prunecli import __version__
from prunecli.errors import listed
from prunecli.measure.stage_spectrum import jacobian_effort
from prunecli.measure.weights import weight_spectra
from prunecli.models.layers import weight_layers
from prunecli.run.job import Job
from prunecli.run.progress import FinishedStages
from prunecli.values.plan import Cost, Plan
from prunecli.values.report import LayerReport, PredictedLoss, Report, Stage, VerifyReport


def summarise(job: Job, plan: Plan, model: nn.Module, size: Cost, verified: VerifyReport) -> Report:
    """The report of a job whose final ``model``, cut by ``plan``, was exported and verified."""
    progress = job.progress
    last = progress.stages[-1]
    dense = progress.stage("dense")
    return Report(
        model=job.source.ref.name,
        base=_figures(job.source.cost, dense),
        final=_figures(size, last) | {"file_bytes": job.folder.weights_file.stat().st_size},
        stages=progress.stages,
        target=progress.target,
        layers=_layers(job.source.model, model, progress.dense_spectra),
        recovery=progress.recovery,
        phases=progress.phases,
        sensitivity=_predicted(plan, progress),
        total_epochs=_total_epochs(progress),
        lr=progress.lr,
        finetune=progress.finetune,
        verify=verified,
        recipe_sha256=job.recipe.sha256(),
        versions=versions(),
        seed=job.recipe.seed,
        warnings=_warnings(job, size),
    )


def _predicted(plan: Plan, progress: FinishedStages) -> PredictedLoss | None:
    """``None`` where the plan expects nothing, because widths were not chosen by their loss."""
    if plan.predicted_kl is None:
        return None
    kept = [step.kl_after for step in progress.recovery if step.kept]
    return PredictedLoss(predicted_kl=plan.predicted_kl, recovered_kl=kept[-1] if kept else None)


def _total_epochs(progress: FinishedStages) -> float | None:
    epochs = [phase.epochs for phase in progress.phases]
    if progress.finetune:
        epochs.append(progress.finetune.epochs)
    return math.fsum(epochs) if epochs else None


def _figures(size: Cost, stage: Stage | None) -> dict[str, Any]:
    return {**size.model_dump(), "top1": stage.top1 if stage else None, "loss": stage.loss if stage else None}


def _layers(dense: nn.Module, final: nn.Module, dense_spectra: dict[str, tuple[float, ...]]) -> tuple[LayerReport, ...]:
    """Widths and weight spectra of every layer, before and after."""
    before, after = weight_layers(dense), weight_layers(final)
    return tuple(
        LayerReport(
            name=name,
            out_before=len(before[name].weight),
            out_after=len(after[name].weight),
            sv_before=dense_spectra[name],
            sv_after=rounded(values),
        )
        for name, values in weight_spectra(final).items()
    )


def _warnings(job: Job, size: Cost) -> tuple[str, ...]:
    """Limits of the result that a user has to know, each once."""
    warnings = [*job.source.notes, *job.progress.warnings]
    if job.images is None:
        warnings.append("No data was given: nothing was fine-tuned and no accuracy was measured.")
    elif job.epochs == 0:
        warnings.append("Nothing was fine-tuned: the budget is 0 epochs.")
    if job.images is not None and job.images.unreadable:
        names = listed(sorted(job.images.unreadable), 3)
        warnings.append(f"{len(job.images.unreadable)} images were unreadable and left out: {names}.")
    classified = job.source.ref.num_classes > 0
    if (
        classified
        and job.recipe.spectrum.samples == "auto"
        and jacobian_effort(job.recipe, job.source, job.device)[1] == 0
    ):
        warnings.append("The Jacobian spectrum was not taken: it would take minutes an image here.")
    if size.macs >= job.source.cost.macs and job.progress.target is not None:
        warnings.append("The model does not have fewer multiply-adds than before.")
    return tuple(dict.fromkeys(warnings))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a rerun has to match."""
    packages = ("torch", "timm", "safetensors", "accelerate")
    return {"prunecli": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


def rounded(values: torch.Tensor) -> tuple[float, ...]:
    """Singular values at six significant digits: enough for a plot, at a third of the size in the file."""
    return tuple(float(f"{value:.6g}") for value in values.tolist())
