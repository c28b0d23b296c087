"""Sparsity-aware orthogonal initialisation (SAO) for training from scratch: few channels are connected, and these
connections are an isometry.

SAO (Esguerra et al., IEEE Access 2023, and their code). Between the ``r`` channels of a layer's narrow side and the
``c`` of its wide side lies a regular bipartite graph: each of the r has ``d`` connections, each of the c ``r d / c``.
Rows with the same connections get mutually orthonormal values, all others share none, so the ``r x c`` matrix has
orthonormal rows. Under a ReLU it is built at half size as M and used as ``[[M, -M], [-M, M]]``: on the pair
``[relu(h); relu(-h)]`` that is M on h. Where a layer has more outputs than inputs the matrix is transposed.

A convolution gets the matrix at its kernel's centre and zeros around it; channels that are not connected have a kernel
of zeros. As in the authors' code the first layer and the last start dense and orthogonal, the gain is 1. There the
missing connections stay missing. Here they are a start only: no multiply-add is saved by a zero, so training may use
all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from prunecli.errors import UsageError
from prunecli.models.layers import centre, restart_, weight_layers
from prunecli.recovery.orthogonal import orthogonal, orthogonality_residual

Pattern = Literal["relu", "tanh"]
_LEAST_DEGREE: Final[dict[Pattern, int]] = {"relu": 4, "tanh": 2}


@dataclass(frozen=True, kw_only=True)
class Initialised:
    """The result of ``initialise_sao_``.

    Attributes:
        sparse: share of channel pairs without a connection, by layer.
        dense: layers with a dense orthogonal start: the first, the last, and those whose widths allow no sparse one.
        left: layers that kept their weights (grouped convolutions).
        residual: largest entry of ``|W W^T - I|`` (of the smaller Gram matrix; for a ReLU pair of M) over all layers.
    """

    sparse: dict[str, float]
    dense: tuple[str, ...]
    left: tuple[str, ...]
    residual: float


def regular_mask(rows: int, columns: int, degree: int, generator: torch.Generator) -> Tensor:
    """A random biregular bipartite graph, bool ``[rows, columns]``: ``degree`` ones a row, equally many ones a column.

    Each block of ``columns / degree`` rows covers every column once; the block is repeated.

    Args:
        rows: channels of the narrow side.
        columns: channels of the wide side.
        degree: connections of each row.
        generator: source of the random numbers.

    Raises:
        ValueError: there are more rows than columns, or the degree allows no such graph.
    """
    if rows > columns or not _is_regular(rows, columns, degree):
        raise ValueError(f"no regular mask of {rows} x {columns} has degree {degree}")
    parts = torch.randperm(columns, generator=generator).view(columns // degree, degree)
    block = torch.zeros(columns // degree, columns, dtype=torch.bool).scatter_(1, parts, value=True)
    return block.repeat(rows * degree // columns, 1)


def sparse_orthogonal(rows: int, columns: int, degree: int, generator: torch.Generator) -> Tensor:
    """A matrix with orthonormal rows and the zeros of a regular mask, float64 ``[rows, columns]``.

    Args:
        rows: channels of the narrow side.
        columns: channels of the wide side.
        degree: entries of each row that are not zero.
        generator: source of the random numbers.

    Raises:
        ValueError: there is no regular mask of this shape and degree.
    """
    mask = regular_mask(rows, columns, degree, generator)
    blocks = columns // degree
    found = torch.zeros(rows, columns, dtype=torch.float64)
    for first in range(blocks):
        alike = slice(first, rows, blocks)  # rows with one support, at most as many as it has entries
        basis = orthogonal(torch.randn(degree, degree, generator=generator, dtype=torch.float64))
        found[alike, mask[first]] = basis[: rows // blocks]
    return found


def mirrored(matrix: Tensor) -> Tensor:
    """``[[M, -M], [-M, M]]`` of ``M [r, c]``, ``[2r, 2c]``: maps ``[relu(h); relu(-h)]`` to ``[M h; -M h]``."""
    return torch.cat([torch.cat([matrix, -matrix], 1), torch.cat([-matrix, matrix], 1)])


def degree_of(wide: int, *, sparsity: float | None, degree: int | None, pattern: Pattern, layer: str) -> int:
    """Connections of each channel of a layer's narrow side: ``degree`` if given, else ``int((1 - sparsity) wide)``.

    Args:
        wide: channels of the layer's wide side.
        sparsity: share of channel pairs without a connection; ``None`` counts as 0.
        degree: connections of each channel of the narrow side; ``None`` to follow ``sparsity``.
        pattern: whether the matrix is mirrored for a ReLU.
        layer: name of the layer, for the message.

    Raises:
        UsageError: fewer connections than the construction needs; names the largest sparsity that this layer allows.
    """
    wanted = degree if degree is not None else int((1 - (sparsity or 0.0)) * wide + 1e-9)
    least = _LEAST_DEGREE[pattern]
    if wanted < min(least, wide):
        raise UsageError(
            f"Layer {layer} cannot be so sparse: under {pattern} init sao needs {least} connections a channel, at most "
            f"a sparsity of {max(0.0, 1 - least / wide):.4g} with {wide} channels, and {wanted} were asked for."
        )
    return wanted


@torch.no_grad()
def initialise_sao_(
    model: nn.Module, *, sparsity: float | None, degree: int | None, pattern: Pattern, seed: int
) -> Initialised:
    """Initialise every Conv2d and Linear of a net in place; biases become zero, every BatchNorm is reset.

    A degree for which a layer's widths have no regular graph is rounded up to the next one that they have; the result
    holds the sparsity that was reached.

    Args:
        model: the net, on the CPU; other parameters than those of Conv2d, Linear and BatchNorm stay.
        sparsity: share of channel pairs without a connection; ``None`` where ``degree`` is given.
        degree: connections of each channel of a layer's narrow side; ``None`` to follow ``sparsity``.
        pattern: ``relu`` mirrors the matrices, ``tanh`` (any other activation, or linear) does not.
        seed: seed of all random numbers.

    Raises:
        UsageError: a sparsity that a layer cannot have; nothing has been changed then.
    """
    layers = weight_layers(model)
    left = tuple(name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups > 1)
    plain = [name for name in layers if name not in left]
    degrees = {
        name: degree_of(
            max(layers[name].weight.shape[:2]), sparsity=sparsity, degree=degree, pattern=pattern, layer=name
        )
        for name in plain[1:-1]
    }
    generator = torch.Generator().manual_seed(seed)
    sparse, dense, residual = {}, [], 0.0
    for name in plain:
        layer = layers[name]
        matrix, core = _matrix(len(layer.weight), layer.weight.shape[1], degrees.get(name), pattern, generator)
        layer.weight.zero_()
        target = centre(layer) if isinstance(layer, nn.Conv2d) else layer.weight
        target.copy_(matrix)
        residual = max(residual, orthogonality_residual(core.to(layer.weight.dtype)))
        missing = 1 - float((matrix != 0).double().mean())
        if missing > 0:
            sparse[name] = missing
        else:
            dense.append(name)
    restart_(model, [layers[name] for name in plain])
    return Initialised(sparse=sparse, dense=tuple(dense), left=left, residual=residual)


def _matrix(
    out: int, into: int, degree: int | None, pattern: Pattern, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A layer's matrix ``[out, into]``, and the orthogonal matrix it is made of: half the size where it is mirrored."""
    rows, columns = min(out, into), max(out, into)
    half = 2 if pattern == "relu" and rows % 2 == columns % 2 == 0 else 1
    regular = [
        possible
        for possible in range(-(-(degree or columns) // half), columns // half)
        if _is_regular(rows // half, columns // half, possible)
    ]
    if degree is None or not regular or (pattern == "relu" and half == 1):
        whole = orthogonal(torch.randn(out, into, generator=generator, dtype=torch.float64))
        return whole, whole
    core = sparse_orthogonal(rows // half, columns // half, regular[0], generator)
    matrix = mirrored(core) if half == 2 else core
    return (matrix.T, core) if out > into else (matrix, core)


def _is_regular(rows: int, columns: int, degree: int) -> bool:
    """Whether there is a biregular graph: whole blocks of rows, and at least one connection for each column."""
    return columns % degree == 0 and rows * degree % columns == 0 and rows * degree >= columns
