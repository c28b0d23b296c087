"""OrthP: hand cases, naive twins, and what must stay untouched."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecli.errors import PruneError, UsageError
from prunecli.measure.jacobian import jacobian_spectrum
from prunecli.models.layers import activation_gain, weight_layers, weight_matrices
from prunecli.recovery.orthogonal import blend_, orthogonal, orthogonality_residual, orthogonalize_

METHODS = ("qr", "polar", "newton_schulz")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_schmidt_rows(matrix: Tensor) -> Tensor:
    """The obvious version of QR's Q for a wide matrix of full rank: its signs make every r_ii positive."""
    rows: list[Tensor] = []
    for filter_row in matrix.double():
        rest = filter_row
        for basis in rows:
            rest = rest - (rest @ basis) * basis
        rows.append(rest / rest.norm())
    return torch.stack(rows).to(matrix.dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 27), (27, 6), (8, 8), (1, 5), (5, 1), (3, 4, 9)])
def test_rows_or_columns_become_orthonormal(method, shape):
    result = orthogonal(random(*shape), method)
    assert result.shape == shape
    assert result.dtype == torch.float32
    assert orthogonality_residual(result) <= 1e-5


def test_qr_of_the_hand_cases():
    tall = orthogonal(torch.tensor([[3.0, 1.0], [4.0, 2.0]]), "qr")
    torch.testing.assert_close(tall, torch.tensor([[0.6, -0.8], [0.8, 0.6]]))
    wide = orthogonal(torch.tensor([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]]), "qr")
    second = torch.tensor([-0.32, 0.24, 2.0])
    torch.testing.assert_close(wide, torch.stack([torch.tensor([0.6, 0.8, 0.0]), second / second.norm()]))


def test_qr_is_gram_schmidt_in_filter_order():
    matrix = random(7, 30)
    torch.testing.assert_close(orthogonal(matrix, "qr"), gram_schmidt_rows(matrix), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(orthogonal(matrix.T, "qr"), gram_schmidt_rows(matrix).T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 20), (20, 5)])
def test_polar_is_u_times_v_transposed_and_the_nearest_orthogonal_matrix(shape):
    matrix = random(*shape)
    U, _, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = orthogonal(matrix, "polar")
    torch.testing.assert_close(found, (U @ Vh).float())
    assert (found - matrix).norm() < (orthogonal(matrix, "qr") - matrix).norm()


def test_newton_schulz_reaches_the_polar_factor_of_an_ill_conditioned_matrix():
    U, _, Vh = torch.linalg.svd(random(10, 40).double(), full_matrices=False)
    matrix = U @ torch.diag(torch.logspace(0, -8, 10, dtype=torch.float64)) @ Vh
    torch.testing.assert_close(orthogonal(matrix, "newton_schulz"), U @ Vh, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_dependent_filters_still_give_an_orthogonal_matrix(method):
    matrix = random(6, 20)
    matrix[2] = 0
    matrix[4] = 2 * matrix[1]
    assert orthogonality_residual(orthogonal(matrix, method)) <= 1e-5
    assert orthogonality_residual(orthogonal(torch.zeros(4, 9), method)) <= 1e-5


def test_bad_matrices_are_refused():
    with pytest.raises(UsageError, match=r"qrr.*Did you mean 'qr'"):
        orthogonal(random(2, 2), "qrr")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="NaN"):
        orthogonal(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        orthogonal(random(3))


class Conv(nn.Module):
    """A bit of everything OrthP meets."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = act
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.grouped(self.act(self.bn(self.stem(x))))).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_is_replaced_and_nothing_else(method):
    torch.manual_seed(0)
    model = Conv(nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = orthogonalize_(model, method)
    assert result.layers == ("stem", "grouped", "depthwise", "head")
    assert result.gain == pytest.approx(math.sqrt(2))
    assert result.residual <= 1e-5
    weights = {f"{name}.weight" for name in result.layers}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in weights), name
    stem = model.stem.weight.reshape(8, 27)
    torch.testing.assert_close(stem @ stem.T, 2 * torch.eye(8), atol=1e-5, rtol=0)
    for block in model.grouped.weight.reshape(2, 4, 36):
        torch.testing.assert_close(block @ block.T, 2 * torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.depthwise.weight.flatten(1).norm(dim=1), torch.full((8,), math.sqrt(2)))


def test_only_the_named_layers():
    model = Conv(nn.ReLU())
    kept = model.head.weight.clone()
    assert orthogonalize_(model, layers=["stem"], gain=1.0).layers == ("stem",)
    assert torch.equal(model.head.weight, kept)
    with pytest.raises(UsageError, match=r"'bn' is no Conv2d or Linear"):
        orthogonalize_(model, layers=["bn"])


def test_a_broken_layer_is_named_and_nothing_changes():
    model = Conv(nn.ReLU())
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    kept = model.stem.weight.clone()
    with pytest.raises(PruneError, match="'head' has NaN or infinite"):
        orthogonalize_(model)
    assert torch.equal(model.stem.weight, kept)
    with pytest.raises(UsageError, match="gain must be above zero"):
        orthogonalize_(Conv(nn.ReLU()), gain=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_perceptron_gets_every_singular_value_exactly_one(method):
    torch.manual_seed(0)
    widths = [1024, *[20] * 6, 10]
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    assert orthogonalize_(model, method).gain == 1.0
    values = jacobian_spectrum(model, random(2, 1, 32, 32)).values
    torch.testing.assert_close(values, torch.ones(2, 10, dtype=torch.float64), atol=1e-5, rtol=0)


class Functional(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.dropout = nn.Dropout()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dropout(self.fc(x)))


@pytest.mark.parametrize(
    ("act", "gain"),
    [
        (torch.relu, 2**0.5),
        (functional.leaky_relu, 2**0.5),
        (lambda x: x.relu_(), 2**0.5),
        (torch.tanh, 5 / 3),
        (torch.sigmoid, 1.0),
        (lambda x: x, 1.0),
    ],
)
def test_functional_activations_need_an_example(act, gain):
    model = Functional(act)
    model.dropout.eval()
    assert activation_gain(model) == 1.0
    assert activation_gain(model, random(2, 4)) == pytest.approx(gain)
    assert model.training
    assert not model.dropout.training


@pytest.mark.parametrize(
    ("act", "gain"), [(nn.GELU(), 2**0.5), (nn.ReLU6(), 2**0.5), (nn.Tanh(), 5 / 3), (nn.Identity(), 1.0)]
)
def test_activation_modules_set_the_gain(act, gain):
    assert activation_gain(Conv(act)) == pytest.approx(gain)


# ---------------------------------------------------------------------------------------------- blend


class Mixed(nn.Module):
    """A convolution, a grouped one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.grouped(self.conv(x))).mean((2, 3)))


