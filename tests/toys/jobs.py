"""A real job of the command line in a few seconds, and how the tests call commands."""

from __future__ import annotations

from inspect import signature

import pytest
from typer.testing import CliRunner, Result

from prunecli.cli.app import app

# LeNet-5 on 256 handwritten digits.
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


def without_extras(patch: pytest.MonkeyPatch) -> None:
    """Let jobs verify their export in this process and draw no plots: each takes as long as the rest of a toy job."""
    from prunecli.run import verify
    from prunecli.show import plots

    patch.setattr(verify, "verify", verify.verify_here)
    patch.setattr(plots, "_drawn", lambda *_, **__: "<svg></svg>")


def call(*arguments: str, stdin: str | None = None, full: bool = False) -> Result:
    """Run a command in this process.

    Args:
        arguments: command line, without the program's name.
        stdin: what the command reads.
        full: whether an export is verified in a fresh process and the report has its plots, as for users.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not full:
            without_extras(patch)
        return CliRunner(**APART).invoke(app, list(arguments), input=stdin)


def sentence(result: Result) -> str:
    """The one message on stderr, as one line."""
    return " ".join(result.stderr.split())
