"""What one step of fine-tuning minimises: cross-entropy, distillation from the dense model, or from the net itself.

The three self-distillation losses need no dense model. Each has a companion for every image of a batch, or remembers:

- CS-KD (Yun et al., CVPR 2020): the answer to an image learns from that to another image of its class.
- PS-KD (Kim et al., ICCV 2021): the targets become, epoch by epoch, more of the previous epoch's answers.
- DLB (Shen et al., CVPR 2022): the answer to an image learns from that to its other view, one step earlier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from prunecli.data.loader import Companion
from prunecli.errors import UsageError
from prunecli.models.outputs import logits_of
from prunecli.recipe.losses import CeLoss, CskdLoss, DlbLoss, PskdLoss
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training import checkpoint

Net = Callable[[Tensor], Any]  # images [B, C, H, W] -> logits [B, K], as ``outputs`` finds them


class Objective:
    """The loss of one batch. It may remember something from one step, or epoch, to the next."""

    companion: Companion = "none"  # what each image of a batch comes with, image and companion in turn

    def loss(self, net: Net, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss in float32 of the net, in training mode, on images ``[B, C, H, W]`` and labels ``[B]``."""
        raise NotImplementedError

    def end_epoch_(self, net: nn.Module) -> None:
        """Note that an epoch has ended with this net."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint has to hold for `restore_`."""
        return {}

    def restore_(self, state: Mapping[str, Tensor], net: nn.Module) -> None:
        """Put a ``state`` back; ``net`` is on its device already."""


@dataclass(frozen=True, kw_only=True)
class Supervised(Objective):
    """Cross-entropy, with soft targets where asked, and distillation from a teacher.

    ``mixup`` draws from numpy's global generator, so the caller seeds that.
    """

    criterion: Callable[[Tensor, Tensor], Tensor]
    mixup: Mixup | None = None
    teacher: nn.Module | None = None
    alpha: float = 0.0
    temperature: float = 1.0

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

    def loss(self, net: Net, images: Tensor, labels: Tensor) -> Tensor:
        """(1 - alpha) CE + alpha T^2 KL(teacher_T, student_T)."""
        mixed, targets = self.mix(images, labels)
        logits = logits_of(net(mixed))
        loss = self.criterion(_exact(logits), targets)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = logits_of(self.teacher(mixed))
        distance = distillation_loss(logits, teacher_logits, temperature=self.temperature)
        return (1.0 - self.alpha) * loss + self.alpha * distance


