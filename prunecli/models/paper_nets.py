"""The papers' small networks, registered with timm on import (``timm.create_model("cifar_resnet56")`` then works).

Sizes are those of He et al. 2016 (section 4.2) for the CIFAR ResNets, of Simonyan and Zisserman 2015 with BatchNorm and
one linear layer for VGG-19, of Lee et al. 2020 for the seven-layer perceptrons, and of LeCun et al. 1998 with max
pooling for LeNet-5. Weights start from PyTorch's own initialisation. Shapes: images ``[B, C, H, W]``, logits
``[B, num_classes]``. ``num_classes=0`` leaves out the classifier, as everywhere in timm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MLP7", "CifarResNet", "CifarVGG", "LeNet5"]

ASSETS = Path(__file__).parents[1] / "assets"
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376  # of scikit-learn's digits, scaled to [0, 1]

VGG19_WIDTHS = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4)


class ZeroPadShortcut(nn.Module):
    """Option A of He et al. 2016: every ``stride``-th position, new channels are zeros, half before and half after."""

    def __init__(self, *, stride: int, pad_before: int, pad_after: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad_before = pad_before
        self.pad_after = pad_after

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, pad_before + C + pad_after, ceil(H / stride), ceil(W / stride)]``."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad_before, self.pad_after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut without parameters: ``[B, C, H, W] -> [B, C', H/s, W/s]``."""

    def __init__(self, in_chs: int, out_chs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        new = out_chs - in_chs
        self.shortcut = (
            nn.Identity()
            if stride == 1 and new == 0
            else ZeroPadShortcut(stride=stride, pad_before=new // 2, pad_after=new - new // 2)
        )
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H / s, W / s]``."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + self.shortcut(x)
        result: Tensor = self.act2(y)
        return result


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for small images: three stages of ``n`` blocks with 16, 32 and 64 channels, strides 1, 2, 2."""

    linear: nn.Module

    def __init__(self, *, blocks: int, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks=blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks=blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks=blocks, stride=2)
        self.feature_info = [
            {"num_chs": 16 * 2**i, "reduction": 2**i, "module": f"layer{i + 1}"} for i in range(3)
        ]  # fmt: skip
        self.global_pool, self.linear = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def get_classifier(self) -> nn.Module:
        """The last layer, Identity where ``num_classes`` is 0."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier by a freshly initialised one with ``num_classes`` outputs."""
        self.num_classes = num_classes
        self.global_pool, self.linear = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, 64, H/4, W/4]``."""
        x = self.act1(self.bn1(self.conv1(x)))
        result: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return result

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``[B, 64, H/4, W/4] -> [B, num_classes]``, or the pooled features with ``pre_logits``."""
        x = self.global_pool(x)
        return x if pre_logits else cast("Tensor", self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


def _stage(in_chs: int, out_chs: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_chs, out_chs, stride=stride)
    return nn.Sequential(first, *(BasicBlock(out_chs, out_chs, stride=1) for _ in range(blocks - 1)))


class CifarVGG(nn.Module):
    """VGG-19 for 32x32 images: 16 convolutions without bias, each with BatchNorm, four poolings, one linear layer."""

    classifier: nn.Module

    def __init__(self, *, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = 512
        layers: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        chs = in_chans
        for width in (*VGG19_WIDTHS, "end"):
            if isinstance(width, int):
                conv = nn.Conv2d(chs, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                chs = width
                continue
            last = {"num_chs": chs, "reduction": 2 ** len(self.feature_info), "module": f"features.{len(layers) - 1}"}
            self.feature_info.append(last)
            if width == "M":
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def get_classifier(self) -> nn.Module:
        """The last layer, Identity where ``num_classes`` is 0."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier by a freshly initialised one with ``num_classes`` outputs."""
        self.num_classes = num_classes
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, 512, H/16, W/16]``."""
        result: Tensor = self.features(x)
        return result

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``[B, 512, H/16, W/16] -> [B, num_classes]``, or the pooled features with ``pre_logits``."""
        x = self.global_pool(x)
        return x if pre_logits else cast("Tensor", self.classifier(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


class MLP7(nn.Module):
    """Seven linear layers with bias, 1024-100-100-100-100-100-100-classes, on flattened 32x32 images.

    ``act_layer`` stands after each layer but the last: ReLU, or Identity for the linear twin whose input-output
    Jacobian is the product of its weight matrices.
    """

    def __init__(self, *, act_layer: type[nn.Module] = nn.ReLU, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = 100
        layers: list[nn.Module] = []
        for i in range(6):
            layers += [nn.Linear(100 if i else 32 * 32 * in_chans, 100), act_layer()]
        self.layers = nn.Sequential(*layers)
        self.head = _linear_head(self.num_features, num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer, Identity where ``num_classes`` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a freshly initialised one with ``num_classes`` outputs; there is no pooling."""
        self.num_classes = num_classes
        self.head = _linear_head(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, C, 32, 32] -> [B, 100]``."""
        result: Tensor = self.layers(x.flatten(1))
        return result

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``[B, 100] -> [B, num_classes]``, or the features themselves with ``pre_logits``."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


class LeNet5(nn.Module):
    """LeNet-5: convolutions 1-6-16-120 (5x5) with two 2x2 max poolings, then linear layers 120-84-classes.

    ``act_layer`` stands after each layer but the last: ReLU, or Identity for the linear twin.
    """

    def __init__(self, *, act_layer: type[nn.Module] = nn.ReLU, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = 120
        self.head_hidden_size = 84
        self.conv1 = nn.Conv2d(in_chans, 6, 5)
        self.act1 = act_layer()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.act2 = act_layer()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.act3 = act_layer()
        self.feature_info = [
            {"num_chs": 6, "reduction": 1, "module": "act1"},
            {"num_chs": 16, "reduction": 2, "module": "act2"},
            {"num_chs": 120, "reduction": 4, "module": "act3"},
        ]
        self.fc1 = nn.Linear(120, 84)
        self.act4 = act_layer()
        self.fc2 = _linear_head(84, num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer, Identity where ``num_classes`` is 0."""
        return self.fc2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a freshly initialised one with ``num_classes`` outputs; there is no pooling."""
        self.num_classes = num_classes
        self.fc2 = _linear_head(self.head_hidden_size, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, C, 32, 32] -> [B, 120, 1, 1]``."""
        x = self.pool1(self.act1(self.conv1(x)))
        x = self.pool2(self.act2(self.conv2(x)))
        result: Tensor = self.act3(self.conv3(x))
        return result

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``[B, 120, 1, 1] -> [B, num_classes]``, or the 84 hidden units with ``pre_logits``."""
        x = self.act4(self.fc1(x.flatten(1)))
        return x if pre_logits else self.fc2(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, num_classes]``."""
        return self.forward_head(self.forward_features(x))


def _linear_head(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()


# ---------------------------------------------------------------------------------------------- timm registration


def _cfg(**changes: Any) -> dict[str, Any]:
    small_rgb = {
        "input_size": (3, 32, 32),
        "num_classes": 10,
        "mean": IMAGENET_DEFAULT_MEAN,  # the published CIFAR ResNets were trained with the ImageNet values
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "conv1",
        "classifier": "linear",
    }
    return small_rgb | changes


_MNIST = {"input_size": (1, 32, 32), "mean": (0.1307,), "std": (0.3081,)}
_DIGITS = {
    "file": str(ASSETS / "cifar_resnet20_digits.safetensors"),
    "input_size": (3, 16, 16),
    "mean": (DIGITS_MEAN,) * 3,
    "std": (DIGITS_STD,) * 3,
}

default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet20.digits": _cfg(**_DIGITS),
        "cifar_resnet20.*": _cfg(),  # star, and last: the plain name means 32x32 images
        "cifar_resnet32": _cfg(),
        "cifar_resnet44": _cfg(),
        "cifar_resnet56": _cfg(),
        "cifar_resnet110": _cfg(),
        "cifar_vgg19": _cfg(
            num_classes=100,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            first_conv="features.0",
            classifier="classifier",
        ),
        "mlp7_linear": _cfg(**_MNIST, first_conv=None, classifier="head"),
        "mlp7_relu": _cfg(**_MNIST, first_conv=None, classifier="head"),
        "lenet5_linear": _cfg(**_MNIST, classifier="fc2"),
        "lenet5_relu": _cfg(**_MNIST, classifier="fc2"),
    }
)


_THREE_MAPS = {"out_indices": (0, 1, 2)}


def _resnet(variant: str, depth: int, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    kwargs = {"blocks": (depth - 2) // 6, "feature_cfg": _THREE_MAPS, **kwargs}
    return _build(CifarResNet, variant, pretrained=pretrained, **kwargs)


def _build(model_cls: type[nn.Module], variant: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    return model


def cifar_resnet20(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for CIFAR, option-A shortcuts."""
    return _resnet("cifar_resnet20", 20, pretrained=pretrained, **kwargs)


def cifar_resnet32(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for CIFAR, option-A shortcuts."""
    return _resnet("cifar_resnet32", 32, pretrained=pretrained, **kwargs)


def cifar_resnet44(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44 for CIFAR, option-A shortcuts."""
    return _resnet("cifar_resnet44", 44, pretrained=pretrained, **kwargs)


def cifar_resnet56(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR, option-A shortcuts."""
    return _resnet("cifar_resnet56", 56, pretrained=pretrained, **kwargs)


def cifar_resnet110(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for CIFAR, option-A shortcuts."""
    return _resnet("cifar_resnet110", 110, pretrained=pretrained, **kwargs)


def cifar_vgg19(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with BatchNorm; its defaults (100 classes, mean, std) are CIFAR-100's, on which the papers use it."""
    kwargs = {"feature_cfg": {"flatten_sequential": True}, **kwargs}
    return _build(CifarVGG, "cifar_vgg19", pretrained=pretrained, **kwargs)


def mlp7_linear(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLP-7-Linear: a product of seven matrices (and biases)."""
    return _build(MLP7, "mlp7_linear", pretrained=pretrained, act_layer=nn.Identity, **kwargs)


def mlp7_relu(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLP-7-ReLU."""
    return _build(MLP7, "mlp7_relu", pretrained=pretrained, **kwargs)


def lenet5_linear(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LeNet-5 without activations (the max poolings stay)."""
    kwargs = {"feature_cfg": _THREE_MAPS, "act_layer": nn.Identity, **kwargs}
    return _build(LeNet5, "lenet5_linear", pretrained=pretrained, **kwargs)


def lenet5_relu(*, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LeNet-5 with ReLU."""
    return _build(LeNet5, "lenet5_relu", pretrained=pretrained, **{"feature_cfg": _THREE_MAPS, **kwargs})


for _entry in (
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_vgg19,
    mlp7_linear,
    mlp7_relu,
    lenet5_linear,
    lenet5_relu,
):
    register_model(_entry)
