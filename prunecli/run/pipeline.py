"""The job: load → graph → plan → (train) → cut → recover → fine-tune → export → verify → report.

``compress`` only composes ``stages``. What a finished stage leaves behind is a file in the run folder, so that a run
which was killed goes on behind the last finished stage, and inside fine-tuning behind the last saved step.
"""

from __future__ import annotations

import copy
from pathlib import Path

from prunecli.errors import PruneError, UsageError
from prunecli.methods.start import start_anew_
from prunecli.recipe.recipe import Recipe
from prunecli.run.job import Notify, interruptible, open_job
from prunecli.run.learning_rate import past_of, recommended_lr
from prunecli.run.progress import Past
from prunecli.run.stages import (
    dense_stage,
    empty_plan,
    finetuned_stage,
    finish,
    planned_stage,
    pruned_stage,
    recovered_stage,
)
from prunecli.values.report import Report

# ---------------------------------------------------------------------------------------------- the job


def compress(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> Report:
    """Run the whole job; the run folder is ``out`` or ``runs/NAME-N``.

    Raises:
        PruneError: every failure, as the subclass whose exit code INTERFACE names. Finished stages stay on disk.
    """
    job = open_job("compress", recipe, out=out, resume=resume, force=force, notify=notify)
    with interruptible(job):
        planned = planned_stage(job)
        smaller = pruned_stage(job, planned)
        recovered_stage(job, planned, smaller)
        return finish(job, planned.plan, finetuned_stage(job, smaller))


def finetune(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> Report:
    """Fine-tune a model or a run without pruning it. Raises as ``compress``."""
    if recipe.data.name is None:
        raise UsageError("Fine-tuning needs data.", hint="Give --data.")
    if recipe.finetune.epochs == 0:
        raise UsageError("Fine-tuning for 0 epochs would change nothing.", hint="Give --epochs.")
    job = open_job("finetune", recipe, out=out, resume=resume, force=force, notify=notify)
    with interruptible(job):
        model = copy.deepcopy(job.source.model)  # the dense model stays as it came: the report and distillation need it
        started = (
            () if recipe.init is None else (start_anew_(model, recipe.init, job.source.spec.size, seed=recipe.seed),)
        )
        job.begin()
        dense_stage(job)
        if job.progress.lr is None:
            past, notes = _past(recipe)
            recommended = recommended_lr(job, model, past)
            found = {"lr": recommended, "recovery": started, "warnings": notes}
            job.save(job.progress.model_copy(update=found))
        return finish(job, empty_plan(job.source, recipe.seed), finetuned_stage(job, model))


def _past(recipe: Recipe) -> tuple[Past, tuple[str, ...]]:
    """What the run that a model comes from did to it, and what there is to say where that run does not tell."""
    try:
        return past_of(recipe), ()
    except PruneError as error:
        return Past(), (f"{error} So the recommended learning rate is that of an uncut model.",)
