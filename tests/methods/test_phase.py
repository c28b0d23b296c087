"""The training phases before the cut: their length, what they push and zero, and that what is zero is what is cut."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from prunecli.errors import InterruptedRunError, PruneError, UsageError
from prunecli.graph.build import build_graph
from prunecli.methods.growing_penalty import GrowingPenalty
from prunecli.methods.phase import Phase, phases_of, require_time
from prunecli.methods.train_phase import train_phase_
from prunecli.models import paper_nets  # noqa: F401 - registers the papers' networks
from prunecli.models.channels import silencing_slices
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DistillSettings, FinetuneSettings
from prunecli.surgery.cut import cut_
from prunecli.training.loop import TrainingRun
from prunecli.training.penalty import gram_loss
from prunecli.values.groups import IndexMap, Member
from prunecli.values.plan import PlannedGroup
from toys.cuts import planned
from toys.phase_nets import NETS, Pair, pair_groups
from toys.training import ADAMW, CPU, Interrupting, ToyImages, same, toy_groups, toy_net, train_toy_phase, weights

# ------------------------------------------------------------------------------------------------- length


def phases(method: str, **settings: Any) -> tuple[Phase, ...]:
    return phases_of(Recipe.from_mapping({"method": {"kind": method, **settings}}))


def test_the_defaults_are_the_papers_figures_for_cifar() -> None:
    (push,) = phases("tpp")
    assert (push.steps, push.zero_from, push.zero_every) == (110_000, 100_000, 100)
    assert [push.reg(step) for step in (0, 9, 10, 99_999, 100_000, 109_999)] == pytest.approx(
        [0, 0, 1e-4, 0.9999, 1, 1], abs=1e-12
    )
    assert (push.gram_weight, push.bn_term, push.lr, push.momentum) == (1000, True, 1e-3, 0.9)


def test_greg_neither_decorrelates_nor_zeroes_nor_pushes_norms() -> None:
    (push,) = phases("greg")
    assert (push.steps, push.gram_weight, push.zero_from, push.bn_term) == (110_000, 0, None, False)


def test_greg2_goes_on_from_the_factor_at_which_it_picked() -> None:
    grow, push = phases("greg", variant=2)
    assert (grow.before_plan, grow.steps, grow.reg(grow.steps)) == (True, 10_000, pytest.approx(1e-2))
    assert (push.before_plan, push.steps, push.reg(0)) == (False, 99_000 + 10_000, pytest.approx(1e-2))


def test_a_fixed_penalty_is_there_from_the_first_step() -> None:
    (push,) = phases("tpp", penalty="fixed", steps=400, stabilise=100)
    assert (push.steps, push.zero_from, push.reg(0), push.reg(499)) == (500, 400, 1, 1)


def test_a_regulariser_alone_pushes_nothing_and_comes_before_the_plan() -> None:
    (phase,) = phases("orthconv")
    assert (phase.name, phase.steps, phase.regulariser_weight) == ("regularise", 50_000, 0.1)
    assert phases("oneshot") == ()


def test_every_group_needs_its_turn_to_be_zeroed() -> None:
    recipe = Recipe.from_mapping({"method": {"kind": "tpp", "stabilise": 199}})
    groups = [*toy_groups(), *toy_groups()]
    with pytest.raises(UsageError, match=r"method.stabilise is 199 steps.*2 groups.*method.stabilise=200"):
        require_time(recipe, groups)
    require_time(recipe, groups[:1])


def test_greg2_settings_of_another_method_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'method.variant' of kind tpp"):
        Recipe.from_mapping({"method": {"kind": "tpp", "variant": 2}})


# ------------------------------------------------------------------------------------------------- pushing

PUSH = Phase(
    name="push",
    steps=30,
    lr=1e-3,
    momentum=0.9,
    reg_step=0.25,
    reg_every=2,
    reg_ceiling=1.0,
    gram_weight=10.0,
    zero_from=8,
    zero_every=2,
)


def after_backward(phase: Phase, step: int) -> tuple[Pair, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The net, its gradients as a step has them, and those of cross-entropy alone."""
    torch.manual_seed(2)
    images, labels = torch.randn(5, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    model = Pair()
    penalty = GrowingPenalty(model, pair_groups(), phase)
    loss = functional.cross_entropy(model(images), labels)
    plain = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    loss = functional.cross_entropy(model(images), labels)
    extra = penalty.loss(step)
    (loss if extra is None else loss + extra).backward()
    penalty.add_gradients_(step)
    return model, {name: p.grad for name, p in model.named_parameters()}, plain


@pytest.mark.parametrize("bn_term", [True, False])
def test_gradients_are_cross_entropy_growing_l2_and_decorrelation(bn_term: bool) -> None:
    phase = Phase(**{**vars(PUSH), "bn_term": bn_term})
    model, found, plain = after_backward(phase, step=5)
    kept, factor = torch.tensor([True, False, False, True]), 0.5
    gram = 10.0 * factor * (gram_loss(model.a.weight.flatten(1), kept) + gram_loss(model.b.weight.flatten(1), kept))
    decorrelation = dict(zip("ab", torch.autograd.grad(gram, [model.a.weight, model.b.weight]), strict=True))
    pushed = {"a.weight", "a.bias", "b.weight"} | ({"norm.weight", "norm.bias"} if bn_term else set())
    for name, parameter in model.named_parameters():
        expected = plain[name].clone()
        if name in pushed:
            expected[[1, 2]] += factor * parameter.detach()[[1, 2]]
        if name in ("a.weight", "b.weight"):
            expected += decorrelation[name[0]]
        torch.testing.assert_close(found[name], expected, msg=name)


def test_nothing_is_added_before_the_factor_has_grown() -> None:
    _, found, plain = after_backward(PUSH, step=1)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_phase_before_the_plan_pushes_all_channels() -> None:
    phase = Phase(**{**vars(PUSH), "name": "grow", "gram_weight": 0.0})
    model, found, plain = after_backward(phase, step=5)
    torch.testing.assert_close(found["b.weight"], plain["b.weight"] + 0.5 * model.b.weight.detach())
    torch.testing.assert_close(found["head.weight"], plain["head.weight"])


def test_groups_become_zero_one_after_the_other_and_stay_so() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    groups = [
        PlannedGroup(
            name=str(at),
            kind="channels",
            width=4,
            keep=(1, 2, 3),
            members=(Member(tensor=f"{at}.weight", dim=0, role="out"), Member(tensor=f"{at}.bias", dim=0, role="out")),
        )
        for at in range(3)
    ]
    penalty, silent = GrowingPenalty(model, groups, PUSH), []
    for step in range(16):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        penalty.project_(step)
        silent.append([not layer.weight[0].any() and not layer.bias[0].any() for layer in model])
    assert silent[8] == [False, False, False]
    assert silent[9] == silent[10] == [True, False, False]
    assert silent[11] == [True, True, False]
    assert silent[13] == silent[15] == [True, True, True]
    assert all(layer.weight[1:].all() for layer in model)


def test_each_stacked_part_of_a_weight_has_its_own_gram_matrix() -> None:
    """A gated MLP: gate and value of channel j are rows j and 3 + j."""
    model = nn.Linear(5, 6)
    parts = tuple(Member(tensor="weight", dim=0, role="out", index=IndexMap(offset=at)) for at in (0, 3))
    group = PlannedGroup(name="gated", kind="channels", width=3, keep=(0, 2), members=parts)
    kept = torch.tensor([True, False, True])
    expected = gram_loss(model.weight[:3], kept) + gram_loss(model.weight[3:], kept)
    torch.testing.assert_close(GrowingPenalty(model, [group], PUSH).gram(), expected)


def test_a_head_is_many_filters_that_leave_together() -> None:
    """Two heads of width 3 in a projection of 6 rows: the Gram matrix is that of the rows, not one of two heads."""
    model = nn.Linear(5, 6)
    member = Member(tensor="weight", dim=0, role="out", index=IndexMap(stride=3, loops=((3, 1),)))
    group = PlannedGroup(name="heads", kind="heads", width=2, keep=(1,), members=(member,))
    kept = torch.tensor([False, False, False, True, True, True])
    torch.testing.assert_close(GrowingPenalty(model, [group], PUSH).gram(), gram_loss(model.weight, kept))


# ------------------------------------------------------------------------------------------------- zeroed = cut


@pytest.mark.parametrize("name", NETS)
def test_the_zeroed_net_is_the_cut_net(name: str) -> None:
    build, kind = NETS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.bias.normal_(0, 0.2)
    graph = build_graph(copy.deepcopy(model).float(), (3, 32, 32), engine="axes")
    chosen = [group for group in graph.groups if group.kind in ("channels", kind) and not group.norms]
    assert {group.kind for group in chosen} == {"channels", kind}
    kept = {group.name: max(1, group.width // 2) for group in chosen}
    groups = planned(graph, kept, random.Random(0))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    zeroed, cut = copy.deepcopy(model), copy.deepcopy(model)
    GrowingPenalty(zeroed, groups, Phase(**{**vars(PUSH), "gram_weight": 0.0})).project_(10_000)
    cut_(cut, groups=groups, attributes=graph.solve(kept), folds=graph.folds)
    assert sum(p.numel() for p in cut.parameters()) < 0.85 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(cut(images), zeroed(images), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(model(images), zeroed(images), rtol=1e-3)


# ------------------------------------------------------------------------------------------------- training


def test_a_phase_equals_a_loop_written_out() -> None:
    images, model = ToyImages(), toy_net(dropout=0.0)
    twin = copy.deepcopy(model).train()
    weight, gone = twin[0].weight, [1, 4]
    pushed = {"0.weight", "0.bias", "1.weight", "1.bias"}
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    batches = [batch for epoch in range(3) for batch in images.train_loader(epoch=epoch)][:30]
    for step, (inputs, labels) in enumerate(batches):
        factor = min(1.0, 0.25 * (step // 2))
        gram = weight.flatten(1) @ weight.flatten(1).T
        target = gram.detach().clone()
        target[gone, :] = 0
        target[:, gone] = 0
        loss = functional.cross_entropy(twin(inputs), labels) + 10 * factor * functional.mse_loss(gram, target)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for (name, value), gradient in zip(twin.named_parameters(), gradients, strict=True):
                if name in pushed:
                    gradient[gone] += factor * value[gone]
                decay = 5e-4 * value if value.ndim > 1 else 0.0
                velocity[name] = 0.9 * velocity[name] + gradient + decay
                value.sub_(0.02 * velocity[name])
            if step + 1 >= 28:
                for tensor in (*twin[0].parameters(), *twin[1].parameters(), twin[1].running_mean):
                    tensor[gone] = 0
                twin[5].weight.view(6, 6, 64)[:, gone] = 0
    train_toy_phase(model, images)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_pruned_channels_are_zero_after_the_phase_and_the_report_says_what_happened() -> None:
    model = toy_net()
    start = copy.deepcopy(model)
    report = train_toy_phase(model, ToyImages())
    for part in silencing_slices(model, toy_groups()):
        assert not part.values().any()
    assert model[0].weight[[0, 2, 3, 5]].all()
    assert (report.steps, report.epochs, report.norm_after, report.penalty_after) == (30, 2.5, 0, 0)
    assert report.norm_before == pytest.approx(
        float(
            torch.cat([t.detach()[[1, 4]].flatten() for t in (*start[0].parameters(), *start[1].parameters())]).norm()
        )
    )
    assert [entry["step"] for entry in report.history] == [0, 12, 24, 30]
    assert report.history[1]["norm"] < report.norm_before
    assert report.history[1]["reg"] == 1  # step 11: four growths of a quarter are behind


@pytest.mark.parametrize("stop_at", [1, 14, 29])
def test_interrupted_anywhere_resumes_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole, model = toy_net(), toy_net()
    train_toy_phase(whole, ToyImages())
    images = ToyImages()
    images.train = Interrupting(images.train, stop_at * images.batch_size)
    with pytest.raises(InterruptedRunError, match=r"The phase before the cut was interrupted.*saved"):
        train_toy_phase(toy_net(), images, folder=tmp_path)
    train_toy_phase(model, ToyImages(), folder=tmp_path)
    assert same(weights(model), weights(whole))


def test_another_plan_is_another_job(tmp_path: Path) -> None:
    train_toy_phase(toy_net(), ToyImages(), folder=tmp_path)
    other = tuple(group.model_copy(update={"keep": (0, 1)}) for group in toy_groups())
    model, expected = toy_net(), toy_net()
    for net, folder in ((model, tmp_path), (expected, None)):
        train_toy_phase(net, ToyImages(), groups=other, folder=folder)
    assert same(weights(model), weights(expected))


def test_a_regulariser_phase_makes_weights_more_orthogonal() -> None:
    (phase,) = phases("kernorth", steps=30, weight=1.0, lr=0.05)
    report = train_phase_(
        toy_net(), phase, (), ToyImages(), FinetuneSettings(), method="kernorth", run=TrainingRun(device=CPU, seed=7)
    )
    assert report.penalty_after < 0.8 * report.penalty_before
    assert report.norm_after is None


def test_a_penalty_that_explodes_is_a_sentence_and_leaves_no_such_state(tmp_path: Path) -> None:
    (phase,) = phases("tpp", reg_step=1.0, reg_every=1, stabilise=11, zero_every=11, gram_weight=1e30)
    with pytest.raises(PruneError, match=r"The (loss|penalty|norm) .*(nan|inf).*"):
        train_phase_(
            toy_net(),
            phase,
            toy_groups(),
            ToyImages(),
            ADAMW,
            method="tpp",
            run=TrainingRun(device=CPU, seed=7, folder=tmp_path),
        )
    assert not list(tmp_path.iterdir())


def test_what_a_recipe_says_of_fine_tuning_stays_out_of_the_phase() -> None:
    """Only weight decay, precision and memory format are shared: the papers' phase is plain SGD on cross-entropy."""
    plain, decorated, decayed = toy_net(), toy_net(), toy_net()
    train_toy_phase(plain, ToyImages())
    fancy = FinetuneSettings(
        optimizer="adamw",
        ema=0.9,
        loss={"kind": "ce", "mixup": 0.4, "label_smoothing": 0.1},
        clip_grad=0.1,
        nesterov=True,
    )
    train_toy_phase(decorated, ToyImages(), settings=fancy)
    train_toy_phase(decayed, ToyImages(), settings=FinetuneSettings(weight_decay=0.1))
    assert same(weights(plain), weights(decorated))
    assert not same(weights(plain), weights(decayed))


def test_a_phase_learns_from_the_dense_model_where_fine_tuning_does() -> None:
    """With nothing but distillation the labels have no say; without a teacher there is nothing to learn from."""
    taught = ADAMW.updated(distill=DistillSettings(alpha=1.0))
    pair, images = [toy_net(), toy_net()], [ToyImages(), ToyImages()]
    images[1].train = TensorDataset(images[1].train.tensors[0], images[1].train.tensors[1].flip(0))
    for net, shown in zip(pair, images, strict=True):
        train_toy_phase(net, shown, settings=taught, teacher=toy_net())
    assert same(weights(pair[0]), weights(pair[1]))
    plain = toy_net()
    train_toy_phase(plain, images[0])
    assert not same(weights(plain), weights(pair[0]))
    with pytest.raises(UsageError, match="no dense model"):
        train_toy_phase(toy_net(), images[0], settings=taught)
