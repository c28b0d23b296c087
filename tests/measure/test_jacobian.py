"""Jacobian and weight spectra against the plain loop, and against products of matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from prunecli.errors import PruneError, UnsupportedError
from prunecli.measure import jacobian
from prunecli.measure.jacobian import jacobian_spectrum, summarise
from prunecli.measure.weights import singular_values, weight_spectra
from toys.spectrum_net import Net, random


def by_loop(model: nn.Module, images: Tensor) -> Tensor:
    """One backward pass a sample and class, one SVD a sample."""
    values = []
    for image in images:
        inputs = image.unsqueeze(0).clone().requires_grad_()
        logits = model(inputs)[0]
        rows = [torch.autograd.grad(logit, inputs, retain_graph=True)[0].flatten() for logit in logits]
        values.append(torch.linalg.svdvals(torch.stack(rows)))
    return torch.stack(values)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net(7)


@pytest.mark.parametrize("classes", [1, 7, 12, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loop_over_classes_and_samples(classes, dtype):
    torch.manual_seed(0)
    model = Net(classes).to(dtype).eval()
    images = random(3, 3, 8, 8).to(dtype)
    values = jacobian_spectrum(model, images, chunk=8).values
    assert values.shape == (3, classes)
    expected = by_loop(model, images).double()
    tolerance = 50 * torch.finfo(dtype).eps * float(expected.max())
    torch.testing.assert_close(values, expected, atol=tolerance, rtol=0)


def test_chunk_changes_nothing_but_speed(net):
    images = random(5, 3, 8, 8)
    values = [jacobian_spectrum(net, images, chunk=chunk).values for chunk in (1, 3, 64)]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], atol=1e-6, rtol=0)


def test_few_jacobians_at_a_time_where_memory_is_short(net, monkeypatch):
    images = random(4, 3, 8, 8)
    at_once = jacobian_spectrum(net, images).values
    monkeypatch.setattr(jacobian, "_HELD_ELEMENTS", 1)
    torch.testing.assert_close(jacobian_spectrum(net, images).values, at_once, atol=1e-6, rtol=0)


def test_a_linear_net_has_the_spectrum_of_the_product_of_its_weights():
    torch.manual_seed(0)
    first, second = nn.Linear(48, 9), nn.Linear(9, 5)
    model = nn.Sequential(nn.Flatten(), first, second).double()
    expected = torch.linalg.svdvals(second.weight @ first.weight).detach()
    values = jacobian_spectrum(model, random(2, 3, 4, 4).double()).values
    torch.testing.assert_close(values, expected.expand(2, -1))


def test_more_classes_than_pixels_and_than_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 9)).double()
    values = jacobian_spectrum(model, random(2, 1, 2, 2).double()).values
    expected = torch.linalg.svdvals(model[2].weight @ model[1].weight)[:4].detach()
    torch.testing.assert_close(values, expected.expand(2, -1))
    assert (values[:, 3] < 1e-15).all()


def test_the_model_is_left_as_it_was(net):
    net.train()
    net.bn.eval()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [child.training for child in net.modules()]
    with torch.no_grad():
        jacobian_spectrum(net, random(2, 3, 8, 8))
    assert [child.training for child in net.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert all(p.requires_grad and (p is net.head.weight or p.grad is None) for p in net.parameters())


class Unbatched(torch.autograd.Function):
    """Identity whose backward reads a number, which vmap refuses."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1.0 if math.isfinite(gradient.sum().item()) else 0.0)


def test_operators_without_batched_backward_take_the_slow_way_to_the_same_values(net):
    images = random(3, 3, 8, 8)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(Unbatched.apply(x))

    for chunk in (1, 4, 64):
        slow = jacobian_spectrum(Wrapped(), images, chunk=chunk).values
        torch.testing.assert_close(slow, jacobian_spectrum(net, images).values, atol=1e-6, rtol=0)


def test_errors_in_the_model_are_not_taken_for_missing_batching():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ torch.ones(5, 5)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jacobian_spectrum(Broken(), random(2, 1, 2, 2))


def test_what_has_no_per_sample_jacobian_is_refused():
    images = random(2, 3, 4, 4)
    coupled = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(UnsupportedError, match="whole batch"):
        jacobian_spectrum(coupled, images)
    with pytest.raises(UnsupportedError, match=r"returns shape \(1, 3, 4, 4\)"):
        jacobian_spectrum(nn.Identity(), images)

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), 2)

    with pytest.raises(UnsupportedError, match="do not depend"):
        jacobian_spectrum(Constant(), images)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    nn.init.constant_(broken[1].weight, math.nan)
    with pytest.raises(PruneError, match="NaN"):
        jacobian_spectrum(broken, images)
    with pytest.raises(ValueError, match="at least one image"):
        jacobian_spectrum(broken, images[:0])
    with pytest.raises(ValueError, match="chunk"):
        jacobian_spectrum(broken, images, chunk=0)


def test_summary_by_hand():
    found = summarise(torch.tensor([[4.0, 2.0], [6.0, 1.0], [3.0, 0.0]]))
    assert (found.min, found.max, found.samples) == (0.0, 6.0, 3)
    assert found.mean == pytest.approx(16 / 6)
    assert found.std == pytest.approx(math.sqrt(66 / 6 - (16 / 6) ** 2))
    assert found.condition == pytest.approx((2 + 6) / 2)  # 3 / 0 is left out
    assert summarise(torch.zeros(1, 2)).condition is None


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (3, 6, 6), (1, 1)])
def test_singular_values_of_narrow_types_agree_with_an_svd(shape):
    matrix = random(*shape)
    expected = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(singular_values(matrix), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(singular_values(matrix.bfloat16()), expected, atol=0.1, rtol=0)


def test_small_singular_values_survive_the_gram_matrix():
    U, _, Vh = torch.linalg.svd(random(4, 30).double(), full_matrices=False)
    wanted = torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=torch.float64)
    found = singular_values((U * wanted @ Vh).float())
    torch.testing.assert_close(found, wanted, atol=2e-7, rtol=0)


def test_weight_spectra_of_grouped_and_plain_layers():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=3), nn.Linear(5, 3))
    found = weight_spectra(model)
    assert list(found) == ["0", "2", "3"]
    torch.testing.assert_close(found["0"], torch.linalg.svdvals(model[0].weight.detach().double().reshape(6, 36)))
    block_diagonal = torch.block_diag(*model[2].weight.detach().double().reshape(3, 2, 18))
    torch.testing.assert_close(found["2"], torch.linalg.svdvals(block_diagonal), atol=1e-6, rtol=0)
    torch.testing.assert_close(found["3"], torch.linalg.svdvals(model[3].weight.detach().double()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(net):
    images = random(3, 3, 8, 8)
    expected = jacobian_spectrum(net, images).values
    on_gpu = jacobian_spectrum(net.cuda(), images.cuda()).values
    assert on_gpu.device.type == "cpu"
    torch.testing.assert_close(on_gpu, expected, atol=1e-4, rtol=0)
