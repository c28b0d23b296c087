"""The commands that make a run: compress, finetune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecli.cli.console import errors, reported, show, write
from prunecli.cli.options import (
    DataDirOpt,
    DataOpt,
    DeviceOpt,
    EpochsOpt,
    ForceOpt,
    FunctionOpt,
    JsonOpt,
    LrOpt,
    ModelArgsOpt,
    OutOpt,
    PretrainedOpt,
    PrintConfigOpt,
    QuietOpt,
    RecipeOpt,
    ResumeOpt,
    SeedOpt,
    WeightsOpt,
    WordsArg,
    flags_of,
    given,
    recovery,
    resolved_recipe,
)

if TYPE_CHECKING:
    from prunecli.recipe.recipe import Recipe


# ---------------------------------------------------------------------------------------------- commands


def compress(
    words: WordsArg = None,
    model: FunctionOpt = None,
    recipe: RecipeOpt = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="METRIC=VALUE", help="macs=50%, speedup=2 …")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="oneshot, tpp, greg, kernorth, orthconv, abp, epsd")
    ] = None,
    criterion: Annotated[str | None, typer.Option("--criterion", help="l1, l2, group_norm, bn_scale, lamp …")] = None,
    recover: Annotated[str | None, typer.Option("--recover", help="auto, none, or steps: lstsq,bn")] = None,
    round_to: Annotated[int | None, typer.Option("--round-to", help="widths are multiples of this; 1 is off")] = None,
    weights: WeightsOpt = None,
    no_pretrained: PretrainedOpt = False,
    model_arg: ModelArgsOpt = None,
    data: DataOpt = None,
    data_dir: DataDirOpt = None,
    epochs: EpochsOpt = None,
    lr: LrOpt = None,
    device: DeviceOpt = None,
    seed: SeedOpt = None,
    out: OutOpt = None,
    resume: ResumeOpt = False,
    force: ForceOpt = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="stop at the plan and show what it would cost")] = False,
    print_config: PrintConfigOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """The main job: load, plan, cut, recover isometry, fine-tune, verify, export, report."""
    with reported(quiet=quiet):
        flags = flags_of(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            epochs=epochs, lr=lr, device=device, seed=seed,
        )  # fmt: skip
        prune = {"criterion": criterion, "round_to": round_to}
        flags |= given(target=target, method=method, prune=given(**prune), recover=recovery(recover))
        resolved = resolved_recipe(words, recipe, flags, model=model, resume=resume, out=out)
        if print_config:
            write(resolved.to_yaml())
        elif dry_run:
            _show_plan(resolved, as_json=as_json)
        else:
            from prunecli.run import pipeline

            _run_job(pipeline.compress, resolved, out, resume, force, as_json, quiet)


def finetune(
    words: WordsArg = None,
    model: FunctionOpt = None,
    recipe: RecipeOpt = None,
    weights: WeightsOpt = None,
    no_pretrained: PretrainedOpt = False,
    model_arg: ModelArgsOpt = None,
    data: DataOpt = None,
    data_dir: DataDirOpt = None,
    epochs: EpochsOpt = None,
    lr: LrOpt = None,
    device: DeviceOpt = None,
    seed: SeedOpt = None,
    out: OutOpt = None,
    resume: ResumeOpt = False,
    force: ForceOpt = False,
    print_config: PrintConfigOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Fine-tuning alone, of a model or a run."""
    with reported(quiet=quiet):
        flags = flags_of(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            epochs=epochs, lr=lr, device=device, seed=seed,
        )  # fmt: skip
        resolved = resolved_recipe(words, recipe, flags, model=model, resume=resume, out=out)
        if print_config:
            write(resolved.to_yaml())
            return
        from prunecli.run import pipeline

        _run_job(pipeline.finetune, resolved, out, resume, force, as_json, quiet)


# ---------------------------------------------------------------------------------------------- running and printing


def _run_job(
    job: Callable[..., Any], recipe: Recipe, out: Path | None, resume: bool, force: bool, as_json: bool, quiet: bool
) -> None:
    from prunecli.cli.progress import Narrator
    from prunecli.show import tables

    opened: list[str] = []

    with Narrator(errors(), quiet=quiet) as narrator:

        def notify(event: dict[str, Any]) -> None:
            if event.get("event") == "open":
                opened.append(event["folder"])
            narrator(event)

        report = job(recipe, out=out, resume=resume, force=force, notify=notify)
    show(report.model_dump(mode="json"), tables.report_summary(report, Path(opened[-1])), as_json=as_json)


def _show_plan(recipe: Recipe, *, as_json: bool) -> None:
    from prunecli.methods import phase
    from prunecli.run import plan_and_prove
    from prunecli.run.source import load_source, open_images
    from prunecli.show import tables

    source = load_source(recipe)
    images = open_images(recipe, source)
    planned, proof = plan_and_prove.plan_and_prove(source, recipe, images)
    phases = phase.costs_of(recipe, images.steps_per_epoch) if images else ()
    document = {
        "plan": planned.plan.model_dump(mode="json"),
        "target": planned.target.model_dump(mode="json"),
        "proof": proof,
        "notes": list(planned.notes),
        "phases": [cost.model_dump(mode="json") for cost in phases],
    }
    show(document, tables.plan_table(planned.plan, planned.target, proof, planned.notes, phases), as_json=as_json)
