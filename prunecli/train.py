"""The fine-tuning loop: explicit, resumable bit for bit, and honest about what it did."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from prunecli import checkpoint
from prunecli.checkpoint import Progress
from prunecli.errors import InterruptedRunError, PruneError, UsageError
from prunecli.evaluation import evaluate, recalibrate_bn_
from prunecli.objective import build_objective
from prunecli.probe import ProbeResult, probe_loss
from prunecli.recipe import FinetuneSettings
from prunecli.report import Accuracy, FinetuneReport
from prunecli.schedule import optimizer_name
from prunecli.stopping import Stopped, stop_if_asked, stop_requests, until
from prunecli.trainer import Trainer, TrainingImages, build_trainer, own_randomness
from prunecli.zoo import state_digest

__all__ = ["ProbeResult", "TrainingImages", "evaluate", "finetune", "optimizer_name", "probe_loss", "recalibrate_bn_"]

Event = dict[str, Any]
_EVENT_SECONDS = 0.5  # at most one step event in this time
_LOSSES_HELD = 16  # losses a GPU run collects before it waits for them; a NaN is found that many steps late


def finetune(
    model: nn.Module,
    images: TrainingImages,
    settings: FinetuneSettings,
    *,
    lr: float,
    epochs: int,
    device: torch.device,
    seed: int,
    folder: Path | None = None,
    teacher: nn.Module | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> FinetuneReport:
    """Fine-tune ``model`` in place; afterwards it holds the exported weights (last or best epoch, averaged if asked).

    It stays on ``device``, in evaluation mode.

    Killed at any moment and called again with the same arguments, it goes on from the newest checkpoint in ``folder``
    to the same weights, on a CPU bit for bit. Events (``step`` at most twice a second, ``epoch``, ``saved``,
    ``resume``) are JSON-able dicts.

    Args:
        model: the starting weights; another start is another job and doesn't resume this one.
        images: training and validation images.
        settings: ``epochs`` and ``lr`` of it are not read, the resolved values are arguments.
        lr: the peak learning rate.
        epochs: at least 1.
        device: where to train.
        seed: of all random numbers but the loader's own.
        folder: where checkpoints go; none: no resuming.
        teacher: the dense model, needed where ``settings.distill.alpha`` is above 0.
        on_event: called between steps.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; the state is saved.
        PruneError: NaN loss, full disk, frozen model, no training images.
        UsageError: distillation without a teacher, fewer than one epoch.
    """
    if epochs < 1:
        raise UsageError(f"Fine-tuning needs at least one epoch, not {epochs}.")
    if images.steps_per_epoch < 1:
        raise PruneError("There is not one batch of training images.")
    job = _job(model, images, settings, lr=lr, epochs=epochs, seed=seed, teacher=teacher)
    with own_randomness(device), stop_requests() as stop:
        trainer = build_trainer(
            model,
            settings,
            lr=lr,
            epochs=epochs,
            steps_per_epoch=images.steps_per_epoch,
            device=device,
            seed=seed,
            make_objective=lambda where: build_objective(
                settings, num_classes=images.num_classes, teacher=_frozen(teacher, where)
            ),
        )
        run = _Finetuning(trainer, images, settings, job, epochs, folder, stop, on_event or (lambda _: None))
        try:
            return run.whole(lr)
        except KeyboardInterrupt:
            raise _interrupted(run.progress, saved=False) from None
        finally:
            model.to(memory_format=torch.contiguous_format)


class _Finetuning:
    """One fine-tuning run: its position, what it measured, and the loop itself."""

    def __init__(
        self,
        trainer: Trainer,
        images: TrainingImages,
        settings: FinetuneSettings,
        job: str,
        epochs: int,
        folder: Path | None,
        stop: threading.Event,
        emit: Callable[[Event], None],
    ) -> None:
        self.trainer, self.images, self.settings = trainer, images, settings
        self.epochs, self.folder, self.stop, self.emit = epochs, folder, stop, emit
        self.progress = Progress(job=job)
        self.best: dict[str, Tensor] = {}  # on the CPU; kept only where the best epoch is exported
        self.pending: list[tuple[Tensor, float, int]] = []  # loss, learning rate and step, not yet waited for
        self.start = state_digest(_trainable(trainer.model))

    def whole(self, lr: float) -> FinetuneReport:
        """All epochs that are left, then the report. Raises InterruptedRunError with the state saved."""
        self._resume()
        try:
            while self.progress.epoch < self.epochs:
                self._train_epoch()
                self._close_epoch()
                self._save()
            stop_if_asked(self.stop)  # also where it was during the last validation or save
        except Stopped:
            self._save()
            raise _interrupted(self.progress, saved=self.folder is not None) from None
        return self._finished(lr)

    def _train_epoch(self) -> None:
        """The rest of the running epoch, from the position in ``progress``."""
        epoch, first, steps = self.progress.epoch, self.progress.step, self.images.steps_per_epoch
        seconds, began, shown = self.progress.seconds, time.monotonic(), -math.inf
        held = _LOSSES_HELD if self.trainer.device.type == "cuda" else 1
        loader = self.trainer.shared(self.images.train_loader(epoch=epoch, skip_batches=first))
        for images, labels in until(self.stop, loader):
            loss, lr = self.trainer.step_(images, labels, epoch=epoch, step=self.progress.step)
            step, now = self.progress.step + 1, time.monotonic()
            self.pending.append((loss, lr, step))
            self._advance(step=step, seconds=seconds + now - began)
            if len(self.pending) >= held or step == steps:
                self._read_losses()
            if not self.pending and (step == steps or now - shown >= _EVENT_SECONDS):
                shown = now
                self._show_step(batch=len(labels), seconds_per_step=(now - began) / (step - first))
            if self.settings.checkpoint_every and step % self.settings.checkpoint_every == 0 and step < steps:
                self._save()
        if self.progress.step != steps:
            raise PruneError(f"Epoch {epoch + 1} had {self.progress.step} batches where {steps} were promised.")

    def _read_losses(self) -> None:
        """Add the losses of the last steps to the epoch's sum; the first that is not finite stops the run."""
        if not self.pending:
            return
        values = torch.stack([loss for loss, _, _ in self.pending]).double().tolist()
        for value, (_, lr, step) in zip(values, self.pending, strict=True):
            if not math.isfinite(value):
                raise self._diverged(f"The loss is {value} at step {step} of epoch {self.progress.epoch + 1}", lr)
        self.pending = []
        self._advance(loss_sum=math.fsum((self.progress.loss_sum, *values)))

    def _close_epoch(self) -> None:
        """Validate and enter the epoch in the history."""
        epoch, lr = self.progress.epoch + 1, self._lr
        if epoch == 1 and state_digest(_trainable(self.trainer.model)) == self.start:
            raise PruneError(f"Epoch 1 at learning rate {lr:g} changed no parameter; nothing is being fine-tuned.")
        began = time.monotonic()
        accuracy = self._validated()
        if not math.isfinite(accuracy.loss):
            raise self._diverged(f"The validation loss after epoch {epoch} is {accuracy.loss}", lr)
        top5 = {} if accuracy.top5 is None else {"top5": accuracy.top5}
        entry = {
            "epoch": float(epoch),
            "lr": lr,
            "train_loss": self.progress.loss_sum / self.images.steps_per_epoch,
            "loss": accuracy.loss,
            "top1": accuracy.top1,
            **top5,
            "seconds": self.progress.seconds + time.monotonic() - began,
        }
        history = (*self.progress.history, entry)
        if self.settings.export == "best" and _best(history) is entry:
            self.best = _snapshot(self.trainer.exported)
        self._advance(epoch=epoch, step=0, loss_sum=0.0, seconds=0.0, history=history)
        self.emit({"event": "epoch", **entry, "epoch": epoch, "epochs": self.epochs})

    def _validated(self) -> Accuracy:
        """Accuracy of what would be exported now, in its own precision; several processes go by the main one's."""
        trainer = self.trainer
        loader = until(self.stop, self.images.val_loader())
        accuracy = evaluate(trainer.exported, loader, device=trainer.device)
        if trainer.accelerator.num_processes > 1:
            accuracy = broadcast_object_list([accuracy])[0]
        return accuracy

    def _finished(self, lr: float) -> FinetuneReport:
        """Put the exported weights into the model and report both the last and the best epoch."""
        model = self.trainer.model
        if self.best:
            model.load_state_dict(self.best)
        elif self.trainer.ema is not None:
            model.load_state_dict(self.trainer.ema.module.state_dict())
        if self.trainer.accelerator.num_processes > 1:  # BatchNorm statistics are each process's own
            model.load_state_dict(broadcast(model.state_dict()))
        model.eval()
        history = self.progress.history
        best = _best(history)
        return FinetuneReport(
            epochs=self.epochs,
            steps=self.epochs * self.images.steps_per_epoch,
            lr=lr,
            schedule=self.settings.schedule,
            best_epoch=int(best["epoch"]),
            best_top1=best["top1"],
            last_top1=history[-1]["top1"],
            history=history,
        )

    # ------------------------------------------------------------------------------------------ position

    def _save(self) -> None:
        """Checkpoint, by the main process. Raises PruneError where a weight is not finite, so that no such state is
        ever kept, and where the disk refuses.
        """
        if self.folder is None or not self.trainer.is_main:
            return
        self._read_losses()
        trainer, named = self.trainer, checkpoint.prefixed
        if not all(bool(tensor.isfinite().all()) for tensor in trainer.model.parameters()):
            raise self._diverged("A weight is not finite", self._lr)
        tensors = named("model", trainer.model.state_dict())
        tensors |= named("optimizer", checkpoint.optimizer_tensors(trainer.optimizer, trainer.model))
        tensors |= named("best", self.best)
        if trainer.ema is not None:
            tensors |= named("ema", trainer.ema.module.state_dict())
        path = checkpoint.save(self.folder, self.progress, tensors)
        self.emit({"event": "saved", "path": str(path), "epoch": self.progress.epoch, "step": self.progress.step})

    def _resume(self) -> None:
        found = checkpoint.newest(self.folder, job=self.progress.job) if self.folder is not None else None
        if found is None:
            return
        self.progress, tensors = found
        trainer, part = self.trainer, checkpoint.unprefixed
        trainer.model.load_state_dict(part("model", tensors))
        checkpoint.restore_optimizer_(trainer.optimizer, trainer.model, part("optimizer", tensors))
        self.best = part("best", tensors)
        if trainer.ema is not None:
            trainer.ema.module.load_state_dict(part("ema", tensors))
        self.emit({"event": "resume", "epoch": self.progress.epoch, "step": self.progress.step})

    def _advance(self, **changes: object) -> None:
        self.progress = self.progress.model_copy(update=changes)

    def _show_step(self, *, batch: int, seconds_per_step: float) -> None:
        """``step`` of ``steps`` counts the whole run; ``loss`` is the epoch's mean so far."""
        steps = self.images.steps_per_epoch
        done, total = self.progress.epoch * steps + self.progress.step, self.epochs * steps
        self.emit(
            {
                "event": "step",
                "step": done,
                "steps": total,
                "epoch": self.progress.epoch + 1,
                "epochs": self.epochs,
                "loss": self.progress.loss_sum / self.progress.step,
                "lr": self._lr,
                "images_per_second": batch / seconds_per_step,
                "eta_seconds": (total - done) * seconds_per_step,
            }
        )

    @property
    def _lr(self) -> float:
        return float(self.trainer.optimizer.param_groups[0]["lr"])

    def _diverged(self, what: str, lr: float) -> PruneError:
        kept = f" The last good state is kept in {self.folder}." if self.folder is not None else ""
        return PruneError(f"{what} (learning rate {lr:g}).{kept}", hint="Use a smaller --lr or finetune.clip_grad=1.")


def _job(
    model: nn.Module,
    images: TrainingImages,
    settings: FinetuneSettings,
    *,
    lr: float,
    epochs: int,
    seed: int,
    teacher: nn.Module | None,
) -> str:
    """Digest of all that decides the resulting weights; how often a run saves does not."""
    parts = {
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_every", "lr", "epochs"}),
        "optimizer": optimizer_name(settings, model),
        "lr": lr,
        "epochs": epochs,
        "seed": seed,
        "steps_per_epoch": images.steps_per_epoch,
        "num_classes": images.num_classes,
        "weights": state_digest(model.state_dict()),
        "teacher": state_digest(teacher.state_dict()) if teacher and settings.distill.alpha > 0 else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _frozen(teacher: nn.Module | None, device: torch.device) -> nn.Module | None:
    return None if teacher is None else teacher.to(device).eval()


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _best(history: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
    """The first epoch with the highest top-1."""
    return max(history, key=lambda entry: entry["top1"])


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def _interrupted(progress: Progress, *, saved: bool) -> InterruptedRunError:
    where = f"Fine-tuning was interrupted in epoch {progress.epoch + 1} after step {progress.step}"
    return InterruptedRunError(f"{where}; its state is saved, --resume continues it." if saved else f"{where}.")
