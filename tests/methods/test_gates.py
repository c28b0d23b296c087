"""Learned gates: their gradient by hand, one vector a coupled group, and that behind closed gates lies the cut net."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecli.errors import InterruptedRunError, UsageError
from prunecli.graph.build import build_graph
from prunecli.methods.gateable import gateable, without_norms
from prunecli.methods.gates import (
    Gated,
    GateSteps,
    drawn_gates,
    gate_places,
    gated_weights,
    planned_gates,
    straight_through,
)
from prunecli.methods.phase import Phase, phases_of
from prunecli.methods.train_phase import train_phase_
from prunecli.planning.make import make_plan
from prunecli.proof.gating import gating_error
from prunecli.recipe.recipe import Recipe
from prunecli.run.source import load_source
from prunecli.surgery.cut import cut_
from prunecli.training.loop import TrainingRun
from prunecli.values.groups import Graph, Member
from prunecli.values.plan import PlannedGroup
from prunecli.values.report import PhaseReport
from toys.cuts import planned
from toys.phase_nets import NETS, Pair, pair_groups
from toys.training import ADAMW, CPU, Interrupting, ToyImages, same, toy_groups, toy_net, weights

# ------------------------------------------------------------------------------------------------- one gate


def tied_readers() -> tuple[nn.Module, PlannedGroup]:
    """Two layers that read the same two channels by one shared weight."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("a", "b", "c")})
    model["c"].weight = model["b"].weight
    readers = tuple(Member(tensor=f"{name}.weight", dim=1, role="in") for name in ("b", "c"))
    members = (Member(tensor="a.weight", dim=0, role="out"), *readers)
    return model, PlannedGroup(name="hidden", kind="channels", width=2, keep=(0,), members=members)


def test_a_shared_weight_has_each_gate_once() -> None:
    model, group = tied_readers()
    ((name, dim, numbers),) = gate_places(model, [group])
    assert (name, dim, numbers.tolist()) == ("b.weight", 1, [0, 1])


def test_two_groups_on_the_same_positions_have_both_gates() -> None:
    model, group = tied_readers()
    other = group.model_copy(update={"name": "other"})
    weights = gated_weights(
        dict(model.named_parameters()), gate_places(model, [group, other]), torch.tensor([1.0, 2, 3, 5])
    )
    torch.testing.assert_close(weights["b.weight"], model["b"].weight * torch.tensor([3.0, 10.0]))


def test_a_gate_is_open_from_the_threshold_on_and_hands_its_gradient_on_unchanged() -> None:
    gate = torch.tensor([-1.0, -0.5, -0.49999, 0.0, 0.49999, 0.5, 0.9], requires_grad=True)
    found = straight_through(gate)
    assert found.tolist() == [1, 1, 0, 0, 0, 1, 1]
    upstream = torch.arange(7.0)
    (gradient,) = torch.autograd.grad(found, gate, upstream)
    assert torch.equal(gradient, upstream)


