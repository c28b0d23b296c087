"""Losses against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from prunecli.objective import build_objective, distillation_loss
from prunecli.recipe import DistillSettings, FinetuneSettings


def test_distillation_is_the_scaled_divergence() -> None:
    student, teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.eye(4, 3) * 2
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert float(distillation_loss(student, teacher, temperature=3.0)) == pytest.approx(float(expected), rel=1e-5)


def test_alpha_weighs_both_terms() -> None:
    torch.manual_seed(0)
    images, labels, teacher = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), nn.Linear(5, 3)
    logits = torch.randn(4, 3, requires_grad=True)
    settings = FinetuneSettings(distill=DistillSettings(alpha=0.3, temperature=2.0))
    loss = build_objective(settings, num_classes=3, teacher=teacher)(logits, labels, images)
    distance = distillation_loss(logits, teacher(images), temperature=2.0)
    torch.testing.assert_close(loss, 0.7 * functional.cross_entropy(logits, labels) + 0.3 * distance)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_label_smoothing_matches_torch() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    objective = build_objective(FinetuneSettings(label_smoothing=0.1), num_classes=4, teacher=None)
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(objective(logits, labels, logits), expected)


@pytest.mark.parametrize("count", [6, 7])
def test_mixup_mixes_images_and_targets_alike(count: int) -> None:
    np.random.seed(0)  # noqa: NPY002 - what timm's Mixup draws from
    labels = torch.arange(count) % 4
    images = functional.one_hot(labels, 4).float().view(count, 1, 2, 2)  # each image is its own target
    kept = images.clone()
    objective = build_objective(FinetuneSettings(mixup=1.0), num_classes=4, teacher=None)
    mixed, targets = objective.mix(images, labels)
    torch.testing.assert_close(mixed.flatten(1), targets)
    assert torch.equal(images, kept)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    if count % 2:
        assert torch.equal(mixed[-1], images[-1])


def test_smoothing_reaches_the_unmixed_image_too() -> None:
    np.random.seed(0)  # noqa: NPY002
    settings = FinetuneSettings(cutmix=1.0, label_smoothing=0.2)
    objective = build_objective(settings, num_classes=4, teacher=None)
    _, targets = objective.mix(torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(targets[-1], torch.tensor([0.05, 0.05, 0.85, 0.05]))
    torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_nothing_asked_nothing_mixed() -> None:
    images, labels = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0])
    objective = build_objective(FinetuneSettings(), num_classes=2, teacher=nn.Linear(1, 1))
    assert objective.teacher is None
    assert objective.mix(images, labels)[0] is images
