"""What training may minimise beside its loss, as pure functions of weights: the penalties of the pruning papers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecli.models.layers import weight_layers


class Penalty:
    """What a step does beside minimising its objective; this one does nothing. ``step`` counts from 0 over the run."""

    def loss(self, step: int) -> Tensor | None:
        """A scalar in float32 that is added to the objective, or ``None``."""
        return None

    def add_gradients_(self, step: int) -> None:
        """Add to the parameters' gradients, after the backward pass."""

    def project_(self, step: int) -> None:
        """Change the parameters after the optimiser's step."""


# ---------------------------------------------------------------------------------------------- decorrelation (TPP)


def gram_loss(filters: Tensor, kept: Tensor) -> Tensor:
    """``mean((G - T)^2)`` over all N^2 entries of the Gram matrix ``G = W W^T`` (TPP, arXiv 2207.12534, scheme v5).

    The target ``T`` is G without gradient, rows and columns of pruned filters zeroed: entries between kept filters cost
    nothing, those with a pruned one, its own norm included, are driven to zero. Computed as the mean of ``G^2`` over
    the latter, which has the same value and gradient.

    Args:
        filters: matrix ``W`` ``[N, values per filter]``.
        kept: mask ``[N]`` of the filters that stay, bool.

    Returns:
        A scalar.
    """
    gram = filters @ filters.T
    return gram.masked_fill(kept[:, None] & kept, 0).square().mean()


# ---------------------------------------------------------------------------------------------- orthogonality


def kernorth(weight: Tensor) -> Tensor:
    """``|M M^T - I|_F`` (not squared) of the kernels as a matrix ``M`` ``[N, values]``, with the Gram matrix of its
    smaller side.

    Kernel orthogonality (Xie et al. 2017), as the code of TPP has it.
    """
    matrix = weight.reshape(len(weight), -1)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = matrix @ matrix.T
    return torch.linalg.vector_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def orthconv(weight: Tensor, *, stride: tuple[int, int] = (1, 1), groups: int = 1) -> Tensor:
    """``|Conv(K, K) - I_centre|_F`` (not squared): a convolution is orthogonal where its kernels, moved against each
    other by any multiple of the stride, do not overlap (Wang et al. 2020, equation 5).

    Kernels of different groups read different channels, so each group is compared within itself. The code of TPP takes
    stride 2 and padding 1 for every 3x3 kernel, which leaves the unmoved kernels out; here it is the layer's own stride
    with the paper's padding ``floor((k - 1) / S) S``.

    Args:
        weight: kernels ``[N, C / groups, kh, kw]``.
        stride: stride of the convolution, rows and columns.
        groups: number of groups of the convolution.

    Returns:
        A scalar.
    """
    num, channels, height, width = weight.shape
    steps = ((height - 1) // stride[0], (width - 1) // stride[1])
    padding = (steps[0] * stride[0], steps[1] * stride[1])
    own = num // groups
    images = weight.reshape(groups, own, channels, height, width).transpose(0, 1).reshape(own, -1, height, width)
    overlaps = functional.conv2d(images, weight, stride=stride, padding=padding, groups=groups)
    target = torch.zeros_like(overlaps)
    target[:, :, steps[0], steps[1]] = torch.eye(own, dtype=weight.dtype, device=weight.device).repeat(1, groups)
    return torch.linalg.vector_norm(overlaps - target)


def _kernel_term(layer: nn.Conv2d | nn.Linear) -> Tensor:
    return kernorth(layer.weight)


def _convolution_term(layer: nn.Conv2d) -> Tensor:
    return orthconv(layer.weight, stride=(layer.stride[0], layer.stride[1]), groups=layer.groups)


def _kernorth_terms(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [partial(_kernel_term, layer) for layer in weight_layers(model).values()]


def _orthconv_terms(model: nn.Module) -> list[Callable[[], Tensor]]:
    """Self-convolution of every convolution but the first; 1x1 and linear layers have only their kernels."""
    layers = list(weight_layers(model).values())
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    return [
        partial(_convolution_term, layer)
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
        else partial(_kernel_term, layer)
        for layer in layers
        if layer is not first
    ]


Regulariser = Literal["kernorth", "orthconv"]
_TERMS: Final[dict[Regulariser, Callable[[nn.Module], list[Callable[[], Tensor]]]]] = {
    "kernorth": _kernorth_terms,
    "orthconv": _orthconv_terms,
}


class Orthogonality(Penalty):
    """``weight`` times the sum of one regulariser over all Conv2d and Linear layers."""

    def __init__(self, model: nn.Module, regulariser: Regulariser, weight: float) -> None:
        self._terms, self._weight = _TERMS[regulariser](model), weight

    def value(self) -> Tensor:
        """The sum, without its weight."""
        return torch.stack([term() for term in self._terms]).sum()

    def loss(self, step: int) -> Tensor | None:
        return self._weight * self.value() if self._terms else None
