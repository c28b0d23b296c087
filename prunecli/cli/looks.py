"""The commands that look at a model or a run."""

from __future__ import annotations

from typing import Annotated

import typer

from prunecli.cli.console import reported, show
from prunecli.cli.options import (
    DataDirOpt,
    DataOpt,
    DeviceOpt,
    EpochsOpt,
    FunctionOpt,
    JsonOpt,
    ModelArgsOpt,
    PretrainedOpt,
    RunArg,
    SeedOpt,
    WeightsOpt,
    WordsArg,
    flags_of,
    given,
    resolved_recipe,
)
from prunecli.errors import UsageError


def inspect(
    words: WordsArg = None,
    model: FunctionOpt = None,
    weights: WeightsOpt = None,
    model_arg: ModelArgsOpt = None,
    engine: Annotated[str | None, typer.Option("--graph", help="axes or torch_pruning")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Coupled groups, widths, what may be cut and what may not and why, params, MACs, support status."""
    with reported():
        from prunecli.errors import UnsupportedError
        from prunecli.planning.inspect import inspection
        from prunecli.run.source import load_source
        from prunecli.show import tables

        flags = flags_of(weights=weights, no_pretrained=not weights, model_arg=model_arg)
        resolved = resolved_recipe(words, None, flags | given(prune=given(graph=engine)), model=model)
        found = inspection(load_source(resolved), resolved)
        show(found.to_mapping(), tables.inspection(found), as_json=as_json)
        if not found.supported:
            raise UnsupportedError(f"{resolved.model} is not supported.")


def spectrum(
    words: WordsArg = None,
    model: FunctionOpt = None,
    weights: WeightsOpt = None,
    no_pretrained: PretrainedOpt = False,
    model_arg: ModelArgsOpt = None,
    data: DataOpt = None,
    data_dir: DataDirOpt = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="images for the Jacobian")] = None,
    device: DeviceOpt = None,
    seed: SeedOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Singular values of the input-output Jacobian and of each layer's weights."""
    with reported():
        from prunecli.measure.stage_spectrum import jacobian_spectrum
        from prunecli.measure.weights import weight_spectra
        from prunecli.models.device import resolve_device
        from prunecli.run.source import load_source, open_images
        from prunecli.show import tables

        flags = flags_of(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            device=device, seed=seed,
        )  # fmt: skip
        resolved = resolved_recipe(words, None, flags | given(spectrum=given(samples=samples)), model=model)
        source = load_source(resolved)
        images = open_images(resolved, source)
        found = jacobian_spectrum(resolved, source, source.model, images, resolve_device(resolved.device))
        if found is None:
            raise UsageError(
                f"The Jacobian of {source.ref.name} would take minutes an image.", hint="--samples 1 takes it anyway."
            )
        layers = {name: values.tolist() for name, values in weight_spectra(source.model.cpu()).items()}
        inputs = "training images" if images else "Gaussian noise (no --data)"
        document = {
            "model": source.ref.name,
            "inputs": inputs,
            "jsv": found.summary.model_dump(),
            "jacobian": found.values.tolist(),
            "layers": layers,
        }
        show(document, tables.spectrum_table(source.ref.name, found.summary, layers, inputs), as_json=as_json)


def lr(
    words: WordsArg = None,
    model: FunctionOpt = None,
    weights: WeightsOpt = None,
    no_pretrained: PretrainedOpt = False,
    model_arg: ModelArgsOpt = None,
    data: DataOpt = None,
    data_dir: DataDirOpt = None,
    epochs: EpochsOpt = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """The recommended fine-tuning LR with its evidence."""
    with reported():
        from prunecli.run.learning_rate import lr_of_source
        from prunecli.show import tables

        flags = flags_of(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            epochs=epochs, device=device,
        )  # fmt: skip
        found = lr_of_source(resolved_recipe(words, None, flags, model=model))
        show(found.model_dump(mode="json"), tables.lr_table(found), as_json=as_json)


def evaluate(
    words: WordsArg = None,
    model: FunctionOpt = None,
    weights: WeightsOpt = None,
    no_pretrained: PretrainedOpt = False,
    model_arg: ModelArgsOpt = None,
    data: DataOpt = None,
    data_dir: DataDirOpt = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="only the first N images")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1)] = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Top-1, top-5 and loss on the validation split."""
    with reported():
        from prunecli.measure.accuracy import evaluate as measure_accuracy
        from prunecli.models.device import resolve_device
        from prunecli.recipe.reading import layered
        from prunecli.run.source import load_source, open_images
        from prunecli.show import tables

        flags = flags_of(
            weights=weights,
            no_pretrained=no_pretrained,
            model_arg=model_arg,
            data=data,
            data_dir=data_dir,
            device=device,
        )
        flags = layered(flags, {"data": given(val_limit=limit, batch_size=batch_size)})
        resolved = resolved_recipe(words, None, flags, model=model)
        if resolved.data.name is None:
            raise UsageError("Evaluation needs data.", hint="Give --data.")
        source = load_source(resolved)
        images = open_images(resolved, source)
        assert images is not None
        where = resolve_device(resolved.device)
        found = measure_accuracy(source.model.to(where), images.val_loader(), device=where)
        name = resolved.data.name
        document = {"model": source.ref.name, "data": name, **found.model_dump(mode="json")}
        show(document, tables.accuracy_table(source.ref.name, name, found, source.notes), as_json=as_json)


def verify(run: RunArg, model: FunctionOpt = None, model_arg: ModelArgsOpt = None, as_json: JsonOpt = False) -> None:
    """Reload in a fresh process and compare logits, class count and bytes."""
    with reported():
        from prunecli.models.user_function import Function
        from prunecli.recipe.reading import parse_assignments
        from prunecli.run import verify as verification
        from prunecli.show import tables

        args = parse_assignments(model_arg or [])
        if args and model is None:
            raise UsageError("--model-arg belongs to a function.", hint="Name it with --model.")
        found = verification.verify(run, Function(name=model, args=args) if model is not None else None)
        show(found.model_dump(mode="json"), tables.verify_line(run, found), as_json=as_json)


def models(
    pattern: Annotated[str | None, typer.Argument(metavar="[PATTERN]", help="a name or part of one, * and ?")] = None,
    as_json: JsonOpt = False,
) -> None:
    """The support matrix for timm architectures."""
    with reported():
        from prunecli.show import tables
        from prunecli.values import support_matrix

        matrix = support_matrix.stored_matrix()
        if pattern is None:
            show(matrix.model_dump(mode="json"), tables.matrix_table(matrix), as_json=as_json)
            return
        found = matrix.matching(pattern)
        document = {name: row.model_dump(mode="json") | {"status": row.status} for name, row in found.items()}
        show(document, tables.architectures_table(found), as_json=as_json)
