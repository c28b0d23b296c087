"""How the layers that read a group weigh its channels.

Each linear reader (and each of its blocks of inputs) gives one *view*: the second moments S of what it reads, and a
matrix A made from its weight W such that ``trace(A S A')`` is the energy of its output, in the units in which an error
there counts:

    ``A = M^(1/2) W``, ``M = diag((gamma / sigma)^2) * share / E``, ``E = trace(W S W' diag((gamma / sigma)^2))``

with gamma and sigma of the BatchNorm right behind the layer and its branch share. So an error is measured against the
sum that the layer's output flows into, and the errors of several readers can be added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecli.measure.layer_inputs import InputStatistics, LayerInputs
from prunecli.values.groups import Group, Member, module_of, tensor_name


@dataclass(frozen=True, kw_only=True)
class View:
    """One block of a layer's inputs, with the channels of a group among them. Float64.

    Attributes:
        A: weight ``[rows, h]``, scaled so that ``trace(A S A')`` is the reader's share of the error of all its output.
        S: second moments of the inputs ``[h, h]``.
        channels: the group's channels in this block ``[n]``.
        at: places of these channels in the block ``[n, r]``; a channel may be several inputs (a head, a feature map).
    """

    A: Tensor
    S: Tensor
    channels: Tensor
    at: Tensor

    def ridged(self, ridge: float) -> View:
        """The view with ``ridge`` times the mean variance on the diagonal, so that ``S`` is positive definite."""
        level = ridge * float(self.S.diagonal().mean()) or 1.0  # inputs that are always zero explain nothing anyway
        return View(A=self.A, S=self.S + level * torch.eye(len(self.S)).double(), channels=self.channels, at=self.at)


#: Function from a group to its views; empty where nothing linear reads the group.
ViewsOf = Callable[[Group], Sequence[View]]


@torch.no_grad()
def views_of(model: nn.Module, statistics: InputStatistics, group: Group) -> list[View]:
    """The views of a group.

    Args:
        model: the dense net behind the statistics.
        statistics: what its layers read.
        group: a group of the net.
    """
    found = []
    for member in group.members:
        path = module_of(member.tensor)
        inputs = statistics.layers.get(path)
        if member.role == "in" and member.dim == 1 and inputs and member.tensor == tensor_name(path, "weight"):
            found += _views(model, path, inputs, member, group.width)
    return found


def _views(model: nn.Module, path: str, inputs: LayerInputs, member: Member, width: int) -> list[View]:
    weights = _scaled_weights(model, path, inputs)
    at = torch.tensor([member.index.positions([channel]) for channel in range(width)])
    found = []
    for A, S, index in zip(weights, inputs.second, inputs.blocks.index, strict=True):
        place = torch.full((int(index.max()) + 1,), -1)
        place[index] = torch.arange(len(index))
        local = torch.where(at < len(place), place[at.clamp(max=len(place) - 1)], -1)
        present = (local >= 0).sum(1)
        channels = present.nonzero().flatten()
        if not len(channels) or int(present[channels].min()) < int(present.max()):
            continue  # a channel of which only a part lies in this block can't be weighed against whole ones
        local = local[channels]
        kept = local[local >= 0].reshape(len(channels), -1)
        short = torch.linalg.qr(A, mode="r").R if len(A) > len(S) else A  # R' R = A' A: the same energies, fewer rows
        found.append(View(A=short, S=S.double(), channels=channels, at=kept))
    return found


def _scaled_weights(model: nn.Module, path: str, inputs: LayerInputs) -> list[Tensor]:
    """``A [rows, h]`` of every block."""
    layer = model.get_submodule(path)
    assert isinstance(layer.weight, Tensor)
    scale = torch.ones(len(layer.weight), dtype=torch.float64)
    if inputs.norm is not None:
        norm = model.get_submodule(inputs.norm)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_var is not None
        scale = 1 / (norm.running_var.cpu().double() + norm.eps).sqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.cpu().double().abs()
    flat = layer.weight.cpu().double().reshape(len(scale), layer.weight.shape[1], -1) * scale[:, None, None]
    blocks = [part.movedim(2, 1).flatten(0, 1) for part in inputs.blocks.weight(flat)]
    energy = sum(float(((A @ S.double()) * A).sum()) for A, S in zip(blocks, inputs.second, strict=True))
    factor = (inputs.share / energy) ** 0.5 if energy > 0 else 0.0
    return [A * factor for A in blocks]
