"""The fine-tuning loop: explicit, resumable bit for bit, and honest about what it did."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from prunecli.errors import PruneError, UsageError
from prunecli.interrupts import stop_requests, until
from prunecli.measure.accuracy import evaluate
from prunecli.measure.batch_norm import recalibrate_bn_
from prunecli.models.tensors import state_digest
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training import checkpoint
from prunecli.training.loop import Event, Loop, Run, settle_
from prunecli.training.objective import build_objective
from prunecli.training.optimizer import optimizer_name
from prunecli.training.penalty import Orthogonality, Penalty
from prunecli.training.probe import ProbeResult, probe_loss
from prunecli.training.step import Trainer, TrainingImages, build_trainer, own_randomness
from prunecli.values.report import Accuracy, FinetuneReport

__all__ = ["ProbeResult", "TrainingImages", "evaluate", "finetune", "optimizer_name", "probe_loss", "recalibrate_bn_"]


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
        teacher: the dense model, needed where ``settings.distill.share`` is above 0.
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
                settings, num_classes=images.num_classes, epochs=epochs, teacher=teacher, device=where
            ),
            make_penalty=lambda trained: _penalty(trained, settings),
        )
        run = Run(
            job=job,
            steps=epochs * images.steps_per_epoch,
            checkpoint_every=settings.checkpoint_every,
            folder=folder,
            stop=stop,
            emit=on_event or (lambda _: None),
        )
        tuning = _Finetuning(trainer, images, run, settings)
        try:
            tuning.run()
            return tuning.finished(lr)
        finally:
            model.to(memory_format=torch.contiguous_format)


class _Finetuning(Loop):
    """One fine-tuning run: validation after every epoch, the best one kept where it is exported."""

    name = "Fine-tuning"
    calmer = "Use a smaller --lr or finetune.clip_grad=1."

    def __init__(self, trainer: Trainer, images: TrainingImages, run: Run, settings: FinetuneSettings) -> None:
        super().__init__(trainer, images, run)
        self.settings = settings
        self.best: dict[str, Tensor] = {}  # on the CPU; kept only where the best epoch is exported

    def measured(self, mean_loss: float) -> dict[str, float]:
        """Validation figures beside the training loss. Raises PruneError where the loss is not finite."""
        lr, accuracy = self.lr, self._validated()
        if not math.isfinite(accuracy.loss):
            raise self.diverged(f"The validation loss after epoch {self.progress.epoch + 1} is {accuracy.loss}", lr)
        top5 = {} if accuracy.top5 is None else {"top5": accuracy.top5}
        entry = {"lr": lr, "train_loss": mean_loss, "loss": accuracy.loss, "top1": accuracy.top1, **top5}
        if self.settings.export == "best" and _best((*self.progress.history, entry)) is entry:
            self.best = _snapshot(self.trainer.exported)
        self.trainer.objective.end_epoch_(self.trainer.model)
        return entry

    def _validated(self) -> Accuracy:
        """Accuracy of what would be exported now, in its own precision; several processes go by the main one's."""
        trainer = self.trainer
        loader = until(self.stop, self.images.val_loader())
        accuracy = evaluate(trainer.exported, loader, device=trainer.device)
        if trainer.accelerator.num_processes > 1:
            accuracy = broadcast_object_list([accuracy])[0]
        return accuracy

    def own_tensors(self) -> dict[str, Tensor]:
        tensors = checkpoint.prefixed("best", self.best)
        tensors |= checkpoint.prefixed("objective", self.trainer.objective.state())
        if self.trainer.ema is not None:
            tensors |= checkpoint.prefixed("ema", self.trainer.ema.module.state_dict())
        return tensors

    def restore_own_(self, tensors: Mapping[str, Tensor]) -> None:
        self.best = checkpoint.unprefixed("best", tensors)
        self.trainer.objective.restore_(checkpoint.unprefixed("objective", tensors), self.trainer.model)
        if self.trainer.ema is not None:
            self.trainer.ema.module.load_state_dict(checkpoint.unprefixed("ema", tensors))

    def finished(self, lr: float) -> FinetuneReport:
        """Put the exported weights into the model and report both the last and the best epoch."""
        model = self.trainer.model
        if self.best:
            model.load_state_dict(self.best)
        elif self.trainer.ema is not None:
            model.load_state_dict(self.trainer.ema.module.state_dict())
        settle_(self.trainer)
        history = self.progress.history
        best = _best(history)
        return FinetuneReport(
            epochs=self.epochs,
            steps=self.steps,
            lr=lr,
            schedule=self.settings.schedule,
            distill=self.settings.distill.share,
            best_epoch=int(best["epoch"]),
            best_top1=best["top1"],
            last_top1=history[-1]["top1"],
            history=history,
        )


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
        "teacher": state_digest(teacher.state_dict()) if teacher and settings.distill.share > 0 else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _penalty(model: nn.Module, settings: FinetuneSettings) -> Penalty:
    if settings.regulariser == "none":
        return Penalty()
    return Orthogonality(model, settings.regulariser, settings.regulariser_weight)


def _best(history: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
    """The first epoch with the highest top-1."""
    return max(history, key=lambda entry: entry["top1"])


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
