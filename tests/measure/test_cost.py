from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

import prunecli.models.paper_nets  # noqa: F401 (registers cifar_resnet56)
from prunecli.measure.cost import count_macs, measure
from prunecli.models.tensors import named_tensors


def test_a_convolution_and_a_linear_layer_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    cost = measure(net, (3, 8, 8))
    assert cost.macs == 4 * 4 * 8 * 3 * 9 + 128 * 10
    assert cost.params == 8 * 27 + 8 + 1280 + 10
    assert cost.bytes == 4 * cost.params


def test_grouped_convolutions_cost_a_group_each():
    assert count_macs(nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 5, 5)) == 25 * 8 * 9
    assert count_macs(nn.Conv2d(8, 16, 1, groups=2), (8, 5, 5)) == 25 * 16 * 4


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.flatten(2)  # [B, 3 heads, tokens * 4] → heads of width 4
        q = q.view(x.shape[0], 3, -1, 4)
        return F.scaled_dot_product_attention(q, q, q)


def test_attention_products_are_counted():
    tokens = 6 * 4 // 4
    assert count_macs(Attention(), (3, 6, 4)) == 2 * 3 * tokens * tokens * 4


@pytest.mark.parametrize("fast", [True, False])
def test_torchs_own_transformer_layer_is_counted_whatever_path_it_takes(fast, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", fast)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = nn.Sequential(nn.Flatten(0, 1), layer)  # images of one channel: rows are tokens
    projections, products, feedforward = 4 * 8 * 24 + 4 * 8 * 8, 2 * 4 * 4 * 8, 2 * 4 * 8 * 16
    assert count_macs(tokens, (1, 4, 8)) == projections + products + feedforward
    assert torch.backends.mha.get_fastpath_enabled() is fast


class TokenFirst(nn.Module):
    """Hands a parameter to a submodule, as class-token transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.body = nn.Parameter(torch.zeros(1, 1, 4)), nn.ModuleList([nn.Linear(4, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body[0](self.token.expand(len(x), 1, 4)) + x.sum()


def test_a_parameter_may_be_a_modules_input():
    assert count_macs(TokenFirst(), (3, 2, 2)) == 24


@pytest.mark.parametrize(
    ("name", "gmacs", "params"),
    [("resnet18", (1.81, 1.82), 11_689_512), ("vit_tiny_patch16_224", (1.25, 1.26), 5_717_416)],
)
def test_known_figures_of_timm_models(name, gmacs, params):
    model = timm.create_model(name)
    cost = measure(model, (3, 224, 224))
    assert gmacs[0] < cost.macs / 1e9 < gmacs[1]
    assert cost.params == params


def test_known_figures_of_resnet56():
    cost = measure(timm.create_model("cifar_resnet56"), (3, 32, 32))
    assert cost.params == 853_018
    assert cost.macs == pytest.approx(125.5e6, rel=0.01)


def test_both_attention_paths_cost_the_same():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    fused = count_macs(model, (3, 224, 224))
    for block in model.blocks:
        block.attn.fused_attn = False
    assert count_macs(model, (3, 224, 224)) == fused


def test_bytes_are_what_safetensors_holds():
    model = timm.create_model("cifar_resnet20").half()
    state = model.state_dict()
    header = 8 + int.from_bytes(save(state)[:8], "little")
    assert measure(model, (3, 32, 32)).bytes == len(save(state)) - header


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False))
    net[1].weight = net[0].weight
    cost = measure(net, (4, 2, 2))
    assert (cost.params, cost.bytes, cost.macs) == (16, 64, 2 * 4 * 16)


def test_the_model_is_left_alone_and_may_hold_no_values():
    model = timm.create_model("levit_128s").train()
    tensors = named_tensors(model)
    expected = measure(model, (3, 224, 224))
    assert model.training
    assert named_tensors(model).keys() == tensors.keys()
    assert all(tensor is tensors[name] for name, tensor in named_tensors(model).items())
    assert measure(timm.create_model("resnet18").to("meta"), (3, 64, 64)) == measure(
        timm.create_model("resnet18"), (3, 64, 64)
    )
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 224, 224))  # fills the bias caches
    assert measure(model, (3, 224, 224)) == expected
