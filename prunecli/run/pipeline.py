"""The two jobs, each as its table of contents: load → graph → plan → (train) → cut → recover → fine-tune → export →
verify → report. The chapters are in ``stages``.

What a finished stage leaves behind is a file in the run folder, so that a run which was killed goes on behind the last
finished stage, and inside fine-tuning behind the last saved step.
"""

from __future__ import annotations

import copy
from pathlib import Path

from prunecli.errors import PruneError, UsageError
from prunecli.methods.initialisation import initialise_
from prunecli.recipe.recipe import Recipe
from prunecli.run.job import Notify, interruptible, open_job
from prunecli.run.learning_rate import history_of, recommended_lr
from prunecli.run.progress import History
from prunecli.run.stages import (
    cut_stage,
    dense_stage,
    empty_plan,
    finetune_stage_,
    finish,
    phase_stage,
    pick_stage,
    plan_stage,
    recover_stage_,
)
from prunecli.values.report import Report


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
        planned = plan_stage(job)
        dense_stage(job)
        planned = pick_stage(job, planned)
        trained = phase_stage(job, planned.plan)
        smaller = cut_stage(job, planned, trained)
        recover_stage_(job, planned.plan, trained, smaller)
        finetune_stage_(job, smaller)
        return finish(job, planned.plan, smaller)


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
            () if recipe.init is None else (initialise_(model, recipe.init, job.source.spec.size, seed=recipe.seed),)
        )
        job.begin()
        dense_stage(job)
        if job.progress.lr is None:
            history, notes = _history(recipe)
            recommended = recommended_lr(job, model, history)
            found = {"lr": recommended, "recovery": started, "warnings": notes}
            job.save(job.progress.model_copy(update=found))
        finetune_stage_(job, model)
        return finish(job, empty_plan(job.source, recipe.seed), model)


def _history(recipe: Recipe) -> tuple[History, tuple[str, ...]]:
    """The history of a model that comes from a run, and a warning where that run cannot be read."""
    try:
        return history_of(recipe), ()
    except PruneError as error:
        return History(), (f"{error} So the recommended learning rate is that of an uncut model.",)
