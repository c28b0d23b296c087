"""A real job of the command line in a few seconds, and how the tests call commands."""

from __future__ import annotations

from inspect import signature

from typer.testing import CliRunner

from prunecli.cli.app import app

# A real job in a few seconds: LeNet-5 on 256 handwritten digits.
JOB = [
    "lenet5_relu",
    "--no-pretrained",
    "--data=digits",
    "--target=ratio=0.5",
    "--epochs=2",
    "--device=cpu",
    "data.train_limit=256",
    "data.val_limit=128",
    "data.batch_size=32",
    "prune.round_to=1",
    "recover.probe_steps=2",
    "recover.bn_images=64",
    "spectrum.samples=2",
]


# click before 8.2 mixes stderr into stdout unless told not to; later ones keep them apart and have no such option
APART = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}


def call(*arguments: str, stdin: str | None = None):
    return CliRunner(**APART).invoke(app, list(arguments), input=stdin)


def sentence(result) -> str:
    """The one message on stderr, as one line."""
    return " ".join(result.stderr.split())