def test_gradients_of_two_linear_layers_by_hand() -> None:
    """y = sum_j b_j v_j u_j x: the closed gate has a gradient, the weights before and behind it have none."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [3.0]]))
        model[1].weight.copy_(torch.tensor([[5.0, 7.0]]))
    members = (Member(tensor="0.weight", dim=0, role="out"), Member(tensor="1.weight", dim=1, role="in"))
    group = PlannedGroup(name="hidden", kind="channels", width=2, keep=(0,), members=members)
    net = Gated(model, [group], torch.tensor([0.7, 0.2]))
    y = net(torch.tensor([[11.0]]))
    y.backward()
    assert y.item() == 5 * 2 * 11
    assert net.gate.grad.tolist() == [5 * 2 * 11, 7 * 3 * 11]
    assert model[0].weight.grad.flatten().tolist() == [5 * 11, 0]
    assert model[1].weight.grad.flatten().tolist() == [2 * 11, 0]


def test_the_l1_push_follows_the_sign_and_the_clamp_comes_after_the_step() -> None:
    gate = nn.Parameter(torch.tensor([-0.3, 0.0, 2.0, -1.5]))
    gate.grad = torch.zeros(4)
    steps = GateSteps(gate, 1e-4)
    steps.add_gradients_(0)
    assert gate.grad.tolist() == pytest.approx([-1e-4, 0, 1e-4, -1e-4])
    steps.project_(0)
    assert gate.tolist() == pytest.approx([-0.3, 0.0, 1.0, -1.0])
    assert steps.open_share() == 0.5


# ------------------------------------------------------------------------------------------------- coupled groups


def test_two_writers_of_one_stream_share_its_gates() -> None:
    """Closing channels 1 and 2 is the same as a reader that ignores them, whatever both writers put there."""
    model = Pair().eval()
    net = Gated(model, pair_groups(), planned_gates(pair_groups()))
    assert net.gate.shape == (4,)
    assert {name: tuple(value.shape) for name, value in net.magnitudes().items()} == {"stream": (4,)}
    images = torch.randn(3, 2, 5, 5)
    before = net(images)
    with torch.no_grad():
        for tensor in (model.a.weight, model.b.weight, model.norm.bias):
            tensor[[1, 2]] += 10
    torch.testing.assert_close(net(images), before)
    with torch.no_grad():
        model.b.weight[0] += 10
    assert not torch.allclose(net(images), before)


def test_all_readers_of_a_residual_stream_have_the_gates_of_its_one_group() -> None:
    model, graph = _net("residual")
    stream = next(group for group in graph.groups if len(group.layers("out")) > 1)
    (only,) = (group for group in planned(graph, {}, random.Random(0)) if group.name == stream.name)
    net = Gated(model, [only], torch.zeros(only.width))
    assert net.gate.numel() == stream.width
    readers = {member.tensor for member in stream.members if member.role == "in"}
    assert set(net.gated()) == readers
    assert len(readers) >= 3


def test_a_shared_weight_is_gated_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)})
    model["b"] = model["a"]
    members = tuple(Member(tensor=f"{name}.weight", dim=1, role="in") for name in "ab")
    group = PlannedGroup(name="x", kind="channels", width=3, keep=(1,), members=members)
    net = Gated(model, [group], torch.tensor([0.0, 1.0, 0.0]))
    assert list(net.gated()) == ["a.weight"]


# ------------------------------------------------------------------------------------------------- closed = cut


def _net(name: str) -> tuple[nn.Module, Graph]:
    build, _ = NETS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.bias.normal_(0, 0.2)
    return model, build_graph(copy.deepcopy(model).float(), (3, 32, 32))


@pytest.mark.parametrize("name", NETS)
def test_the_gated_net_is_the_cut_net_and_closed_gates_may_open_again(name: str) -> None:
    model, graph = _net(name)
    kind = NETS[name][1]
    chosen = [group for group in graph.groups if group.kind in ("channels", kind) and not group.norms]
    kept = {group.name: max(1, group.width // 2) for group in chosen}
    groups = planned(graph, kept, random.Random(0))
    gated_groups = [group for group in groups if group.is_cut]
    cut = copy.deepcopy(model)
    cut_(cut, groups=groups, attributes=graph.solve(kept), folds=graph.folds)
    net = Gated(model, gated_groups, planned_gates(gated_groups))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    behind = net(images)
    torch.testing.assert_close(cut(images), behind, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(model(images), behind, rtol=1e-3)
    (gradient,) = torch.autograd.grad(behind.square().sum(), net.gate)
    alive = gradient[planned_gates(gated_groups) == 0] != 0
    assert alive.float().mean() > 0.8  # a ReLU may be dead
    net.fold_()
    torch.testing.assert_close(model(images), behind.detach(), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------- what is gated


def vit() -> tuple[Any, Graph, Recipe]:
    recipe = Recipe.from_mapping(
        {
            "model": "vit_tiny_patch16_224",
            "pretrained": False,
            "model_args": {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3},
            "method": "abp",
        }
    )
    source = load_source(recipe)
    return source, build_graph(source.model, source.spec.size), recipe


def test_a_stream_under_layer_norm_has_no_gates_and_that_is_said() -> None:
    source, graph, recipe = vit()
    found = gateable(source, graph, recipe.target, recipe.prune, seed=recipe.seed)
    assert {group.name for group in graph.groups} - {group.name for group in found.graph.groups} == {"patch_embed.proj"}
    said = f"1 of {len(graph.groups)} coupled groups have no gates and stay whole, first patch_embed.proj: a norm takes"
    assert found.notes[0].startswith(said)
    cut = make_plan(source, found.graph, found.scores, found.target, found.settings).plan.cut_groups
    assert {(group.width, len(group.keep)) for group in cut if group.kind == "channels"} == {(192, 96)}


def test_a_group_whose_closed_gate_is_not_removal_is_found_and_left_out() -> None:
    """Were it forgotten that the stream has norms, the comparison with the silenced net would show it."""
    source, graph, recipe = vit()
    forgotten = replace(graph, groups=tuple(replace(group, norms=()) for group in graph.groups))
    found = gateable(source, forgotten, recipe.target, recipe.prune, seed=recipe.seed)
    assert {group.name for group in found.graph.groups} == {group.name for group in without_norms(graph)[0].groups}
    assert "patch_embed.proj: all channels stay, a closed gate was tried" in found.notes[0]


def test_the_comparison_sees_a_gate_that_closes_nothing() -> None:
    model, graph = _net("residual")
    groups = [g for g in planned(graph, {graph.groups[1].name: 4}, random.Random(0)) if g.is_cut]
    options: dict[str, Any] = {"groups": groups, "input_size": (3, 32, 32), "seed": 0}
    assert gating_error(model, lambda net: Gated(net, groups, planned_gates(groups)), **options) < 1e-12
    assert gating_error(model, lambda net: net, **options) > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": {"kind": "tpp", "gate_l1": 1e-4}}, "unknown key 'method.gate_l1' of kind tpp"),
        ({"method": "abp", "prune": {"criterion": "fpgm"}}, "method abp ranks channels by their gates"),
    ],
)
def test_settings_that_contradict_the_method_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.from_mapping(values)


# ------------------------------------------------------------------------------------------------- training


def gate_phase(**settings: Any) -> Phase:
    (phase,) = phases_of(Recipe.from_mapping({"method": {"kind": "abp", "steps": 30, **settings}}))
    return phase


def test_gates_learn_before_the_plan_at_a_rate_of_their_own() -> None:
    assert (gate_phase().name, gate_phase().before_plan, gate_phase().lr, gate_phase(lr=0.5).lr) == (
        "gate",
        True,
        0.1,
        0.5,
    )


def train(net: Gated, images: ToyImages, l1: float = 0.01, folder: Path | None = None) -> PhaseReport:
    phase = gate_phase(lr=0.05, gate_l1=l1)
    return train_phase_(
        net, phase, toy_groups(), images, ADAMW, method="abp", run=TrainingRun(device=CPU, seed=7, folder=folder)
    )


def gated_toy(dropout: float = 0.2) -> Gated:
    return Gated(toy_net(dropout=dropout), toy_groups(), drawn_gates(toy_groups(), seed=1))


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        return (gate.abs() >= 0.5).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_phase_equals_a_loop_with_gates_on_the_activations() -> None:
    """The paper's form, after norm and activation: the gate times the channel, its own straight-through gradient."""
    images, net = ToyImages(), gated_toy(dropout=0.0)
    twin, gate = copy.deepcopy(net.model).train(), net.gate.detach().clone().requires_grad_()
    parameters = [*twin.parameters(), gate]
    velocity = [torch.zeros_like(p) for p in parameters]
    batches = [batch for epoch in range(3) for batch in images.train_loader(epoch=epoch)][:30]
    for inputs, labels in batches:
        hidden = twin[2](twin[1](twin[0](inputs))) * _Open.apply(gate)[:, None, None]
        gradients = torch.autograd.grad(functional.cross_entropy(twin[5](hidden.flatten(1)), labels), parameters)
        with torch.no_grad():
            for at, (value, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                extra = 5e-4 * value if value.ndim > 1 else 0.01 * value.sign() if value is gate else 0.0
                velocity[at] = 0.9 * velocity[at] + gradient + extra
                value.sub_(0.05 * velocity[at])
            gate.clamp_(-1, 1)
    report = train(net, images)
    torch.testing.assert_close(net.gate.detach(), gate.detach(), rtol=1e-3, atol=1e-5)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(net.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert (report.name, report.open_before, report.open_after) == (
        "gate",
        pytest.approx(float((drawn_gates(toy_groups(), seed=1).abs() >= 0.5).float().mean())),
        pytest.approx(float((gate.abs() >= 0.5).float().mean())),
    )


@pytest.mark.parametrize("stop_at", [1, 14])
def test_interrupted_anywhere_resumes_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole, net = gated_toy(), gated_toy()
    train(whole, ToyImages())
    images = ToyImages()
    images.train = Interrupting(images.train, stop_at * images.batch_size)
    with pytest.raises(InterruptedRunError, match="saved"):
        train(gated_toy(), images, folder=tmp_path)
    train(net, ToyImages(), folder=tmp_path)
    assert same(weights(net), weights(whole))
