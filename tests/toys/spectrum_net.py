"""A net with every kind of layer that a Jacobian passes through, and seeded random images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Convolution, BatchNorm with real statistics, attention, a classifier; ``classes`` may pass ``width``."""

    def __init__(self, classes: int, width: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)
        for tensor in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias):
            nn.init.uniform_(tensor, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = functional.relu_(self.bn(self.conv(x))).flatten(2).mT
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.dropout(mixed).mean(1))
