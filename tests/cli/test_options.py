"""Options and the recipe keys they set, and what a command loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from prunecli.cli.app import app
from prunecli.cli.options import RECIPE_OPTIONS, Asked, FolderOptions
from prunecli.errors import UsageError

GIVEN = {
    "weights": ("w.safetensors", "w.safetensors"),
    "no_pretrained": (True, False),
    "model_arg": (["width=32", "act.name=relu"], {"width": 32, "act": {"name": "relu"}}),
    "data": ("digits", "digits"),
    "data_dir": ("/data", "/data"),
    "limit": (7, 7),
    "batch_size": (16, 16),
    "target": ("macs=50%", "macs=50%"),
    "method": ("oneshot", {"kind": "oneshot"}),
    "graph": ("torch_pruning", "torch_pruning"),
    "criterion": ("l2", "l2"),
    "round_to": (1, 1),
    "recover": ("lstsq, bn", ["lstsq", "bn"]),
    "epochs": (0, 0),
    "lr": ("0.5", 0.5),
    "samples": (3, 3),
    "device": ("cpu", "cpu"),
    "seed": (0, 0),
}


def test_every_row_of_the_table_is_tried():
    assert set(GIVEN) == set(RECIPE_OPTIONS)


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_sets_the_key_of_its_row_over_key_value(name):
    given, expected = GIVEN[name]
    key = RECIPE_OPTIONS[name].key
    assigned = (f"{key}={{}}",) if name == "model_arg" else (f"{key}=7",)
    found = Asked.of(words=["resnet18", *assigned], model=None, **{name: given}).recipe().to_mapping()
    for part in key.split("."):
        found = found[part]
    assert found == expected


def test_options_that_are_not_given_set_nothing():
    asked = Asked.of(words=["resnet18"], model=None, weights=None, no_pretrained=False, model_arg=[], epochs=None)
    assert asked == Asked(words=("resnet18",))


def test_what_looks_at_shapes_alone_needs_no_weights_but_takes_a_file():
    assert Asked(words=("resnet18",)).untrained().recipe().pretrained is False
    assert Asked(words=("resnet18",), options={"weights": "w.pth"}).untrained().recipe().pretrained is True


def test_a_resume_with_options_is_a_job_of_its_own(tmp_path):
    folder = FolderOptions(out=tmp_path, resume=True)
    assert Asked(words=("resnet18",)).recipe(folder).model == "resnet18"
    with pytest.raises(UsageError, match="holds no run to resume"):
        Asked().recipe(folder)


def test_no_pretrained_and_none_read_as_false_and_no_steps():
    result = CliRunner().invoke(app, ["compress", "resnet18", "--no-pretrained", "--recover=none", "--print-config"])
    recipe = yaml.safe_load(result.stdout)
    assert (recipe["pretrained"], recipe["recover"]["steps"]) == (False, [])


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["recipes", "ls"], ["models", "swin"]])
def test_what_needs_no_model_loads_no_torch(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "prunecli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "timm", "numpy", "matplotlib", "sklearn", "accelerate"}
