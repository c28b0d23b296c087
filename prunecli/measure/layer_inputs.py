"""What every layer that reads a prunable axis is given, from one pass of the dense net over unlabelled images.

Scores, loss curves and least squares all rest on these statistics, so the images pass once. Of a feature map at most
``_POSITIONS`` positions an image are looked at, on a regular grid.

Inputs are held in *blocks*, and only inputs of one block are related to each other. A plain layer is one block; each
group of a grouped convolution is one, with filters of its own. Layers with too many inputs are split into several
blocks that feed the same filters: a flattened feature map by its positions (the channels at one position), else into
consecutive parts. That bounds the memory: all second moments together take at most ``_BYTES`` while they are summed,
half of it afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from prunecli.measure.activations import (
    Layer,
    See,
    call_order,
    following_norms,
    nonlinear_in_weight,
    own_layers,
    uncalled_once,
    watch,
)
from prunecli.measure.branch_shares import branch_shares
from prunecli.measure.moments import Moments
from prunecli.models.layers import evaluation_mode
from prunecli.values.groups import Member, module_of, tensor_name

_POSITIONS: Final = 400  # rows of one image
_WIDEST: Final = 8192  # inputs of one block
_SHARE_IMAGES: Final = 32  # images for branch shares
_BYTES: Final = 2**30  # of all second moments in float64


class Coupled(Protocol):
    """A coupled group or its place in a plan: anything with members."""

    @property
    def members(self) -> tuple[Member, ...]:
        """Places where the axis runs through tensors."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the inputs of a layer are split.

    Attributes:
        index: position of every input on the weight's input axis ``[blocks, h]``.
        own_filters: whether each block has filters of its own (a grouped convolution).
    """

    index: Tensor
    own_filters: bool

    def rows(self, layer: Layer, given: Tensor, images: int) -> Tensor:
        """The inputs ``given`` to the layer as rows ``[blocks, images, n, h]``, at most ``_POSITIONS`` an image."""
        if isinstance(layer, nn.Conv2d):
            step = max(1, math.ceil(math.sqrt(given.shape[-1] * given.shape[-2] / _POSITIONS)))
            given = given[..., step // 2 :: step, step // 2 :: step].movedim(1, -1)
        count = given.numel() // given.shape[-1]
        # What does not depend on the images (a table of positions) has another number of rows: each is a sample then.
        flat = given.detach().reshape(images if count % images == 0 else count, -1, given.shape[-1])
        if isinstance(layer, nn.Linear):
            flat = flat[:, :: math.ceil(flat.shape[1] / _POSITIONS)]
        blocks, h = self.index.shape
        if self.own_filters:
            return flat.reshape(*flat.shape[:2], blocks, h).movedim(2, 0)
        return flat[:, :, self.index.to(flat.device)].movedim(2, 0)

    def weight(self, weight: Tensor) -> Tensor:
        """A weight ``[N, H, ...]`` as ``[blocks, filters, h, k]``, k kernel positions; float64."""
        blocks, h = self.index.shape
        flat = weight.detach().double().reshape(len(weight), weight.shape[1], -1)
        if self.own_filters:
            return flat.reshape(blocks, -1, h, flat.shape[-1])
        return flat[:, self.index].movedim(1, 0)


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """Statistics of what one layer reads.

    Attributes:
        blocks: how the inputs are split.
        mean: mean row ``[blocks, h]``, float64.
        second: shrunk second moments ``[blocks, h, h]``, float32: about the mean where ``affine``, else about zero.
        shrinkage: rho of each block, see `prunecli.measure.moments`.
        affine: whether an added constant can go anywhere: into a bias, or into the norm behind the layer.
        norm: path of the BatchNorm that alone reads the layer's output; ``None`` without.
        share: branch share of the layer's output, see `prunecli.measure.branch_shares`.
    """

    blocks: Blocks
    mean: Tensor
    second: Tensor
    shrinkage: tuple[float, ...]
    affine: bool
    norm: str | None
    share: float


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """The statistics of all layers that read prunable axes.

    Attributes:
        layers: statistics by module path, in module order.
        left: reason by module path, for readers that have none.
        shares: branch share by module path, of every Conv2d and Linear with a weight of its own.
        images: number of images behind them.
    """

    layers: Mapping[str, LayerInputs]
    left: Mapping[str, str]
    shares: Mapping[str, float]
    images: int


@torch.no_grad()
def input_statistics(model: nn.Module, groups: Iterable[Coupled], batches: Sequence[Tensor]) -> InputStatistics:
    """Statistics of the layers that read the axes of ``groups``.

    Left out and named: other kinds than Conv2d and Linear, layers the forward pass does not call as modules or calls
    several times, that share or standardise their weight.

    Args:
        model: the dense net; it is not changed.
        groups: coupled groups of the net, or planned ones.
        batches: images ``[B, C, H, W]`` on the model's device; no labels.
    """
    axes: dict[str, list[Member]] = {}
    for member in (m for group in groups for m in group.members if m.role == "in"):
        axes.setdefault(member.tensor, []).append(member)
    own, others = own_layers(model)
    left: dict[str, str] = {}
    readers: dict[str, Layer] = {}
    for tensor in axes:
        path = module_of(tensor)
        if path in own and tensor == tensor_name(path, "weight"):
            readers[path] = own[path]
        else:
            left[path] = others.get(path, "it is neither Conv2d nor Linear")
    one = batches[0][:1]
    with evaluation_mode(model):
        left |= uncalled_once(call_order(model, readers, one), readers) | nonlinear_in_weight(model, readers, one)
        readers = {path: readers[path] for path in own if path in readers and path not in left}
        norms = following_norms(model, one)
        shares = branch_shares(model, batches[0][:_SHARE_IMAGES], own)
        blocks = _all_blocks(readers, axes)
        affine = {path: layer.bias is not None or path in norms for path, layer in readers.items()}
        moments = _moments(model, readers, blocks, affine, batches)
    found = {}
    for path in readers:
        own_moments = moments.pop(path)  # what is not needed any more leaves, so that no two copies of all are held
        found[path] = LayerInputs(
            blocks=blocks[path],
            mean=own_moments.mean.cpu(),
            second=own_moments.shrunk.float().cpu(),
            shrinkage=tuple(own_moments.shrinkage.tolist()),
            affine=affine[path],
            norm=norms.get(path),
            share=shares[path],
        )
    return InputStatistics(layers=found, left=left, shares=shares, images=sum(map(len, batches)))


def _moments(
    model: nn.Module,
    readers: Mapping[str, Layer],
    blocks: Mapping[str, Blocks],
    affine: Mapping[str, bool],
    batches: Sequence[Tensor],
) -> dict[str, Moments]:
    moments = {path: Moments(about_zero=not affine[path]) for path in readers}

    def add(path: str, images: int) -> See:
        return lambda given, _: moments[path].add(blocks[path].rows(readers[path], given, images))

    for batch in batches:
        watch(model, batch, {path: add(path, len(batch)) for path in readers})
    return moments


# ---------------------------------------------------------------------------------------------- blocks


def _all_blocks(readers: Mapping[str, Layer], axes: Mapping[str, Sequence[Member]]) -> dict[str, Blocks]:
    """The blocks of every layer, so small that all second moments together keep within ``_BYTES``."""
    widest = _WIDEST
    while True:
        found = {path: _blocks(layer, axes[tensor_name(path, "weight")], widest) for path, layer in readers.items()}
        if widest == 1 or 8 * sum(b.index.shape[1] * b.index.numel() for b in found.values()) <= _BYTES:
            return found
        widest //= 2


def _blocks(layer: Layer, members: Sequence[Member], widest: int) -> Blocks:
    """The blocks of a layer, of at most ``widest`` inputs where the layer is not grouped."""
    inputs = layer.weight.shape[1]
    everything = torch.arange(inputs)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if groups > 1:
        return Blocks(index=everything.expand(groups, inputs), own_filters=True)
    if inputs <= widest:
        return Blocks(index=everything[None], own_filters=False)
    repeats = members[0].index.repeats
    if len(members) == 1 and repeats > 1 and inputs % repeats == 0 and inputs // repeats <= widest:
        channels = torch.tensor([members[0].index.positions([j]) for j in range(inputs // repeats)])
        if torch.equal(channels.flatten().sort().values, everything):
            return Blocks(index=channels.mT.contiguous(), own_filters=False)
    count = next(n for n in range(math.ceil(inputs / widest), inputs + 1) if inputs % n == 0)
    return Blocks(index=everything.reshape(count, -1), own_filters=False)
