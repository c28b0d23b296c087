"""Runs of an earlier version: they load, and their recipe, of another shape, is answered with its new keys.

``fixtures/old_run`` was made by the version before sections by kind (commit fd2bc48), without its checkpoints and page:
``prunecli compress lenet5_relu --no-pretrained --data digits data.train_limit=128 data.val_limit=64 --epochs 1
--target ratio=0.5 --recover none spectrum.samples=2 'finetune.original={lr: 0.4, epochs: 200}'``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml

import prunecli
from prunecli.recipe.moved_keys import MOVED
from toys.jobs import call, sentence

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"


def test_it_loads_as_the_net_it_was() -> None:
    model = prunecli.load(OLD)
    plan = json.loads((OLD / "plan.json").read_text())
    assert model.conv1.out_channels == len(next(g["keep"] for g in plan["groups"] if g["name"] == "conv1")) < 6
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_it_verifies() -> None:
    done = call("verify", str(OLD), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["ok"]


def test_its_accuracy_is_what_its_report_says() -> None:
    done = call("eval", str(OLD), "--data=digits", "--limit=64", "--device=cpu", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == json.loads((OLD / "report.json").read_text())["final"]["top1"]


def test_a_rate_is_recommended_from_what_it_records() -> None:
    done = call("lr", str(OLD), "--data=digits", "--epochs=1", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["evidence"]["base_peak_lr"] == 0.4


def test_resuming_it_or_using_its_recipe_names_the_new_key_of_each_old_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    held = [old for old in MOVED if "." in old and old.partition(".")[2] in recipe[old.partition(".")[0]]]
    assert len(held) == len([old for old in MOVED if "." in old]), "a resolved recipe holds every key"
    for done in (
        call("compress", "--resume", f"--out={run}"),
        call("compress", f"--recipe={run / 'recipe.yaml'}", "--dry-run"),
        call("recipes", "validate", str(run / "recipe.yaml")),
    ):
        assert done.exit_code == 2
        assert all(f"{old} is now {MOVED[old]}" in sentence(done) for old in held)
        assert "unknown key" not in sentence(done)
