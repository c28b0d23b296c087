"""REPAIR transfer: equal means and spreads on its own images, in bias and filter or in running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prunecli.measure.batch_norm import recalibrate_bn_
from prunecli.recovery.repair import Spread, repair_
from prunecli.surgery.cut import cut
from toys.half_plans import Standardised, half_plan, random
from toys.user_nets import Residual


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 8),
            nn.ReLU(), nn.Linear(8, 5),
        )  # fmt: skip


def outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, made, n=name: held.update({n: made.detach()}))
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return {name: made.movedim(1, -1).reshape(-1, made.shape[1]) for name, made in held.items()}


def test_the_spread_is_that_of_all_rows_at_once():
    rows = random(30, 3, dtype=torch.float64) + 1e6
    spread = Spread()
    for part in rows.split(7):
        spread.add(part)
    torch.testing.assert_close(spread.mean, rows.mean(0))
    torch.testing.assert_close(spread.std, rows.std(0, correction=0), rtol=1e-6, atol=0)


def test_means_and_spreads_become_the_dense_ones():
    torch.manual_seed(0)
    model = Plain().eval()
    plan = half_plan(model, (2, 6, 6))
    pruned, images = cut(model, plan), random(40, 2, 6, 6)
    names = ["0", "2", "5", "7"]
    done = repair_(pruned, model, plan, images.split(16))
    assert done.layers == tuple(names)
    assert (done.norms, done.dead, dict(done.left)) == (0, 0, {})
    dense, now = outputs(model, names, images), outputs(pruned, names, images)
    for name in names:
        step = 1 if name == "7" else 2
        for moment in (torch.mean, torch.std):
            torch.testing.assert_close(moment(now[name], 0), moment(dense[name], 0)[::step], rtol=1e-4, atol=1e-4)


def test_before_a_batch_norm_the_map_goes_into_running_statistics_alone():
    """What comes out behind the norm has the dense mean and spread, and no weight has changed."""
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    plan = half_plan(model, (1, 8, 8))
    pruned, images = cut(model, plan), random(32, 1, 8, 8)
    before = copy.deepcopy(pruned.state_dict())
    done = repair_(pruned, model, plan, [images])
    assert done.norms == 4
    norms = [f"blocks.{i}.bn{j}" for i in (0, 1) for j in (1, 2)]
    dense, now = outputs(model, norms, images), outputs(pruned, norms, images)
    for name in norms:
        for moment in (torch.mean, torch.std):
            torch.testing.assert_close(moment(now[name], 0), moment(dense[name], 0)[::2], rtol=1e-3, atol=1e-3)
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {f"{name}.running_{what}" for name in norms for what in ("mean", "var")}
    assert changed == statistics | {"head.weight", "head.bias"}  # the stem says what it said in the dense net


def test_where_the_dense_statistics_are_those_of_the_images_it_is_reestimation():
    torch.manual_seed(0)
    model, images = Residual().eval(), random(64, 1, 8, 8)
    recalibrate_bn_(model, [images], device=torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # torch keeps the unbiased variance; what was seen is the other one
            module.running_var *= 1 - 1 / (64 * 64)
    plan = half_plan(model, (1, 8, 8), "blocks.0.conv1", "blocks.1.conv1")
    assert plan.cut_groups
    repaired, again = cut(model, plan), cut(model, plan)
    repair_(repaired, model, plan, [images])
    recalibrate_bn_(again, [images], device=torch.device("cpu"))
    bn = (net.blocks[0].bn1 for net in (repaired, again))
    (mean, var), (want_mean, want_var) = ((norm.running_mean, norm.running_var) for norm in bn)
    torch.testing.assert_close(mean, want_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, want_var * (1 - 1 / (64 * 64)), rtol=1e-4, atol=1e-5)


def test_dead_channels_are_left_alone_and_counted():
    torch.manual_seed(0)
    model = Plain().eval()
    plan = half_plan(model, (2, 6, 6), "0")
    pruned = cut(model, plan)
    with torch.no_grad():
        pruned[0].weight[1] = 0
    bias = pruned[0].bias.clone()
    done = repair_(pruned, model, plan, [random(16, 2, 6, 6)])
    assert done.dead == 1
    assert torch.equal(pruned[0].bias[1], bias[1])
    assert not pruned[0].weight[1].any()


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 3, 1)), "0", "neither a bias nor a BatchNorm"),
        (nn.Sequential(Standardised(3, 4, 1), nn.Conv2d(4, 3, 1)), "0", "not linear in its weight"),
    ],
)
def test_what_cannot_take_the_map_is_named(model, layer, reason):
    plan = half_plan(model.eval(), (3, 8, 8))
    done = repair_(cut(model, plan), model, plan, [random(4, 3, 8, 8)])
    assert reason in done.left[layer]
    assert layer not in done.layers
