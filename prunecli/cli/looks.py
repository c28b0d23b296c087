"""The commands that look at a model or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunecli.cli.console import reported, show
from prunecli.cli.options import Asked, FunctionOpt, JsonOpt, ModelArgsOpt, named_function, takes


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
