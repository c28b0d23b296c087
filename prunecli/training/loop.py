"""Steps over epochs of batches, resumable bit for bit: what fine-tuning and the phases before the cut have in common.

`train_` is the frame of every training. A `Loop` knows where it is and how to save that; what an epoch's end measures
and what is reported belongs to the classes made from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from prunecli.errors import DivergedError, InterruptedRunError, PruneError
from prunecli.interrupts import Stopped, stop_if_asked, stop_requests, until
from prunecli.models.tensors import state_digest
from prunecli.randomness import own_randomness
from prunecli.training import checkpoint
from prunecli.training.checkpoint import TrainingPosition
from prunecli.training.objective import Objective
from prunecli.training.penalty import Penalty
from prunecli.training.step import Trainer, TrainingImages, TrainingPlan, build_trainer

Event = dict[str, Any]
Report = TypeVar("Report")

_EVENT_SECONDS = 0.5  # at most one step event in this time
_LOSSES_HELD = 16  # losses a GPU run collects before it waits for them; a NaN is found that many steps late


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Where a training runs and who listens.

    Attributes:
        device: device to train on.
        seed: seed of all random numbers but the loader's own.
        folder: folder of the checkpoints; ``None`` where nothing is saved and nothing resumed.
        on_event: function that gets each event between two steps: ``step`` at most twice a second, ``epoch``, ``saved``
            and ``resume``, as dicts that JSON can hold.
    """

    device: torch.device
    seed: int
    folder: Path | None = None
    on_event: Callable[[Event], None] = lambda _: None


