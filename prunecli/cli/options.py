"""The options of the command line: which recipe key each one sets, and how commands come by those that they share.

``RECIPE_OPTIONS`` is the one table from option to key. A command names the rows that it has (``takes``) and gets them
as one value, ``Asked``, which makes the recipe. Options that belong to a job or to its output come as one value too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, get_type_hints

import typer

from prunecli.errors import UsageError

if TYPE_CHECKING:
    from prunecli.models.user_function import Function
    from prunecli.recipe.recipe import Recipe

_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*=")

# ---------------------------------------------------------------------------------------------- from option to key


def _keyword_arguments(pairs: list[str]) -> dict[str, Any]:
    """``["width=32", …]`` as a mapping. Raises UsageError."""
    from prunecli.recipe.layers import parse_assignments

    return parse_assignments(pairs)


def _rate(text: str) -> str | float:
    """``auto`` or a number. Raises UsageError."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--lr {text!r} is neither auto nor a number.") from None


def _steps(text: str) -> list[str]:
    """Recovery steps by name; ``none`` is the empty list."""
    return [] if text == "none" else [part.strip() for part in text.split(",")]


@dataclass(frozen=True)
class RecipeOption:
    """An option that sets one key of the recipe.

    Attributes:
        key: Recipe key, its sections separated by dots.
        kind: Type that Typer reads the option as.
        option: Names, help and bounds of the option, made by ``typer.Option``.
        value: Function from what Typer read to the value of the key. Raises UsageError.
    """

    key: str
    kind: Any
    option: Any
    value: Callable[[Any], object] = field(default=lambda given: given)


_Text: Final = str | None
_Count: Final = int | None
_MODEL_ARG: Final = typer.Option("--model-arg", metavar="K=V", help="goes to timm, or to your function")

# By the name of the parameter. --help lists a command's options in the order in which the command names them.
RECIPE_OPTIONS: Final[Mapping[str, RecipeOption]] = {
    "weights": RecipeOption(
        "weights", _Text, typer.Option("--weights", metavar="FILE", help=".safetensors, .pth, .bin")
    ),
    "no_pretrained": RecipeOption(
        "pretrained", bool, typer.Option("--no-pretrained", help="start from random weights"), lambda given: not given
    ),
    "model_arg": RecipeOption("model_args", list[str] | None, _MODEL_ARG, _keyword_arguments),
    "data": RecipeOption(
        "data.name", _Text, typer.Option("--data", metavar="PATH|NAME", help="ImageFolder, timm data set, digits")
    ),
    "data_dir": RecipeOption(
        "data.dir", _Text, typer.Option("--data-dir", metavar="DIR", help="where a named data set lies")
    ),
    "limit": RecipeOption("data.val_limit", _Count, typer.Option("--limit", min=1, help="only the first N images")),
    "batch_size": RecipeOption("data.batch_size", _Count, typer.Option("--batch-size", min=1)),
    "target": RecipeOption(
        "target", _Text, typer.Option("--target", metavar="METRIC=VALUE", help="macs=50%, speedup=2 …")
    ),
    "method": RecipeOption(
        "method", _Text, typer.Option("--method", help="oneshot, tpp, greg, kernorth, orthconv, abp, epsd")
    ),
    "graph": RecipeOption("prune.graph", _Text, typer.Option("--graph", help="axes or torch_pruning")),
    "criterion": RecipeOption(
        "prune.criterion", _Text, typer.Option("--criterion", help="l1, l2, group_norm, bn_scale, lamp …")
    ),
    "round_to": RecipeOption(
        "prune.round_to", _Count, typer.Option("--round-to", help="widths are multiples of this; 1 is off")
    ),
    "recover": RecipeOption(
        "recover.steps", _Text, typer.Option("--recover", help="auto, none, or steps: lstsq,bn"), _steps
    ),
    "epochs": RecipeOption(
        "finetune.epochs", _Count, typer.Option("--epochs", help="fine-tuning budget; 0 switches it off")
    ),
    "lr": RecipeOption("finetune.lr", _Text, typer.Option("--lr", metavar="auto|FLOAT"), _rate),
    "samples": RecipeOption(
        "spectrum.samples", _Count, typer.Option("--samples", min=1, help="images for the Jacobian")
    ),
    "device": RecipeOption("device", _Text, typer.Option("--device", metavar="auto|cpu|cuda[:N]")),
    "seed": RecipeOption("seed", _Count, typer.Option("--seed")),
}


