"""Least-squares reconstruction: layers that read a pruned axis predict the removed inputs from the kept ones.

With ``h [H]`` a row of a layer's inputs in the dense net and ``P`` its kept positions, the least-squares map
``h ≈ B h_P + c`` turns the layer's weight ``W`` into ``W B``, contracted over the input axis at every kernel position,
and its bias ``b`` into ``b + W c``, summed over the kernel positions:

    ``B = S_HP (S_PP + ridge * mean(diag S_PP) * I)^-1`` ``[H, P]``, ``c = mean(h) - B mean(h_P)`` ``[H]``

where ``S`` is the covariance of the rows over all samples and positions. Inputs that have nothing to do with each
other make ``B`` a selection: then ``W B`` is what surgery left.

Sources: "GRAIL" (arXiv 2602.23795) for the ridge solution from the dense net's Gram matrix, and "CORP" (arXiv
2602.05243) for the affine term ``c``. A layer without a bias hands ``W c`` to the running mean of the BatchNorm that is
its one reader; one that has neither gets no affine term, and ``S`` is the Gram matrix as in GRAIL. Under zero padding
``c`` is added at positions outside the image too, so it is exact only away from the border.

Two choices are by measurement (CIFAR-10, ResNet-20; figures in ``benchmarks/README.md``): the affine term, in spite
of the border; and regressing on the dense net's own inputs instead of on the pruned net's, layer by layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

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
from prunecli.models.layers import evaluation_mode
from prunecli.surgery.cut import cut_
from prunecli.values.groups import module_of, tensor_name
from prunecli.values.plan import Plan, removed_positions

_WIDEST: Final = 8192  # inputs of a layer, whose second moments then take half a GiB


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer that loses inputs.

    Attributes:
        blocks: numbers of the dense layer's groups that stay (a layer without groups is one block).
        groups: number of blocks in the dense layer.
        kept: positions on the weight's input axis that stay, the same in each block.
    """

    blocks: tuple[int, ...]
    groups: int
    kept: tuple[int, ...]

    def inputs(self, layer: Layer, given: Tensor) -> Tensor:
        """The inputs ``given`` to the dense layer, as rows ``[blocks, n, H]`` in float64."""
        flat = rows(layer, given)
        return flat.reshape(len(flat), self.groups, -1).transpose(0, 1)[list(self.blocks)]


class Moments:
    """First and second moments of rows ``[blocks, n, H]``, summed batch by batch in float64.

    Rows are taken relative to the first batch's mean, so that a mean that is large against the spread costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.origin = torch.zeros(())
        self.sums = torch.zeros(())
        self.products = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Add one batch of rows ``[blocks, n, H]``."""
        if not self.count:
            self.origin = values.mean(1, keepdim=True)
        values = values - self.origin
        self.count += values.shape[1]
        self.sums = self.sums + values.sum(1)
        self.products = self.products + values.mT @ values

    @property
    def mean(self) -> Tensor:
        """The mean row ``[blocks, H]``."""
        return self.origin.squeeze(1) + self.sums / self.count

    @property
    def covariance(self) -> Tensor:
        """Second moments about the mean ``[blocks, H, H]``."""
        mean = self.sums / self.count
        return self.products / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    @property
    def gram(self) -> Tensor:
        """Second moments about zero ``[blocks, H, H]``."""
        return self.covariance + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


def solve(moments: Moments, kept: Sequence[int], *, ridge: float, affine: bool) -> tuple[Tensor, Tensor]:
    """The least-squares map ``h ≈ B h_P + c``: ``B [blocks, H, P]`` and ``c [blocks, H]``.

    Directions in which the kept inputs never vary are left out, with or without a ridge.

    Args:
        moments: moments of all inputs of the layer.
        kept: positions of the kept inputs, P of H.
        ridge: addition to the diagonal, as a share of its mean.
        affine: whether to solve for c too; else c is zero and moments are taken about zero.
    """
    P = list(kept)
    S = moments.covariance if affine else moments.gram
    S_PP, S_HP = S[:, P][:, :, P], S[:, :, P]
    level = ridge * S_PP.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(len(P), dtype=S.dtype, device=S.device)
    ridged = S_PP + level[:, None, None] * eye
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if ridge > 0 and not failed.any():  # an eigendecomposition costs tens of times as much
        B = torch.cholesky_solve(S_HP.mT, factor).mT
    else:
        B = S_HP @ torch.linalg.pinv(ridged, hermitian=True)
    mean = moments.mean
    c = mean - (B @ mean[:, P].unsqueeze(-1)).squeeze(-1) if affine else torch.zeros_like(mean)
    return B, c


def find_readers(dense: nn.Module, plan: Plan) -> tuple[dict[str, Reader], dict[str, str]]:
    """The layers that lose inputs, and those among them that are left alone.

    The removed positions are the ones that surgery uses, so that flattened feature maps and attention heads need no
    rule of their own: they are positions on the weight's input axis.

    Args:
        dense: the dense net.
        plan: the plan of the cut.

    Returns:
        The readers by module path, in module order; and the reason by module path for what is left alone.
    """
    removed = removed_positions(plan.groups)
    layers, others = own_layers(dense)
    reads = {m.tensor: module_of(m.tensor) for g in plan.cut_groups for m in g.members if m.role == "in"}
    found: dict[str, Reader] = {}
    left: dict[str, str] = {}
    for tensor, path in reads.items():
        layer = layers.get(path)
        if layer is None or tensor != tensor_name(path, "weight"):
            left[path] = others.get(path, "it is neither Conv2d nor Linear")
        elif layer.weight.shape[1] > _WIDEST:
            left[path] = f"{layer.weight.shape[1]} inputs are more than the {_WIDEST} that are solved for"
        elif 1 in removed[tensor]:
            found[path] = _reader(layer, removed[tensor])
    return {path: found[path] for path in layers if path in found}, left


