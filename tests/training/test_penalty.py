"""The penalties against numbers by hand, autograd and naive loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecli.training.penalty import Orthogonality, gram_loss, kernorth, orthconv

# Three filters of four weights; the second is pruned.
FILTERS = torch.tensor([[1.0, 0, 2, 0], [0, 1, 1, 0], [3, 0, 0, 1]], dtype=torch.float64)
KEPT = torch.tensor([True, False, True])


def test_gram_loss_by_hand() -> None:
    # G = [[5, 2, 3], [2, 2, 0], [3, 0, 10]]; what costs: row and column 1, that is 2, 2, 2 and 0, 0.
    assert float(gram_loss(FILTERS, KEPT)) == pytest.approx((2**2 + 2**2 + 2**2) / 9)


def test_gram_gradient_by_hand_and_by_the_target_of_the_paper() -> None:
    filters = FILTERS.clone().requires_grad_()
    (found,) = torch.autograd.grad(gram_loss(filters, KEPT), filters)
    gram = filters @ filters.T
    target = gram.detach().clone()
    target[1, :] = 0
    target[:, 1] = 0
    (expected,) = torch.autograd.grad(functional.mse_loss(gram, target), filters)
    torch.testing.assert_close(found, expected)
    # d/dw_0 of (2 (w_0.w_1)^2) / 9 = 4 (w_0.w_1) w_1 / 9; of w_2 it is zero, as w_1.w_2 = 0.
    torch.testing.assert_close(found[0], 4 * 2 * FILTERS[1] / 9)
    assert not found[2].any()


def test_nothing_pruned_costs_nothing() -> None:
    assert float(gram_loss(FILTERS, torch.ones(3, dtype=torch.bool))) == 0


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 2, 2)])
def test_kernorth_equals_loops(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    rows = weight.reshape(shape[0], -1).tolist()
    vectors = rows if len(rows) <= len(rows[0]) else [list(column) for column in zip(*rows, strict=True)]
    total = 0.0
    for (i, a), (j, b) in itertools.product(enumerate(vectors), repeat=2):
        total += (sum(x * y for x, y in zip(a, b, strict=True)) - (i == j)) ** 2
    assert float(kernorth(weight)) == pytest.approx(total**0.5)


def naive_orthconv(weight: Tensor, stride: int) -> float:
    """Overlap of every kernel with every kernel, moved by every multiple of the stride."""
    size = weight.shape[2]
    moves = range(-((size - 1) // stride), (size - 1) // stride + 1)
    total = 0.0
    for i, j in itertools.product(range(len(weight)), repeat=2):
        for down, right in itertools.product(moves, repeat=2):
            overlap = 0.0
            for c, y, x in itertools.product(range(weight.shape[1]), range(size), range(size)):
                v, u = y + down * stride, x + right * stride
                if 0 <= v < size and 0 <= u < size:
                    overlap += float(weight[i, c, v, u] * weight[j, c, y, x])
            total += (overlap - (i == j and down == right == 0)) ** 2
    return total**0.5


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (2, 1), (5, 2)])
def test_orthconv_equals_loops(size: int, stride: int) -> None:
    weight = torch.randn(3, 2, size, size, dtype=torch.float64)
    assert float(orthconv(weight, stride=(stride, stride))) == pytest.approx(naive_orthconv(weight, stride))


def test_orthconv_compares_kernels_of_one_group_only() -> None:
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    squares = sum(naive_orthconv(part, 1) ** 2 for part in weight.split(2))
    assert float(orthconv(weight, groups=3)) == pytest.approx(squares**0.5)


def test_an_orthogonal_convolution_costs_nothing() -> None:
    weight = torch.zeros(4, 4, 3, 3)
    weight[:, :, 1, 1] = torch.linalg.qr(torch.randn(4, 4))[0]  # delta-orthogonal
    assert float(orthconv(weight)) < 1e-6


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(8, 3)
    )


@torch.no_grad()
def test_each_regulariser_takes_the_layers_of_its_paper() -> None:
    model = net()
    first, conv, pointwise, linear = model[0].weight, model[2].weight, model[3].weight, model[5].weight
    kernels = sum(kernorth(weight) for weight in (first, conv, pointwise, linear))
    assert float(Orthogonality(model, "kernorth", 0.1).loss(0)) == pytest.approx(0.1 * float(kernels))
    mixed = orthconv(conv, stride=(2, 2)) + kernorth(pointwise) + kernorth(linear)
    assert float(Orthogonality(model, "orthconv", 0.5).loss(0)) == pytest.approx(0.5 * float(mixed))
