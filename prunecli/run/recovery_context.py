"""The recovery of a job: what it may look at."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from prunecli.data.transforms import augmentation
from prunecli.measure.calibration import Calibration
from prunecli.models.source import Source
from prunecli.recipe.recipe import Recipe
from prunecli.recovery.steps import RecoveryContext
from prunecli.run.job import Job
from prunecli.run.measured import jacobian
from prunecli.values.plan import Plan
from prunecli.values.report import RecoveryStep


def untrained_context(
    recipe: Recipe, source: Source, plan: Plan, calibration: Calibration | None, device: torch.device
) -> RecoveryContext:
    """What the recovery of a cut of ``source`` may look at that nobody trains or follows."""
    return RecoveryContext(
        dense=source.model,
        plan=plan,
        images=None,
        calibration=calibration,
        spec=source.spec,
        settings=recipe.recover,
        finetune=recipe.finetune,
        finetune_steps=0,
        batch_size=recipe.data.batch_size,
        mirrored=augmentation(recipe.data, source.spec) != "none",
        device=device,
        seed=recipe.seed,
        spectrum_of=lambda _: None,
        tell=lambda _: None,
        notify=lambda _: None,
    )


def recovery_context(job: Job, dense: nn.Module, plan: Plan) -> RecoveryContext:
    """What the recovery of this job may look at; ``dense`` are the weights that ``plan`` cut."""

    def tell(row: RecoveryStep) -> None:
        job.say("recovery", name=row.name, kept=row.kept, rule=row.rule)

    return replace(
        untrained_context(job.recipe, job.source, plan, job.calibration, job.device),
        dense=dense,
        images=job.images,
        finetune_steps=job.epochs * job.images.steps_per_epoch if job.images else 0,
        spectrum_of=partial(jacobian, job),
        tell=tell,
        notify=job.relay,
    )
