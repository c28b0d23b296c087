"""Least-squares reconstruction: layers that read a pruned axis predict the removed inputs from the kept ones.

With ``h [H]`` a row of a layer's inputs in the dense net and ``P`` its kept positions, the least-squares map
``h ≈ B h_P + c`` turns the layer's weight ``W`` into ``W B``, contracted over the input axis at every kernel position,
and its bias ``b`` into ``b + W c``, summed over the kernel positions:

    ``B = S_HP (S_PP + ridge * mean(diag S_PP) * I)^-1`` ``[H, P]``, ``c = mean(h) - B mean(h_P)`` ``[H]``

where ``S`` is the covariance of the rows, shrunk as in `prunecli.measure.moments`. Inputs that have nothing to do with
each other make ``B`` a selection: then ``W B`` is what surgery left.

Sources: "GRAIL" (arXiv 2602.23795) for the ridge solution from the dense net's Gram matrix, and "CORP" (arXiv
2602.05243) for the affine term ``c``. A layer without a bias hands ``W c`` to the running mean of the BatchNorm that is
its one reader; one that has neither gets no affine term, and ``S`` is the Gram matrix as in GRAIL. Under zero padding
``c`` is added at positions outside the image too, so it is exact only away from the border.

Two choices are by measurement (CIFAR-10, ResNet-20; figures in ``benchmarks/README.md``): the affine term, in spite
of the border; and regressing on the dense net's own inputs instead of on the pruned net's, layer by layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunecli.measure.activations import Layer, own_layers
from prunecli.measure.layer_inputs import InputStatistics, LayerInputs
from prunecli.surgery.cut import cut_
from prunecli.values.groups import module_of, tensor_name
from prunecli.values.plan import Plan, removed_positions


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer that loses inputs.

    Attributes:
        blocks: numbers of the dense layer's blocks of inputs that stay (all, but for groups of a grouped convolution).
        kept: positions on the weight's input axis that stay, ascending.
    """

    blocks: tuple[int, ...]
    kept: tuple[int, ...]


def solve(second: Tensor, mean: Tensor, kept: Sequence[int], *, ridge: float, affine: bool) -> tuple[Tensor, Tensor]:
    """The least-squares map ``h ≈ B h_P + c``: ``B [H, P]`` and ``c [H]``, float64.

    Directions in which the kept inputs never vary are left out, with or without a ridge.

    Args:
        second: second moments of all inputs ``[H, H]``, about the mean where ``affine``, else about zero.
        mean: mean of all inputs ``[H]``.
        kept: positions of the kept inputs, P of H.
        ridge: addition to the diagonal, as a share of its mean.
        affine: whether to solve for c too; else it is zero.
    """
    P = list(kept)
    S_HP = second[:, P].double()
    B = regression(S_HP[P], S_HP, ridge=ridge)
    c = mean - B @ mean[P] if affine else torch.zeros_like(mean)
    return B, c


def regression(S_PP: Tensor, S_HP: Tensor, *, ridge: float) -> Tensor:
    """``S_HP (S_PP + ridge * mean(diag S_PP) * I)^-1`` ``[H, P]``.

    Args:
        S_PP: second moments of the inputs that predict ``[P, P]``, float64.
        S_HP: those between the predicted and the predicting inputs ``[H, P]``.
        ridge: addition to the diagonal, as a share of its mean.
    """
    ridged = S_PP + ridge * S_PP.diagonal().mean() * torch.eye(len(S_PP), dtype=S_PP.dtype, device=S_PP.device)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if ridge > 0 and not failed:  # an eigendecomposition costs tens of times as much
        return torch.cholesky_solve(S_HP.mT, factor).mT
    return S_HP @ torch.linalg.pinv(ridged, hermitian=True)


def find_readers(dense: nn.Module, plan: Plan, statistics: InputStatistics) -> tuple[dict[str, Reader], dict[str, str]]:
    """The layers that lose inputs, and those among them that are left alone.

    The removed positions are the ones that surgery uses, so that flattened feature maps and attention heads need no
    rule of their own: they are positions on the weight's input axis.

    Args:
        dense: the dense net.
        plan: the plan of the cut.
        statistics: what the readers of the plan's groups are given in the dense net.

    Returns:
        The readers by module path, in module order; and the reason by module path for what is left alone.
    """
    removed = removed_positions(plan.groups)
    reads = {m.tensor: module_of(m.tensor) for g in plan.cut_groups for m in g.members if m.role == "in"}
    left = {path: statistics.left[path] for path in reads.values() if path in statistics.left}
    losing = {path: removed[tensor] for tensor, path in reads.items() if path not in left and 1 in removed[tensor]}
    layers = own_layers(dense)[0]
    found = {
        path: _reader(layers[path], inputs, losing[path])
        for path, inputs in statistics.layers.items()
        if path in losing
    }
    return found, left


def _reader(layer: Layer, inputs: LayerInputs, removed: Mapping[int, Sequence[int]]) -> Reader:
    """The reader of a layer whose weight loses ``removed`` positions, by dimension."""
    gone = set(removed[1])
    blocks = tuple(range(len(inputs.blocks.index)))
    if inputs.blocks.own_filters:
        filters, lost = layer.weight.shape[0] // len(blocks), set(removed.get(0, ()))
        blocks = tuple(b for b in blocks if not lost.issuperset(range(b * filters, (b + 1) * filters)))
    return Reader(blocks=blocks, kept=tuple(at for at in range(layer.weight.shape[1]) if at not in gone))


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """The result of ``reconstruct_``.

    Attributes:
        layers: the layers with new weights, in module order.
        left: the reason by name, for layers that lost inputs and were left alone.
        shrinkage: rho of each of these layers, the largest of its blocks.
    """

    layers: tuple[str, ...]
    left: Mapping[str, str]
    shrinkage: Mapping[str, float]


