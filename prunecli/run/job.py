"""One run under way: what is fixed for all its stages, the progress so far, and how a stage is measured."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from prunecli.data.images import Images
from prunecli.errors import InterruptedRunError, PruneError, UsageError
from prunecli.files import read_tensors, read_value, write_json
from prunecli.interrupts import interrupted_as
from prunecli.measure.calibration import Calibration
from prunecli.measure.jacobian import JacobianSpectrum
from prunecli.methods import phase
from prunecli.models.device import resolve_device
from prunecli.models.source import Source
from prunecli.recipe.recipe import Recipe
from prunecli.run.folder import RunFolder, held, locate, prepare_
from prunecli.run.progress import Command, FinishedStages, History
from prunecli.run.source import load_source, open_calibration, open_images, run_of
from prunecli.training import retraining_rates
from prunecli.values.plan import Plan
from prunecli.values.report import (
    Stage,
)

Notify = Callable[[dict[str, Any]], None]

DEFAULT_EPOCHS: Final = 10
_NEEDS_IMAGES: Final = {
    "lstsq": "solves from what layers read on images",
    "onepass": "solves from what layers read on images",
    "repair": "measures what layers make of images",
    "bn": "re-estimates statistics",
    "blocks": "trains blocks on what the dense ones make of images",
}


@dataclass
class Job:
    """One run under way: what is fixed for all its stages, and the progress so far.

    Attributes:
        recipe: the resolved recipe.
        folder: the run folder.
        source: the dense model.
        images: training and validation images; ``None`` without data.
        calibration: unlabelled images; ``None`` without any.
        device: where models are measured and trained.
        notify: called with every event.
        progress: what the finished stages measured.
        resume: whether an earlier start of the same run is continued.
        force: whether a run that is there is replaced.
        begun: whether the folder was made and locked.
        spectra: Jacobian spectrum by the digest of a model's weights, of the models measured by this process.
        closing: releases the folder.
        started: time at which the job was opened, in seconds of ``time.perf_counter``.
    """

    recipe: Recipe
    folder: RunFolder
    source: Source
    images: Images | None
    calibration: Calibration | None
    device: torch.device
    notify: Notify
    progress: FinishedStages
    resume: bool
    force: bool
    begun: bool = False
    spectra: dict[str, JacobianSpectrum | None] = field(default_factory=dict)
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

    def save(self, progress: FinishedStages) -> None:
        """Make the progress of a finished stage durable."""
        self.progress = progress
        write_json(self.folder.progress_file, progress.model_dump(mode="json"))

    def history(self, plan: Plan, now: Stage | None) -> History:
        """The history of the model in this job up to the stage ``now``."""
        return History(plan=plan, dense=self.progress.stage("dense"), now=now)

    @property
    def epochs(self) -> int:
        """The fine-tuning budget in epochs."""
        return planned_epochs(self.recipe, has_data=self.images is not None)


def planned_epochs(recipe: Recipe, *, has_data: bool) -> int:
    """The fine-tuning budget in epochs: the recipe's, else 10 where there is data and 0 where there is none.

    Raises:
        UsageError: the recipe asks for epochs without data.
    """
    asked = recipe.finetune.epochs
    if asked and not has_data:
        raise UsageError(f"Fine-tuning for {asked} epochs needs data.", hint="Give --data, or --epochs 0.")
    return asked if asked is not None else (DEFAULT_EPOCHS if has_data else 0)


def open_job(command: Command, recipe: Recipe, *, out: Path | None, resume: bool, force: bool, notify: Notify) -> Job:
    """Load the model, open the data, choose the folder. Nothing is written yet: ``Job.begin`` does that.

    Raises:
        UsageError: the recipe, the data or the folder does not allow this command.
        PruneError: weights, images or an earlier start cannot be read.
    """
    device = resolve_device(recipe.device)
    folder = locate(out, model=recipe.model or "", resume=resume, force=force)
    earlier = _earlier(folder, recipe, command) if resume else None
    notify({"event": "start", "name": "load"})
    source = load_source(recipe)
    if earlier and earlier.source_digest != source.digest:
        raise PruneError(f"The weights of {source.ref.name} are not those that {folder.path} was started with.")
    images = open_images(recipe, source)
    calibration = open_calibration(recipe, source, images)
    _require_possible(command, recipe, images, calibration)
    if command != "finetune":
        phase.require_possible(recipe, images)
    return Job(
        recipe=recipe,
        folder=folder,
        source=source,
        images=images,
        calibration=calibration,
        device=device,
        notify=notify,
        progress=earlier or FinishedStages(command=command, recipe_sha256=recipe.sha256(), source_digest=source.digest),
        resume=resume,
        force=force,
    )


def _require_possible(command: Command, recipe: Recipe, images: Images | None, calibration: Calibration | None) -> None:
    """Raises UsageError where a later stage would find that what it needs is not there."""
    if recipe.init is not None:
        _require_start(command, recipe, images, recipe.init.kind)
    if command == "finetune" and recipe.finetune.schedule.kind == "allr":
        raise UsageError(retraining_rates.NEEDS_A_CUT)
    for step in recipe.recover.steps:
        if step in _NEEDS_IMAGES and calibration is None:
            raise UsageError(
                f"Recovery step {step} {_NEEDS_IMAGES[step]}, so it needs --data.",
                hint="A folder of images without labels will do: data.calibration=FOLDER.",
            )
    if planned_epochs(recipe, has_data=images is not None) and images is not None and not images.train_size:
        raise UsageError(
            f"Data {recipe.data.name} has no training images to fine-tune with.",
            hint=f"Put them into {recipe.data.name}/train, one folder a class"
            + (", or give --epochs 0." if command == "compress" else "."),
        )


def _require_start(command: Command, recipe: Recipe, images: Images | None, init: str) -> None:
    """Raises UsageError where a new start makes no sense."""
    if images is None:
        raise UsageError(f"init {init} is the start of a training, so it needs data.", hint="Give --data.")
    if run_of(recipe):
        raise UsageError(f"init {init} starts from a plain model, and {recipe.model} is a run folder.")
    if command == "compress" and recipe.recover.steps:
        raise UsageError(
            f"init {init} starts anew after the cut, so there is nothing to recover.",
            hint="Give --recover none.",
        )


def _earlier(folder: RunFolder, recipe: Recipe, command: Command) -> FinishedStages | None:
    """The progress of an earlier start, None where it was killed before any. Raises where it was another job."""
    if folder.recipe().sha256() != recipe.sha256():
        raise UsageError(
            f"{folder.path} was started with another recipe.",
            hint="Resume without further options (the folder's recipe is used), or --force to start again.",
        )
    if not folder.progress_file.is_file():
        return None
    progress = read_value(FinishedStages, folder.progress_file)
    if progress.command != command:
        raise UsageError(
            f"{folder.path} was started with `prunecli {progress.command}`.",
            hint=f"`prunecli {progress.command} --resume --out {shlex.quote(str(folder.path))}` continues it.",
        )
    if progress.recipe_sha256 != recipe.sha256():  # cut off in the middle, YAML may still be a recipe
        raise UsageError(f"{folder.recipe_file} was changed after the run had started.", hint="--force starts again.")
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

    def explain() -> InterruptedRunError:
        if not job.begun:
            return InterruptedRunError("Interrupted before anything was written.")
        with suppress(PruneError):  # a full disk must not hide why the run ended
            job.folder.log("interrupted")
        return InterruptedRunError(
            f"Interrupted; {job.folder.path} keeps what was finished.",
            hint=f"`prunecli {job.progress.command} --resume --out {shlex.quote(str(job.folder.path))}` continues.",
        )

    with interrupted_as(explain), job.closing:
        yield
