"""The registered networks: sizes known from the papers, parameter names of the published files, timm's interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import prunecli.models.paper_nets

# name -> (parameters, input size, num_features, head_hidden_size). ResNet counts: He et al. 2016 / METHODS; the others
# by hand: MLP 1024*100+100 + 5*(100*100+100) + 100*10+10; LeNet 156 + 2416 + 48120 + 10164 + 850.
NETS = {
    "cifar_resnet20": (269_722, (3, 32, 32), 64, 64),
    "cifar_resnet32": (464_154, (3, 32, 32), 64, 64),
    "cifar_resnet44": (658_586, (3, 32, 32), 64, 64),
    "cifar_resnet56": (853_018, (3, 32, 32), 64, 64),
    "cifar_resnet110": (1_727_962, (3, 32, 32), 64, 64),
    "cifar_vgg19": (20_018_880 + 11_008 + 51_300, (3, 32, 32), 512, 512),
    "mlp7_linear": (102_500 + 50_500 + 1_010, (1, 32, 32), 100, 100),
    "mlp7_relu": (102_500 + 50_500 + 1_010, (1, 32, 32), 100, 100),
    "lenet5_linear": (61_706, (1, 32, 32), 120, 84),
    "lenet5_relu": (61_706, (1, 32, 32), 120, 84),
}


@pytest.mark.parametrize("name", NETS)
def test_size_and_timm_interface(name: str) -> None:
    params, size, features, hidden = NETS[name]
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert model.pretrained_cfg["input_size"] == size
    assert model.pretrained_cfg["crop_pct"] == 1.0
    assert (model.num_features, model.head_hidden_size) == (features, hidden)
    classes = model.pretrained_cfg["num_classes"]
    assert model.num_classes == classes
    classifier = model.pretrained_cfg["classifier"]
    assert model.get_submodule(classifier) is model.get_classifier()
    first = model.pretrained_cfg["first_conv"]
    assert first is None or isinstance(model.get_submodule(first), torch.nn.Conv2d)

    x = torch.randn(2, *size)
    maps = model.forward_features(x)
    assert maps.shape[1] == features
    assert model(x).shape == (2, classes)
    torch.testing.assert_close(model.forward_head(maps), model(x))
    assert model.forward_head(maps, pre_logits=True).shape == (2, hidden)

    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, hidden)


@pytest.mark.parametrize("name", NETS)
def test_keyword_arguments(name: str) -> None:
    size = NETS[name][1]
    model = timm.create_model(name, num_classes=3, in_chans=2).eval()
    assert model(torch.randn(2, 2, *size[1:])).shape == (2, 3)


@pytest.mark.parametrize("name", [n for n in NETS if not n.startswith("mlp")])
def test_feature_info_is_what_the_layers_give(name: str) -> None:
    size = NETS[name][1]
    features = timm.create_model(name, features_only=True).eval()
    full = timm.create_model(name).eval()
    full.load_state_dict(features.state_dict(), strict=False)
    maps = features(torch.randn(1, *size))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    if not name.startswith("lenet"):  # valid convolutions shrink the map beyond the stride
        assert [size[1] // m.shape[2] for m in maps] == features.feature_info.reduction()


def test_option_a_shortcut_by_hand() -> None:
    block = timm.create_model("cifar_resnet20").layer2[0].eval()
    x = torch.randn(2, 16, 8, 8)
    zeros = torch.zeros(2, 8, 4, 4)
    torch.testing.assert_close(block.shortcut(x), torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1))
    assert (block.shortcut.pad_before, block.shortcut.pad_after) == (8, 8)
    torch.nn.init.zeros_(block.bn2.weight)
    torch.testing.assert_close(block(x), torch.relu(block.shortcut(x)))


def test_linear_mlp_is_the_product_of_its_matrices() -> None:
    model = timm.create_model("mlp7_linear").double().eval()
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], torch.randn(1, 1, 32, 32).double())
    product = torch.eye(1024).double()
    for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        product = layer.weight @ product
    torch.testing.assert_close(jacobian.reshape(10, 1024), product)
    assert timm.create_model("mlp7_relu").layers[1](torch.tensor(-1.0)) == 0


def test_published_checkpoints_load_strictly(shared_data: Path) -> None:
    for depth in (20, 56):
        weights = load_file(shared_data / "checkpoints" / f"cifar10_resnet{depth}.safetensors")
        model = timm.create_model(f"cifar_resnet{depth}")
        assert set(weights) == {n for n in model.state_dict() if not n.endswith("num_batches_tracked")}
        model.load_state_dict(weights, strict=True)


def test_digits_tag_has_its_own_input_and_leaves_the_plain_name_alone() -> None:
    plain, digits = timm.create_model("cifar_resnet20"), timm.create_model("cifar_resnet20.digits")
    assert plain.pretrained_cfg["input_size"] == (3, 32, 32)
    assert not plain.pretrained_cfg.get("file")
    assert digits.pretrained_cfg["input_size"] == (3, 16, 16)
    assert Path(digits.pretrained_cfg["file"]).name == "cifar_resnet20_digits.safetensors"
    assert digits(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_shipped_digits_checkpoint_loads_offline() -> None:
    file = prunecli.models.paper_nets.ASSETS / "cifar_resnet20_digits.safetensors"
    if not file.is_file():
        pytest.skip("the shipped checkpoint is not there yet")
    assert file.stat().st_size <= 2 * 2**20
    model = timm.create_model("cifar_resnet20.digits", pretrained=True)
    torch.testing.assert_close(model.conv1.weight, load_file(file)["conv1.weight"])
