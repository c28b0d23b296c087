"""EPSD's score: by hand, against finite differences through the training steps, and in a whole job."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecli.errors import PruneError, UnsupportedError, UsageError
from prunecli.graph.build import build_graph
from prunecli.methods import epsd
from prunecli.methods.epsd import epsd_scores
from prunecli.methods.gates import gate_places, gated_weights
from prunecli.models.load import load_model
from prunecli.recipe.methods import EpsdMethod
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import FinetuneSettings
from prunecli.run import plan_and_prove
from prunecli.run.folder import RunFolder
from prunecli.run.scores import scores_of
from prunecli.run.source import load_source, open_images
from prunecli.training.objective import LastBatch, build_objective
from prunecli.values.groups import Group, Member
from toys.jobs import JOB, call
from toys.training import CPU, ToyImages

HIDDEN = Group(
    name="hidden",
    kind="channels",
    width=2,
    members=(Member(tensor="0.weight", dim=0, role="out"), Member(tensor="1.weight", dim=1, role="in")),
)


class OneImage:
    """The same image in every batch: x = 1 of class 1, of two."""

    num_classes = 2
    steps_per_epoch = 1

    def train_loader(
        self, *, epoch: int, skip_batches: int = 0, companion: str = "none"
    ) -> list[tuple[Tensor, Tensor]]:
        return [(torch.ones(1, 1), torch.tensor([1]))]


def test_one_step_of_two_linear_layers_by_hand() -> None:
    """Logits (0, s), s = sum_j v_j u_j: with g = -sigmoid(-s) the step is u -= lr g v, v -= lr g u."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5], [-1.0]]))
        model[1].weight.copy_(torch.tensor([[0.0, 0.0], [0.7, 0.2]]))
    lr = 0.3
    found = epsd_scores(
        model.double(),
        [HIDDEN],
        Doubled(OneImage()),
        EpsdMethod(steps=1, lr=lr),
        FinetuneSettings(),
        device=CPU,
        seed=0,
    )["hidden"]

    def after(c: Tensor) -> Tensor:
        u, top, v = torch.tensor([0.5, -1.0]).double(), torch.zeros(2).double(), c * torch.tensor([0.7, 0.2]).double()
        g = -torch.sigmoid((top - v) @ u)
        u, v, top = u - lr * g * (v - top), v - lr * g * u, top + lr * g * u
        return functional.softplus((top - v) @ u)

    expected = torch.autograd.functional.jacobian(after, torch.ones(2).double())
    torch.testing.assert_close(found, expected.abs())
    assert (found > 1e-3).all()


class Doubled:
    """Images in float64, for finite differences."""

    def __init__(self, images: Any) -> None:
        self.images, self.num_classes, self.steps_per_epoch = images, images.num_classes, images.steps_per_epoch

    def train_loader(self, **which: Any) -> Any:
        return [(inputs.double(), labels) for inputs, labels in self.images.train_loader(**which)]


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 64, 6),
    ).double()


@pytest.mark.parametrize("loss", ["ce", "cskd", "pskd", "dlb"])
def test_scores_are_the_derivative_of_the_loss_behind_the_steps(loss: Any) -> None:
    model, images = net(), Doubled(ToyImages(batch_size=24))
    groups = build_graph(model.float(), (1, 8, 8)).groups
    model.double()
    assert [group.width for group in groups] == [4, 3]
    how = (images, EpsdMethod(steps=2, lr=0.2), FinetuneSettings(loss=loss))
    found = epsd_scores(model, groups, *how, device=CPU, seed=0)
    assert list(found) == [group.name for group in groups]
    places = gate_places(model, groups)

    def loss_from(masks: Tensor) -> float:
        """Train a net that really starts from masked weights; what it learns from stays that of the unmasked one."""
        trained, base = copy.deepcopy(model).train(), copy.deepcopy(model).train()
        trained.load_state_dict(gated_weights(dict(model.named_parameters()), places, masks), strict=False)
        objective, own = (build_objective(FinetuneSettings(loss=loss), num_classes=6, epochs=3) for _ in range(2))
        optimizer = torch.optim.SGD([*trained.parameters(), *base.parameters()], lr=0.2)
        batches = epsd._batches(images, objective, CPU)
        for step in range(3):
            batch = next(batches)
            value = objective.loss(lambda x: trained(x) if torch.is_grad_enabled() else base(x), *batch)
            if step < 2:
                optimizer.zero_grad()
                (value + own.loss(base, *batch)).backward()
                optimizer.step()
                objective.end_epoch_(base)
                own.end_epoch_(base)
            if isinstance(objective, LastBatch) and isinstance(own, LastBatch):
                objective.last["logits"] = own.last["logits"]
        return value.item()

    scores = torch.cat(list(found.values()))
    for number in range(7):
        step = torch.zeros(7).double()
        step[number] = 1e-5
        slope = (loss_from(1 + step) - loss_from(1 - step)) / 2e-5
        assert float(scores[number]) == pytest.approx(abs(slope), rel=1e-5)


def test_the_model_stays_as_it_is_and_the_score_repeats() -> None:
    model = load_model("cifar_resnet20", pretrained=False).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = build_graph(model, (3, 32, 32)).groups
    images = Noise()
    scored = [
        epsd_scores(model, groups, images, EpsdMethod(steps=1), FinetuneSettings(), device=CPU, seed=1)
        for _ in range(2)
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    for group in groups:
        assert torch.equal(scored[0][group.name], scored[1][group.name])
        assert scored[0][group.name].shape == (group.width,)
        assert scored[0][group.name].max() > 0


class Noise:
    """Coloured noise of ten classes."""

    num_classes = 10
    steps_per_epoch = 2

    def train_loader(self, *, epoch: int, skip_batches: int = 0, companion: str = "none") -> Any:
        generator = torch.Generator().manual_seed(epoch)
        return [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)) for _ in range(2)]


