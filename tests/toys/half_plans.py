"""Plans that halve every group, for what is repaired after a cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunecli.graph.build import build_graph
from prunecli.values.plan import Cost, ModelRef, Plan, PlannedGroup


def random(*shape: int, seed: int = 0, **kwargs) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def half_plan(model: nn.Module, size: tuple[int, int, int], *only: str) -> Plan:
    """All groups, or those named, lose every second channel, whatever these are worth."""
    graph = build_graph(model, size)
    groups = [
        PlannedGroup(
            name=g.name,
            kind=g.kind,
            width=g.width,
            keep=tuple(range(0, g.width, 2 if not only or g.name in only else 1)),
            members=g.members,
            norms=g.norms,
        )
        for g in graph.groups
    ]
    kept = {g.name: len(g.keep) for g in groups if g.is_cut}
    ref = ModelRef(name="m", num_classes=1, timm="0")
    cost = Cost(params=1, macs=1, bytes=1)
    return Plan(
        model=ref, engine="axes", criterion="l1", ranking="local", seed=0, groups=tuple(groups), base=cost,
        attributes=graph.solve(kept), folds=tuple(f for f in graph.folds if f.group in kept), predicted=cost,
    )  # fmt: skip


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.square().sum().sqrt()
        return F.conv2d(x, weight, self.bias)
