"""Second moments and their shrinkage, against the sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunecli.measure.moments import Moments
from toys.half_plans import random


def taken(rows: Tensor, *, about_zero: bool = False, batch: int = 3) -> Moments:
    found = Moments(about_zero=about_zero)
    for part in rows.split(batch, dim=1):
        found.add(part)
    return found


@pytest.mark.parametrize("about_zero", [False, True])
def test_moments_are_those_of_all_rows_at_once(about_zero):
    rows = random(2, 7, 5, 4, dtype=torch.float64) + 3  # blocks, images, rows, inputs
    found = taken(rows, about_zero=about_zero)
    flat = rows.flatten(1, 2)
    torch.testing.assert_close(found.mean, flat.mean(1))
    spread = flat if about_zero else flat - flat.mean(1, keepdim=True)
    torch.testing.assert_close(found.second, spread.mT @ spread / flat.shape[1])


@pytest.mark.parametrize("n", [2, 9], ids=["few rows an image", "many rows an image"])
def test_the_shrinkage_is_the_formula_with_images_as_samples(n):
    """All images in one batch, so that moments are taken about the mean of all."""
    rows = random(1, 6, n, 4, dtype=torch.float64)
    x = rows[0] - rows[0].mean((0, 1))
    own = x.mT @ x / n  # Q_n, one image each
    spread = ((own - own.mean(0)).square().sum(0) / (6 * 5)).fill_diagonal_(0).sum()
    signal = own.mean(0).fill_diagonal_(0).square().sum()
    found = taken(rows, batch=6)
    torch.testing.assert_close(found.shrinkage[0], (spread / signal).clamp(max=1))
    rho, second = found.shrinkage[0], found.second[0]
    torch.testing.assert_close(found.shrunk[0].diagonal(), second.diagonal())
    torch.testing.assert_close(found.shrunk[0][0, 1], (1 - rho) * second[0, 1])


def test_images_that_agree_are_believed_and_one_image_is_not():
    same = random(1, 1, 9, 4).expand(1, 5, 9, 4)
    assert float(taken(same, batch=5).shrinkage) == pytest.approx(0, abs=1e-6)
    assert float(taken(same[:, :1]).shrinkage) == 1


def test_more_images_are_believed_more():
    few, many = (float(taken(random(1, n, 1, 8) @ random(8, 8, seed=1)).shrinkage) for n in (12, 3000))
    assert many < 0.05 < few
