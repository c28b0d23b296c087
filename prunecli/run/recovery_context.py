"""The recovery of a job: what it may look at."""

from __future__ import annotations

from functools import partial

from torch import nn

from prunecli.data.transforms import augmentation
from prunecli.recovery.steps import RecoveryContext
from prunecli.run.job import Job
from prunecli.run.measured import jacobian
from prunecli.values.plan import Plan
from prunecli.values.report import RecoveryStep


def recovery_context(job: Job, dense: nn.Module, plan: Plan) -> RecoveryContext:
    """What the recovery of this job may look at; ``dense`` are the weights that ``plan`` cut."""

    def tell(row: RecoveryStep) -> None:
        job.say("recovery", name=row.name, kept=row.kept, rule=row.rule)

    recipe, images = job.recipe, job.images
    return RecoveryContext(
        dense=dense,
        plan=plan,
        images=images,
        calibration=job.calibration,
        spec=job.source.spec,
        settings=recipe.recover,
        finetune=recipe.finetune,
        finetune_steps=job.epochs * images.steps_per_epoch if images else 0,
        batch_size=recipe.data.batch_size,
        mirrored=augmentation(recipe.data, job.source.spec) != "none",
        device=job.device,
        seed=recipe.seed,
        spectrum_of=partial(jacobian, job),
        tell=tell,
        notify=job.relay,
    )
