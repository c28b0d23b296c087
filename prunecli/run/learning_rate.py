"""Who decides the learning rate of a run: the user, the schedule, or the rules for the situation the model is in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from pydantic import ValidationError
from torch import nn

from prunecli.data.images import Images
from prunecli.errors import PruneError
from prunecli.measure import accuracy
from prunecli.models.source import Source
from prunecli.recipe.reading import read_yaml
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.schedules import CosineSchedule, OriginalSchedule, StepSchedule
from prunecli.recipe.settings import FinetuneSettings
from prunecli.run.folder import RunFolder
from prunecli.run.job import DEFAULT_EPOCHS, Job
from prunecli.run.progress import History
from prunecli.run.source import load_source, open_images, run_of
from prunecli.surgery.cut import cut
from prunecli.training import retraining_rates
from prunecli.training.optimizer import optimizer_name
from prunecli.training.recommended_lr import recommendation
from prunecli.training.retraining_rates import RemovedWeights
from prunecli.values.learning_rate import FinetuneSituation, LRReport
from prunecli.values.plan import Plan

DISTILL_SHARE: Final = 0.9
_SMALL_IMAGE: Final = 64  # pixels; the CIFAR-like side of the published rules


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """A fine-tuning as it was asked for, whatever happens to the model before it.

    Attributes:
        recipe: the recipe.
        source: the model as it was loaded.
        images: the data; ``None`` without data.
        epochs: the length, with the default filled in.
        distill_share: the share of the loss that is distillation, with ``auto`` resolved.
    """

    recipe: Recipe
    source: Source
    images: Images | None
    epochs: int
    distill_share: float


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
    by_labels = replace(_finetuning(job), distill_share=0.0)
    history = job.history(plan, job.progress.stage("pruned"))
    return _recommended(by_labels, model, history, lost_top1=lost_top1).recommended


def finetune_settings(job: Job) -> FinetuneSettings:
    """The recipe's fine-tuning settings with the final rate and the distillation share resolved."""
    asked, found = job.recipe.finetune, job.progress.lr
    schedule = asked.schedule
    anneals = isinstance(schedule, CosineSchedule | StepSchedule) and schedule.min_lr is None
    if anneals and found is not None and found.final_lr is not None:
        schedule = schedule.updated(min_lr=found.final_lr)
    return asked.updated(distill=asked.distill.updated(alpha=_distill_share(job)), schedule=schedule)


def _distill_share(job: Job) -> float:
    """The meaning of ``distill.alpha: auto`` here: the dense model teaches where it knows the data, going by the
    validation images, and where nothing else teaches already.
    """
    asked, dense = job.recipe.finetune, job.progress.stage("dense")
    if asked.distill.alpha != "auto":
        return asked.distill.share
    if (
        job.progress.command == "finetune"
        or asked.loss.kind != "ce"
        or not dense
        or dense.top1 is None
        or not job.images
    ):
        return 0.0
    return DISTILL_SHARE if accuracy.halves_chance_error(dense.top1, job.images.num_classes) else 0.0


def recommended_lr(job: Job, model: nn.Module, history: History) -> LRReport:
    """The rate that the schedule prescribes, else the one that the rules recommend for what was measured."""
    return _recommended(_finetuning(job), model, history, lost_top1=_lost_top1(history, job.images))


def lr_of_source(recipe: Recipe) -> LRReport:
    """The recommendation of ``prunecli lr``: for a run folder with the damage that its own report measured."""
    source = load_source(recipe)
    epochs = recipe.finetune.epochs if recipe.finetune.epochs is not None else DEFAULT_EPOCHS
    # A run's own plan is not passed on: its cut has already been made in the loaded weights.
    if epochs and (prescribed := _prescribed(recipe, source, None, epochs=epochs)):
        return prescribed
    images, history = open_images(recipe, source), history_of(recipe)
    share = recipe.finetune.distill.share
    asked = Finetuning(recipe=recipe, source=source, images=images, epochs=epochs, distill_share=share)
    return recommendation(_situation(asked, source.model, history, lost_top1=_lost_top1(history, images)))


def _finetuning(job: Job) -> Finetuning:
    return Finetuning(
        recipe=job.recipe,
        source=job.source,
        images=job.images,
        epochs=job.epochs,
        distill_share=_distill_share(job),
    )


