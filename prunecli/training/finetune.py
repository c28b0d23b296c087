"""Fine-tuning: validation after every epoch, and a report of the last and the best one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from prunecli.errors import UsageError
from prunecli.interrupts import until
from prunecli.measure.accuracy import evaluate
from prunecli.models.tensors import state_digest
from prunecli.recipe.losses import NoRegulariser
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training import checkpoint
from prunecli.training.loop import Loop, TrainingRun, settle_, train_
from prunecli.training.objective import build_objective
from prunecli.training.optimizer import optimizer_name
from prunecli.training.penalty import Orthogonality, Penalty
from prunecli.training.step import TrainingImages, TrainingPlan
from prunecli.values.report import Accuracy, FinetuneReport


def finetune(
    model: nn.Module,
    images: TrainingImages,
    settings: FinetuneSettings,
    *,
    lr: float,
    epochs: int,
    run: TrainingRun,
    teacher: nn.Module | None = None,
) -> FinetuneReport:
    """Fine-tune ``model`` in place; afterwards it holds the exported weights (last or best epoch, averaged if asked).

    It stays on the device, in evaluation mode. Interrupted or killed, it resumes as `loop.train_` describes.

    Args:
        model: starting weights.
        images: training and validation images.
        settings: fine-tuning settings; ``epochs`` and ``lr`` are not read from it.
        lr: peak learning rate.
        epochs: number of epochs, at least 1.
        run: device, seed, folder of the checkpoints and listener.
        teacher: dense model, needed where ``settings.distill.share`` is above 0.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; the state is saved.
        PruneError: a loss that is not finite, a full disk, a frozen model, no training images.
        UsageError: distillation without a teacher, fewer than one epoch.
    """
    if epochs < 1:
        raise UsageError(f"Fine-tuning needs at least one epoch, not {epochs}.")
    plan = TrainingPlan(
        settings=settings,
        lr=lr,
        steps=epochs * images.steps_per_epoch,
        steps_per_epoch=images.steps_per_epoch,
        checkpoint_every=settings.checkpoint_every,
    )
    return train_(
        model,
        images,
        plan,
        run,
        facts={
            "settings": settings.model_dump(mode="json", exclude={"checkpoint_every", "lr", "epochs"}),
            "optimizer": optimizer_name(settings, model),
            "lr": lr,
            "epochs": epochs,
            "num_classes": images.num_classes,
            "teacher": state_digest(teacher.state_dict()) if teacher and settings.distill.share > 0 else None,
        },
        make_objective=lambda device: build_objective(
            settings, num_classes=images.num_classes, epochs=epochs, teacher=teacher, device=device
        ),
        make_penalty=lambda trained: (
            Penalty()
            if isinstance(settings.regulariser, NoRegulariser)
            else Orthogonality(trained, settings.regulariser.kind, settings.regulariser.weight)
        ),
        make_loop=_Finetuning,
    )


@dataclass(kw_only=True, eq=False)
class _Finetuning(Loop[FinetuneReport]):
    """One fine-tuning: validation after every epoch, the best one kept where it is exported."""

    name = "Fine-tuning"
    divergence_hint = "Use a smaller --lr or finetune.clip_grad=1."

    best: dict[str, Tensor] = field(default_factory=dict)  # on the CPU; kept only where the best epoch is exported

    def measured(self, mean_loss: float) -> dict[str, float]:
        """Validation figures beside the training loss. Raises PruneError where the loss is not finite."""
        lr, accuracy = self.lr, self._validated()
        if not math.isfinite(accuracy.loss):
            raise self.diverged(f"The validation loss after epoch {self.progress.epoch + 1} is {accuracy.loss}", lr)
        top5 = {} if accuracy.top5 is None else {"top5": accuracy.top5}
        entry = {"lr": lr, "train_loss": mean_loss, "loss": accuracy.loss, "top1": accuracy.top1, **top5}
        if self.trainer.plan.settings.export == "best" and _best((*self.progress.history, entry)) is entry:
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

    def finished(self) -> FinetuneReport:
        """Put the exported weights into the model and report both the last and the best epoch."""
        model, plan = self.trainer.model, self.trainer.plan
        if self.best:
            model.load_state_dict(self.best)
        elif self.trainer.ema is not None:
            model.load_state_dict(self.trainer.ema.module.state_dict())
        settle_(self.trainer)
        history = self.progress.history
        best = _best(history)
        return FinetuneReport(
            epochs=plan.epochs,
            steps=plan.steps,
            lr=plan.lr,
            schedule=plan.settings.schedule.kind,
            distill=plan.settings.distill.share,
            best_epoch=int(best["epoch"]),
            best_top1=best["top1"],
            last_top1=history[-1]["top1"],
            history=history,
        )


def _best(history: Iterable[Mapping[str, float]]) -> Mapping[str, float]:
    """The first epoch with the highest top-1."""
    return max(history, key=lambda entry: entry["top1"])


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
