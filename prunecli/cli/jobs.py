"""The commands that make a run: compress, finetune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecli.cli.console import errors, reported, show, write
from prunecli.cli.options import Asked, FolderOptions, OutputOptions, takes

if TYPE_CHECKING:
    from prunecli.recipe.recipe import Recipe
    from prunecli.values.report import Report


@takes(
    *("recipe", "target", "method", "criterion", "recover", "round_to"),
    *("weights", "no_pretrained", "model_arg", "data", "data_dir", "epochs", "lr", "device", "seed"),
)
def compress(
    asked: Asked,
    folder: FolderOptions,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="stop at the plan and show what it would cost")] = False,
    output: OutputOptions,
) -> None:
    """The main job: load, plan, cut, recover isometry, fine-tune, verify, export, report."""
    with reported(quiet=output.quiet):
        recipe = asked.recipe(folder)
        if output.print_config:
            write(recipe.to_yaml())
        elif dry_run:
            _show_plan(recipe, as_json=output.as_json)
        else:
            from prunecli.run import pipeline

            _run(pipeline.compress, recipe, folder, output)


@takes("recipe", "weights", "no_pretrained", "model_arg", "data", "data_dir", "epochs", "lr", "device", "seed")
def finetune(asked: Asked, folder: FolderOptions, output: OutputOptions) -> None:
    """Fine-tuning alone, of a model or a run."""
    with reported(quiet=output.quiet):
        recipe = asked.recipe(folder)
        if output.print_config:
            write(recipe.to_yaml())
        else:
            from prunecli.run import pipeline

            _run(pipeline.finetune, recipe, folder, output)


def _run(job: Callable[..., Report], recipe: Recipe, folder: FolderOptions, output: OutputOptions) -> None:
    from prunecli.cli.progress import ProgressDisplay
    from prunecli.run.folder import RunFolder
    from prunecli.show import tables

    opened: list[str] = []

    with ProgressDisplay(errors(), quiet=output.quiet) as display:

        def notify(event: dict[str, Any]) -> None:
            if event.get("event") == "open":
                opened.append(event["folder"])
            display(event)

        report = job(recipe, out=folder.out, resume=folder.resume, force=folder.force, notify=notify)
    run = RunFolder(path=Path(opened[-1]))
    table = tables.report_summary(report, page=run.page_file, model=run.weights_file)
    show(report.model_dump(mode="json"), table, as_json=output.as_json)


def _show_plan(recipe: Recipe, *, as_json: bool) -> None:
    from prunecli.run import looks
    from prunecli.show import tables

    found = looks.dry_run(recipe)
    planned = found.planned
    table = tables.plan_table(planned.plan, planned.target, found.proof, planned.notes, found.phases)
    show(found.to_mapping(), table, as_json=as_json)
