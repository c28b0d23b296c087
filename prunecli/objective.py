"""What fine-tuning minimises: cross-entropy with soft targets, and distillation from the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from prunecli.errors import UsageError
from prunecli.outputs import logits_of
from prunecli.recipe import FinetuneSettings


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of one batch. ``mixup`` draws from numpy's global generator, so the caller seeds that."""

    criterion: Callable[[Tensor, Tensor], Tensor]
    mixup: Mixup | None
    teacher: nn.Module | None
    alpha: float
    temperature: float

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, ...]`` and labels ``[B]`` -> mixed images and soft targets ``[B, K]``; as they are if off.

        timm mixes pairs, so the last image of an odd batch stays unmixed.
        """
        if self.mixup is None:
            return images, labels
        even = len(images) - len(images) % 2
        mixed = images.clone()  # timm mixes in place, and the loader may own the memory
        targets = torch.empty(len(labels), self.mixup.num_classes, device=labels.device)
        if even:
            _, targets[:even] = self.mixup(mixed[:even], labels[:even])
        if even < len(images):
            off = self.mixup.label_smoothing / self.mixup.num_classes
            targets[even:] = off
            targets[even, labels[even]] += 1.0 - self.mixup.label_smoothing
        return mixed, targets

    def __call__(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Scalar loss of ``logits`` [B, K] in float32: (1 - alpha) CE + alpha T^2 KL(teacher_T, student_T)."""
        loss = self.criterion(logits.float(), targets)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = logits_of(self.teacher(images))
        distance = distillation_loss(logits, teacher_logits, temperature=self.temperature)
        return (1.0 - self.alpha) * loss + self.alpha * distance


def distillation_loss(logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Hinton et al. 2015, section 2).

    Args:
        logits: the student's, ``[B, K]``.
        teacher_logits: ``[B, K]``.
        temperature: T; the factor T^2 keeps the gradient's size independent of it.
    """
    student = functional.log_softmax(logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def build_objective(settings: FinetuneSettings, *, num_classes: int, teacher: nn.Module | None) -> Objective:
    """The loss the settings ask for; ``teacher`` is used only where ``distill.alpha`` is above 0.

    Raises:
        UsageError: distillation is asked for and there is no teacher.
    """
    alpha = settings.distill.alpha
    if alpha > 0 and teacher is None:
        raise UsageError(
            f"finetune.distill.alpha is {alpha:g}, but there is no dense model to learn from.",
            hint="Set it to 0, or run `compress`, which has the dense model.",
        )
    mixing = settings.mixup > 0 or settings.cutmix > 0
    criterion: Callable[[Tensor, Tensor], Tensor]
    if mixing:
        criterion = SoftTargetCrossEntropy()
    elif settings.label_smoothing > 0:
        criterion = LabelSmoothingCrossEntropy(settings.label_smoothing)
    else:
        criterion = nn.CrossEntropyLoss()
    return Objective(
        criterion=criterion,
        mixup=Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            num_classes=num_classes,
        )
        if mixing
        else None,
        teacher=teacher if alpha > 0 else None,
        alpha=alpha,
        temperature=settings.distill.temperature,
    )
