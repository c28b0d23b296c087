"""Models as a user of the package writes them; the tests name them as ``toys.user_nets:NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A residual branch whose forward has keywords of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return F.relu(x + scale * self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """A small residual net; it says what it is fed with as timm's models do."""

    def __init__(self, width: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x.mean((2, 3))

    def forward(self, images: Tensor, mask: Tensor | None = None, *, normalise: bool = False) -> Any:
        features = self.features(images) if mask is None else self.features(images * mask)
        return self.head(F.normalize(features) if normalise else features)


class InDict(Residual):
    """The same net, its logits inside a mapping."""

    def forward(self, images: Tensor, mask: Tensor | None = None, *, normalise: bool = False) -> Mapping[str, Tensor]:
        return {"loss": images.sum(), "logits": super().forward(images, mask, normalise=normalise)}


class TwoOutputs(Residual):
    """Logits first, then the features that they come from."""

    def forward(self, images: Tensor, mask: Tensor | None = None, *, normalise: bool = False) -> tuple[Tensor, Tensor]:
        return super().forward(images, mask, normalise=normalise), self.features(images)


class Tied(nn.Module):
    """Two layers with one weight, and a table that is in no state_dict and never the same."""

    def __init__(self) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
        self.first, self.second, self.third = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.third.weight = self.second.weight
        self.head = nn.Linear(16, 10)
        self.register_buffer("table", torch.rand(10), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(images.flatten(1)))))
        return self.table * self.head(F.relu(self.third(x)))


def in_function(width: int = 8) -> nn.Module:
    """A module whose class is another one each time."""

    class Local(Residual):
        pass

    return Local(width)


def resnet18() -> nn.Module:
    """torchvision's."""
    from torchvision.models import resnet18 as make

    return make(weights=None, num_classes=10)


def hugging_face_vit() -> nn.Module:
    """transformers' ViT for images of 32 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
