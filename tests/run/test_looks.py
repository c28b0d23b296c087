"""Looks at a model from Python: values come back, nothing is written."""

from __future__ import annotations

import pytest

from prunecli.errors import UsageError
from prunecli.recipe.recipe import Recipe
from prunecli.run import looks

LENET = {"model": "lenet5_relu", "pretrained": False, "device": "cpu"}
DIGITS = {"name": "digits", "train_limit": 64, "val_limit": 48}


def recipe(**values: object) -> Recipe:
    return Recipe.from_mapping({**LENET, **values})


def test_an_evaluation_counts_its_images():
    found = looks.evaluate(recipe(data=DIGITS))
    assert (found.model, found.data, found.accuracy.samples) == ("lenet5_relu", "digits", 48)
    assert found.to_mapping()["top1"] == found.accuracy.top1
    with pytest.raises(UsageError, match="Evaluation needs data"):
        looks.evaluate(recipe())


@pytest.mark.parametrize(("data", "inputs"), [(DIGITS, "training images"), ({}, "Gaussian noise (no --data)")])
def test_spectra_name_what_the_jacobian_was_taken_at(data, inputs):
    found = looks.spectra(recipe(data=data, spectrum={"samples": 2}))
    assert found.inputs == inputs
    assert found.jacobian.values.shape[0] == found.jacobian.summary.samples == 2
    assert all(values == sorted(values, reverse=True) for values in found.layers.values())


def test_a_jacobian_that_is_switched_off_is_named():
    with pytest.raises(UsageError, match="--samples 1 takes it anyway"):
        looks.spectra(recipe(spectrum={"samples": 0}))


def test_a_dry_run_is_a_plan_with_its_proof_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = looks.dry_run(recipe(target="ratio=0.5", prune={"round_to": 1}))
    assert found.planned.plan.cut_groups
    assert found.proof.startswith("pruned net equals silenced dense net")
    assert (found.phases, found.to_mapping()["phases"]) == ((), [])
    assert not list(tmp_path.iterdir())


def test_an_inspection_has_every_group():
    found = looks.inspect(recipe())
    assert found.supported
    assert {group.width for group in found.graph.groups} == {6, 16, 120, 84}
