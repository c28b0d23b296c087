"""The commands about packaged recipes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prunecli.cli.console import reported, show, tell, write
from prunecli.cli.options import JsonOpt
from prunecli.errors import UsageError

recipes = typer.Typer(
    help="Packaged recipes: list, show, copy, validate; the reference of all keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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


@recipes.command("keys")
def recipes_keys(
    prefix: Annotated[str, typer.Argument(metavar="[PREFIX]", help="only keys at and below this one")] = "",
    as_json: JsonOpt = False,
) -> None:
    """The reference of all recipe keys: type or choices, default, what each sets."""
    with reported():
        from prunecli.recipe import reference
        from prunecli.show import tables

        found = reference.recipe_keys(prefix)
        show([asdict(key) for key in found], tables.recipe_keys(found), as_json=as_json)