@dataclass(kw_only=True, eq=False)
class Loop(ABC, Generic[Report]):
    """One training: its position, what it measured, and the loop itself.

    Attributes:
        trainer: model, optimiser, objective and everything else a step needs.
        images: training and validation images.
        run: checkpoints and listener.
        stop: request to stop between two steps.
        progress: position, and the history of the epochs completed.
        unread: loss on the device, learning rate and step of the last steps, not yet waited for.
        start: digest of the trainable parameters before the first step.
    """

    name: ClassVar[str]  # how an interruption calls the training
    divergence_hint: ClassVar[str]  # what to change where it diverges

    trainer: Trainer
    images: TrainingImages
    run: TrainingRun
    stop: threading.Event
    progress: TrainingPosition
    unread: list[tuple[Tensor, float, int]] = field(default_factory=list)
    start: str = field(init=False)

    def __post_init__(self) -> None:
        self.start = state_digest(_trainable(self.trainer.model))

    # ------------------------------------------------------------------------------------------ what differs

    @abstractmethod
    def measured(self, mean_loss: float) -> dict[str, float]:
        """The history's figures of the epoch just trained, whose mean loss is given."""

    @abstractmethod
    def finished(self) -> Report:
        """Leave the model as it is to be used, in evaluation mode, and report."""

    def own_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and optimiser."""
        return {}

    def restore_own_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensors of a checkpoint back that are neither weights nor optimiser."""

    # ------------------------------------------------------------------------------------------ the loop

    @property
    def done(self) -> int:
        """Optimiser steps taken so far."""
        return self.progress.epoch * self.trainer.plan.steps_per_epoch + self.progress.step

    def train(self) -> None:
        """All epochs that are left. Raises InterruptedRunError with the state saved."""
        try:
            self._resume()
            try:
                while self.progress.epoch < self.trainer.plan.epochs:
                    self._train_epoch()
                    self._close_epoch()
                    self._save()
                stop_if_asked(self.stop)  # also where it was during the last validation or save
            except Stopped:
                self._save()
                raise self._interrupted(saved=self.run.folder is not None) from None
        except KeyboardInterrupt:
            raise self._interrupted(saved=False) from None

    def _train_epoch(self) -> None:
        """The rest of the running epoch, from the position in ``progress``."""
        plan, epoch, first = self.trainer.plan, self.progress.epoch, self.progress.step
        steps = self._steps_of_epoch
        seconds, began, shown = self.progress.seconds, time.monotonic(), -math.inf
        held = _LOSSES_HELD if self.trainer.device.type == "cuda" else 1
        companion = self.trainer.objective.companion
        loader = self.trainer.shared(self.images.train_loader(epoch=epoch, skip_batches=first, companion=companion))
        batches = until(self.stop, loader) if first < steps else iter(())
        for images, labels in batches:
            loss, lr = self.trainer.step_(images, labels, epoch=epoch, step=self.progress.step)
            step, now = self.progress.step + 1, time.monotonic()
            self.unread.append((loss, lr, step))
            self.advance(step=step, seconds=seconds + now - began)
            if len(self.unread) >= held or step == steps:
                self._read_losses()
            if not self.unread and (step == steps or now - shown >= _EVENT_SECONDS):
                shown = now
                self._show_step(batch=len(labels), seconds_per_step=(now - began) / (step - first))
            if plan.checkpoint_every and step % plan.checkpoint_every == 0 and step < steps:
                self._save()
            if step == steps < plan.steps_per_epoch:
                break
        if self.progress.step != steps:
            raise PruneError(f"Epoch {epoch + 1} had {self.progress.step} batches where {steps} were promised.")

    def _read_losses(self) -> None:
        """Add the losses of the last steps to the epoch's sum; the first that is not finite stops the run."""
        if not self.unread:
            return
        values = torch.stack([loss for loss, _, _ in self.unread]).double().tolist()
        for value, (_, lr, step) in zip(values, self.unread, strict=True):
            if not math.isfinite(value):
                raise self.diverged(f"The loss is {value} at step {step} of epoch {self.progress.epoch + 1}", lr)
        self.unread = []
        self.advance(loss_sum=math.fsum((self.progress.loss_sum, *values)))

    def _close_epoch(self) -> None:
        """Measure and enter the epoch in the history."""
        epoch = self.progress.epoch + 1
        if epoch == 1 and state_digest(_trainable(self.trainer.model)) == self.start:
            raise PruneError(f"Epoch 1 at learning rate {self.lr:g} changed no parameter; nothing is being trained.")
        began = time.monotonic()
        found = self.measured(self.progress.loss_sum / self._steps_of_epoch)
        entry = {
            "epoch": float(epoch),
            **found,
            "seconds": self.progress.seconds + time.monotonic() - began,
        }
        history = (*self.progress.history, entry)
        self.advance(epoch=epoch, step=0, loss_sum=0.0, seconds=0.0, history=history)
        self.run.on_event({"event": "epoch", **entry, "epoch": epoch, "epochs": self.trainer.plan.epochs})

    # ------------------------------------------------------------------------------------------ position

    @property
    def _steps_of_epoch(self) -> int:
        plan = self.trainer.plan
        return min(plan.steps_per_epoch, plan.steps - self.progress.epoch * plan.steps_per_epoch)

    def _save(self) -> None:
        """Checkpoint, by the main process. Raises PruneError where a weight is not finite, so that no such state is
        ever kept, and where the disk refuses.
        """
        if self.run.folder is None or not self.trainer.is_main:
            return
        self._read_losses()
        trainer, named = self.trainer, checkpoint.prefixed
        if not all(bool(tensor.isfinite().all()) for tensor in trainer.model.parameters()):
            raise self.diverged("A weight is not finite", self.lr)
        tensors = named("model", trainer.model.state_dict())
        tensors |= named("optimizer", checkpoint.optimizer_tensors(trainer.optimizer, trainer.model))
        path = checkpoint.save(self.run.folder, self.progress, tensors | self.own_tensors())
        self.run.on_event(
            {"event": "saved", "path": str(path), "epoch": self.progress.epoch, "step": self.progress.step}
        )

    def _resume(self) -> None:
        if self.run.folder is None:
            return
        found = checkpoint.newest(self.run.folder, digest=self.progress.digest)
        if found is None:
            return
        self.progress, tensors = found
        trainer, part = self.trainer, checkpoint.unprefixed
        trainer.model.load_state_dict(part("model", tensors))
        checkpoint.restore_optimizer_(trainer.optimizer, trainer.model, part("optimizer", tensors))
        self.restore_own_(tensors)
        self.run.on_event({"event": "resume", "epoch": self.progress.epoch, "step": self.progress.step})

    def advance(self, **changes: object) -> None:
        """Change the position or what was measured."""
        self.progress = self.progress.model_copy(update=changes)

    def _show_step(self, *, batch: int, seconds_per_step: float) -> None:
        """``step`` of ``steps`` counts the whole training; ``loss`` is the epoch's mean so far."""
        plan = self.trainer.plan
        self.run.on_event(
            {
                "event": "step",
                "step": self.done,
                "steps": plan.steps,
                "epoch": self.progress.epoch + 1,
                "epochs": plan.epochs,
                "loss": self.progress.loss_sum / self.progress.step,
                "lr": self.lr,
                "images_per_second": batch / seconds_per_step,
                "eta_seconds": (plan.steps - self.done) * seconds_per_step,
            }
        )

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.trainer.schedule(max(self.done - 1, 0))

    def diverged(self, what: str, lr: float) -> DivergedError:
        """What to raise where a number is not finite."""
        kept = f" The last good state is kept in {self.run.folder}." if self.run.folder is not None else ""
        return DivergedError(f"{what} (learning rate {lr:g}).{kept}", hint=self.divergence_hint)

    def _interrupted(self, *, saved: bool) -> InterruptedRunError:
        where = f"{self.name} was interrupted in epoch {self.progress.epoch + 1} after step {self.progress.step}"
        return InterruptedRunError(f"{where}; its state is saved, --resume continues it." if saved else f"{where}.")


