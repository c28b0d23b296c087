"""Accuracy: what a model gets right on labelled images, and how much of that a cut has lost."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecli.errors import PruneError
from prunecli.models.layers import evaluation_mode
from prunecli.models.outputs import logits_of
from prunecli.values.report import Accuracy


def halves_chance_error(top1: float, classes: int) -> bool:
    """Whether the error is below half of the chance error: the model has learnt from data of this kind.

    Args:
        top1: accuracy, percent.
        classes: number of classes; guessing is right once in so many.
    """
    return top1 > (100 + 100 / classes) / 2


def lost_top1(dense: float, now: float, *, classes: int) -> float | None:
    """Share of the dense model's top-1 above chance that is gone, 0 to 1.

    Args:
        dense: top-1 of the dense model, percent.
        now: top-1 of the model made from it, on the same images, percent.
        classes: number of classes.

    Returns:
        ``None`` where the dense model itself is not far above chance (`halves_chance_error`).
    """
    if not halves_chance_error(dense, classes):
        return None
    return min(1.0, max(0.0, (dense - now) / (dense - 100 / classes)))


def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, amp: bool = False
) -> Accuracy:
    """Top-1 and top-5 (percent) and mean cross-entropy (nats) in evaluation mode; top-5 needs five classes or more.

    Args:
        model: module from images ``[B, C, H, W]`` to logits ``[B, K]``, as `logits_of` finds them; moved to ``device``,
            its mode is put back.
        loader: batches of images ``[B, C, H, W]`` and labels ``[B]``.
        device: device of the forward passes and, in float64, of the sums.
        amp: ``True`` for forward passes in bfloat16.

    Raises:
        PruneError: the loader is empty.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    samples, classes = 0, 0
    with evaluation_mode(model.to(device)), torch.no_grad():
        for images, labels in loader:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                logits = logits_of(model(images.to(device, non_blocking=True)))
            targets = labels.to(device, non_blocking=True)
            samples, classes = samples + len(targets), logits.shape[1]
            hits = logits.float().topk(min(5, classes), dim=1).indices == targets[:, None]
            loss = functional.cross_entropy(logits.double(), targets, reduction="sum")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
    if samples == 0:
        raise PruneError("There is no image to evaluate on.")
    top1, top5, loss_sum = sums.tolist()
    return Accuracy(
        top1=100 * top1 / samples,
        top5=100 * top5 / samples if classes >= 5 else None,
        loss=loss_sum / samples,
        samples=samples,
    )


def answers(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """All logits and labels of a loader, in evaluation mode.

    Args:
        model: module from images to logits, as for `evaluate`.
        loader: batches of images ``[B, C, H, W]`` and labels ``[B]``.
        device: device of the forward passes.

    Returns:
        Logits ``[n, K]`` in float64 and labels ``[n]``, on the CPU.

    Raises:
        PruneError: the loader is empty.
    """
    logits, labels = [], []
    with evaluation_mode(model.to(device)), torch.no_grad():
        for images, truth in loader:
            logits.append(logits_of(model(images.to(device))).cpu().double())
            labels.append(truth.cpu())
    if not logits:
        raise PruneError("There is no image to evaluate on.")
    return torch.cat(logits), torch.cat(labels)