def _reader(layer: Layer, removed: Mapping[int, Sequence[int]]) -> Reader:
    """The reader of a layer whose weight loses ``removed`` positions, by dimension."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    filters, gone = layer.weight.shape[0] // groups, set(removed.get(0, ()))
    blocks = (b for b in range(groups) if not gone.issuperset(range(b * filters, (b + 1) * filters)))
    kept = (at for at in range(layer.weight.shape[1]) if at not in set(removed[1]))
    return Reader(blocks=tuple(blocks), groups=groups, kept=tuple(kept))


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """The result of ``reconstruct_``.

    Attributes:
        layers: the layers with new weights, in module order.
        left: the reason by name, for layers that lost inputs and were left alone.
    """

    layers: tuple[str, ...]
    left: Mapping[str, str]


@torch.no_grad()
def reconstruct_(
    pruned: nn.Module, dense: nn.Module, plan: Plan, batches: Sequence[Tensor], *, ridge: float
) -> Reconstructed:
    """Give every Conv2d and Linear that lost inputs its least-squares weight, in place.

    The dense weights are what is reconstructed, so other changes to such a layer are overwritten. Several readers of
    one axis (a residual stream) are solved each on its own, a grouped convolution block by block. Left alone and named:
    other kinds of layers, layers the forward pass does not call as modules, that share or standardise their weight, and
    those with more than 8192 inputs.

    Args:
        pruned: the net that was cut by ``plan`` from ``dense``; both on one device.
        dense: the dense net, which runs once on all images and is not changed.
        plan: the plan of the cut.
        batches: images ``[B, C, H, W]`` on the device of both nets.
        ridge: addition to the diagonal of the second moments, as a share of its mean.
    """
    readers, left = find_readers(dense, plan)
    full = _with_all_inputs(dense, plan, readers)
    one = batches[0][:1]
    with evaluation_mode(pruned), evaluation_mode(dense):
        layers = {name: layer for name, layer in own_layers(dense)[0].items() if name in readers}
        left |= uncalled_once(call_order(dense, readers, one), readers) | nonlinear_in_weight(dense, layers, one)
        readers = {name: reader for name, reader in readers.items() if name not in left}
        norms = following_norms(pruned, one)
        moments = _moments(dense, layers, readers, batches)
    for name, reader in readers.items():
        norm = norms.get(name)
        affine = layers[name].bias is not None or norm is not None
        B, c = solve(moments[name], reader.kept, ridge=ridge, affine=affine)
        shift = _set_weight_(pruned.get_submodule(name), full.get_submodule(name), B, c)
        if layers[name].bias is not None:
            _shift_(pruned, full, tensor_name(name, "bias"), shift)
        elif norm is not None:
            _shift_(pruned, full, f"{norm}.running_mean", -shift)
    return Reconstructed(layers=tuple(readers), left=left)


def _with_all_inputs(dense: nn.Module, plan: Plan, readers: Mapping[str, Reader]) -> nn.Module:
    """A cut copy of the dense net whose readers keep all inputs: weights ``[N', H, ...]``, attention scales folded."""
    stay = {(tensor_name(path, "weight"), 1) for path in readers}
    groups = tuple(
        group.model_copy(update={"members": tuple(m for m in group.members if (m.tensor, m.dim) not in stay)})
        for group in plan.groups
    )
    full = copy.deepcopy(dense)
    cut_(full, groups=groups, attributes=(), folds=plan.folds)
    return full


def _moments(
    dense: nn.Module, layers: Mapping[str, Layer], readers: Mapping[str, Reader], batches: Sequence[Tensor]
) -> dict[str, Moments]:
    """Moments of the inputs of each reader in the dense net, over all batches."""
    moments = {name: Moments() for name in readers}

    def add(name: str) -> See:
        return lambda given, _: moments[name].add(readers[name].inputs(layers[name], given))

    for batch in batches:
        watch(dense, batch, {name: add(name) for name in readers})
    return moments


def _set_weight_(layer: nn.Module, full: nn.Module, B: Tensor, c: Tensor) -> Tensor:
    """Write ``W B`` into the layer and return ``W c [N']``, summed over kernel positions."""
    assert isinstance(layer.weight, Tensor)
    assert isinstance(full.weight, Tensor)
    blocks, inputs = c.shape
    W = full.weight.double().reshape(blocks, -1, inputs, full.weight[0, 0].numel())
    layer.weight.copy_(torch.einsum("bnhk,bhp->bnpk", W, B).reshape(layer.weight.shape))
    return torch.einsum("bnhk,bh->bn", W, c).flatten()


def _shift_(pruned: nn.Module, full: nn.Module, tensor: str, shift: Tensor) -> None:
    """Set a tensor of the pruned net to its value in ``full`` plus ``shift``."""
    path, _, name = tensor.rpartition(".")
    now, before = (getattr(net.get_submodule(path), name) for net in (pruned, full))
    now.copy_(before.double() + shift)
