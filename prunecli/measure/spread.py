"""Mean and spread of channels over many rows, summed without keeping the rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Spread:
    """Running mean and variance of channels over rows ``[n, C]``, in float64; nothing else is kept."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.square = torch.zeros(())  # summed squares of distances to the mean

    def add(self, values: Tensor) -> None:
        """Add one batch of rows ``[n, C]`` (Chan's update, exact where the mean is large against the spread)."""
        count, mean = len(values), values.mean(0)
        step, total = mean - self.mean, self.count + count
        self.square = self.square + (values - mean).square().sum(0) + step.square() * self.count * count / total
        self.mean, self.count = self.mean + step * count / total, total

    @property
    def std(self) -> Tensor:
        """Standard deviation ``[C]``, of the rows themselves (divided by n)."""
        return (self.square / self.count).sqrt()
