"""The command line: parse, call, print, exit. Heavy imports happen inside commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys

import typer

from prunecli import __version__
from prunecli.cli.console import settle_process
from prunecli.cli.jobs import compress, finetune, lr
from prunecli.cli.looks import evaluate, inspect, models, sensitivity, spectrum, verify
from prunecli.cli.recipes import recipes

app = typer.Typer(
    name="prunecli",
    help="Make pretrained vision models smaller and faster: prune, recover, fine-tune, verify, export.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes, name="recipes")

_DEBUG = "--debug"

app.command()(compress)
app.command()(finetune)
app.command()(inspect)
app.command()(sensitivity)
app.command()(spectrum)
app.command()(lr)
app.command(name="eval")(evaluate)
app.command()(verify)
app.command()(models)


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
