"""One run under way: what is fixed for all its stages, the progress so far, and how a stage is measured."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import nn

from prunecli.data.images import Images
from prunecli.errors import InterruptedRunError, PruneError, UsageError
from prunecli.files import read_tensors, write_json
from prunecli.measure import accuracy as measure_accuracy
from prunecli.measure import cost
from prunecli.measure.accuracy import knows_the_data
from prunecli.measure.jacobian import JacobianSpectrum
from prunecli.methods import phase
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import FinetuneSettings
from prunecli.run.folder import RECIPE, RunFolder, held, locate, prepare_, read_value
from prunecli.run.source import Source, cut, jacobian_spectrum, load_source, open_images, resolve_device, run_of
from prunecli.training import retraining_rates, schedule
from prunecli.training.recommended_lr import recommend_lr
from prunecli.values.plan import Plan
from prunecli.values.report import (
    Accuracy,
    FinetuneReport,
    LRReport,
    PhaseReport,
    RecoveryStep,
    Stage,
    StageName,
    TargetResult,
)
from prunecli.values.value import Value

Command = Literal["compress", "finetune"]
Notify = Callable[[dict[str, Any]], None]

DEFAULT_EPOCHS: Final = 10
DISTILL_SHARE: Final = 0.9
_NEEDS_IMAGES: Final = {
    "lstsq": "solves from what layers read on images",
    "repair": "measures what layers make of images",
    "bn": "re-estimates statistics",
}
_SMALL_IMAGE: Final = 64  # pixels; the CIFAR-like side of the published rules


class Progress(Value):
    """What finished stages measured: ``checkpoints/progress.json``."""

    command: Command
    recipe_sha256: str
    source_digest: str
    plan_sha256: str | None = None
    stages: tuple[Stage, ...] = ()
    phases: tuple[PhaseReport, ...] = ()
    recovery: tuple[RecoveryStep, ...] = ()
    lr: LRReport | None = None
    finetune: FinetuneReport | None = None
    target: TargetResult | None = None
    jacobians: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    dense_spectra: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def with_stage(self, stage: Stage, jacobian: tuple[float, ...] | None = None, **changes: object) -> Progress:
        """The progress after one more stage."""
        jacobians = self.jacobians | ({str(stage.name): jacobian} if jacobian else {})
        return self.model_copy(update={"stages": (*self.stages, stage), "jacobians": jacobians, **changes})

    def stage(self, name: StageName) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Past:
    """What was done to a model before its fine-tuning; nothing of it where it was neither cut nor measured.

    Attributes:
        plan: what was cut.
        dense: the model before that, as measured.
        now: the model as it is to be fine-tuned.
        base_peak_lr: highest rate the dense model was trained at, where somebody said so.
    """

    plan: Plan | None = None
    dense: Stage | None = None
    now: Stage | None = None
    base_peak_lr: float | None = None


@dataclass
class Job:
    """One run under way: what is fixed for all its stages, and the progress so far."""

    recipe: Recipe
    folder: RunFolder
    source: Source
    images: Images | None
    device: torch.device
    notify: Notify
    progress: Progress
    resume: bool
    force: bool
    begun: bool = False
    closing: ExitStack = field(default_factory=ExitStack)
    started: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Make the folder, now that the job is known to be possible; from here on no other process may use it."""
        self.closing.enter_context(held(self.folder))
        prepare_(self.folder, self.recipe, resume=self.resume, force=self.force)
        self.begun = True
        self.say(
            "open",
            model=self.source.ref.name,
            folder=str(self.folder.path),
            device=str(self.device),
            resumed=self.resume,
        )

    def say(self, event: str, **values: object) -> None:
        """Log one event and tell the caller."""
        self.folder.log(event, **values)
        self.notify({"event": event, **values})

    def relay(self, event: dict[str, Any]) -> None:
        """Pass on an event of the training loop; single steps are shown and not logged."""
        if event["event"] != "step":
            self.folder.log(**event)
        self.notify(event)

    def save(self, progress: Progress) -> None:
        """Make the progress of a finished stage durable."""
        self.progress = progress
        write_json(_progress_file(self.folder), progress.model_dump(mode="json"))

    def past(self, plan: Plan, now: Stage | None) -> Past:
        """What this job did to its model so far."""
        return Past(plan=plan, dense=self.progress.stage("dense"), now=now)

    @property
    def epochs(self) -> int:
        return planned_epochs(self.recipe, has_data=self.images is not None)


def planned_epochs(recipe: Recipe, *, has_data: bool) -> int:
    """The fine-tuning budget: what was asked, else 10 where there is data. Raises UsageError."""
    asked = recipe.finetune.epochs
    if asked and not has_data:
        raise UsageError(f"Fine-tuning for {asked} epochs needs data.", hint="Give --data, or --epochs 0.")
    return asked if asked is not None else (DEFAULT_EPOCHS if has_data else 0)


