"""What a recipe names, loaded: the model and the images.

Nothing here writes a file.
"""

from __future__ import annotations

from pathlib import Path

from prunecli.data import calibration
from prunecli.data.images import Images, open_data
from prunecli.errors import PruneError, UsageError
from prunecli.measure.calibration import Calibration
from prunecli.measure.cost import measure
from prunecli.models.build import input_spec
from prunecli.models.device import resolve_device
from prunecli.models.load import load_model
from prunecli.models.source import Source
from prunecli.models.user_function import Function
from prunecli.recipe.recipe import Recipe
from prunecli.run.export import load_exported
from prunecli.run.folder import RunFolder, is_run
from prunecli.training.probe import HELD_OUT


def run_of(recipe: Recipe) -> RunFolder | None:
    """The run folder whose model a recipe starts from; ``None`` where it names a model of another kind."""
    if recipe.model is None:
        return None
    folder = RunFolder(path=Path(recipe.model.removeprefix("local-dir:")))
    return folder if is_run(folder.path) or folder.begun else None


def load_source(recipe: Recipe) -> Source:
    """Load the model that a recipe names: a timm name, a hub or local folder, a function, or a run folder.

    Raises UsageError (no such model) or PruneError (broken weights).
    """
    if recipe.model is None:
        raise UsageError(
            "No model was given.", hint="Name a timm model, hf-hub:…, local-dir:…, package.module:function or a run."
        )
    if run := run_of(recipe):
        path = run.path
        function = Function(name=recipe.function, args=recipe.model_args) if recipe.function else None
        if recipe.weights or recipe.data.preprocessing or (recipe.model_args and not function):
            raise UsageError(f"{path} is a run folder: it brings its own weights, arguments and preprocessing.")
        model, exported = load_exported(path, function)
        ref, digest = exported.model, exported.weights_sha256
        notes: tuple[str, ...] = (f"The base is the pruned model of {path}.",)
    elif recipe.function:
        raise UsageError(
            f"{recipe.model} is no run folder, so {recipe.function!r} cannot have made it.", hint="Name one."
        )
    else:
        loaded = load_model(
            recipe.model,
            weights=recipe.weights,
            pretrained=recipe.pretrained,
            model_args=recipe.model_args,
            preprocessing=recipe.data.preprocessing,
            seed=recipe.seed,
        )
        model, ref, digest, notes = loaded.model, loaded.ref, loaded.digest, loaded.notes
    broken = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    broken += [name for name, tensor in model.named_buffers() if bool(tensor.isnan().any())]  # a mask may be infinite
    if broken:
        raise PruneError(f"The weights of {recipe.weights or recipe.model} are not finite, first in {broken[0]}.")
    spec = input_spec(ref)
    return Source(model=model, ref=ref, spec=spec, digest=digest, cost=measure(model, spec.size), notes=tuple(notes))


def open_images(recipe: Recipe, source: Source) -> Images | None:
    """The data of a recipe, or None where it names none. Raises UsageError, PruneError."""
    if recipe.data.name is None:
        return None
    if source.ref.num_classes == 0:
        raise UsageError(
            f"Model {recipe.model!r} has no classifier, so data cannot say how good it is.",
            hint="Give --model-arg num_classes=N to put a new one on it, or no --data.",
        )
    return open_data(recipe.data, source.spec, num_classes=source.ref.num_classes, seed=recipe.seed)


def open_calibration(recipe: Recipe, source: Source, images: Images | None) -> Calibration | None:
    """The unlabelled images of a recipe: those of ``data.calibration``, else the data's own; ``None`` without both.

    Raises UsageError, PruneError.
    """
    settings = recipe.data
    from_folder = settings.calibration is not None
    found = calibration.open_calibration(settings, source.spec, seed=recipe.seed) if from_folder else images
    if found is None:
        return None
    return Calibration(
        found,
        images=settings.calibration_images,
        held_out=settings.held_out_images,
        judged=0 if from_folder else HELD_OUT,
        device=resolve_device(recipe.device),
    )
