"""Isometry recovery: replace every weight matrix by an orthogonal one (OrthP), or move it part of the way (blend).

Shapes: a convolution weight ``[N, C, k, k]`` is read as the matrix ``[N, C*k*k]``, a linear weight as ``[out, in]``.
A grouped convolution is block-diagonal, so each of its blocks ``[N/g, C/g*k*k]`` is made orthogonal on its own.
*Orthogonal* means orthonormal rows where the matrix is wide or square, orthonormal columns where it is tall.

Source: Wang and Fu, "Dynamical Isometry: The Missing Ingredient for Neural Network Pruning" (arXiv 2105.05916); the QR
variant is the paper's, the polar factor is the nearest orthogonal matrix, and the Newton-Schulz iteration (Björck and
Bowie 1971) reaches the polar factor with matrix products alone. For comparison, as in the paper's code: the
approximate isometry of Lee et al. (arXiv 1906.06307) by gradient descent, a delta-orthogonal start (Xiao et al., arXiv
1806.05393) and an orthogonal one from scratch (``nn.init.orthogonal_``), the last two without the weights' own values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prunecli.errors import PruneError, UsageError, nearest
from prunecli.models.layers import activation_gain, blocks, centre, restart_, weight_layers, weight_matrices

Method = Literal["qr", "polar", "newton_schulz", "approximate", "delta", "scratch"]
_NEWTON_SCHULZ_STEPS = 120  # 1.5**120 lifts a singular value of 1e-16 to 1 with 30 steps to spare
_APPROXIMATE_STEPS = 10_000
_APPROXIMATE_RATE = 1e-3
_PATIENCE = 200  # steps without a lower loss, after which descent ends


@dataclass(frozen=True, kw_only=True)
class Orthogonalized:
    """The result of ``orthogonalize_``.

    Attributes:
        residual: largest entry of ``|W W^T / gain^2 - I|`` (``W^T W`` where W is tall) over all layers and blocks,
            measured on the weights as stored; with ``delta`` on the kernels' centres.
        gain: factor by which every orthogonal matrix was multiplied.
        layers: paths of the layers that were replaced, in module order.
    """

    residual: float
    gain: float
    layers: tuple[str, ...]


# ---------------------------------------------------------------------------------------------- matrices


def orthogonal(matrix: Tensor, method: Method = "qr") -> Tensor:
    """The orthogonal matrix that ``method`` makes from ``matrix``, of the same shape and dtype.

    Directions that the matrix lacks (zero or dependent filters) are filled with an arbitrary orthonormal completion,
    so that the result is orthogonal for any finite input, zero included; ``approximate`` alone leaves them out.

    Args:
        matrix: stack of matrices ``[..., N, M]`` in any floating dtype; the work is done in float64, cast back once.
        method: ``qr`` (Q of the tall orientation, columns signed so that R has a diagonal >= 0; depends on the order
            of the filters), ``polar`` (U V^T of the SVD, the nearest orthogonal matrix), ``newton_schulz`` (the same,
            by iteration) or ``approximate`` (gradient descent on the distance to orthogonality, Lee et al.).

    Raises:
        UsageError: the method is unknown.
        ValueError: the matrix has fewer than two dimensions.
        PruneError: the matrix has NaN or infinite entries.
    """
    if method not in _METHODS:
        raise UsageError(f"Unknown orthogonalisation {method!r}.", hint=nearest(method, _METHODS))
    if matrix.dim() < 2:
        raise ValueError(f"expected [..., N, M], got shape {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise PruneError("A matrix with NaN or infinite entries cannot be made orthogonal.")
    wide = matrix.shape[-2] < matrix.shape[-1]
    tall = (matrix.mT if wide else matrix).double()
    result = _METHODS[method](tall)
    return (result.mT if wide else result).to(matrix.dtype)


def _qr(tall: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(tall)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    # sign(0) would be 0 and wipe out the column of a zero or dependent filter.
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(Q)
    return Q * signs.unsqueeze(-2)


def _polar(tall: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(tall, full_matrices=False)
    return U @ Vh


def _newton_schulz(tall: Tensor) -> Tensor:
    """``X <- 1.5 X - 0.5 X X^T X`` from ``X = A / ||A||_F``, until ``X^T X`` is the identity to rounding.

    All singular values start in (0, 1], where the cubic converges to 1. A singular value of exactly zero never moves,
    so what has not converged after all steps (rank-deficient input) gets its missing directions from an SVD.
    """
    norm = torch.linalg.matrix_norm(tall, keepdim=True)
    X = tall / torch.where(norm > 0, norm, 1.0)
    eye = torch.eye(tall.shape[-1], dtype=X.dtype, device=X.device)
    tolerance = 8 * tall.shape[-1] * torch.finfo(X.dtype).eps
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = X.mT @ X
        if (gram - eye).abs().max() <= tolerance:
            return X
        X = X @ (1.5 * eye - 0.5 * gram)
    return _polar(X)


def _approximate(tall: Tensor) -> Tensor:
    """Minimise the mean square of ``X^T X - I`` from ``X = A`` by Adam (rate 1e-3, at most 10,000 steps).

    The published code takes ``X X^T`` of the matrix as it lies; both have the same minimisers, this one the smaller
    Gram matrix. It ends early where the largest entry of the gap is at rounding, or no longer falls: what matters of a
    gap is reported as the residual.
    """
    X = tall.clone().requires_grad_()
    eye = torch.eye(tall.shape[-1], dtype=X.dtype, device=X.device)
    optimizer = torch.optim.Adam([X], lr=_APPROXIMATE_RATE)
    lowest, since = math.inf, 0
    for _ in range(_APPROXIMATE_STEPS):
        with torch.enable_grad():
            gap = X.mT @ X - eye
            loss = gap.square().mean()
        (X.grad,) = torch.autograd.grad(loss, X)
        optimizer.step()
        value = float(loss.detach())
        lowest, since = (value, 0) if value < 0.999 * lowest else (lowest, since + 1)
        if value < 1e-14 or since == _PATIENCE:
            break
    return X.detach()


_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "qr": _qr,
    "polar": _polar,
    "newton_schulz": _newton_schulz,
    "approximate": _approximate,
}
_STARTS = ("delta", "scratch")  # made from random numbers, not from the weights


def orthogonality_residual(matrices: Tensor) -> float:
    """Largest entry of ``|W W^T - I|`` over a stack ``[..., N, M]`` (``W^T W`` where N > M), in float64."""
    W = matrices.double()
    gram = W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return float((gram - eye).abs().max())


# ---------------------------------------------------------------------------------------------- models


@torch.no_grad()
def orthogonalize_(
    module: nn.Module,
    method: Method = "qr",
    *,
    gain: Literal["auto"] | float = "auto",
    example: Tensor | None = None,
    layers: Collection[str] | None = None,
    seed: int = 0,
) -> Orthogonalized:
    """OrthP in place: ``W <- gain * orthogonal(W)`` for every Conv2d and Linear, classifier and shortcuts included.

    Biases and normalisation layers (parameters and statistics) stay; re-estimate BatchNorm statistics afterwards. The
    old norms of the layers are not restored: that would undo the isometry.

    Two methods forget the weights. ``delta`` puts a random orthogonal matrix at the centre of every convolution's
    kernel and zeros elsewhere, linear layers stay. ``scratch`` starts all again: random orthogonal weights, biases at
    0, BatchNorm scales at 1, shifts at 0 and statistics reset.

    Args:
        module: the net, whose weights keep dtype and device.
        method: a method of ``orthogonal``, or ``delta`` or ``scratch``.
        gain: factor of every orthogonal matrix; ``auto`` for ``activation_gain(module, example)``.
        example: input of the net ``[B, C, H, W]``, with which ``auto`` finds functional activations.
        layers: module paths of the layers to replace; ``None`` for all.
        seed: seed of ``delta`` and ``scratch``.

    Raises:
        UsageError: the method is unknown, the gain is not above zero, or a name in ``layers`` is no such layer.
        PruneError: a layer with NaN or infinite weights (named); nothing has been changed then.
    """
    chosen = _layers_named(module, layers)
    factor = activation_gain(module, example) if gain == "auto" else float(gain)
    if not (math.isfinite(factor) and factor > 0):
        raise UsageError(f"The gain must be above zero, not {factor:g}.")
    if method not in (*_METHODS, *_STARTS):
        raise UsageError(f"Unknown orthogonalisation {method!r}.", hint=nearest(method, (*_METHODS, *_STARTS)))
    _require_finite(chosen)
    if method == "delta":
        chosen = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Conv2d)}
    generator = torch.Generator().manual_seed(seed)
    residual = 0.0
    for layer in chosen.values():
        if method == "delta":
            layer.weight.zero_()
        part = centre(layer) if method == "delta" else layer.weight
        matrices = blocks(part, layer)
        if method in _STARTS:
            new = orthogonal(torch.randn(matrices.shape, generator=generator, dtype=torch.float64), "qr")
        else:
            new = orthogonal(matrices.double(), method)
        part.copy_((factor * new).reshape(part.shape))
        residual = max(residual, orthogonality_residual(blocks(part, layer).double() / factor))
    if method == "scratch":
        restart_(module, chosen.values())
    return Orthogonalized(residual=residual, gain=factor, layers=tuple(chosen))


@torch.no_grad()
def blend_(module: nn.Module, share: float) -> int:
    """``W <- (1 - share) W + share * g * U V^T`` in place for every Conv2d and Linear; returns the number of layers.

    ``U V^T`` is the polar factor of the weight matrix (of each block where a convolution is grouped), so a singular
    value ``s`` becomes ``(1 - share) s + share * g``: the smallest are lifted, the singular vectors and with them the
    features stay. ``g`` is the number that keeps the matrix's Frobenius norm, so that the layer neither grows nor
    shrinks; a zero matrix stays zero. Biases and normalisation layers stay; re-estimate BatchNorm statistics.

    Args:
        module: the net, whose weights keep dtype and device.
        share: share of the orthogonal matrix, between 0 (nothing changes) and 1 (all singular values equal).

    Raises:
        UsageError: the share lies outside [0, 1].
        PruneError: a layer with NaN or infinite weights (named); nothing has been changed then.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"The share of the blend must lie between 0 and 1, not {share:g}.")
    layers = weight_layers(module)
    _require_finite(layers)
    for layer in layers.values():
        layer.weight.copy_(_blended(weight_matrices(layer).double(), share).reshape(layer.weight.shape))
    return len(layers)