def _recommended(asked: Finetuning, model: nn.Module, history: History, *, lost_top1: float | None) -> LRReport:
    if asked.epochs and (found := _prescribed(asked.recipe, asked.source, history.plan, epochs=asked.epochs)):
        return found
    return recommendation(_situation(asked, model, history, lost_top1=lost_top1))


def _prescribed(recipe: Recipe, source: Source, plan: Plan | None, *, epochs: int) -> LRReport | None:
    """The rate of a schedule that has one of its own; ``None`` for the others."""
    allr = recipe.finetune.schedule.kind == "allr"
    removed = _removed_weights(source.model, plan) if plan and allr else None
    return retraining_rates.prescribed_lr(recipe.finetune, epochs=epochs, removed=removed)


def _removed_weights(dense: nn.Module, plan: Plan) -> RemovedWeights:
    return RemovedWeights(
        sparsity=_removed_params(plan),
        norm_dense=_weight_norm(dense),
        norm_pruned=_weight_norm(cut(dense, plan)),
    )


def _removed_params(plan: Plan) -> float:
    """The share of the parameters that the plan removes."""
    return 1 - plan.predicted.params / plan.base.params


def _weight_norm(model: nn.Module) -> float:
    """Euclidean norm over all parameters."""
    return math.sqrt(math.fsum(float(tensor.detach().double().square().sum()) for tensor in model.parameters()))


def _situation(asked: Finetuning, model: nn.Module, history: History, *, lost_top1: float | None) -> FinetuneSituation:
    """The measured damage and the budget of the fine-tuning, as the rules read them.

    Args:
        asked: the fine-tuning.
        model: the model as it is to be fine-tuned.
        history: what was done to the model before.
        lost_top1: the share of the dense top-1 that the model lacks; ``None`` if unknown.
    """
    recipe, images, plan = asked.recipe, asked.images, history.plan
    settings, original = recipe.finetune, recipe.finetune.original
    cut_groups = plan.cut_groups if plan else ()
    removed = [1 - len(group.keep) / group.width for group in cut_groups]
    return FinetuneSituation(
        optimizer=optimizer_name(settings, model),
        epochs=asked.epochs,
        batch_size=recipe.data.batch_size,
        small_images=max(asked.source.spec.size[1:]) <= _SMALL_IMAGE,
        removed_channels=sum(removed) / len(removed) if removed else 0.0,
        removed_params=_removed_params(plan) if plan else 0.0,
        steps=asked.epochs * images.steps_per_epoch or None if images is not None else None,
        narrowest_width=min((len(group.keep) for group in cut_groups), default=None),
        jsv_ratio=_jsv_ratio(history),
        lost_top1=lost_top1,
        base_peak_lr=original.lr if original else history.base_peak_lr,
        from_scratch=not recipe.pretrained,
        distill_share=asked.distill_share,
        distill_temperature=settings.distill.temperature,
    )


def _jsv_ratio(history: History) -> float | None:
    """The mean Jacobian singular value now over the dense one; ``None`` where one was not measured."""
    dense, now = history.dense, history.now
    if not dense or not now or not dense.jsv or not now.jsv or dense.jsv.mean <= 0:
        return None
    return now.jsv.mean / dense.jsv.mean


def _lost_top1(history: History, images: Images | None) -> float | None:
    """The share of the dense top-1 that the model lacks; ``None`` where that was not measured."""
    dense, now = history.dense, history.now
    if not images or not dense or dense.top1 is None or not now or now.top1 is None:
        return None
    return accuracy.lost_top1(dense.top1, now.top1, classes=images.num_classes)


def history_of(recipe: Recipe) -> History:
    """The history of a model that comes from a run folder; an empty one for other models.

    Raises:
        PruneError: the run's plan or report cannot be read.
    """
    run = run_of(recipe)
    if run is None:
        return History()
    stages = run.report().stages
    dense = next((stage for stage in stages if stage.name == "dense"), None)
    return History(plan=run.plan(), dense=dense, now=stages[-1] if stages else None, base_peak_lr=_base_peak_lr(run))


def _base_peak_lr(run: RunFolder) -> float | None:
    """The rate that the run's base was trained at, if the run's recipe names it.

    The key alone is read: the recipe of an earlier version may have another shape.
    """
    try:
        finetune = read_yaml(run.recipe_file)["finetune"]
        return OriginalSchedule.model_validate(finetune["original"]).lr
    except (PruneError, KeyError, TypeError, ValidationError):
        return None