# ---------------------------------------------------------------------------------------------- options as values

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
RecipeOpt = Annotated[str | None, typer.Option("--recipe", metavar="FILE|NAME|-")]
ModelArgsOpt = Annotated[list[str] | None, _MODEL_ARG]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
JsonOpt = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else there")]


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The run folder of a job: where it is, and what becomes of a run that is there."""

    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run folder; default runs/NAME-N")] = None
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False
    force: Annotated[bool, typer.Option("--force", help="replace a run that is there")] = False


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What a job prints."""

    print_config: Annotated[bool, typer.Option("--print-config", help="show the resolved recipe and stop")] = False
    as_json: JsonOpt = False
    quiet: QuietOpt = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The words and options of one call that add up to a recipe.

    Attributes:
        words: Names of models and ``KEY=VALUE`` pairs.
        function: Value of ``--model``: the model, or beside a word that is one the function that made that run.
        file: Value of ``--recipe``: a file, a packaged name or ``-``.
        options: Values as Typer read them, by row of ``RECIPE_OPTIONS``; only those that were given.
    """

    words: tuple[str, ...] = ()
    function: str | None = None
    file: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, *, words: list[str] | None, model: str | None, recipe: str | None = None, **options: Any) -> Self:
        """From the parameters of a command."""
        given = {name: value for name, value in options.items() if value not in (None, []) and value is not False}
        return cls(words=tuple(words or ()), function=model, file=recipe, options=given)

    def untrained(self) -> Self:
        """The same with random weights where no file is named: what looks at shapes alone downloads nothing."""
        return self if "weights" in self.options else replace(self, options={**self.options, "no_pretrained": True})

    def recipe(self, folder: FolderOptions | None = None) -> Recipe:
        """Merge the recipe file, ``KEY=VALUE`` and options; later ones win.

        Args:
            folder: Run folder of a job; a resume without anything else takes the recipe in it.

        Raises:
            UsageError: An option, a word or the recipe is wrong, or there is no run to resume.
        """
        from prunecli.recipe import packaged
        from prunecli.recipe.layers import layered, nested, parse_assignments
        from prunecli.recipe.recipe import Recipe

        rows = [(RECIPE_OPTIONS[name], value) for name, value in self.options.items()]
        flags = layered(*(nested(row.key, row.value(value)) for row, value in rows))
        models = [word for word in self.words if not _ASSIGNMENT.match(word)]
        if len(models) > 1:
            raise UsageError(f"One model at a time, not {len(models)}: {', '.join(models)}.")
        named = {"model": models[0], "function": self.function} if models else {"model": self.function}
        flags |= {key: value for key, value in named.items() if value is not None}
        if folder and folder.resume and not self.words and self.file is None and not flags:
            return _recipe_of_run(folder.out)
        base = packaged.read(self.file) if self.file else {}
        assigned = parse_assignments([word for word in self.words if _ASSIGNMENT.match(word)])
        return Recipe.from_mapping(layered(base, assigned, flags), origin=self.file or "options")


def _recipe_of_run(out: Path | None) -> Recipe:
    from prunecli.run.folder import RunFolder

    if out is None:
        raise UsageError("--resume needs to know what to resume.", hint="Give --out DIR.")
    folder = RunFolder(path=out)
    if not folder.begun:
        raise UsageError(f"{out} holds no run to resume.", hint="Start one without --resume.")
    return folder.recipe()


def named_function(model: str | None, model_arg: list[str] | None) -> Function | None:
    """The function of ``--model`` with its ``--model-arg``. Raises UsageError for arguments without a function."""
    from prunecli.models.user_function import Function

    args = _keyword_arguments(model_arg or [])
    if args and model is None:
        raise UsageError("--model-arg belongs to a function.", hint="Name it with --model.")
    return Function(name=model, args=args) if model is not None else None


# ---------------------------------------------------------------------------------------------- attaching to commands


def takes(*options: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Attach options to a command in place of the parameters that stand for several.

    A parameter of type ``Asked`` becomes the words, ``--model`` and ``options``; one of type ``FolderOptions`` or
    ``OutputOptions`` becomes its fields. Typer sees the long signature, the command gets the values.

    Args:
        options: Rows of ``RECIPE_OPTIONS``, and ``recipe``, in the order of --help.
    """

    def attach(command: Callable[..., None]) -> Callable[..., None]:
        flat: list[inspect.Parameter] = []
        groups: dict[str, tuple[Callable[..., object], list[str]]] = {}
        make: Callable[..., object]
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kind: Any = parameter.annotation
            if kind is Asked:
                make, members = Asked.of, _recipe_parameters(options)
            elif kind in (FolderOptions, OutputOptions):
                make, members = kind, _field_parameters(kind)
            else:
                flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            flat += members
            groups[parameter.name] = (make, [member.name for member in members])

        @wraps(command)
        def called(**values: Any) -> None:
            for name, (make, members) in groups.items():
                values[name] = make(**{member: values.pop(member) for member in members})
            command(**values)

        called.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
        return called

    return attach


def _recipe_parameters(options: Iterable[str]) -> list[inspect.Parameter]:
    kinds: dict[str, Any] = {"words": WordsArg, "model": FunctionOpt, "recipe": RecipeOpt}
    kinds |= {name: Annotated[row.kind, row.option] for name, row in RECIPE_OPTIONS.items()}
    return [_parameter(name, kinds[name], default=None) for name in ("words", "model", *options)]


def _field_parameters(group: type) -> list[inspect.Parameter]:
    kinds = get_type_hints(group, include_extras=True)
    return [_parameter(one.name, kinds[one.name], default=one.default) for one in fields(group)]


def _parameter(name: str, kind: Any, *, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
