"""A short trial of fixed length: which starting point is worth fine-tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prunecli.errors import PruneError
from prunecli.measure.accuracy import answers
from prunecli.measure.batch_norm import recalibrate_bn_
from prunecli.randomness import own_randomness
from prunecli.recipe.losses import supervised_part
from prunecli.recipe.schedules import ConstantSchedule
from prunecli.recipe.settings import DistillSettings, FinetuneSettings
from prunecli.training.objective import build_objective
from prunecli.training.step import Trainer, TrainingImages, TrainingPlan, build_trainer

HELD_OUT = 512  # most images a probe is judged on
_BYTES = 2**29  # most memory a probe's images take


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """A short trial. Losses are in nats, and infinite where the trial diverged.

    A net that was damaged by a cut is far too confident, and its plain loss is above that of a net that guesses. The
    calibrated losses divide the logits by the one temperature that makes their mean lowest.

    Attributes:
        train_loss: mean over the steps; ``None`` where no step was taken.
        val_loss: mean over the held-out images.
        val_top1: top-1 accuracy on the held-out images, in percent.
        lr: learning rate of the steps; ``None`` where no step was taken.
        calibrated: calibrated loss of each held-out image, always the same images in the same order, so that two
            trials can be compared image by image.
    """

    train_loss: float | None
    val_loss: float
    val_top1: float
    lr: float | None
    calibrated: tuple[float, ...]


def probe_loss(
    model: nn.Module,
    images: TrainingImages,
    *,
    steps: int,
    lr: float,
    settings: FinetuneSettings,
    device: torch.device,
    seed: int,
) -> ProbeResult:
    """Take ``steps`` optimiser steps at constant ``lr`` on a copy and judge it on training images it did not see.

    Both parts come from the calibration images, a quarter of them (at most 512) held out; the validation split is never
    touched, nor is ``model``. Small sets are gone through again in another order. Distillation and the weight average
    are left out: the trial compares starting points, and it is too short for either. After the steps BatchNorm
    statistics are re-estimated on the trial's own images, since a running average still lags behind the weights by then
    and would decide the outcome (training itself never reads it, so it is no property of a starting point).

    Args:
        model: the starting point.
        images: source of the calibration images.
        steps: number of optimiser steps; 0 only evaluates.
        lr: learning rate of every step.
        settings: optimiser, clipping, mixup and precision of the trial.
        device: device to compute on.
        seed: seed of the images' order, of dropout and of mixup.

    Raises:
        PruneError: fewer than two calibration images, or a frozen model.
    """
    trial = copy.deepcopy(model)
    batch_size = _batch_size(images)
    inputs, labels = images.calibration(_image_count(images, steps * batch_size))
    held = min(HELD_OUT, len(labels) // 4 or 1) if steps else len(labels)
    if steps and len(labels) <= held:
        raise PruneError("A trial fine-tuning needs at least two training images.")
    losses: list[float] = []
    plain = settings.updated(
        schedule=ConstantSchedule(),
        original=None,
        ema=None,
        distill=DistillSettings(),
        loss=supervised_part(settings.loss),
    )
    with own_randomness(device):
        if steps:
            trainer = build_trainer(
                trial,
                TrainingPlan(settings=plain, lr=lr, steps=steps, steps_per_epoch=steps),
                device=device,
                seed=seed,
                make_objective=lambda _: build_objective(plain, num_classes=images.num_classes),
            )
            losses = _train(
                trainer, inputs[held:], labels[held:], batch_size=min(batch_size, len(labels) - held), seed=seed
            )
        judged = zip(torch.split(inputs[:held], batch_size), torch.split(labels[:held], batch_size), strict=True)
        logits, truth = answers(trial, judged, device=device)
    return ProbeResult(
        lr=lr if steps else None,
        train_loss=_finite(sum(losses) / steps) if steps else None,
        val_loss=_finite(float(cross_entropy(logits, truth))),
        val_top1=100 * int((logits.argmax(dim=1) == truth).sum()) / len(truth),
        calibrated=tuple(calibrated_losses(logits, truth).tolist()),
    )


def calibrated_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy ``[n]`` in nats of ``logits [n, K]`` over the temperature, of 61 from 0.1 to 100, that suits best.

    One that is not finite counts as infinite.
    """
    scaled = (cross_entropy(logits / t, labels, reduction="none") for t in torch.logspace(-1, 2, 61).tolist())
    losses = (values.nan_to_num(nan=math.inf) for values in scaled)
    return min(losses, key=lambda values: float(values.mean()))


def _train(trainer: Trainer, inputs: Tensor, labels: Tensor, *, batch_size: int, seed: int) -> list[float]:
    """Loss of every step of the one epoch; BatchNorm statistics are re-estimated after the last."""
    batches = _orders(len(labels), batch_size, seed=seed)
    losses = []
    for step in range(trainer.plan.steps):
        rows = next(batches)
        losses.append(trainer.step_(inputs[rows], labels[rows], epoch=0, step=step)[0])
    full = inputs[: len(inputs) - len(inputs) % batch_size]
    recalibrate_bn_(trainer.model, torch.split(full, batch_size), device=trainer.device)
    values: list[float] = torch.stack(losses).double().tolist()
    return values


def _orders(count: int, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Endless batches of row numbers below ``count``: whole shuffles one after the other, each batch full."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(count, generator=generator)
        yield from torch.split(rows[: count - count % batch_size], batch_size)


def _batch_size(images: TrainingImages) -> int:
    loader = images.train_loader(epoch=0)
    size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    return int(size) if size else len(next(iter(loader))[1])


def _image_count(images: TrainingImages, wanted: int) -> int:
    """How many calibration images a trial takes: its steps' and the held-out ones, within its memory."""
    one = images.calibration(1)[0]
    return max(2, min(wanted + max(HELD_OUT, wanted // 3), _BYTES // (one.numel() * one.element_size())))


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
