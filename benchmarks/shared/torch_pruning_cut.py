"""Torch-Pruning's own pruner brought to a target, to stand prunecli's cuts beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from prunecli.measure import cost
from prunecli.models.layers import evaluation_mode

ROUNDS = 12  # halvings of the interval in which the ratio lies


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How its pruner ranks channels.

    Attributes:
        importance: maker of its importance.
        gradients: ``True`` where it reads the gradients of the loss on labelled images.
        isomorphic: ``True`` for channels that compete with those of all groups alike (Fang et al. 2024, arXiv
            2407.04616), ``False`` for one share of every group.
    """

    importance: Callable[[], tp.importance.Importance]
    gradients: bool = False
    isomorphic: bool = False


CRITERIA = {  # without LAMP, which ranks the channels of one group as L2 does
    "l1": Criterion(importance=lambda: tp.importance.GroupMagnitudeImportance(p=1)),
    "l2": Criterion(importance=lambda: tp.importance.GroupMagnitudeImportance(p=2)),
    "bn_scale": Criterion(importance=tp.importance.BNScaleImportance),
    "fpgm": Criterion(importance=tp.importance.FPGMImportance),
    "taylor": Criterion(importance=tp.importance.GroupTaylorImportance, gradients=True),
    "isomorphic": Criterion(importance=tp.importance.GroupTaylorImportance, gradients=True, isomorphic=True),
}


def loss_gradients(dense: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 32) -> dict[str, Tensor]:
    """Gradients of the summed cross-entropy by parameter, in evaluation mode.

    Args:
        dense: net from images to logits; it is left as it was.
        images: images ``[N, C, H, W]``.
        labels: their classes ``[N]``.
        batch_size: number of images in a pass.
    """
    net = copy.deepcopy(dense)
    with evaluation_mode(net):
        for some, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            nn.functional.cross_entropy(net(some), truth, reduction="sum").backward()
    return {name: tensor.grad for name, tensor in net.named_parameters() if tensor.grad is not None}


def nearest_cut(
    dense: nn.Module,
    size: tuple[int, int, int],
    left: float,
    *,
    metric: Literal["macs", "params"] = "macs",
    criterion: Criterion = CRITERIA["l1"],
    gradients: Mapping[str, Tensor] | None = None,
    whole: Sequence[str] = (),
) -> tuple[nn.Module, float]:
    """The cut that comes nearest to a cost, and the ratio that its pruner was asked for.

    Args:
        dense: net to cut; it is left as it was.
        size: channels, height and width of an image.
        left: share of the cost that is to stay.
        metric: name of the cost.
        criterion: ranking of the channels.
        gradients: gradients by parameter, for a criterion that reads them.
        whole: name patterns of layers that keep their filters, beside the classifier.
    """
    full = getattr(cost.measure(dense, size), metric)
    low, high, tried = 0.0, 1.0, []
    for round_ in range(ROUNDS):
        ratio = (low + high) / 2
        net = its_cut(dense, size, ratio, criterion, gradients, whole)
        share = getattr(cost.measure(net, size), metric) / full
        tried.append((abs(share - left), round_, net, ratio))
        low, high = (ratio, high) if share > left else (low, ratio)
    _, _, net, ratio = min(tried)
    return net, ratio


def its_cut(
    dense: nn.Module,
    size: tuple[int, int, int],
    ratio: float,
    criterion: Criterion,
    gradients: Mapping[str, Tensor] | None = None,
    whole: Sequence[str] = (),
) -> nn.Module:
    """A copy of which its pruner took a share of the widths; attention as in its example for timm's ViTs."""
    net = copy.deepcopy(dense)
    for name, tensor in net.named_parameters() if gradients else ():
        tensor.grad = gradients[name].clone() if gradients and name in gradients else None
    heads = {m.qkv: m.num_heads for m in net.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    ignored = [net.get_classifier()]  # type: ignore[operator]
    ignored += [layer for name, layer in net.named_modules() if any(fnmatchcase(name, pattern) for pattern in whole)]
    pruner = tp.pruner.BasePruner(
        net,
        torch.randn(1, *size),
        importance=criterion.importance(),
        pruning_ratio=ratio,
        global_pruning=criterion.isomorphic,
        isomorphic=criterion.isomorphic,
        ignored_layers=ignored,
        num_heads=dict(heads),
        prune_num_heads=False,
        prune_head_dims=True,
    )
    pruner.step()
    for module in net.modules():  # its example tells timm's attention by hand; attn_dim came to timm later
        if hasattr(module, "qkv") and hasattr(module, "num_heads"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads
    net.zero_grad()
    return net
