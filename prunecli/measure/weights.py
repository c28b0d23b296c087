"""Singular values of matrices, and of every layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunecli.models.layers import weight_layers, weight_matrices

_GRAM_COLUMNS = 2**14  # columns cast to float64 at once


@torch.no_grad()
def weight_spectra(model: nn.Module) -> dict[str, Tensor]:
    """Layer name → singular values of its weight matrix ``[out, in*k*k]``, largest first (float64, on the CPU).

    Every Conv2d and Linear, in module order. A grouped convolution is block-diagonal: its values are those of all
    blocks together.
    """
    return {
        name: singular_values(weight_matrices(layer)).flatten().sort(descending=True).values.cpu()
        for name, layer in weight_layers(model).items()
    }


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values ``[..., min(N, M)]`` in float64, largest first.

    Args:
        matrices: ``[..., N, M]``. In float64 their SVD is taken; in a narrower type the roots of the eigenvalues of the
            float64 Gram matrix, which are exact to the input's rounding.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    if wide.dtype == torch.float64:
        return torch.linalg.svdvals(wide)
    rows = wide.shape[-2]
    gram = torch.zeros(*wide.shape[:-1], rows, dtype=torch.float64, device=wide.device)
    for columns in wide.split(_GRAM_COLUMNS, dim=-1):
        block = columns.double()
        gram += block @ block.mT
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)
