"""Losses against their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from prunecli.errors import UsageError
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DistillSettings, FinetuneSettings
from prunecli.training.objective import Progressive, Supervised, build_objective, distillation_loss


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
    loss = build_objective(settings, num_classes=3, teacher=teacher).loss(lambda _: logits, images, labels)
    distance = distillation_loss(logits, teacher(images), temperature=2.0)
    torch.testing.assert_close(loss, 0.7 * functional.cross_entropy(logits, labels) + 0.3 * distance)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_label_smoothing_matches_torch() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    objective = build_objective(FinetuneSettings(loss={"kind": "ce", "label_smoothing": 0.1}), num_classes=4)
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(objective.loss(nn.Identity(), logits, labels), expected)


@pytest.mark.parametrize("count", [6, 7])
def test_mixup_mixes_images_and_targets_alike(count: int) -> None:
    np.random.seed(0)  # noqa: NPY002 - what timm's Mixup draws from
    labels = torch.arange(count) % 4
    images = functional.one_hot(labels, 4).float().view(count, 1, 2, 2)  # each image is its own target
    kept = images.clone()
    objective = build_objective(FinetuneSettings(loss={"kind": "ce", "mixup": 1.0}), num_classes=4)
    assert isinstance(objective, Supervised)
    mixed, targets = objective.mix(images, labels)
    torch.testing.assert_close(mixed.flatten(1), targets)
    assert torch.equal(images, kept)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    if count % 2:
        assert torch.equal(mixed[-1], images[-1])


def test_smoothing_reaches_the_unmixed_image_too() -> None:
    np.random.seed(0)  # noqa: NPY002
    settings = FinetuneSettings(loss={"kind": "ce", "cutmix": 1.0, "label_smoothing": 0.2})
    objective = build_objective(settings, num_classes=4)
    assert isinstance(objective, Supervised)
    _, targets = objective.mix(torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(targets[-1], torch.tensor([0.05, 0.05, 0.85, 0.05]))
    torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_nothing_asked_nothing_mixed() -> None:
    images, labels = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0])
    objective = build_objective(FinetuneSettings(), num_classes=2, teacher=nn.Linear(1, 1))
    assert isinstance(objective, Supervised)
    assert objective.teacher is None
    assert objective.mix(images, labels)[0] is images


# ------------------------------------------------------------------------------------- learning from the net itself


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL of each row, written out."""
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1)


def test_cskd_learns_from_another_image_of_the_class_and_from_no_image_of_another() -> None:
    torch.manual_seed(0)
    net, images, labels = nn.Linear(5, 3), torch.randn(6, 5), torch.tensor([0, 0, 2, 2, 1, 2])  # the last pair differs
    objective = build_objective(FinetuneSettings(loss="cskd"), num_classes=3)
    assert objective.companion == "class"
    loss = objective.loss(net, images, labels)
    logits, others = net(images[[0, 2, 4]]), net(images[[1, 3, 5]]).detach()
    part = divergence(others, logits, 4.0)[:2].sum() / 3
    expected = functional.cross_entropy(logits, torch.tensor([0, 2, 1])) + part
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(loss, net.parameters()), torch.autograd.grad(expected, net.parameters()), strict=True
    ):
        torch.testing.assert_close(found, wanted)  # nothing reaches the net through the companions


def test_pskd_moves_its_targets_towards_the_net_of_the_epoch_before() -> None:
    torch.manual_seed(0)
    net, images, labels = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    objective = build_objective(FinetuneSettings(loss={"kind": "pskd", "weight": 0.6}), num_classes=3, epochs=4)
    torch.testing.assert_close(objective.loss(net, images, labels), functional.cross_entropy(net(images), labels))
    objective.end_epoch_(net)
    before = net(images).softmax(1).detach()
    with torch.no_grad():
        net.weight.add_(1.0, alpha=0.5).mul_(-1)
    share = 0.6 * 2 / 4  # the second of four epochs
    targets = (1 - share) * functional.one_hot(labels, 3) + share * before
    expected = -(targets * net(images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective.loss(net, images, labels), expected)
    again = build_objective(FinetuneSettings(loss={"kind": "pskd", "weight": 0.6}), num_classes=3, epochs=4)
    again.restore_(objective.state(), net)
    torch.testing.assert_close(again.loss(net, images, labels), expected)


class Keeps(nn.Module):
    """Normalises, and keeps what it made of its last images, as nets do whose features somebody wants to see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features = self.norm(x)
        logits: torch.Tensor = self.head(self.features)
        return logits


def test_the_net_of_the_epoch_before_answers_in_evaluation_mode_and_remembers_no_gradient() -> None:
    torch.manual_seed(0)
    net, images, labels = Keeps(), 3 + 2 * torch.randn(8, 5), torch.arange(8) % 3
    objective = build_objective(FinetuneSettings(loss={"kind": "pskd", "weight": 1.0}), num_classes=3, epochs=2)
    objective.loss(net, images, labels).backward()
    objective.end_epoch_(net)
    expected = net.eval()(images).softmax(1).detach()
    found = objective.loss(net.train(), images, labels)
    torch.testing.assert_close(found, functional.cross_entropy(net(images), expected))
    assert isinstance(objective, Progressive)
    assert objective.before is not None
    assert all(not value.requires_grad and value.grad is None for value in objective.before.parameters())


def test_dlb_learns_from_what_it_said_of_the_other_view_one_step_before() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    first, second = torch.randn(4, 5), torch.randn(6, 5)  # two images in two views, then three
    labels = [torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 0, 0, 1, 1])]
    objective = build_objective(FinetuneSettings(loss="dlb"), num_classes=3)
    assert objective.companion == "view"
    loss = objective.loss(net, first, labels[0])
    torch.testing.assert_close(loss, functional.cross_entropy(net(first[0::2]), torch.tensor([0, 1])))
    said = net(first[0::2]).detach()
    with torch.no_grad():
        net.weight.mul_(-1)
    again, logits = net(first[1::2]), net(second[0::2])
    truth = functional.cross_entropy(torch.cat([again, logits]), torch.tensor([0, 1, 2, 0, 1]))
    state = objective.state()
    torch.testing.assert_close(objective.loss(net, second, labels[1]), truth + divergence(said, again, 3.0).mean())
    resumed = build_objective(FinetuneSettings(loss="dlb"), num_classes=3)
    resumed.restore_(state, net)
    torch.testing.assert_close(resumed.loss(net, second, labels[1]), truth + divergence(said, again, 3.0).mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": {"kind": "ce", "weight": 0.5}}, "unknown key 'finetune.loss.weight' of kind ce"),
        ({"loss": "cskd", "distill": {"alpha": 0.5}}, "learns from the dense model, loss cskd from the net itself"),
        ({"loss": {"kind": "dlb", "mixup": 0.2}}, "unknown key 'finetune.loss.mixup' of kind dlb"),
        ({"loss": {"kind": "pskd", "label_smoothing": 0.1}}, "unknown key 'finetune.loss.label_smoothing' of kind"),
        ({"loss": {"kind": "pskd", "temperature": 4}}, "unknown key 'finetune.loss.temperature' of kind pskd"),
        ({"loss": {"kind": "pskd", "weight": 1.5}}, "finetune.loss.weight: Input should be less than or equal to 1"),
    ],
)
def test_losses_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.from_mapping({"finetune": settings})
