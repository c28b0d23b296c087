"""The commands that make a run folder: compress, finetune, and lr where it measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from prunecli.cli.console import errors, reported, show, write
from prunecli.cli.options import Asked, FolderOptions, OutputOptions, takes
from prunecli.errors import UsageError

if TYPE_CHECKING:
    from prunecli.recipe.recipe import Recipe
    from prunecli.run.folder import RunFolder
    from prunecli.values.report import Report

Result = TypeVar("Result")


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


@takes(
    *("recipe", "target", "recover"),
    *("weights", "no_pretrained", "model_arg", "data", "data_dir", "epochs", "device", "seed"),
)
def lr(
    asked: Asked,
    folder: FolderOptions,
    *,
    measure: Annotated[
        bool, typer.Option("--measure", help="fine-tune the cut briefly at five rates, without and with recovery")
    ] = False,
    output: OutputOptions,
) -> None:
    """The recommended fine-tuning LR with its evidence; with --measure, beside what other rates reach."""
    with reported(quiet=output.quiet):
        if not measure:
            _require_no_measurement(asked, folder)
        recipe = asked.recipe(folder)
        if measure:
            _measure(recipe, folder, output)
        elif output.print_config:
            write(recipe.to_yaml())
        else:
            from prunecli.run.learning_rate import lr_of_source
            from prunecli.show import tables

            found = lr_of_source(recipe)
            show(found.model_dump(mode="json"), tables.lr_table(found), as_json=output.as_json)


def _require_no_measurement(asked: Asked, folder: FolderOptions) -> None:
    """Raises UsageError for an option that would change nothing."""
    given = {"--out": folder.out, "--resume": folder.resume, "--force": folder.force}
    given |= {f"--{name}": asked.options.get(name) for name in ("target", "recover")}
    for option, value in given.items():
        if value:
            raise UsageError(f"{option} belongs to a measurement.", hint="Add --measure.")


def _measure(recipe: Recipe, folder: FolderOptions, output: OutputOptions) -> None:
    from prunecli.run import rates
    from prunecli.show import tables

    if output.print_config:
        write(rates.resolved(recipe).recipe.to_yaml())
        return
    found, run = _finished(rates.measure_rates, recipe, folder, output)
    document = {**found.model_dump(mode="json"), "folder": str(run.path), "page": str(run.rates_page)}
    show(document, tables.rates_table(found, page=run.rates_page), as_json=output.as_json)


def _run(job: Callable[..., Report], recipe: Recipe, folder: FolderOptions, output: OutputOptions) -> None:
    from prunecli.show import tables

    report, run = _finished(job, recipe, folder, output)
    table = tables.report_summary(report, page=run.page_file, model=run.weights_file)
    show(report.model_dump(mode="json"), table, as_json=output.as_json)


def _finished(
    job: Callable[..., Result], recipe: Recipe, folder: FolderOptions, output: OutputOptions
) -> tuple[Result, RunFolder]:
    """The result of a job whose progress is shown meanwhile, and the folder that it chose."""
    from prunecli.cli.progress import ProgressDisplay
    from prunecli.run.folder import RunFolder

    opened: list[str] = []

    with ProgressDisplay(errors(), quiet=output.quiet) as display:

        def notify(event: dict[str, Any]) -> None:
            if event.get("event") == "open":
                opened.append(event["folder"])
            display(event)

        result = job(recipe, out=folder.out, resume=folder.resume, force=folder.force, notify=notify)
    return result, RunFolder(path=Path(opened[-1]))


def _show_plan(recipe: Recipe, *, as_json: bool) -> None:
    from prunecli.run import looks
    from prunecli.show import tables

    found = looks.dry_run(recipe)
    planned = found.planned
    table = tables.plan_table(planned.plan, planned.target, found.proof, planned.notes, found.phases)
    show(found.to_mapping(), table, as_json=as_json)
