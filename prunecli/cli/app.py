"""The command line: parse, call, print, exit. Heavy imports happen inside commands, so that --help answers at once."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecli import __version__
from prunecli.cli.console import errors, reported, settle_process, show, tell, write
from prunecli.errors import UsageError

if TYPE_CHECKING:
    from prunecli.recipe.recipe import Recipe


app = typer.Typer(
    name="prunecli",
    help="Make pretrained vision models smaller and faster: prune, recover, fine-tune, verify, export.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="Packaged recipes: list, show, copy, validate.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes, name="recipes")

_DEBUG = "--debug"
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*=")

WordsArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [KEY=VALUE]...", help="timm name, hf-hub:owner/name, local-dir:PATH, module:function or a run"
    ),
]
FunctionOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="a function of yours that makes the model (of MODEL, if that is a run)",
    ),
]
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]
WeightsOpt = Annotated[str | None, typer.Option("--weights", metavar="FILE", help=".safetensors, .pth, .bin")]
PretrainedOpt = Annotated[bool, typer.Option("--no-pretrained", help="start from random weights")]
ModelArgsOpt = Annotated[
    list[str] | None, typer.Option("--model-arg", metavar="K=V", help="goes to timm, or to your function")
]
DataOpt = Annotated[str | None, typer.Option("--data", metavar="PATH|NAME", help="ImageFolder, timm data set, digits")]
DataDirOpt = Annotated[str | None, typer.Option("--data-dir", metavar="DIR", help="where a named data set lies")]
DeviceOpt = Annotated[str | None, typer.Option("--device", metavar="auto|cpu|cuda[:N]")]
SeedOpt = Annotated[int | None, typer.Option("--seed")]
JsonOpt = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else there")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
EpochsOpt = Annotated[int | None, typer.Option("--epochs", help="fine-tuning budget; 0 switches it off")]
LrOpt = Annotated[str | None, typer.Option("--lr", metavar="auto|FLOAT")]
RecipeOpt = Annotated[str | None, typer.Option("--recipe", metavar="FILE|NAME|-")]
OutOpt = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run folder; default runs/NAME-N")]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="continue an interrupted run")]
ForceOpt = Annotated[bool, typer.Option("--force", help="replace a run that is there")]
PrintConfigOpt = Annotated[bool, typer.Option("--print-config", help="show the resolved recipe and stop")]


# ---------------------------------------------------------------------------------------------- commands


@app.command()
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
        flags = _flags(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            epochs=epochs, lr=lr, device=device, seed=seed,
        )  # fmt: skip
        prune = {"criterion": criterion, "round_to": round_to}
        flags |= _given(target=target, method=method, prune=_given(**prune), recover=_recovery(recover))
        resolved = _resolved(words, recipe, flags, model=model, resume=resume, out=out)
        if print_config:
            write(resolved.to_yaml())
        elif dry_run:
            _show_plan(resolved, as_json=as_json)
        else:
            from prunecli.run import pipeline

            _run_job(pipeline.compress, resolved, out, resume, force, as_json, quiet)


@app.command()
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
        flags = _flags(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            epochs=epochs, lr=lr, device=device, seed=seed,
        )  # fmt: skip
        resolved = _resolved(words, recipe, flags, model=model, resume=resume, out=out)
        if print_config:
            write(resolved.to_yaml())
            return
        from prunecli.run import pipeline

        _run_job(pipeline.finetune, resolved, out, resume, force, as_json, quiet)


@app.command()
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

        flags = _flags(weights=weights, no_pretrained=not weights, model_arg=model_arg)
        resolved = _resolved(words, None, flags | _given(prune=_given(graph=engine)), model=model)
        found = inspection(load_source(resolved), resolved)
        show(found.to_mapping(), tables.inspection(found), as_json=as_json)
        if not found.supported:
            raise UnsupportedError(f"{resolved.model} is not supported.")


@app.command()
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

        flags = _flags(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            device=device, seed=seed,
        )  # fmt: skip
        resolved = _resolved(words, None, flags | _given(spectrum=_given(samples=samples)), model=model)
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


@app.command()
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

        flags = _flags(
            weights=weights, no_pretrained=no_pretrained, model_arg=model_arg, data=data, data_dir=data_dir,
            epochs=epochs, device=device,
        )  # fmt: skip
        found = lr_of_source(_resolved(words, None, flags, model=model))
        show(found.model_dump(mode="json"), tables.lr_table(found), as_json=as_json)


@app.command(name="eval")
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
        from prunecli.models.device import resolve_device
        from prunecli.recipe.reading import layered
        from prunecli.run.source import load_source, open_images
        from prunecli.show import tables
        from prunecli.training import finetune as finetuning

        flags = _flags(
            weights=weights,
            no_pretrained=no_pretrained,
            model_arg=model_arg,
            data=data,
            data_dir=data_dir,
            device=device,
        )
        flags = layered(flags, {"data": _given(val_limit=limit, batch_size=batch_size)})
        resolved = _resolved(words, None, flags, model=model)
        if resolved.data.name is None:
            raise UsageError("Evaluation needs data.", hint="Give --data.")
        source = load_source(resolved)
        images = open_images(resolved, source)
        assert images is not None
        where = resolve_device(resolved.device)
        found = finetuning.evaluate(source.model.to(where), images.val_loader(), device=where)
        name = resolved.data.name
        document = {"model": source.ref.name, "data": name, **found.model_dump(mode="json")}
        show(document, tables.accuracy_table(source.ref.name, name, found, source.notes), as_json=as_json)


@app.command()
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


@app.command()
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


@recipes.command("ls")
def recipes_ls(as_json: JsonOpt = False) -> None:
    """The packaged recipes."""
    with reported():
        from prunecli.recipe import packaged
        from prunecli.show import tables

        rows = [(name, packaged.summary(name)) for name in packaged.names()]
        show(dict(rows), tables.recipe_list(rows), as_json=as_json)


@recipes.command("show")
def recipes_show(name: str) -> None:
    """Print a packaged recipe."""
    with reported():
        from prunecli.recipe import packaged

        write(packaged.path_of(name).read_text(encoding="utf-8"))


@recipes.command("cp")
def recipes_cp(name: str, dest: Path) -> None:
    """Copy a packaged recipe to DEST, which must not exist."""
    with reported():
        from prunecli.files import write_text
        from prunecli.recipe import packaged

        source = packaged.path_of(name)
        dest = dest / source.name if dest.is_dir() else dest
        if dest.exists():
            raise UsageError(f"{dest} exists already.", hint="Choose another name.")
        write_text(dest, source.read_text(encoding="utf-8"))
        tell(f"Wrote {dest}.")


@recipes.command("validate")
def recipes_validate(file: str) -> None:
    """Check a recipe file; every mistake is named at once."""
    with reported():
        from prunecli.recipe import packaged

        packaged.validate(file)
        tell(f"{file} is a valid recipe.")


# ---------------------------------------------------------------------------------------------- from words to a recipe


def _given(**values: Any) -> dict[str, Any]:
    """Only what the user gave."""
    return {key: value for key, value in values.items() if value is not None and value != {}}


def _flags(
    *,
    weights: str | None = None,
    no_pretrained: bool = False,
    model_arg: list[str] | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    epochs: int | None = None,
    lr: str | None = None,
    device: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The shared options as recipe keys. Raises UsageError where a number cannot be read."""
    from prunecli.recipe.reading import parse_assignments

    rate: str | float | None = lr
    if lr is not None and lr != "auto":
        try:
            rate = float(lr)
        except ValueError:
            raise UsageError(f"--lr {lr!r} is neither auto nor a number.") from None
    return _given(
        weights=weights,
        pretrained=False if no_pretrained else None,
        model_args=parse_assignments(model_arg or []),
        data=_given(name=data, dir=data_dir),
        finetune=_given(epochs=epochs, lr=rate),
        device=device,
        seed=seed,
    )