def jacobian(job: Job, model: nn.Module) -> JacobianSpectrum | None:
    """The Jacobian spectrum of one stage, or None where it is switched off or would cost too much."""
    return jacobian_spectrum(job.recipe, job.source, model, job.images, job.device)


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
        optimizer=schedule.optimizer_name(recipe.finetune, model),
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


def open_job(command: Command, recipe: Recipe, *, out: Path | None, resume: bool, force: bool, notify: Notify) -> Job:
    """Load the model, open the data, choose the folder. Nothing is written yet: ``Job.begin`` does that."""
    device = resolve_device(recipe.device)
    folder = locate(out, model=recipe.model or "", resume=resume, force=force)
    earlier = _earlier(folder, recipe, command) if resume else None
    notify({"event": "start", "name": "load"})
    source = load_source(recipe)
    if earlier and earlier.source_digest != source.digest:
        raise PruneError(f"The weights of {source.ref.name} are not those that {folder.path} was started with.")
    images = open_images(recipe, source)
    _require_possible(command, recipe, images)
    if command == "compress":
        phase.require_possible(recipe, images)
    return Job(
        recipe=recipe,
        folder=folder,
        source=source,
        images=images,
        device=device,
        notify=notify,
        progress=earlier or Progress(command=command, recipe_sha256=recipe.sha256(), source_digest=source.digest),
        resume=resume,
        force=force,
    )


def _require_possible(command: Command, recipe: Recipe, images: Images | None) -> None:
    """Raises UsageError where a later stage would find that what it needs is not there."""
    if recipe.init is not None:
        _require_start(command, recipe, images)
    if command == "finetune" and recipe.finetune.schedule == "allr":
        raise UsageError(retraining_rates.NEEDS_A_CUT)
    for step in recipe.recover.steps:
        if step in _NEEDS_IMAGES and images is None:
            raise UsageError(f"Recovery step {step} {_NEEDS_IMAGES[step]}, so it needs --data.")
    if planned_epochs(recipe, has_data=images is not None) and images is not None and not images.train_size:
        raise UsageError(
            f"Data {recipe.data.name} has no training images to fine-tune with.",
            hint=f"Put them into {recipe.data.name}/train, one folder a class, or give --epochs 0.",
        )


def _require_start(command: Command, recipe: Recipe, images: Images | None) -> None:
    """Raises UsageError where a new start makes no sense."""
    if images is None:
        raise UsageError(f"init {recipe.init} is the start of a training, so it needs data.", hint="Give --data.")
    if run_of(recipe):
        raise UsageError(f"init {recipe.init} starts from a plain model, and {recipe.model} is a run folder.")
    if command == "compress" and recipe.recover.steps:
        raise UsageError(
            f"init {recipe.init} starts anew after the cut, so there is nothing to recover.",
            hint="Give --recover none.",
        )


def _earlier(folder: RunFolder, recipe: Recipe, command: Command) -> Progress | None:
    """The progress of an earlier start, None where it was killed before any. Raises where it was another job."""
    if folder.recipe().sha256() != recipe.sha256():
        raise UsageError(
            f"{folder.path} was started with another recipe.",
            hint="Resume without further options (the folder's recipe is used), or --force to start again.",
        )
    if not _progress_file(folder).is_file():
        return None
    progress = read_value(Progress, _progress_file(folder))
    if progress.command != command:
        raise UsageError(
            f"{folder.path} was started with `prunecli {progress.command}`.",
            hint=f"`prunecli {progress.command} --resume --out {shlex.quote(str(folder.path))}` continues it.",
        )
    if progress.recipe_sha256 != recipe.sha256():  # cut off in the middle, YAML may still be a recipe
        raise UsageError(f"{folder.path / RECIPE} was changed after the run had started.", hint="--force starts again.")
    return progress


def reload_(model: nn.Module, path: Path) -> None:
    """What an earlier start saved after a stage. Raises PruneError where the file does not hold it."""
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError:
        raise PruneError(f"{path} does not hold the weights of this run.", hint="--force starts again.") from None


@contextmanager
def interruptible(job: Job) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a run with what was finished on disk."""
    try:
        with job.closing:
            yield
    except (KeyboardInterrupt, InterruptedRunError):
        if not job.begun:
            raise InterruptedRunError("Interrupted before anything was written.") from None
        with suppress(PruneError):  # a full disk must not hide why the run ended
            job.folder.log("interrupted")
        raise InterruptedRunError(
            f"Interrupted; {job.folder.path} keeps what was finished.",
            hint=f"`prunecli {job.progress.command} --resume --out {shlex.quote(str(job.folder.path))}` continues.",
        ) from None


def _progress_file(folder: RunFolder) -> Path:
    return folder.checkpoints / "progress.json"
