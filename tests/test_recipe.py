"""Recipes: what users may write, what they are told when it is wrong."""

from __future__ import annotations

import pytest
import yaml

from prunecli.errors import UsageError
from prunecli.recipe.layers import layered, parse_assignments
from prunecli.recipe.reading import parse_yaml
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.target import Target

ORIGINAL = {"lr": 0.1, "epochs": 200}


@pytest.mark.parametrize(
    ("text", "metric", "value", "relative"),
    [
        ("ratio=0.3", "ratio", 0.3, False),
        ("ratio=30%", "ratio", 0.3, False),
        ("macs=50%", "macs", 0.5, True),
        ("macs=2G", "macs", 2e9, False),
        ("speedup=2x", "speedup", 2.0, False),
        ("speedup=1.5", "speedup", 1.5, False),
        ("params=10M", "params", 10e6, False),
        ("params=1B", "params", 1e9, False),
        ("size=20MB", "size", 20e6, False),
        ("size=20mib", "size", 20 * 2**20, False),
    ],
)
def test_targets_are_read(text, metric, value, relative):
    target = Target.parse(text)
    assert (target.metric, target.value, target.relative) == (metric, pytest.approx(value), relative)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mac=50%", "'macs'"),
        ("latency=5ms", "bench"),
        ("ratio=1", "below 1"),
        ("ratio=0", "above 0"),
        ("speedup=0.5", "above 1"),
        ("speedup=50%", "unit"),
        ("macs=150%", "below 1"),
        ("params=10MB", "unit"),
        ("macs", "readable number"),
        ("macs=fast", "readable number"),
    ],
)
def test_unreadable_targets_say_why(text, said):
    with pytest.raises(UsageError, match=said):
        Target.parse(text)


def test_all_mistakes_are_reported_at_once_with_the_nearest_key():
    with pytest.raises(UsageError) as caught:
        Recipe.from_mapping({"finetune": {"epoch": 3}, "prune": {"criterion": "l3"}, "sed": 1})
    message = str(caught.value)
    assert "'epochs'" in message
    assert "prune.criterion" in message
    assert "'seed'" in message


def test_a_resolved_recipe_repeats_itself():
    recipe = Recipe.from_mapping({"model": "resnet18", "target": "macs=50%", "finetune": {"lr": 0.01}})
    again = Recipe.from_mapping(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert Recipe.from_mapping({"model": "resnet18"}).sha256() != recipe.sha256()


def test_later_layers_win_and_siblings_stay():
    assert layered({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"b": 4}) == {"a": {"x": 1, "y": 3}, "b": 4}


def test_assignments_are_yaml_values_under_dotted_keys():
    assert parse_assignments(["finetune.lr=0.01", "prune.select=[a, 'b*']", "weights=null"]) == {
        "finetune": {"lr": 0.01},
        "prune": {"select": ["a", "b*"]},
        "weights": None,
    }
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_assignments(["finetune.lr"])


def test_weights_and_no_pretrained_contradict():
    with pytest.raises(UsageError, match="contradict"):
        Recipe.from_mapping({"weights": "a.pth", "pretrained": False})


@pytest.mark.parametrize(("text", "said"), [("a: [1", "not valid YAML"), ("- a", "key: value pairs")])
def test_broken_yaml_is_one_sentence(text, said):
    with pytest.raises(UsageError, match=said):
        parse_yaml(text, origin="job.yaml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": {"input_size": [3, 64]}}, "data.input_size"),
        ({"data": {"input_size": [3, 0, 64]}}, "data.input_size"),
        ({"data": {"mean": []}}, "data.mean"),
        ({"data": {"std": [0.5, 0.0]}}, "data.std"),
        ({"data": {"input_size": [3, 64, 64]}, "model_args": {"img_size": 64}}, "img_size both set the input"),
    ],
)
def test_wrong_preprocessing_is_named(values, said):
    with pytest.raises(UsageError, match=said):
        Recipe.from_mapping(values)


def test_preprocessing_is_what_was_given():
    recipe = Recipe.from_mapping({"data": {"input_size": [3, 64, 64], "std": [0.5]}})
    assert recipe.data.preprocessing == {"input_size": [3, 64, 64], "std": [0.5]}
    assert Recipe.from_mapping(yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe().data.preprocessing == {}


@pytest.mark.parametrize(
    ("finetune", "said"),
    [
        ({"schedule": "rewind"}, "schedule rewind needs original"),
        ({"schedule": "rewind", "lr": 0.1}, "schedule rewind needs original"),
        ({"schedule": "clr"}, "schedule clr needs original"),
        ({"schedule": "allr", "original": ORIGINAL, "lr": 0.1}, "allr says its own rates; leave lr at auto"),
        (
            {"schedule": {"kind": "slr", "warmup_epochs": 1}, "original": ORIGINAL},
            "finetune.schedule.warmup_epochs' of kind slr",
        ),
        ({"schedule": {"kind": "slr", "min_lr": 1e-4}, "original": ORIGINAL}, "finetune.schedule.min_lr' of kind slr"),
        ({"schedule": "rewind", "original": ORIGINAL, "epochs": 201}, "cannot replay 201 of 200 epochs"),
        (
            {"schedule": "step", "original": ORIGINAL, "lr": 0.01},
            "original is read by lr: auto and by rewind, slr, clr, allr; here schedule is step and lr is 0.01",
        ),
    ],
)
def test_schedules_say_what_they_lack(finetune, said):
    with pytest.raises(UsageError, match=said) as caught:
        Recipe.from_mapping({"finetune": finetune})
    assert str(caught.value).startswith(("recipe: finetune: ", "recipe: unknown key 'finetune.schedule."))


@pytest.mark.parametrize("finetune", [{"schedule": "slr", "lr": 0.1}, {"schedule": "rewind", "original": ORIGINAL}])
def test_retraining_schedules_repeat_themselves(finetune):
    recipe = Recipe.from_mapping({"finetune": finetune})
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe
