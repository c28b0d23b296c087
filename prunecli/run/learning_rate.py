"""Who decides the learning rate of a run."""

from __future__ import annotations

import math
from typing import Any, Final

from torch import nn

from prunecli.data.images import Images
from prunecli.errors import PruneError
from prunecli.measure import accuracy as measure_accuracy
from prunecli.measure.accuracy import knows_the_data
from prunecli.models.source import Source
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import FinetuneSettings
from prunecli.run.folder import RunFolder
from prunecli.run.job import DEFAULT_EPOCHS, Job
from prunecli.run.progress import Past
from prunecli.run.source import load_source, open_images, run_of
from prunecli.surgery.cut import cut
from prunecli.training import retraining_rates
from prunecli.training.optimizer import optimizer_name
from prunecli.training.recommended_lr import recommend_lr
from prunecli.values.plan import Plan
from prunecli.values.report import LRReport

DISTILL_SHARE: Final = 0.9
_SMALL_IMAGE: Final = 64  # pixels; the CIFAR-like side of the published rules


def learning_rate(job: Job) -> float:
    """The rate to fine-tune with: the user's, else the recommended one."""
    asked = job.recipe.finetune.lr
    if asked != "auto":
        return asked
    assert job.progress.lr is not None
    return job.progress.lr.recommended


def learning_rate_at(job: Job, plan: Plan, model: nn.Module, lost_top1: float | None) -> float:
    """The rate to fine-tune ``model`` with, by labels alone, if it lost this share of the dense top-1."""
    if job.recipe.finetune.lr != "auto":
        return job.recipe.finetune.lr
    past = job.past(plan, job.progress.stage("pruned"))
    return _recommended(job, model, past, lost_top1=lost_top1, distill_share=0.0).recommended


def finetune_settings(job: Job) -> FinetuneSettings:
    """The settings of the recipe; where it leaves it to the tool, with the last rate that the recommendation names and
    with distillation from a dense model that is worth learning from.
    """
    asked, found = job.recipe.finetune, job.progress.lr
    decided: dict[str, Any] = {"distill": asked.distill.model_copy(update={"alpha": _distill_share(job)})}
    if asked.min_lr is None and found is not None and "final_lr" in found.evidence:
        decided["min_lr"] = found.evidence["final_lr"]
    return asked.model_copy(update=decided)


def _distill_share(job: Job) -> float:
    """What ``distill.alpha: auto`` means here: the dense model teaches where it knows the data, going by the validation
    images, and where nothing else teaches already.
    """
    asked, dense = job.recipe.finetune, job.progress.stage("dense")
    if asked.distill.alpha != "auto":
        return asked.distill.share
    if job.progress.command != "compress" or asked.loss != "ce" or not dense or dense.top1 is None or not job.images:
        return 0.0
    return DISTILL_SHARE if knows_the_data(dense.top1, job.images.num_classes) else 0.0


def recommended_lr(job: Job, model: nn.Module, past: Past) -> LRReport:
    """What the schedule prescribes, else the rules of ``lr`` on what was measured."""
    return _recommended(job, model, past, lost_top1=_lost(past, job.images), distill_share=_distill_share(job))


def _recommended(job: Job, model: nn.Module, past: Past, *, lost_top1: float | None, distill_share: float) -> LRReport:
    if job.epochs and (prescribed := _prescribed_lr(job.recipe, job.source, past.plan, epochs=job.epochs)):
        return prescribed
    return lr_report(
        job.recipe,
        job.source,
        model,
        past,
        lost_top1=lost_top1,
        epochs=job.epochs,
        images=job.images,
        distill_share=distill_share,
    )


def _prescribed_lr(recipe: Recipe, source: Source, plan: Plan | None, *, epochs: int) -> LRReport | None:
    """Feed the norms of the weights before and after the cut to the schedules that have rates of their own."""
    cut_too = plan is not None and recipe.finetune.schedule == "allr"
    dense = _weight_norm(source.model) if cut_too else 0.0
    return retraining_rates.prescribed_lr(
        recipe.finetune,
        epochs=epochs,
        sparsity=1 - plan.predicted.params / plan.base.params if plan else 0.0,
        norm_dense=dense,
        norm_pruned=_weight_norm(cut(source.model, plan)) if plan and cut_too else dense,
    )


def _weight_norm(model: nn.Module) -> float:
    """Euclidean norm over all parameters."""
    return math.sqrt(math.fsum(float(tensor.detach().double().square().sum()) for tensor in model.parameters()))


def lr_report(
    recipe: Recipe,
    source: Source,
    model: nn.Module,
    past: Past,
    *,
    lost_top1: float | None,
    epochs: int,
    images: Images | None,
    distill_share: float,
) -> LRReport:
    """Feed the measured damage and the budget to ``lr.recommend_lr``."""
    plan, dense, now, original = past.plan, past.dense, past.now, recipe.finetune.original
    cut_groups = plan.cut_groups if plan else ()
    removed = [1 - len(group.keep) / group.width for group in cut_groups]
    ratio = now.jsv.mean / dense.jsv.mean if dense and now and dense.jsv and now.jsv and dense.jsv.mean > 0 else None
    return recommend_lr(
        optimizer=optimizer_name(recipe.finetune, model),
        epochs=epochs,
        batch_size=recipe.data.batch_size,
        small_images=max(source.spec.size[1:]) <= _SMALL_IMAGE,
        removed_channels=sum(removed) / len(removed) if removed else 0.0,
        removed_params=1 - plan.predicted.params / plan.base.params if plan else 0.0,
        steps=epochs * images.steps_per_epoch or None if images is not None else None,
        narrowest_width=min((len(group.keep) for group in cut_groups), default=None),
        jsv_ratio=ratio,
        lost_top1=lost_top1,
        base_peak_lr=original.lr if original else past.base_peak_lr,
        from_scratch=not recipe.pretrained,
        distill_share=distill_share,
        distill_temperature=recipe.finetune.distill.temperature,
    )


def _lost(past: Past, images: Images | None) -> float | None:
    """Share of the dense top-1 that the model lacks; none where that was not measured."""
    dense, now = past.dense, past.now
    if not images or not dense or dense.top1 is None or not now or now.top1 is None:
        return None
    return measure_accuracy.lost_top1(dense.top1, now.top1, classes=images.num_classes)


def past_of(recipe: Recipe) -> Past:
    """What the run that a model comes from did to it. Raises PruneError where its plan or report cannot be read."""
    run = run_of(recipe)
    if run is None:
        return Past()
    stages = run.report().stages
    dense = next((stage for stage in stages if stage.name == "dense"), None)
    return Past(plan=run.plan(), dense=dense, now=stages[-1] if stages else None, base_peak_lr=_base_peak_lr(run))


def _base_peak_lr(run: RunFolder) -> float | None:
    """The rate its base was trained at, as its recipe says it; a recipe of another version says nothing."""
    try:
        original = run.recipe().finetune.original
    except PruneError:
        return None
    return original.lr if original else None


def lr_of_source(recipe: Recipe) -> LRReport:
    """What ``prunecli lr`` says: for a run folder with the damage that its own report measured."""
    source = load_source(recipe)
    epochs = recipe.finetune.epochs if recipe.finetune.epochs is not None else DEFAULT_EPOCHS
    if epochs and (prescribed := _prescribed_lr(recipe, source, None, epochs=epochs)):
        return prescribed
    images, past = open_images(recipe, source), past_of(recipe)
    return lr_report(
        recipe,
        source,
        source.model,
        past,
        lost_top1=_lost(past, images),
        epochs=epochs,
        images=images,
        distill_share=recipe.finetune.distill.share,
    )