def _recovery(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {"steps": [] if text == "none" else [part.strip() for part in text.split(",")]}


def _resolved(
    words: list[str] | None,
    recipe: str | None,
    flags: dict[str, Any],
    *,
    model: str | None,
    resume: bool = False,
    out: Path | None = None,
) -> Recipe:
    """Merge recipe, KEY=VALUE and flags (later ones win). Raises UsageError.

    ``--model`` is the model, or beside a word that is one the function that made that run. A resume without anything
    else takes the recipe of the run folder.
    """
    from prunecli.recipe import packaged
    from prunecli.recipe.reading import layered, parse_assignments
    from prunecli.recipe.recipe import Recipe

    words = words or []
    models = [word for word in words if not _ASSIGNMENT.match(word)]
    if len(models) > 1:
        raise UsageError(f"One model at a time, not {len(models)}: {', '.join(models)}.")
    flags |= _given(model=models[0], function=model) if models else _given(model=model)
    if resume and not words and recipe is None and not flags:
        return _recipe_of_run(out)
    base = packaged.read(recipe) if recipe else {}
    assigned = parse_assignments([word for word in words if _ASSIGNMENT.match(word)])
    return Recipe.from_mapping(layered(base, assigned, flags), origin=recipe or "options")


def _recipe_of_run(out: Path | None) -> Recipe:
    from prunecli.run.folder import RunFolder

    if out is None:
        raise UsageError("--resume needs to know what to resume.", hint="Give --out DIR.")
    folder = RunFolder(path=out)
    if not folder.begun:
        raise UsageError(f"{out} holds no run to resume.", hint="Start one without --resume.")
    return folder.recipe()


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


def main() -> None:
    """Entry of the console script."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        sys.stdout.write(f"prunecli {__version__}\n")
        return
    if _DEBUG in arguments:
        os.environ["PRUNECLI_DEBUG"] = "1"
        arguments.remove(_DEBUG)
    settle_process()
    app(args=arguments, prog_name="prunecli")