def train_(
    model: nn.Module,
    images: TrainingImages,
    plan: TrainingPlan,
    run: TrainingRun,
    *,
    facts: Mapping[str, object],
    make_objective: Callable[[torch.device], Objective],
    make_penalty: Callable[[nn.Module], Penalty],
    make_loop: Callable[..., Loop[Report]],
) -> Report:
    """Train ``model`` in place through all the steps of ``plan``; it stays on the device, in evaluation mode.

    Killed at any moment and called again with equal arguments, it goes on from the newest checkpoint in the run's
    folder to the same weights, on a CPU bit for bit.

    Args:
        model: starting weights; a training from other ones does not resume this one.
        images: training and validation images.
        plan: settings and length.
        run: device, seed, folder of the checkpoints and listener.
        facts: values that JSON can hold and that, with seed, images and starting weights, decide the weights.
        make_objective: function from the device to the loss.
        make_penalty: function from the model to what is done beside minimising the loss.
        make_loop: subclass of `Loop`, or a partial call of one.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; the state is saved.
        PruneError: a loss or weight that is not finite, a full disk, a frozen model, no training images.
    """
    if plan.steps_per_epoch < 1:
        raise PruneError("There is not one batch of training images.")
    decisive = {
        **facts,
        "seed": run.seed,
        "steps_per_epoch": plan.steps_per_epoch,
        "weights": state_digest(model.state_dict()),
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    with own_randomness(run.device), stop_requests() as stop:
        trainer = build_trainer(
            model,
            plan,
            device=run.device,
            seed=run.seed,
            make_objective=make_objective,
            make_penalty=make_penalty,
        )
        loop = make_loop(trainer=trainer, images=images, run=run, stop=stop, progress=TrainingPosition(digest=digest))
        try:
            loop.train()
            return loop.finished()
        finally:
            model.to(memory_format=torch.contiguous_format)


def settle_(trainer: Trainer) -> None:
    """Leave the trained model in evaluation mode, the same in every process."""
    if trainer.accelerator.num_processes > 1:  # BatchNorm statistics are each process's own
        trainer.model.load_state_dict(broadcast(trainer.model.state_dict()))
    trainer.model.eval()


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