def condition(matrices: Tensor) -> Tensor:
    s = torch.linalg.svdvals(matrices.double())
    return s[..., 0] / s[..., -1]


def test_blend_keeps_norms_and_singular_vectors_and_lowers_the_condition():
    torch.manual_seed(0)
    model = Mixed()
    before = {name: weight_matrices(layer).clone() for name, layer in weight_layers(model).items()}
    norm = copy.deepcopy(model.norm.state_dict())
    assert blend_(model, 0.3) == 3
    for name, old in before.items():
        new = weight_matrices(model.get_submodule(name))
        torch.testing.assert_close(torch.linalg.matrix_norm(new), torch.linalg.matrix_norm(old))
        assert (condition(new) < condition(old)).all(), name
        U, s, Vh = torch.linalg.svd(old, full_matrices=False)
        turned = U.mT @ new @ Vh.mT
        lifted = turned.diagonal(dim1=-2, dim2=-1) - 0.7 * s
        torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)), atol=1e-5, rtol=0)
        torch.testing.assert_close(lifted, lifted[..., :1].expand_as(lifted), atol=1e-5, rtol=0)
    assert all(torch.equal(value, norm[name]) for name, value in model.norm.state_dict().items())


def test_blend_by_hand():
    """Singular values 3 and 4, share 1: both become sqrt((9 + 16) / 2). Share 0 and a zero matrix stay as they are."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, -4.0])))
    blend_(layer, 0)
    torch.testing.assert_close(layer.weight.detach(), torch.diag(torch.tensor([3.0, -4.0])))
    blend_(layer, 1)
    torch.testing.assert_close(layer.weight.detach(), math.sqrt(12.5) * torch.diag(torch.tensor([1.0, -1.0])))
    nn.init.zeros_(layer.weight)
    blend_(layer, 0.3)
    assert not layer.weight.any()


def test_blend_refuses_what_it_cannot_mean():
    with pytest.raises(UsageError, match="between 0 and 1"):
        blend_(Mixed(), 1.5)
    model = Mixed()
    with torch.no_grad():
        model.fc.weight[0, 0] = math.nan
    with pytest.raises(PruneError, match="'fc'"):
        blend_(model, 0.3)


# ---------------------------------------------------------------------------------------------- for comparison


def test_delta_is_an_orthogonal_centre_and_nothing_else():
    model = Mixed()
    fc = model.fc.weight.clone()
    done = orthogonalize_(model, "delta", gain=2.0, seed=3)
    assert done.layers == ("conv", "grouped")
    assert done.residual < 1e-5
    centre = model.conv.weight.detach()[:, :, 1, 1].clone()
    torch.testing.assert_close(centre.T @ centre, 4 * torch.eye(3))
    model.conv.weight.data[:, :, 1, 1] = 0
    assert not model.conv.weight.any()
    assert torch.equal(model.fc.weight, fc)


def test_scratch_starts_all_again():
    torch.manual_seed(0)
    model, other = Mixed(), Mixed()
    with torch.no_grad():
        model.norm.running_mean.fill_(3)
        model.norm.weight.fill_(2)
    for net in (model, other):
        orthogonalize_(net, "scratch", gain=1.5, seed=3)
    for name, layer in weight_layers(model).items():
        assert orthogonality_residual(weight_matrices(layer) / 1.5) < 1e-5
        assert not layer.bias.any()
        assert torch.equal(layer.weight, other.get_submodule(name).weight), "the seed decides, not the old weights"
    fresh = nn.BatchNorm2d(6).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.norm.state_dict().items())


@pytest.mark.parametrize("shape", [(4, 10), (10, 4)])
def test_the_approximate_isometry_ends_near_orthogonal(shape):
    matrix = 0.3 * random(*shape)
    result = orthogonal(matrix, "approximate")
    assert orthogonality_residual(result) < 1e-4
    before, after = ((m - orthogonal(matrix, "polar")).norm() for m in (random(*shape, seed=5), result))
    assert after < 0.5 * before, "it starts from the weights"