@torch.no_grad()
def reconstruct_(
    pruned: nn.Module, dense: nn.Module, plan: Plan, statistics: InputStatistics, *, ridge: float
) -> Reconstructed:
    """Give every Conv2d and Linear that lost inputs its least-squares weight, in place.

    The dense weights are what is reconstructed, so other changes to such a layer are overwritten. Several readers of
    one axis (a residual stream) are solved each on its own, a grouped convolution block by block. Left alone and named:
    what ``statistics`` left out.

    Args:
        pruned: the net that was cut by ``plan`` from ``dense``; both on one device.
        dense: the dense net, which is not changed.
        plan: the plan of the cut.
        statistics: what the readers of the plan's groups are given in the dense net.
        ridge: addition to the diagonal of the second moments, as a share of its mean.
    """
    readers, left = find_readers(dense, plan, statistics)
    full = with_all_inputs(dense, plan, readers)
    for name, reader in readers.items():
        inputs = statistics.layers[name]
        put_(pruned, full, name, reader, inputs, solve_blocks(reader, inputs, ridge=ridge))
    shrinkage = {name: max(statistics.layers[name].shrinkage) for name in readers}
    return Reconstructed(layers=tuple(readers), left=left, shrinkage=shrinkage)


def with_all_inputs(dense: nn.Module, plan: Plan, readers: Collection[str]) -> nn.Module:
    """A cut copy of the dense net whose readers keep all inputs: weights ``[N', H, ...]``, attention scales folded.

    Args:
        dense: the dense net.
        plan: the plan of the cut.
        readers: paths of the layers that keep all inputs.
    """
    stay = {(tensor_name(path, "weight"), 1) for path in readers}
    groups = tuple(
        group.model_copy(update={"members": tuple(m for m in group.members if (m.tensor, m.dim) not in stay)})
        for group in plan.groups
    )
    full = copy.deepcopy(dense)
    cut_(full, groups=groups, attributes=(), folds=plan.folds)
    return full


def kept_in_blocks(reader: Reader, inputs: LayerInputs) -> dict[int, list[int]]:
    """By number of each block that stays, the places in the block of the inputs that stay."""
    kept = torch.tensor(reader.kept)
    return {b: torch.isin(inputs.blocks.index[b], kept).nonzero().flatten().tolist() for b in reader.blocks}


def solve_blocks(reader: Reader, inputs: LayerInputs, *, ridge: float) -> list[tuple[Tensor, Tensor]]:
    """``B [h, p]`` and ``c [h]`` of each block that stays, from the dense net's own inputs.

    Args:
        reader: what the layer keeps.
        inputs: what it is given in the dense net.
        ridge: addition to the diagonal, as a share of its mean.
    """
    return [
        solve(inputs.second[b], inputs.mean[b], local, ridge=ridge, affine=inputs.affine)
        for b, local in kept_in_blocks(reader, inputs).items()
    ]


def put_(
    pruned: nn.Module,
    full: nn.Module,
    name: str,
    reader: Reader,
    inputs: LayerInputs,
    maps: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Write ``W B`` into a reader, and ``W c`` into its bias or the running mean of the BatchNorm behind it.

    Args:
        pruned: the cut net.
        full: the cut net of `with_all_inputs`.
        name: path of the reader.
        reader: what the layer keeps.
        inputs: how its inputs are split.
        maps: ``B [h, p]`` and ``c [h]`` of each block that stays.
    """
    layer, whole = (net.get_submodule(name) for net in (pruned, full))
    assert isinstance(layer.weight, Tensor)
    assert isinstance(whole.weight, Tensor)
    W = whole.weight.detach().cpu().double().reshape(*whole.weight.shape[:2], -1)
    if inputs.blocks.own_filters:
        parts = W.reshape(len(maps), -1, *W.shape[1:])
        weight = torch.cat([_contracted(W_b, B) for W_b, (B, _) in zip(parts, maps, strict=True)])
        shift = torch.cat([W_b.sum(2) @ c for W_b, (_, c) in zip(parts, maps, strict=True)])
    else:
        weight = W.new_zeros(len(W), len(reader.kept), W.shape[2])
        shift = W.new_zeros(len(W))
        kept = torch.tensor(reader.kept)
        for (b, local), (B, c) in zip(kept_in_blocks(reader, inputs).items(), maps, strict=True):
            at = inputs.blocks.index[b]
            weight[:, torch.searchsorted(kept, at[local])] = _contracted(W[:, at], B)
            shift += W[:, at].sum(2) @ c
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if getattr(layer, "bias", None) is not None:
        _shift_(pruned, full, tensor_name(name, "bias"), shift)
    elif inputs.norm is not None:
        _shift_(pruned, full, tensor_name(inputs.norm, "running_mean"), -shift)


def _contracted(W: Tensor, B: Tensor) -> Tensor:
    """``W B`` over the inputs: ``[n, h, k]`` and ``[h, p]`` give ``[n, p, k]``."""
    return torch.einsum("nhk,hp->npk", W, B)


def _shift_(pruned: nn.Module, full: nn.Module, tensor: str, shift: Tensor) -> None:
    """Set a tensor of the pruned net to its value in ``full`` plus ``shift``."""
    path, _, name = tensor.rpartition(".")
    now, before = (getattr(net.get_submodule(path), name) for net in (pruned, full))
    now.copy_(before.double().cpu() + shift)