def test_attention_is_differentiated_through_its_plain_kernel() -> None:
    model = load_model("vit_tiny_patch16_224", pretrained=False, model_args={"img_size": 32, "depth": 2}).model
    groups = build_graph(model, (3, 32, 32)).groups
    found = epsd_scores(model, groups, Noise(), EpsdMethod(steps=1), FinetuneSettings(), device=CPU, seed=1)
    assert all(bool((values > 0).any()) for values in found.values())


def test_frozen_weights_take_no_step() -> None:
    """Behind a frozen reader the first layer moves alone: as if the steps were those of the first layer."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.requires_grad = False
    how = (Doubled(OneImage()), EpsdMethod(steps=1, lr=0.3), FinetuneSettings())
    found = epsd_scores(model.double(), [HIDDEN], *how, device=CPU, seed=0)["hidden"]
    u, w = model[0].weight.detach().flatten(), model[1].weight.detach()

    def after(c: Tensor) -> Tensor:
        v = w[1] * c - w[0] * c
        moved = u + 0.3 * torch.sigmoid(-v @ u) * v
        return functional.softplus(-v @ moved)

    torch.testing.assert_close(found, torch.autograd.functional.jacobian(after, torch.ones(2).double()).abs())


def test_without_groups_there_are_no_scores() -> None:
    how = (OneImage(), EpsdMethod(), FinetuneSettings())
    assert epsd_scores(nn.Linear(1, 2), [], *how, device=CPU, seed=0) == {}


def test_dropout_draws_by_the_seed_and_leaves_the_callers_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Dropout(0.5), nn.Linear(2, 2, bias=False))
    reader = Member(tensor="2.weight", dim=1, role="in")
    group = replace(HIDDEN, members=(HIDDEN.members[0], reader))
    state = torch.get_rng_state()
    found = [
        epsd_scores(model, [group], OneImage(), EpsdMethod(steps=2), FinetuneSettings(), device=CPU, seed=seed)
        for seed in (1, 1, 2, 3, 4, 5)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0]["hidden"], found[1]["hidden"])
    assert any(not torch.equal(found[0]["hidden"], other["hidden"]) for other in found[2:])


class Backward(torch.autograd.Function):
    """A derivative that has none itself, and says so as torch's own do."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("derivative for aten::once_backward is not implemented")


class Once(torch.autograd.Function):
    """The identity, with that derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return Backward.apply(*gradients)


class OnceLayer(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Once.apply(x)


def test_what_cannot_be_differentiated_twice_is_said() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False), OnceLayer())
    how = (OneImage(), EpsdMethod(steps=1), FinetuneSettings())
    with pytest.raises(UnsupportedError, match="this model does not allow: derivative for"):
        epsd_scores(model, [HIDDEN], *how, device=CPU, seed=0)


def test_steps_that_diverge_are_said() -> None:
    model = load_model("cifar_resnet20", pretrained=False).model
    groups = build_graph(model, (3, 32, 32)).groups
    with pytest.raises(PruneError, match="diverge"):
        epsd_scores(model, groups, Noise(), EpsdMethod(lr=1e30), FinetuneSettings(), device=CPU, seed=1)


# ------------------------------------------------------------------------------------------------- whole jobs


def epsd_recipe(**values: Any) -> Recipe:
    made = {
        "model": "lenet5_relu",
        "pretrained": False,
        "method": {"kind": "epsd", "steps": 1},
        "target": "ratio=0.25",
        "data": {"name": "digits", "batch_size": 64},
        "finetune": {"loss": "cskd"},
        "prune": {"ranking": "global", "round_to": 1},
    }
    return Recipe.from_mapping(made | values)


def test_the_plan_keeps_the_channels_that_score_best() -> None:
    recipe = epsd_recipe()
    source = load_source(recipe)
    images = open_images(recipe, source)
    planned, proof = plan_and_prove.plan_and_prove(source, recipe, images)
    assert "equals" in proof
    plan = planned.plan
    assert plan.criterion == "epsd"
    expected = epsd_scores(
        source.model, plan.groups, images, recipe.method, recipe.finetune, device=CPU, seed=recipe.seed
    )
    for group in plan.groups:
        assert group.score == pytest.approx(expected[group.name].tolist())
        gone = sorted(set(range(group.width)) - set(group.keep))
        if gone:
            assert max(group.score[j] for j in gone) <= min(group.score[j] for j in group.keep)
    assert plan_and_prove.plan_and_prove(source, recipe, images)[0].plan == plan


@pytest.mark.parametrize("data", [{}, {"name": "digits", "train_limit": 1}])  # one image alone is no batch
def test_without_training_images_it_is_refused(data: dict[str, Any]) -> None:
    recipe = epsd_recipe(data=data)
    source = load_source(recipe)
    with pytest.raises(UsageError, match="needs training images"):
        scores_of(source, build_graph(source.model, source.spec.size), recipe, open_images(recipe, source))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": {"criterion": "fpgm"}}, "method epsd ranks channels by the steps it takes"),
        ({"method": {"kind": "oneshot", "steps": 1}}, "unknown key 'method.steps' of kind oneshot"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        epsd_recipe(**values)


def test_a_whole_job_trains_with_the_loss_it_was_scored_by(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = [*JOB, "--method=epsd", "method.steps=1", "finetune.loss=dlb", "--recover=none", "--epochs=2"]
    done = call("compress", *job, f"--out={out}")
    assert done.exit_code == 0, done.stderr
    report = RunFolder(path=out).report()
    assert report.phases == ()
    assert report.total_epochs == 2
    assert RunFolder(path=out).plan().criterion == "epsd"
