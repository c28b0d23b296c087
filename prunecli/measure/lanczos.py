"""Spectral densities by Golub-Kahan-Lanczos bidiagonalisation: singular values of a map that is only known by products.

For each sample a map J [K, P] is given as ``v -> J v`` and ``u -> J^T u``. From one random unit vector u of length K,
m steps give a bidiagonal B [m, m]; its singular values and the squared first entries of its left singular vectors are
nodes and weights of the Gauss quadrature of the spectral density of J J^T seen from u (Golub and Welsch 1969; Ubaru,
Chen and Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"). Bidiagonalising J instead of
tridiagonalising J J^T keeps small singular values from being squared into rounding.

What is estimated, and how well:

* the largest singular values converge first, to all digits. Those found are counted as what they are, one of K each,
  and chance is left to the rest: the few large values of a trained net would otherwise make up most of the noise.
* the mean over the rest: u, less its part along the vectors found, is uniform on the sphere of the other K' dimensions,
  so a quadrature ``u^T f u`` over them has variance ``2 / (K' + 2)`` times the variance of f over their spectrum,
  exactly (fourth moments of the sphere). The standard errors are computed from it.
* the smallest: from above only. Small singular values converge last; the figure is an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


_CONVERGED = 1e-2  # residual of a singular triple relative to its value: the value's own error is about its square
_WEIGHTLESS = 1e-20  # of a node: rounding; a random vector has a share of 1e-20 of K = 1000 once in 10^8 times
_SINGLE = 16.0  # K times the weight of one vector is chi-squared with one degree: more than this is a repeated value


@dataclass(frozen=True, kw_only=True)
class Density:
    """Estimated densities of singular values, one for each of B samples.

    Attributes:
        nodes: singular values ``[B, m]``, largest first.
        weights: shares of the spectrum ``[B, m]`` that the nodes stand for; each row sums to one.
        size: number K of singular values that each density stands for.
        mean_error: standard error ``[B]`` of each mean, from the one start vector of a sample.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    mean_error: Tensor

    def moment(self, power: int) -> Tensor:
        """``mean(sigma^power)`` over each sample's spectrum, ``[B]``."""
        return (self.weights * self.nodes.pow(power)).sum(dim=1)

    @property
    def mean(self) -> Tensor:
        """Mean singular value of each sample, ``[B]``."""
        return self.moment(1)

    def quantiles(self, count: int) -> Tensor:
        """Values ``[B, count]`` that are spread like each sample's singular values, largest first.

        Each node stands for its weight's share of the spectrum; between the middles of neighbouring shares the values
        are interpolated (logarithms, as spectra spread over decades), beyond the outer middles they stay at the node:
        what lies below the smallest node found is counted there.
        """
        middles = self.weights.cumsum(dim=1) - self.weights / 2
        places = (torch.arange(count, dtype=middles.dtype) + 0.5) / count
        logs = self.nodes.clamp_min(torch.finfo(self.nodes.dtype).tiny).log()
        found = [_interpolated(places, x, y).exp() for x, y in zip(middles, logs, strict=True)]
        return torch.stack(found)


