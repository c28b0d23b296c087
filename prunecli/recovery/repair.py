"""REPAIR transfer: every channel of the pruned net gets back the mean and the spread that it had in the dense net.

Layer by layer in the order of the calls, with ``mu, sigma`` a channel's pre-activation mean and standard deviation in
the dense net and ``m, s`` those in the pruned net (with the layers before it already repaired), the output becomes
``y <- sigma * (y - m) / s + mu``, folded into the layer: filter and bias times ``sigma / s``, bias moved.

Where a BatchNorm is the layer's one reader, the map goes into its running statistics instead. Folded into the filters
it would be undone by the first training step, which normalises by the batch; running statistics are what that
BatchNorm reads in evaluation and nothing else does. Where its dense statistics are those of these images the result is
plain re-estimation, ``running mean = m``, ``running variance = s^2``.

Source: Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair" (arXiv 2211.08403),
there between the ends of an interpolation; here from the dense net to the pruned one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecli.measure.activations import (
    Layer,
    See,
    call_order,
    following_norms,
    nonlinear_in_weight,
    own_layers,
    rows,
    uncalled_once,
    watch,
)
from prunecli.measure.spread import Spread
from prunecli.models.layers import evaluation_mode
from prunecli.values.groups import tensor_name
from prunecli.values.plan import Plan, removed_positions

_DEAD: Final = 1e-5  # share of the larger of two spreads, below which the smaller one counts as zero


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """The result of ``repair_``.

    Attributes:
        layers: the repaired layers in the order of their calls.
        norms: number of layers repaired in the BatchNorm behind them.
        dead: number of channels left alone because they hardly vary in one of the two nets.
        left: the reason by name, for layers left alone.
    """

    layers: tuple[str, ...]
    norms: int
    dead: int
    left: Mapping[str, str]


@torch.no_grad()
def repair_(pruned: nn.Module, dense: nn.Module, plan: Plan, batches: Sequence[Tensor]) -> Repaired:
    """Repair every Conv2d and Linear of ``pruned`` in place.

    Left alone and named: layers that are not called exactly once, that share or standardise their weight, that have
    neither bias nor BatchNorm to take the mean, and those into which surgery folded an attention scale (there another
    spread is meant).

    Args:
        pruned: the net that was cut by ``plan`` from ``dense``; both on one device.
        dense: the dense net, which is not changed.
        plan: the plan of the cut, for the output channels that stayed.
        batches: images ``[B, C, H, W]`` on the device of both nets; the statistics agree on these images.
    """
    layers, left = own_layers(pruned)
    one = batches[0][:1]
    removed, dead = removed_positions(plan.groups), 0
    with evaluation_mode(pruned), evaluation_mode(dense):
        order = call_order(pruned, layers, one)
        norms = following_norms(pruned, one)
        left |= uncalled_once(order, layers) | nonlinear_in_weight(pruned, layers, one) | _unfit(layers, norms, plan)
        chosen = tuple(name for name in order if name not in left)
        dense_layers, _ = own_layers(dense)
        targets = _spreads(dense, {name: dense_layers[name] for name in chosen}, batches)
        for name in chosen:
            gone = set(removed.get(tensor_name(name, "weight"), {}).get(0, ()))
            kept = [at for at in range(len(targets[name].mean)) if at not in gone]
            now = _spreads(pruned, {name: layers[name]}, batches)[name]
            mean, std = targets[name].mean[kept], targets[name].std[kept]
            if name in norms:
                norm, before = (net.get_submodule(norms[name]) for net in (pruned, dense))
                dead += _transfer_norm_(norm, before, kept, now, mean=mean, std=std)
            else:
                dead += _transfer_(layers[name], now, mean=mean, std=std)
    return Repaired(layers=chosen, norms=sum(name in norms for name in chosen), dead=dead, left=left)


def _unfit(layers: Mapping[str, Layer], norms: Mapping[str, str], plan: Plan) -> dict[str, str]:
    """Layers that the map cannot be folded into, with the reason."""
    cut = {group.name for group in plan.cut_groups}
    folded = {fold.tensor for fold in plan.folds if fold.group in cut}
    left = {}
    for name, layer in layers.items():
        if layer.bias is None and name not in norms:
            left[name] = "it has neither a bias nor a BatchNorm of its own"
        elif tensor_name(name, "weight") in folded:
            left[name] = "an attention scale is folded into it"
    return left


def _spreads(model: nn.Module, layers: Mapping[str, Layer], batches: Sequence[Tensor]) -> dict[str, Spread]:
    """Mean and variance of the outputs of layers that are each called once in a forward pass."""
    spreads = {name: Spread() for name in layers}

    def add(name: str) -> See:
        return lambda _, made: spreads[name].add(rows(layers[name], made))

    for batch in batches:
        watch(model, batch, {name: add(name) for name in layers}, alone=len(layers) == 1)
    return spreads


def _transfer_(layer: Layer, now: Spread, *, mean: Tensor, std: Tensor) -> int:
    """Fold the map from ``now`` to ``mean`` and ``std [N]`` into the layer; returns the number of dead channels."""
    assert layer.bias is not None
    alive = (now.std > _DEAD * std) & (std > _DEAD * now.std)
    factor = torch.where(alive, std / torch.where(alive, now.std, 1.0), 1.0)
    shift = torch.where(alive, mean - factor * now.mean, 0.0)
    weight, bias = layer.weight.double(), layer.bias.double()
    layer.weight.copy_(weight * factor.view(-1, *[1] * (weight.dim() - 1)))
    layer.bias.copy_(factor * bias + shift)
    return int((~alive).sum())


def _transfer_norm_(
    norm: nn.Module, dense: nn.Module, kept: Sequence[int], now: Spread, *, mean: Tensor, std: Tensor
) -> int:
    """Fold the map before a BatchNorm into its running statistics; returns the number of channels left alone.

    With running mean r and variance v of the dense norm's ``kept`` channels, ``(std (y - m) / s + mean - r)
    / sqrt(v + eps)`` is the normalised ``(y - r') / sqrt(v' + eps)`` of ``r' = m - (mean - r) s / std`` and
    ``v' = (v + eps) (s / std)^2 - eps``.
    """
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    r, v = (getattr(dense, name).double()[list(kept)] for name in ("running_mean", "running_var"))
    alive = (now.std > _DEAD * std) & (std > _DEAD * now.std)
    ratio = torch.where(alive, now.std / torch.where(alive, std, 1.0), 1.0)
    variance = (v + norm.eps) * ratio.square() - norm.eps
    alive &= variance >= 0  # below zero eps dominates, and only a larger scale could lift such a channel
    norm.running_mean.copy_(torch.where(alive, now.mean - (mean - r) * ratio, norm.running_mean.double()))
    norm.running_var.copy_(torch.where(alive, variance, norm.running_var.double()))
    return int((~alive).sum())
