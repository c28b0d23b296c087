"""Nets whose channels a phase before the cut pushes or gates."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import nn

from prunecli.models import paper_nets  # noqa: F401 - registers the papers' networks
from prunecli.values.groups import Member
from prunecli.values.plan import PlannedGroup


class Pair(nn.Module):
    """Two convolutions that write into one stream, a norm on it, and a reader."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.a(x) + self.b(x)).mean((2, 3)))


def pair_groups() -> tuple[PlannedGroup, ...]:
    members = [("a.weight", 0, "out"), ("a.bias", 0, "elementwise"), ("b.weight", 0, "out")]
    members += [(f"norm.{name}", 0, "elementwise") for name in ("weight", "bias", "running_mean", "running_var")]
    members += [("head.weight", 1, "in")]
    made = tuple(Member(tensor=name, dim=dim, role=role) for name, dim, role in members)
    return (PlannedGroup(name="stream", kind="channels", width=4, keep=(0, 3), members=made),)


class Sigmoids(nn.Module):
    """An activation that turns zero into something else: silent producers alone would leave a half in every reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.bn(self.conv1(x)).sigmoid()).sigmoid()
        return self.fc(x.mean((2, 3)))


SMALL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
NETS: dict[str, Any] = {
    "cnn": (Sigmoids, "channels"),
    "residual": (lambda: timm.create_model("cifar_resnet20"), "channels"),
    "vit-heads": (lambda: timm.create_model("vit_tiny_patch16_224", **SMALL), "heads"),
    "vit-head_dim": (lambda: timm.create_model("vit_tiny_patch16_224", **SMALL), "head_dim"),
    "gated": (lambda: timm.create_model("vit_tiny_patch16_224", mlp_layer=SwiGLUPacked, **SMALL), "heads"),
}