def _interpolated(places: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear through ``(x, y)``, constant outside; x ascending."""
    right = torch.searchsorted(x, places).clamp(min(1, len(x) - 1), len(x) - 1)
    left = (right - 1).clamp_min(0)
    share = ((places - x[left]) / (x[right] - x[left]).clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1)
    return y[left] + share * (y[right] - y[left])


def spectral_density(forward: Product, adjoint: Product, start: Tensor, *, steps: int) -> Density:
    """Densities of B maps J_b ``[K, P]`` at once.

    Both bases are orthogonalised in full, so that no singular value is found twice.

    Args:
        forward: product ``v -> J v``, ``[B, P] -> [B, K]``, each row with its own map.
        adjoint: product ``u -> J^T u``, ``[B, K] -> [B, P]``.
        start: random vectors ``[B, K]``, normalised here; the products run on their device and in their dtype.
        steps: largest number of products with each of J and J^T; never more than K are made.
    """
    samples, size = start.shape
    steps = min(steps, size)
    lefts, rights = [_unit(start, start.new_zeros(samples))[0]], list[Tensor]()
    alphas, betas = list[Tensor](), list[Tensor]()
    nothing = start.new_zeros(samples)  # a vector this short is rounding
    for _ in range(steps):
        # J^T u_j = alpha_j v_j + beta_{j-1} v_{j-1} and J v_j = alpha_j u_j + beta_j u_{j+1} (Golub and Kahan 1965)
        v = adjoint(lefts[-1]) - (betas[-1][:, None] * rights[-1] if rights else 0)
        v, alpha = _unit(_orthogonal_to(rights, v), nothing)
        nothing = torch.maximum(nothing, 10 * torch.finfo(alpha.dtype).eps * alpha)
        u, beta = _unit(_orthogonal_to(lefts, forward(v) - alpha[:, None] * lefts[-1]), nothing)
        for found, new in ((rights, v), (alphas, alpha), (lefts, u), (betas, beta)):
            found.append(new)
    bidiagonal = torch.zeros(samples, steps, steps, dtype=torch.float64)
    rows = torch.arange(steps)
    bidiagonal[:, rows, rows] = torch.stack(alphas, dim=1).double().cpu()
    bidiagonal[:, rows[1:], rows[:-1]] = torch.stack(betas, dim=1).double().cpu()[:, :-1]
    # u_1 = start is the first basis vector, so its components along the left singular vectors are their first entries.
    U, nodes, Vh = torch.linalg.svd(bidiagonal)
    # J V = U B + beta_m u_{m+1} e_m^T: the last entry of a right singular vector is what its triple misses.
    residuals = betas[-1].double().cpu()[:, None] * Vh[:, :, -1].abs()
    return _density(nodes, U[:, 0, :].square(), residuals, size)


def _density(nodes: Tensor, weights: Tensor, residuals: Tensor, size: int) -> Density:
    """Densities from the singular values, quadrature weights and residuals ``[B, m]`` of the bidiagonal matrices.

    Converged singular values get weight ``1 / size`` each; the remaining nodes share the rest by their quadrature
    weights. Nodes without weight come from a map that was done before the last step; they repeat the smallest of the
    others.
    """
    live = weights > _WEIGHTLESS
    nodes = torch.where(live, nodes, torch.where(live, nodes, torch.inf).amin(dim=1, keepdim=True))
    known = (residuals <= _CONVERGED * nodes) & (weights <= _SINGLE / size)
    known &= ~known.all(dim=1, keepdim=True)  # a repeated value may hide behind small weights: something must be left
    # Only an unbroken run from the largest down: which of the smaller ones converge depends on their weights, and
    # leaving out just those would bias the rest.
    known = (known & live).cumprod(dim=1).bool()
    # As many nodes as singular values, none without weight: then the decomposition is complete.
    known |= live.all(dim=1, keepdim=True) & torch.tensor(nodes.shape[1] == size)
    counts = known.sum(dim=1, keepdim=True)
    rest = weights.masked_fill(known, 0)
    rest = rest / rest.sum(dim=1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
    left = (size - counts) / size
    # The mean over the found values is exact, so only the rest has an error: 2 / (K' + 2) times its variance.
    mean = (rest * nodes).sum(dim=1)
    variance = ((rest * nodes.square()).sum(dim=1) - mean**2).clamp_min(0)
    error = left[:, 0] * (2 / (size - counts[:, 0] + 2) * variance).sqrt()
    return Density(nodes=nodes, weights=torch.where(known, 1 / size, left * rest), size=size, mean_error=error)


def _orthogonal_to(basis: list[Tensor], vectors: Tensor) -> Tensor:
    """Vectors [B, N] without their parts along the basis, each [B, N]; twice, as once leaves rounding."""
    if not basis:
        return vectors
    stacked = torch.stack(basis, dim=1)  # [B, m, N]
    for _ in range(2):
        vectors = vectors - torch.einsum("bmn,bm->bn", stacked, torch.einsum("bmn,bn->bm", stacked, vectors))
    return vectors


def _unit(vectors: Tensor, nothing: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and their former lengths; both zero where a vector is not longer than ``nothing``: a map is done."""
    length = torch.linalg.vector_norm(vectors, dim=1)
    length = torch.where(length > nothing, length, 0)
    return torch.where(length > 0, 1 / length, 0)[:, None] * vectors, length
