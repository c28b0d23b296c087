"""Looks at a model that a recipe names: nothing is written, and nothing is left changed.

The learning rate that ``prunecli lr`` shows is made in ``learning_rate``, the comparison of ``verify`` in ``verify``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunecli.errors import UsageError
from prunecli.measure import accuracy as measure_accuracy
from prunecli.measure.jacobian import JacobianSpectrum
from prunecli.measure.stage_spectrum import jacobian_spectrum
from prunecli.measure.weights import weight_spectra
from prunecli.methods import phase
from prunecli.models.device import resolve_device
from prunecli.planning.inspect import inspection
from prunecli.planning.make import Planned
from prunecli.recipe.recipe import Recipe
from prunecli.run.plan_and_prove import plan_and_prove
from prunecli.run.source import load_source, open_calibration, open_images
from prunecli.values.inspection import Inspection
from prunecli.values.report import Accuracy, PhaseCost

# ---------------------------------------------------------------------------------------------- what can be cut


def inspect(recipe: Recipe) -> Inspection:
    """The coupled groups of a model, and whether half of every group can be cut correctly.

    Raises as ``load_source``, and UnsupportedError where there is no graph at all.
    """
    return inspection(load_source(recipe), recipe)


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """A plan and what it would cost.

    Attributes:
        planned: Plan with its target and notes.
        proof: Result of the equivalence check as a sentence.
        phases: Cost of each training phase before the cut; empty without data.
    """

    planned: Planned
    proof: str
    phases: tuple[PhaseCost, ...]

    def to_mapping(self) -> dict[str, Any]:
        """A JSON document."""
        return {
            "plan": self.planned.plan.model_dump(mode="json"),
            "target": self.planned.target.model_dump(mode="json"),
            "proof": self.proof,
            "notes": list(self.planned.notes),
            "phases": [cost.model_dump(mode="json") for cost in self.phases],
        }


def dry_run(recipe: Recipe) -> DryRun:
    """Plan and prove a cut, and stop there. Raises as ``load_source``, ``open_images`` and ``plan_and_prove``."""
    source = load_source(recipe)
    images = open_images(recipe, source)
    planned, proof = plan_and_prove(source, recipe, images, calibration=open_calibration(recipe, source, images))
    phases = phase.costs_of(recipe, images.steps_per_epoch) if images else ()
    return DryRun(planned=planned, proof=proof, phases=phases)


# ---------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Singular values of one model.

    Attributes:
        model: Name of the model.
        inputs: Images that the Jacobian was taken at, in words.
        jacobian: Spectrum of the input-output Jacobian.
        layers: Singular values of each layer's weight matrix, largest first, by layer.
    """

    model: str
    inputs: str
    jacobian: JacobianSpectrum
    layers: Mapping[str, list[float]]

    def to_mapping(self) -> dict[str, Any]:
        """A JSON document."""
        return {
            "model": self.model,
            "inputs": self.inputs,
            "jsv": self.jacobian.summary.model_dump(),
            "jacobian": self.jacobian.values.tolist(),
            "layers": dict(self.layers),
        }


def spectra(recipe: Recipe) -> Spectra:
    """Singular values of the Jacobian, at training images or without data at Gaussian noise, and of the weights.

    Raises as ``load_source`` and ``open_images``, and UsageError where the Jacobian would take minutes an image.
    """
    source = load_source(recipe)
    images = open_images(recipe, source)
    jacobian = jacobian_spectrum(recipe, source, source.model, images, resolve_device(recipe.device))
    if jacobian is None:
        raise UsageError(
            f"The Jacobian of {source.ref.name} would take minutes an image.", hint="--samples 1 takes it anyway."
        )
    return Spectra(
        model=source.ref.name,
        inputs="training images" if images else "Gaussian noise (no --data)",
        jacobian=jacobian,
        layers={name: values.tolist() for name, values in weight_spectra(source.model.cpu()).items()},
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy of one model on one data set.

    Attributes:
        model: Name of the model.
        data: Name or path of the data set.
        accuracy: Top-1, top-5 and loss on the validation images.
        notes: Remarks on where the weights come from.
    """

    model: str
    data: str
    accuracy: Accuracy
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """A JSON document."""
        return {"model": self.model, "data": self.data, **self.accuracy.model_dump(mode="json")}


def evaluate(recipe: Recipe) -> Evaluation:
    """Accuracy on the validation split. Raises as ``load_source`` and ``open_images``, and UsageError without data."""
    if recipe.data.name is None:
        raise UsageError("Evaluation needs data.", hint="Give --data.")
    source = load_source(recipe)
    images = open_images(recipe, source)
    assert images is not None
    device = resolve_device(recipe.device)
    accuracy = measure_accuracy.evaluate(source.model, images.val_loader(), device=device)
    return Evaluation(model=source.ref.name, data=recipe.data.name, accuracy=accuracy, notes=source.notes)
