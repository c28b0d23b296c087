"""One-pass reconstruction: every reader is solved on what the pruned net really gives it.

Readers are solved in the order of their calls. With ``x [H]`` the inputs in the dense net and ``y [P]`` those that
reach the layer in the pruned net, whose earlier readers are solved already, the map ``x ≈ B y + c`` replaces the one
from the dense net's own inputs (`least_squares`), or is mixed with it:

    ``B = S_xy (S_yy + ridge * mean(diag S_yy) * I)^-1``, ``c = mean(x) - B mean(y)``

with S the joint moments, shrunk as in `prunecli.measure.moments`; the covariance of a kept channel with itself, before
and after the cut, is not shrunk. Errors of earlier layers are seen and partly undone; with few images a deep net
overfits.

Statistics of BatchNorm then become those of the net's own inputs, with scale and shift rewritten so that the function
stays: ``gamma' = gamma sigma' / sigma``, ``beta' = beta + gamma (mu' - mu) / sigma``. Re-estimating them without that
would undo the solution.

Related: sequential reconstruction as in ThiNet (Luo et al. 2017) and channel pruning (He et al. 2017), asymmetric
reconstruction of Zhang et al. 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecli.measure.activations import See, call_order, own_layers, uncalled_once, watch
from prunecli.measure.layer_inputs import Blocks, InputStatistics, LayerInputs
from prunecli.measure.moments import Moments
from prunecli.measure.spread import Spread
from prunecli.measure.walk import Walk
from prunecli.models.layers import evaluation_mode
from prunecli.recovery.least_squares import (
    Reader,
    Reconstructed,
    find_readers,
    kept_in_blocks,
    put_,
    regression,
    solve_blocks,
    with_all_inputs,
)
from prunecli.values.plan import Plan


@torch.no_grad()
def reconstruct_in_one_pass_(
    pruned: nn.Module,
    dense: nn.Module,
    plan: Plan,
    statistics: InputStatistics,
    batches: Sequence[Tensor],
    *,
    ridge: float,
    mix: float,
) -> Reconstructed:
    """Give every Conv2d and Linear that lost inputs the weight that fits what it is really given, in place.

    Args:
        pruned: the net that was cut by ``plan`` from ``dense``; both on one device.
        dense: the dense net, which is not changed.
        plan: the plan of the cut.
        statistics: what the readers of the plan's groups are given in the dense net.
        batches: images ``[B, C, H, W]`` on the device of both nets.
        ridge: addition to the diagonal of the second moments, as a share of its mean.
        mix: share of this solution; the rest is that of `least_squares`.
    """
    readers, left = find_readers(dense, plan, statistics)
    full = with_all_inputs(dense, plan, readers)
    layers, pruned_layers = own_layers(dense)[0], own_layers(pruned)[0]
    shrinkage = {}
    walks = Walk(dense, batches), Walk(pruned, batches)
    for name in call_order(dense, readers, batches[0][:1]):
        reader, inputs = readers[name], statistics.layers[name]
        remaining = _remaining(reader, inputs)
        if remaining is None:
            maps, shrinkage[name] = solve_blocks(reader, inputs, ridge=ridge), max(inputs.shrinkage)
        else:
            joint = Moments(about_zero=not inputs.affine)
            for x, y, batch in zip(*(walk.inputs(name) for walk in walks), batches, strict=True):
                rows = inputs.blocks.rows(layers[name], x, len(batch))[list(reader.blocks)]
                joint.add(torch.cat([rows, remaining.rows(pruned_layers[name], y, len(batch))], -1))
            maps, shrinkage[name] = _joint_maps(joint, reader, inputs, ridge=ridge), max(joint.shrinkage.tolist())
            if mix < 1:
                maps = [
                    (mix * B + (1 - mix) * B_dense, mix * c + (1 - mix) * c_dense)
                    for (B, c), (B_dense, c_dense) in zip(maps, solve_blocks(reader, inputs, ridge=ridge), strict=True)
                ]
        put_(pruned, full, name, reader, inputs, maps)
    absorb_statistics_(pruned, batches)
    return Reconstructed(layers=tuple(readers), left=left, shrinkage=shrinkage)


def _remaining(reader: Reader, inputs: LayerInputs) -> Blocks | None:
    """How the inputs of the pruned layer are split; ``None`` where blocks lost different numbers of inputs."""
    if inputs.blocks.own_filters:
        index = torch.arange(len(reader.kept)).expand(len(reader.blocks), len(reader.kept))
        return Blocks(index=index, own_filters=True)
    kept = torch.tensor(reader.kept)
    parts = [inputs.blocks.index[b][local] for b, local in kept_in_blocks(reader, inputs).items()]
    if len({len(part) for part in parts}) > 1:
        return None
    return Blocks(index=torch.searchsorted(kept, torch.stack(parts)), own_filters=False)


def _joint_maps(joint: Moments, reader: Reader, inputs: LayerInputs, *, ridge: float) -> list[tuple[Tensor, Tensor]]:
    """``B [h, p]`` and ``c [h]`` of each block from the joint moments of dense and remaining inputs."""
    h = inputs.blocks.index.shape[1]
    found = []
    for S, mean, rho, local in zip(
        joint.second.cpu(),
        joint.mean.cpu(),
        joint.shrinkage.tolist(),
        kept_in_blocks(reader, inputs).values(),
        strict=True,
    ):
        itself = torch.zeros(h, len(local), dtype=S.dtype)
        itself[local, range(len(local))] = 1  # a kept channel, before and after the cut
        S_yy = (1 - rho) * S[h:, h:] + rho * torch.diag(S[h:, h:].diagonal())
        B = regression(S_yy, S[:h, h:] * (1 - rho + rho * itself), ridge=ridge)
        c = mean[:h] - B @ mean[h:] if inputs.affine else torch.zeros_like(mean[:h])
        found.append((B, c))
    return found


@torch.no_grad()
def absorb_statistics_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Give every BatchNorm the statistics of its own inputs, in place, without changing what the net computes.

    Norms without scale and shift keep their statistics, and so do those that are called several times.

    Args:
        model: a net in any mode.
        batches: images ``[B, C, H, W]`` on its device.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats
    }
    spreads: dict[str, Spread] = {}

    def add(name: str) -> See:
        return lambda given, _: spreads[name].add(given.movedim(1, -1).reshape(-1, given.shape[1]).double())

    with evaluation_mode(model):
        several = uncalled_once(call_order(model, norms, batches[0][:1]), norms)
        spreads.update((name, Spread()) for name in norms if name not in several)
        for batch in batches:
            watch(model, batch, {name: add(name) for name in spreads})
    for name, spread in spreads.items():
        _absorb_(norms[name], spread)


def _absorb_(norm: _BatchNorm, spread: Spread) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma, beta, mean, var = (t.double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    before, after = (var + norm.eps).sqrt(), (spread.std.square() + norm.eps).sqrt()
    norm.weight.copy_(gamma * after / before)
    norm.bias.copy_(beta + gamma * (spread.mean - mean) / before)
    norm.running_mean.copy_(spread.mean)
    norm.running_var.copy_(spread.std.square())