def _blended(W: Tensor, share: float) -> Tensor:
    """The blend of each matrix ``[..., N, M]`` in float64.

    With r singular values s of sum n and square sum f, ``g`` solves ``sum (((1 - a) s + a g)^2) = f``: with u = a g,
    ``r u^2 + 2 (1 - a) n u = (1 - (1 - a)^2) f``.
    """
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    rest, rank = 1 - share, s.shape[-1]
    half, f = rest * s.sum(-1), s.square().sum(-1)
    u = (torch.sqrt(half.square() + rank * (1 - rest**2) * f) - half) / rank
    return (U * (rest * s + u.unsqueeze(-1)).unsqueeze(-2)) @ Vh


def _require_finite(layers: Mapping[str, nn.Conv2d | nn.Linear]) -> None:
    """Raises PruneError for the first layer with NaN or infinite weights."""
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise PruneError(f"Layer {name!r} has NaN or infinite weights and cannot be made orthogonal.")


def _layers_named(module: nn.Module, layers: Collection[str] | None) -> dict[str, nn.Conv2d | nn.Linear]:
    """The Conv2d and Linear with these paths, all without. Raises UsageError for a path that is none of them."""
    known = weight_layers(module)
    if layers is None:
        return known
    for name in layers:
        if name not in known:
            raise UsageError(f"{name!r} is no Conv2d or Linear of this model.", hint=nearest(name, known))
    return {name: layer for name, layer in known.items() if name in layers}