@dataclass(frozen=True, kw_only=True)
class ClassWise(Objective):
    """CS-KD: ``CE(f(x), y) + weight T^2 KL(softmax(f(x') / T) || softmax(f(x) / T))``, x' another image of class y.

    The answer to x' is a constant; it is computed in training mode, as in the authors' code. A companion of another
    class (an image that could not be read has been replaced) counts for nothing.
    """

    companion = "class"
    criterion: Callable[[Tensor, Tensor], Tensor]
    weight: float
    temperature: float

    def loss(self, net: Net, images: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(net(images[0::2]))
        with torch.no_grad():
            others = logits_of(net(images[1::2]))
        alike = (labels[0::2] == labels[1::2])[:, None]
        distance = distillation_loss(logits, torch.where(alike, others, logits.detach()), temperature=self.temperature)
        return self.criterion(_exact(logits), labels[0::2]) + self.weight * distance


class Progressive(Objective):
    """PS-KD: ``CE(f_t(x), (1 - a_t) y + a_t softmax(f_{t-1}(x)))``, ``a_t = weight t / epochs`` in epoch t from 1.

    ``f_{t-1}`` is the net at the end of the epoch before, in evaluation mode; in the first epoch there is none. The
    authors' code keeps what that epoch's training steps had predicted instead, a number for every image and class.
    """

    def __init__(self, *, weight: float, epochs: int) -> None:
        self.weight, self.epochs = weight, epochs
        self.epoch = 0  # epochs completed
        self.before: nn.Module | None = None

    def loss(self, net: Net, images: Tensor, labels: Tensor) -> Tensor:
        logits = _exact(logits_of(net(images)))
        if self.before is None:
            return functional.cross_entropy(logits, labels)
        with torch.no_grad():
            believed = _exact(logits_of(self.before(images))).softmax(dim=1)
        share = self.weight * (self.epoch + 1) / self.epochs
        truth = functional.one_hot(labels, logits.shape[1]).to(believed)
        return functional.cross_entropy(logits, torch.lerp(truth, believed, share))

    def end_epoch_(self, net: nn.Module) -> None:
        self.epoch += 1
        self.before = _constant(net)

    def state(self) -> dict[str, Tensor]:
        before = {} if self.before is None else self.before.state_dict()
        return {"epoch": torch.tensor(self.epoch)} | checkpoint.prefixed("before", before)

    def restore_(self, state: Mapping[str, Tensor], net: nn.Module) -> None:
        self.epoch = int(state["epoch"])
        if self.epoch:
            self.before = _constant(net)
            self.before.load_state_dict(checkpoint.unprefixed("before", state))


class LastBatch(Objective):
    """DLB: ``CE`` on this batch and on the one before, ``+ weight T^2 KL(last_T || now_T)`` on the one before.

    Images of the batch before come again in another view, and learn from the net's answers to their first view, one
    step earlier. The two batches go through the net one after the other, as in the authors' code, so a step costs two.
    """

    companion = "view"

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], *, weight: float, temperature: float) -> None:
        self.criterion, self.weight, self.temperature = criterion, weight, temperature
        self.last: dict[str, Tensor] = {}  # images (second views), labels and logits of the batch before

    def loss(self, net: Net, images: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits_of(net(images[0::2])), labels[0::2]
        last, self.last = self.last, {"images": images[1::2].clone(), "labels": labels, "logits": logits.detach()}
        if not last:
            return self.criterion(_exact(logits), labels)
        again = logits_of(net(last["images"]))
        answers, truth = torch.cat([again, logits]), torch.cat([last["labels"], labels])
        distance = distillation_loss(again, last["logits"], temperature=self.temperature)
        return self.criterion(_exact(answers), truth) + self.weight * distance

    def state(self) -> dict[str, Tensor]:
        return self.last

    def restore_(self, state: Mapping[str, Tensor], net: nn.Module) -> None:
        device = next(net.parameters()).device
        self.last = {name: tensor.to(device) for name, tensor in state.items()}


def distillation_loss(logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Hinton et al. 2015, section 2).

    Args:
        logits: student's logits ``[B, K]``.
        teacher_logits: teacher's logits ``[B, K]``.
        temperature: divisor T of both; the factor T^2 keeps the gradient's size independent of T.

    Returns:
        A scalar in nats, in float32 at least.
    """
    student = functional.log_softmax(_exact(logits) / temperature, dim=1)
    teacher = functional.log_softmax(_exact(teacher_logits) / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def build_objective(
    settings: FinetuneSettings,
    *,
    num_classes: int,
    epochs: int = 1,
    teacher: nn.Module | None = None,
    device: torch.device | None = None,
) -> Objective:
    """The loss the settings ask for.

    Args:
        settings: fine-tuning settings: loss, mixing of images, label smoothing and distillation.
        num_classes: number of classes K.
        epochs: number of epochs of the whole training, over which PS-KD's share grows.
        teacher: dense model, used only where ``distill.share`` is above 0; it is then moved to ``device`` and set to
            evaluation mode.
        device: device of the teacher; ``None`` leaves it where it is.

    Raises:
        UsageError: distillation is asked for and there is no teacher.
    """
    alpha = settings.distill.share
    if alpha > 0 and teacher is None:
        raise UsageError(
            f"finetune.distill.alpha is {alpha:g}, but there is no dense model to learn from.",
            hint="Set it to 0, or run `compress`, which has the dense model.",
        )
    loss = settings.loss
    if isinstance(loss, PskdLoss):
        return Progressive(weight=loss.weight, epochs=epochs)
    mixing = isinstance(loss, CeLoss) and (loss.mixup > 0 or loss.cutmix > 0)
    criterion: Callable[[Tensor, Tensor], Tensor]
    if mixing:
        criterion = SoftTargetCrossEntropy()
    elif loss.label_smoothing > 0:
        criterion = LabelSmoothingCrossEntropy(loss.label_smoothing)
    else:
        criterion = nn.CrossEntropyLoss()
    if isinstance(loss, CskdLoss):
        return ClassWise(criterion=criterion, weight=loss.weight, temperature=loss.temperature)
    if isinstance(loss, DlbLoss):
        return LastBatch(criterion, weight=loss.weight, temperature=loss.temperature)
    return Supervised(
        criterion=criterion,
        mixup=Mixup(
            mixup_alpha=loss.mixup,
            cutmix_alpha=loss.cutmix,
            label_smoothing=loss.label_smoothing,
            num_classes=num_classes,
        )
        if mixing
        else None,
        teacher=teacher.to(device).eval() if teacher is not None and alpha > 0 else None,
        alpha=alpha,
        temperature=settings.distill.temperature,
    )


def _exact(logits: Tensor) -> Tensor:
    """At least in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _constant(net: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode; tensors that modules cached in the last forward pass are detached."""
    kept = [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    held = copy.deepcopy(net, {id(value): value.detach().clone() for value in kept if value.grad_fn is not None}).eval()
    for parameter in held.parameters():
        parameter.requires_grad, parameter.grad = False, None
    return held
