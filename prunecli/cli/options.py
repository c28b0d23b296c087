"""Options that commands share, and the recipe they add up to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecli.errors import UsageError

if TYPE_CHECKING:
    from prunecli.recipe.recipe import Recipe


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


# ---------------------------------------------------------------------------------------------- from words to a recipe


def given(**values: Any) -> dict[str, Any]:
    """Only what the user gave."""
    return {key: value for key, value in values.items() if value is not None and value != {}}


def flags_of(
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
    from prunecli.recipe.layers import parse_assignments

    rate: str | float | None = lr
    if lr is not None and lr != "auto":
        try:
            rate = float(lr)
        except ValueError:
            raise UsageError(f"--lr {lr!r} is neither auto nor a number.") from None
    return given(
        weights=weights,
        pretrained=False if no_pretrained else None,
        model_args=parse_assignments(model_arg or []),
        data=given(name=data, dir=data_dir),
        finetune=given(epochs=epochs, lr=rate),
        device=device,
        seed=seed,
    )


def recovery(text: str | None) -> dict[str, Any] | None:
    """The option ``--recover`` as recipe keys; None where it was not given."""
    if text is None:
        return None
    return {"steps": [] if text == "none" else [part.strip() for part in text.split(",")]}


def resolved_recipe(
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
    from prunecli.recipe.layers import layered, parse_assignments
    from prunecli.recipe.recipe import Recipe

    words = words or []
    models = [word for word in words if not _ASSIGNMENT.match(word)]
    if len(models) > 1:
        raise UsageError(f"One model at a time, not {len(models)}: {', '.join(models)}.")
    flags |= given(model=models[0], function=model) if models else given(model=model)
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
