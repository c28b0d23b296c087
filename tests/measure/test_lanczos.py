"""Estimated spectra against maps whose singular values are known, and against whole Jacobians."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.measure.jacobian import jacobian_estimate, jacobian_spectrum
from prunecli.measure.lanczos import Density, spectral_density
from toys.spectrum_net import Net, random


def density_of(values: Tensor, *, samples: int, steps: int, seed: int, columns: int = 80) -> Density:
    """Of maps ``[N, columns]`` with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)

    def rotation(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(samples, rows, rows, dtype=torch.float64, generator=generator)).Q

    J = rotation(size) @ torch.diag(values.double()).expand(samples, -1, -1) @ rotation(columns)[:, :size]
    start = torch.randn(samples, size, dtype=torch.float64, generator=generator)
    return spectral_density(
        lambda w: (J @ w[..., None])[..., 0], lambda u: (J.mT @ u[..., None])[..., 0], start, steps=steps
    )


SPECTRA = {
    "even": torch.linspace(0.1, 2.0, 60),
    "decades": torch.logspace(-3, 1, 60),
    "few large": torch.cat([torch.tensor([30.0, 20.0, 12.0]), torch.linspace(1.0, 0.2, 57)]),
    "half are zero": torch.cat([torch.linspace(2.0, 1.0, 30), torch.zeros(30)]),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_stated_errors_cover_the_truth_as_often_as_they_say(values):
    density = density_of(values, samples=400, steps=12, seed=0)
    off = (density.mean - values.double().mean()).abs() / density.mean_error
    assert (off <= 1).double().mean() == pytest.approx(0.683, abs=0.08)
    assert (off <= 2).double().mean() >= 0.87
    assert off.mean() > 0.5  # the errors are not merely large
    torch.testing.assert_close(density.weights.sum(dim=1), torch.ones(400, dtype=torch.float64))
    largest = float(values.max())
    assert (density.nodes[:, 0] <= largest * (1 + 1e-9)).all()
    assert density.nodes[:, 0].median() > 0.98 * largest
    assert (density.nodes[:, -1] >= values.min() - 1e-9).all()


def test_all_steps_give_all_singular_values():
    values = SPECTRA["decades"].double().flip(0)
    density = density_of(values, samples=3, steps=100, seed=1)
    torch.testing.assert_close(density.nodes, values.expand(3, -1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(density.mean, values.mean().expand(3))
    assert (density.mean_error == 0).all()
    torch.testing.assert_close(density.quantiles(60), values.expand(3, -1), atol=1e-9, rtol=1e-6)


def test_a_map_with_one_repeated_value():
    density = density_of(torch.full((50,), 0.7), samples=4, steps=8, seed=2)
    torch.testing.assert_close(density.mean, torch.full((4,), 0.7).double())
    torch.testing.assert_close(density.quantiles(5), torch.full((4, 5), 0.7).double())


def test_a_map_of_low_rank_and_one_that_is_zero():
    values = torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(57)])
    density = density_of(values, samples=200, steps=20, seed=4)
    torch.testing.assert_close(density.mean, torch.full((200,), 0.1).double())  # all three are found, the rest is 0
    torch.testing.assert_close(density.nodes[:, 0], torch.full((200,), 3.0).double())
    zero = density_of(torch.zeros(60), samples=2, steps=5, seed=0)
    assert (zero.mean == 0).all()
    assert (zero.mean_error == 0).all()
    assert (zero.quantiles(4) < 1e-300).all()


def test_quantiles_are_spread_as_the_spectrum_is():
    values = SPECTRA["decades"].double().flip(0)
    found = density_of(values, samples=50, steps=20, seed=3).quantiles(60).log10().mean(dim=0)
    torch.testing.assert_close(found[:36], values[:36].log10(), atol=0.35, rtol=0)  # below, they count at the last node
    assert (found.diff() <= 1e-9).all()


MODELS = {
    "more logits than features": lambda: Net(30),
    "fewer": lambda: Net(7),
    "resnet": lambda: timm.create_model("test_resnet", num_classes=40),
    "vit": lambda: timm.create_model("test_vit", num_classes=60, img_size=64),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_as_many_steps_as_logits_give_the_exact_spectrum(make):
    torch.manual_seed(0)
    model = make().double()
    images = random(2, 3, 64, 64).double()
    exact, found = jacobian_spectrum(model, images), jacobian_estimate(model, images, steps=100)
    torch.testing.assert_close(found.values, exact.values, atol=1e-6 * float(exact.values.max()), rtol=1e-3)
    for name in ("mean", "std", "min", "max"):
        assert getattr(found.summary, name) == pytest.approx(getattr(exact.summary, name), rel=1e-6, abs=1e-7)
    assert found.summary.samples == 2


def test_a_few_steps_lie_within_their_stated_error():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=80)
    images = random(4, 3, 64, 64)
    exact = jacobian_spectrum(model, images).summary
    for seed in range(5):
        found = jacobian_estimate(model, images, steps=20, seed=seed).summary
        assert found.method == "lanczos"
        assert 0 < found.mean_error < 0.1 * exact.mean
        assert abs(found.mean - exact.mean) < 4 * found.mean_error
        assert found.max == pytest.approx(exact.max, rel=1e-3)
        assert found.min >= exact.min * (1 - 1e-3)
        assert found.condition <= exact.condition * (1 + 1e-3)


def test_model_flags_gradients_and_generator_are_left_alone():
    torch.manual_seed(0)
    model = Net(7).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (jacobian_estimate(model, random(2, 3, 8, 8), steps=3, seed=5) for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


class Twice(torch.autograd.Function):
    """Differentiable twice, without a forward derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class Once(Twice):
    """Differentiable once."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Twice.backward))


@pytest.mark.parametrize("narrow", [True, False])
def test_an_operator_without_a_forward_derivative_gives_the_same_spectrum(narrow: bool):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 5), nn.Linear(5, 9 if narrow else 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Twice.apply(self.first(x.flatten(1))))

    torch.manual_seed(0)
    model, images = Odd().double(), random(2, 3, 2, 2).double()
    found = jacobian_estimate(model, images, steps=9).values
    torch.testing.assert_close(found, jacobian_spectrum(model, images).values, atol=1e-9, rtol=1e-6)


def test_an_operator_without_a_second_derivative_is_one_sentence():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(Once.apply(x.flatten(1)))

    with pytest.raises(UnsupportedError, match="cannot be estimated"):
        jacobian_estimate(Odd(), random(2, 3, 2, 2))


def test_no_images_and_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        jacobian_estimate(Net(3), torch.zeros(0, 3, 8, 8))
    with pytest.raises(ValueError, match="steps"):
        jacobian_estimate(Net(3), torch.zeros(1, 3, 8, 8), steps=0)
