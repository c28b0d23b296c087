"""The Jacobian spectrum of a stage of a job, within a budget of multiply-adds."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn

from prunecli.data.images import Images
from prunecli.measure import jacobian
from prunecli.models.build import InputSpec
from prunecli.models.source import Source
from prunecli.recipe.recipe import Recipe

# Exact Jacobians cost K backward passes an image, a Lanczos step two; `auto` takes as many images as this many
# multiply-adds buy (about a minute on two CPU cores), and Lanczos where they buy no exact one.
_JACOBIAN_MACS: Final = {"cpu": 1.5e12, "cuda": 1.5e14}
_FEWEST_EXACT: Final = 4  # one whole Jacobian of 1000 classes costs more than estimates of many, and shows one image
_JACOBIAN_IMAGES: Final = {"exact": 16, "lanczos": 4}


def jacobian_effort(recipe: Recipe, source: Source, device: torch.device) -> tuple[Literal["exact", "lanczos"], int]:
    """The method of the Jacobian spectrum and the number of images, 0 where even one would take too long.

    Args:
        recipe: recipe whose section ``spectrum`` counts; ``auto`` is resolved by the budget.
        source: dense model, whose cost and number of classes decide.
        device: device of the measurement.
    """
    settings, passes = recipe.spectrum, {"exact": 3 * source.ref.num_classes, "lanczos": 2 * recipe.spectrum.steps}
    bought = {how: int(_JACOBIAN_MACS[device.type] / (n * source.cost.macs or 1)) for how, n in passes.items()}
    wanted = _FEWEST_EXACT if settings.samples == "auto" else settings.samples
    how = settings.method
    if how == "auto":
        how = "exact" if bought["exact"] >= wanted else "lanczos"
    if settings.samples != "auto":
        return how, settings.samples
    return how, min(_JACOBIAN_IMAGES[how], bought[how]) if source.ref.num_classes else 0


def jacobian_spectrum(
    recipe: Recipe, source: Source, model: nn.Module, images: Images | None, device: torch.device
) -> jacobian.JacobianSpectrum | None:
    """The Jacobian spectrum of ``model``; ``None`` where it is off or would take too long.

    Args:
        recipe: recipe whose section ``spectrum`` and seed count.
        source: dense model, which decides on the effort for all stages alike.
        model: the model of this stage; moved to ``device``.
        images: images of the job; ``None`` for Gaussian noise.
        device: device of the measurement.
    """
    how, count = jacobian_effort(recipe, source, device)
    if count == 0:
        return None
    batch = spectrum_batch(images, source.spec, count, seed=recipe.seed).to(device)
    settings = recipe.spectrum
    if how == "exact":
        return jacobian.jacobian_spectrum(model.to(device), batch, chunk=settings.chunk)
    return jacobian.jacobian_estimate(model.to(device), batch, steps=settings.steps, seed=recipe.seed)


def spectrum_batch(images: Images | None, spec: InputSpec, count: int, *, seed: int) -> Tensor:
    """Images ``[count, C, H, W]`` for the Jacobian: training images in evaluation preprocessing, or Gaussian noise.

    Args:
        images: images of the job; ``None`` for noise.
        spec: images that the model expects.
        count: number of images.
        seed: seed of the noise.
    """
    if images is not None:
        return images.calibration(count)[0]
    return torch.randn(count, *spec.size, generator=torch.Generator().manual_seed(seed))
