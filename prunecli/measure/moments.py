"""Second moments of what layers read, and how far a sample of images can be trusted with them.

Shapes: *rows* ``[blocks, images, n, h]``, where n rows come from each image and a block holds h inputs. Positions of
one image are not independent, so a few hundred images say little about wide layers: any half of the inputs of a
classifier behind 1280 features "explains" the rest of 160 images. So the estimate is shrunk towards its diagonal,

    ``C <- (1 - rho) C + rho diag(C)``, ``rho = sum_{i != j} Var C_ij / sum_{i != j} C_ij^2``,

with the variance of C_ij taken between images: ``Var C = (sum_n |Q_n|^2 - N |Q|^2) / (N (N - 1))`` in squared Frobenius
norms without the diagonals, ``Q_n`` one image's own second moment, Q their mean.

Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices" (the intensity
rho), with the diagonal as target as in Schäfer and Strimmer 2005 (their target D).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """First and second moments of rows, summed batch by batch.

    Rows are taken relative to the first batch's mean, so that a mean that is large against the spread costs no digits.
    Products are computed in the rows' own precision and summed in float64.

    Args:
        about_zero: whether second moments are taken about zero (a Gram matrix) instead of about the mean.
    """

    def __init__(self, *, about_zero: bool) -> None:
        self.images = 0
        self._about_zero = about_zero
        self._count = 0
        self._origin = torch.zeros(())
        self._sums = torch.zeros(())
        self._products = torch.zeros(())
        self._squares = torch.zeros(())  # of the images' own second moments, without their diagonals

    def add(self, rows: Tensor) -> None:
        """Add one batch of rows ``[blocks, images, n, h]``."""
        if not self._count:
            mean = rows.mean((1, 2), keepdim=True)
            self._origin = torch.zeros_like(mean) if self._about_zero else mean
        x = rows - self._origin
        blocks, images, n, h = x.shape
        flat = x.reshape(blocks, images * n, h)
        self.images += images
        self._count += images * n
        self._sums = self._sums + flat.sum(1).double()
        self._products = self._products + (flat.mT @ flat).double()
        own = (x @ x.mT if n < h else x.mT @ x) / n  # both have the same Frobenius norm
        diagonals = (x.square().sum(2) / n).square().sum((1, 2))
        self._squares = self._squares + own.square().sum((1, 2, 3)).double() - diagonals.double()

    @property
    def mean(self) -> Tensor:
        """The mean row ``[blocks, h]``, float64."""
        return self._origin.double().reshape(self._sums.shape) + self._sums / self._count

    @property
    def second(self) -> Tensor:
        """The sample's second moments ``[blocks, h, h]``, float64."""
        found = self._products / self._count
        if self._about_zero:
            return found
        mean = self._sums / self._count
        return found - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    @property
    def shrinkage(self) -> Tensor:
        """Rho ``[blocks]`` in [0, 1]: 0 where the images agree, 1 where one image is all there is."""
        if self.images < 2:
            return torch.ones_like(self._squares)
        found = self._products / self._count
        spread = (self._squares - self.images * _without_diagonal(found)) / (self.images * (self.images - 1))
        signal = _without_diagonal(self.second)
        return (spread / signal.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)

    @property
    def shrunk(self) -> Tensor:
        """Second moments ``[blocks, h, h]`` shrunk towards their diagonal, float64."""
        rho = self.shrinkage[:, None, None]
        second = self.second
        return (1 - rho) * second + rho * torch.diag_embed(second.diagonal(dim1=1, dim2=2))


def _without_diagonal(matrices: Tensor) -> Tensor:
    """The squared Frobenius norm ``[blocks]`` of matrices ``[blocks, h, h]`` without their diagonals."""
    return matrices.square().sum((1, 2)) - matrices.diagonal(dim1=1, dim2=2).square().sum(1)
