"""Steps over epochs of batches, resumable bit for bit: what fine-tuning and the phases before the cut have in common.

A `Loop` knows where it is and how to save that; what is trained for, what an epoch's end measures and what is reported
belongs to the classes made from it.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from prunecli.errors import DivergedError, InterruptedRunError, PruneError
from prunecli.interrupts import Stopped, stop_if_asked, until
from prunecli.models.tensors import state_digest
from prunecli.training import checkpoint
from prunecli.training.checkpoint import Progress
from prunecli.training.step import Trainer, TrainingImages

Event = dict[str, Any]
_EVENT_SECONDS = 0.5  # at most one step event in this time
_LOSSES_HELD = 16  # losses a GPU run collects before it waits for them; a NaN is found that many steps late


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is fixed for a training run.

    Attributes:
        job: digest of all that decides the resulting weights; only an equal job resumes this one.
        steps: optimiser steps in all; the last epoch ends with them, complete or not.
        checkpoint_every: save every so many steps as well; an epoch's end always saves.
        folder: where checkpoints go; none: no resuming.
        stop: set where the run is to stop between two steps.
        emit: gets the events.
    """

    job: str
    steps: int
    checkpoint_every: int | None
    folder: Path | None
    stop: threading.Event
    emit: Callable[[Event], None]


