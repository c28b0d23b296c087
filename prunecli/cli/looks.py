"""The commands that look at a model or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunecli.cli.console import errors, reported, show
from prunecli.cli.options import Asked, FunctionOpt, JsonOpt, ModelArgsOpt, QuietOpt, named_function, takes


@takes("weights", "model_arg", "graph")
def inspect(asked: Asked, as_json: JsonOpt = False) -> None:
    """Coupled groups, widths, what may be cut and what may not and why, params, MACs, support status."""
    with reported():
        from prunecli.errors import UnsupportedError
        from prunecli.run import looks
        from prunecli.show import tables

        recipe = asked.untrained().recipe()
        found = looks.inspect(recipe)
        show(found.to_mapping(), tables.inspection(found), as_json=as_json)
        if not found.supported:
            raise UnsupportedError(f"{recipe.model} is not supported.")


@takes(
    *("recipe", "criterion", "recover", "round_to", "weights", "no_pretrained", "model_arg"),
    *("data", "data_dir", "limit", "device", "seed"),
)
def sensitivity(
    asked: Asked,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder for the report")] = None,
    *,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """What every width of every group costs, and what the whole model keeps at 90, 80 … 30 % of its multiply-adds.

    Nothing is trained. What was measured is kept, for the same command and for compress.
    """
    with reported(quiet=quiet):
        from prunecli.cli.progress import ProgressDisplay
        from prunecli.run.sensitivity import sensitivity as measure
        from prunecli.show import tables

        recipe = asked.recipe()
        with ProgressDisplay(errors(), quiet=quiet) as display:
            found = measure(recipe, out=out, notify=display)
        document = {**found.sensitivity.model_dump(mode="json"), "folder": found.folder and str(found.folder)}
        show(document, tables.sensitivity_tables(found.sensitivity, found.folder), as_json=as_json)


@takes("weights", "no_pretrained", "model_arg", "data", "data_dir", "samples", "device", "seed")
def spectrum(asked: Asked, as_json: JsonOpt = False) -> None:
    """Singular values of the input-output Jacobian and of each layer's weights."""
    with reported():
        from prunecli.run import looks
        from prunecli.show import tables

        found = looks.spectra(asked.recipe())
        table = tables.spectrum_table(found.model, found.jacobian.summary, found.layers, found.inputs)
        show(found.to_mapping(), table, as_json=as_json)


@takes("weights", "no_pretrained", "model_arg", "data", "data_dir", "limit", "batch_size", "device")
def evaluate(asked: Asked, as_json: JsonOpt = False) -> None:
    """Top-1, top-5 and loss on the validation split."""
    with reported():
        from prunecli.run import looks
        from prunecli.show import tables

        found = looks.evaluate(asked.recipe())
        table = tables.accuracy_table(found.model, found.data, found.accuracy, found.notes)
        show(found.to_mapping(), table, as_json=as_json)


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    model: FunctionOpt = None,
    model_arg: ModelArgsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Reload in a fresh process and compare logits, class count and bytes."""
    with reported():
        from prunecli.run import verify as verification
        from prunecli.show import tables

        found = verification.verify(run, named_function(model, model_arg))
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
        document = {name: row.to_mapping() for name, row in found.items()}
        show(document, tables.architectures_table(found), as_json=as_json)
