"""Replay: bit-equal to the plain pass from every starting point, and it computes nothing that comes before it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunecli.measure.dataflow import differing, trace
from prunecli.measure.replay import Replay
from prunecli.models.layers import evaluation_mode
from prunecli.models.outputs import logits_of
from prunecli.models.tensors import named_tensors
from prunecli.surgery.cut import cut
from toys.half_plans import half_plan, random
from toys.user_nets import InDict, Residual, Tied


class CustomReLU(torch.autograd.Function):
    """What it reads no ``TorchFunctionMode`` sees."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Awkward(nn.Module):
    """A module called twice, writes in place into what others read, views, a custom function, a borrowed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(width, 6, 3, padding=1) for width in (2, 6, 6))
        self.tower = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True))
        self.keep = nn.Identity()
        self.late = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        shortcut = self.keep(x)
        y = self.conv2(self.act(x))  # the shortcut is rectified too
        y = F.linear(y.movedim(1, -1), self.late.weight).movedim(-1, 1)
        y = CustomReLU.apply(self.act(y) - 0.1)
        z = self.tower(y + shortcut)
        rows = self.conv3(z).flatten(2)
        rows[:, :, ::2] *= 2
        return self.head(self.late(rows.mean(2) + z.mean((2, 3))))


class Encoder(nn.Sequential):
    """In evaluation mode a layer is one operator, and its submodules are not called."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        super().__init__(nn.Flatten(2), nn.Linear(16, 8), body, nn.Flatten(), nn.Linear(24, 4))


def timm_net(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=4, **kwargs)


SMALL_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
NETS = {
    "residual": (lambda: Residual(8, 4), (1, 8, 8)),
    "in a dict": (lambda: InDict(8, 4), (1, 8, 8)),
    "awkward": (Awkward, (2, 6, 6)),
    "one weight twice": (Tied, (1, 8, 8)),
    "torch's own transformer": (Encoder, (3, 4, 4)),
    "resnet": (timm_net("test_resnet"), (3, 32, 32)),
    "efficientnet": (timm_net("tf_efficientnet_lite0"), (3, 32, 32)),
    "vit": (timm_net("test_vit", img_size=32), (3, 32, 32)),
    "convnext": (timm_net("test_convnext"), (3, 32, 32)),
    "densenet": (timm_net("densenet121", growth_rate=4, block_config=(2, 3, 2)), (3, 32, 32)),
    "swin": (timm_net("swin_tiny_patch4_window7_224", **SMALL_SWIN), (3, 32, 32)),
}


def net(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A net whose modes differ, and its images in two unequal batches."""
    torch.manual_seed(0)
    make, size = NETS[name]
    model = make().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.rand_like(parameter))
    return model, list(random(5, *size).split(3))


@torch.no_grad()
def plain(model: nn.Module, batches: list[Tensor]) -> Tensor:
    with evaluation_mode(model):
        return torch.cat([logits_of(model(batch)) for batch in batches])


def with_noise(model: nn.Module, *names: str) -> nn.Module:
    """A copy in which the named tensors differ."""
    other = copy.deepcopy(model)
    tensors = named_tensors(other)
    with torch.no_grad():
        for name in names:
            tensors[name].add_(random(*tensors[name].shape, seed=1))
    return other


@pytest.mark.parametrize("name", NETS)
def test_every_starting_point_gives_the_bits_of_the_plain_pass(name):
    """One parameter differs, each in turn, backwards and forwards, so that recordings start at many places."""
    model, batches = net(name)
    modes = [module.training for module in model.modules()]
    names = [n for n, _ in model.named_parameters()]
    chosen = names[:: max(1, len(names) // 4)]
    replay, dense = Replay(model, batches), plain(model, batches)
    for parameter in (*chosen[2:0:-1], *chosen[3:], names[-1], chosen[0]):
        other = with_noise(model, parameter)
        logits = replay.logits(other)
        assert torch.equal(logits, plain(other, batches)), parameter
        assert not torch.equal(logits, dense), parameter
    assert torch.equal(replay.logits(model), dense)
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in vars(module) for net in (model, other) for module in net.modules())


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("residual", ("blocks.1.conv1",)),
        ("vit", ("blocks.3.mlp.fc1", "blocks.3.attn.qkv:heads")),
        ("densenet", ("features.denseblock2.denselayer2.conv1",)),
    ],
)
def test_a_cut_net_with_other_statistics_gives_the_bits_of_the_plain_pass(name, groups):
    model, batches = net(name)
    plan = half_plan(model, tuple(batches[0].shape[1:]), *groups)
    assert len(plan.cut_groups) == len(groups)
    pruned, replay = cut(model, plan), Replay(model, batches)
    for module in pruned.modules():
        if isinstance(module, nn.BatchNorm2d) and len(module.weight) in {g.width // 2 for g in plan.cut_groups}:
            module.running_mean.add_(0.1)
    assert torch.equal(replay.logits(pruned), plain(pruned, batches))
    assert replay._outputs[0]  # something was skipped


def test_what_is_kept_is_the_output_of_the_block_before():
    """For later layers of a block both its input, which the shortcut reads, and what the branch has made so far."""
    model, batches = net("resnet")
    replay = Replay(model, batches)
    kept: list[set[str]] = []
    for parameter in ("layer3.0.conv1.weight", "layer4.0.bn2.weight", "layer4.0.conv2.weight"):
        before = set(replay._outputs[0])
        replay.logits(with_noise(model, parameter))
        kept.append(set(replay._outputs[0]) - before)
    assert kept == [{"layer2"}, {"layer3", "layer4.0.conv2"}, {"layer4.0.bn1"}]  # act1 writes in place, so it runs


def test_neither_net_computes_what_is_known():
    model, batches = net("resnet")
    replay = Replay(model, batches)
    first, second = with_noise(model, "layer2.0.conv1.weight"), with_noise(model, "layer4.0.conv1.weight")
    ran: dict[str, Counter[str]] = {name: Counter() for name in ("dense", "first", "second")}
    for name, each in zip(ran, (model, first, second), strict=True):
        for path, module in each.named_modules():
            if isinstance(module, nn.BatchNorm2d) and path.startswith("layer"):
                module.register_forward_hook(lambda *_, name=name, stage=path[:6]: ran[name].update([stage]))
    replay.logits(first)
    assert ran["first"].keys() == {"layer2", "layer3", "layer4"}
    assert ran["dense"].keys() == {"layer1"}
    replay.logits(second)
    assert ran["second"].keys() == {"layer4"}
    assert ran["dense"].keys() == {"layer1", "layer2", "layer3"}
    assert ran["dense"]["layer1"] == len(batches) * sum(isinstance(m, nn.BatchNorm2d) for m in model.layer1.modules())


def test_a_tensor_counts_from_where_it_is_first_read_or_its_holder_is_called():
    model = Awkward()
    flow = trace(model, random(1, 2, 6, 6))
    assert flow.first_use(["late.bias"]) > flow.first_use(["late.weight"])  # borrowed before
    assert flow.first_use(["late.bias"]) == flow.called_once["late"].begin
    assert flow.first_use(["head.weight", "conv2.bias"]) == flow.called_once["conv2"].begin
    assert flow.first_use([]) == float("inf")


def test_nets_differ_in_what_is_not_bit_equal():
    torch.manual_seed(0)
    model = Tied()
    assert not differing(model, copy.deepcopy(model))
    assert differing(model, with_noise(model, "table")) == {"table"}
    assert differing(model, with_noise(model, "third.weight")) == {"second.weight", "third.weight"}
    assert differing(nn.Linear(2, 3), nn.Linear(2, 4)) == {"weight", "bias"}