class Loop(ABC):
    """One training run: its position, what it measured, and the loop itself."""

    name: str  # how an interruption calls the run
    calmer: str  # what to change where it diverges

    def __init__(self, trainer: Trainer, images: TrainingImages, run: Run) -> None:
        self.trainer, self.images, self.steps = trainer, images, run.steps
        self.checkpoint_every, self.folder, self.stop, self.emit = run.checkpoint_every, run.folder, run.stop, run.emit
        self.progress = Progress(job=run.job)
        self.pending: list[tuple[Tensor, float, int]] = []  # loss, learning rate and step, not yet waited for
        self.start = state_digest(_trainable(trainer.model))

    # ------------------------------------------------------------------------------------------ what differs

    @abstractmethod
    def measured(self, mean_loss: float) -> dict[str, float]:
        """What the history says about the epoch that was just trained with this mean loss."""

    def own_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and optimiser."""
        return {}

    def restore_own_(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most loops have nothing of their own
        """Put the tensors of a checkpoint back that are neither weights nor optimiser."""

    # ------------------------------------------------------------------------------------------ the loop

    @property
    def epochs(self) -> int:
        """Epochs in all, the last one perhaps not complete."""
        return math.ceil(self.steps / self.images.steps_per_epoch)

    @property
    def done(self) -> int:
        """Optimiser steps taken so far."""
        return self.progress.epoch * self.images.steps_per_epoch + self.progress.step

    def run(self) -> None:
        """All epochs that are left. Raises InterruptedRunError with the state saved."""
        try:
            self._resume()
            try:
                while self.progress.epoch < self.epochs:
                    self._train_epoch()
                    self._close_epoch()
                    self._save()
                stop_if_asked(self.stop)  # also where it was during the last validation or save
            except Stopped:
                self._save()
                raise self._interrupted(saved=self.folder is not None) from None
        except KeyboardInterrupt:
            raise self._interrupted(saved=False) from None

    def _train_epoch(self) -> None:
        """The rest of the running epoch, from the position in ``progress``."""
        epoch, first, whole = self.progress.epoch, self.progress.step, self.images.steps_per_epoch
        steps = self._steps_of_epoch
        seconds, began, shown = self.progress.seconds, time.monotonic(), -math.inf
        held = _LOSSES_HELD if self.trainer.device.type == "cuda" else 1
        companion = self.trainer.objective.companion
        loader = self.trainer.shared(self.images.train_loader(epoch=epoch, skip_batches=first, companion=companion))
        batches = until(self.stop, loader) if first < steps else iter(())
        for images, labels in batches:
            loss, lr = self.trainer.step_(images, labels, epoch=epoch, step=self.progress.step)
            step, now = self.progress.step + 1, time.monotonic()
            self.pending.append((loss, lr, step))
            self.advance(step=step, seconds=seconds + now - began)
            if len(self.pending) >= held or step == steps:
                self._read_losses()
            if not self.pending and (step == steps or now - shown >= _EVENT_SECONDS):
                shown = now
                self._show_step(batch=len(labels), seconds_per_step=(now - began) / (step - first))
            if self.checkpoint_every and step % self.checkpoint_every == 0 and step < steps:
                self._save()
            if step == steps < whole:
                break
        if self.progress.step != steps:
            raise PruneError(f"Epoch {epoch + 1} had {self.progress.step} batches where {steps} were promised.")

    def _read_losses(self) -> None:
        """Add the losses of the last steps to the epoch's sum; the first that is not finite stops the run."""
        if not self.pending:
            return
        values = torch.stack([loss for loss, _, _ in self.pending]).double().tolist()
        for value, (_, lr, step) in zip(values, self.pending, strict=True):
            if not math.isfinite(value):
                raise self.diverged(f"The loss is {value} at step {step} of epoch {self.progress.epoch + 1}", lr)
        self.pending = []
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
        self.emit({"event": "epoch", **entry, "epoch": epoch, "epochs": self.epochs})

    # ------------------------------------------------------------------------------------------ position

    @property
    def _steps_of_epoch(self) -> int:
        whole = self.images.steps_per_epoch
        return min(whole, self.steps - self.progress.epoch * whole)

    def _save(self) -> None:
        """Checkpoint, by the main process. Raises PruneError where a weight is not finite, so that no such state is
        ever kept, and where the disk refuses.
        """
        if self.folder is None or not self.trainer.is_main:
            return
        self._read_losses()
        trainer, named = self.trainer, checkpoint.prefixed
        if not all(bool(tensor.isfinite().all()) for tensor in trainer.model.parameters()):
            raise self.diverged("A weight is not finite", self.lr)
        tensors = named("model", trainer.model.state_dict())
        tensors |= named("optimizer", checkpoint.optimizer_tensors(trainer.optimizer, trainer.model))
        path = checkpoint.save(self.folder, self.progress, tensors | self.own_tensors())
        self.emit({"event": "saved", "path": str(path), "epoch": self.progress.epoch, "step": self.progress.step})

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder, job=self.progress.job) if self.folder is not None else None
        if found is None:
            return
        self.progress, tensors = found
        trainer, part = self.trainer, checkpoint.unprefixed
        trainer.model.load_state_dict(part("model", tensors))
        checkpoint.restore_optimizer_(trainer.optimizer, trainer.model, part("optimizer", tensors))
        self.restore_own_(tensors)
        self.emit({"event": "resume", "epoch": self.progress.epoch, "step": self.progress.step})

    def advance(self, **changes: object) -> None:
        """Change the position or what was measured."""
        self.progress = self.progress.model_copy(update=changes)

    def _show_step(self, *, batch: int, seconds_per_step: float) -> None:
        """``step`` of ``steps`` counts the whole run; ``loss`` is the epoch's mean so far."""
        self.emit(
            {
                "event": "step",
                "step": self.done,
                "steps": self.steps,
                "epoch": self.progress.epoch + 1,
                "epochs": self.epochs,
                "loss": self.progress.loss_sum / self.progress.step,
                "lr": self.lr,
                "images_per_second": batch / seconds_per_step,
                "eta_seconds": (self.steps - self.done) * seconds_per_step,
            }
        )

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.trainer.schedule(max(self.done - 1, 0))

    def diverged(self, what: str, lr: float) -> DivergedError:
        """What to raise where a number is not finite."""
        kept = f" The last good state is kept in {self.folder}." if self.folder is not None else ""
        return DivergedError(f"{what} (learning rate {lr:g}).{kept}", hint=self.calmer)

    def _interrupted(self, *, saved: bool) -> InterruptedRunError:
        where = f"{self.name} was interrupted in epoch {self.progress.epoch + 1} after step {self.progress.step}"
        return InterruptedRunError(f"{where}; its state is saved, --resume continues it." if saved else f"{where}.")


def settle_(trainer: Trainer) -> None:
    """Leave the trained model in evaluation mode, the same in every process."""
    if trainer.accelerator.num_processes > 1:  # BatchNorm statistics are each process's own
        trainer.model.load_state_dict(broadcast(trainer.model.state_dict()))
    trainer.model.eval()


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
