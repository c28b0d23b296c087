"""One-pass reconstruction: against the obvious loop, exact cases, and BatchNorm statistics that change nothing."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from prunecli.measure.layer_inputs import input_statistics
from prunecli.measure.moments import Moments
from prunecli.measure.walk import Walk
from prunecli.recovery.least_squares import reconstruct_, regression
from prunecli.recovery.onepass import absorb_statistics_, reconstruct_in_one_pass_
from prunecli.surgery.cut import cut
from toys.half_plans import half_plan, random
from toys.user_nets import Residual


class Chain(nn.Module):
    """Three convolutions of one kernel position with biases: every map can be written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).mean((2, 3))


def given(net: nn.Module, path: str, images: Tensor) -> Tensor:
    held: list[Tensor] = []
    handle = net.get_submodule(path).register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    net(images)
    handle.remove()
    return held[0].detach()


def test_each_reader_is_regressed_on_what_the_solved_layers_before_it_give(monkeypatch):
    monkeypatch.setattr(Moments, "shrinkage", property(lambda self: torch.zeros_like(self._squares)))
    torch.manual_seed(0)
    model = Chain().double().eval()
    plan = half_plan(model.float(), (3, 5, 5))
    model.double()
    images = random(12, 3, 5, 5, dtype=torch.float64)
    statistics = input_statistics(model, plan.groups, images.split(4))
    pruned, want = cut(model, plan), cut(model, plan)
    reconstruct_in_one_pass_(pruned, model, plan, statistics, images.split(4), ridge=1e-3, mix=1)
    for path in ("b", "c"):
        x, y = (given(net, path, images).movedim(1, -1).flatten(0, 2) for net in (model, want))
        x_mean, y_mean = x.mean(0), y.mean(0)
        B = regression((y - y_mean).T @ (y - y_mean) / len(y), (x - x_mean).T @ (y - y_mean) / len(y), ridge=1e-3)
        layer, dense = want.get_submodule(path), model.get_submodule(path)
        rows = slice(None, None, 2) if path == "b" else slice(None)
        W = dense.weight.detach()[rows, :, 0, 0]
        layer.weight.data = (W @ B)[:, :, None, None]
        layer.bias.data = dense.bias.detach()[rows] + W @ (x_mean - B @ y_mean)
    torch.testing.assert_close(pruned.state_dict(), want.state_dict(), rtol=1e-6, atol=1e-8)


def test_mixed_with_nothing_of_itself_it_is_plain_least_squares():
    torch.manual_seed(0)
    model = Chain().eval()
    plan, images = half_plan(model, (3, 5, 5)), random(12, 3, 5, 5)
    statistics = input_statistics(model, plan.groups, [images])
    plain, mixed = cut(model, plan), cut(model, plan)
    reconstruct_(plain, model, plan, statistics, ridge=1e-3)
    reconstruct_in_one_pass_(mixed, model, plan, statistics, [images], ridge=1e-3, mix=0)
    torch.testing.assert_close(mixed.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_it_undoes_errors_of_earlier_layers_that_plain_least_squares_leaves():
    torch.manual_seed(0)
    model = Residual().eval()
    plan, images = half_plan(model, (1, 8, 8)), random(64, 1, 8, 8)
    statistics = input_statistics(model, plan.groups, images.split(16))
    plain, onepass = cut(model, plan), cut(model, plan)
    reconstruct_(plain, model, plan, statistics, ridge=1e-3)
    reconstruct_in_one_pass_(onepass, model, plan, statistics, images.split(16), ridge=1e-3, mix=1)
    errors = [float((net.eval()(images) - model(images)).detach().square().mean()) for net in (plain, onepass)]
    assert errors[1] < 0.9 * errors[0]


def test_absorbed_statistics_are_those_of_the_inputs_and_change_nothing():
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    model.eval()
    images = random(20, 1, 8, 8)
    before = copy.deepcopy(model)
    absorb_statistics_(model, images.split(5))
    torch.testing.assert_close(model(images), before(images), rtol=1e-4, atol=1e-5)
    inputs = given(model, "blocks.0.bn1", images)
    norm = model.get_submodule("blocks.0.bn1")
    torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext"])
def test_a_walk_hands_every_layer_what_a_plain_pass_gives_it(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    images = random(5, 3, 64, 64) if name != "test_vit" else random(5, 3, 160, 160)
    kinds = nn.Conv2d | nn.Linear
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds) and module.weight.dim() > 1]
    walk = Walk(model, images.split(2))
    with torch.no_grad():
        for path in paths[::3]:
            torch.testing.assert_close(
                torch.cat(list(walk.inputs(path))), given(model, path, images), rtol=1e-4, atol=1e-5
            )
