"""Recipes: what users may write, what they are told when it is wrong."""

from __future__ import annotations

import pytest
import yaml

from prunecli.errors import UsageError
from prunecli.recipe import packaged
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


# ------------------------------------------------------------------------------------------------- sections by kind


def test_a_plain_string_is_short_for_a_kind_and_a_section_without_one_has_the_default_kind():
    short = Recipe.from_mapping({"method": "tpp", "finetune": {"loss": "cskd", "regulariser": "kernorth"}})
    long = Recipe.from_mapping(
        {"method": {"kind": "tpp"}, "finetune": {"loss": {"kind": "cskd"}, "regulariser": {"kind": "kernorth"}}}
    )
    assert short == long
    schedule = Recipe.from_mapping({"finetune": {"schedule": {"min_lr": 0.1}}}).finetune.schedule
    assert (schedule.kind, schedule.min_lr) == ("cosine", 0.1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "tp"}, "method: unknown kind 'tp' (Did you mean 'tpp'?)"),
        ({"method": {"kind": "greg", "variant": 3}}, "method: unknown variant '3' (Known: 1, 2.)"),
        ({"method": None}, "method: Input should be a kind or key: value pairs, not None"),
        ({"method": {"reg_every": 5}}, "unknown key 'method.reg_every' of kind oneshot (Known: kind.)"),
        (
            {"method": {"kind": "tpp", "penalty": "fixed", "stablise": 5}},
            "unknown key 'method.stablise' of kind tpp, penalty fixed (Did you mean 'stabilise'?)",
        ),
        (
            {"method": {"kind": "greg", "variant": 2, "penalty": "fixed"}},
            "method.penalty: Input should be 'growing', not 'fixed'",
        ),
        (
            {"method": {"kind": "greg", "variant": 2, "pick_ceiling": 2}},
            "method: pick_ceiling must be below reg_ceiling",
        ),
        ({"init": "soa"}, "init.kind: Input should be 'sao', not 'soa'"),
        (
            {"finetune": {"schedule": {"kind": "step", "milestone": [0.5]}}},
            "unknown key 'finetune.schedule.milestone' of kind step (Did you mean 'milestones'?)",
        ),
        (
            {"finetune": {"schedule": {"kind": "step", "milestones": ["half"]}}},
            "finetune.schedule.milestones.0: Input should be a valid number",
        ),
        ({"finetune": {"lr": -1}}, "finetune.lr: Input should be 'auto' or greater than 0, not -1"),
        ({"finetune": {"regulariser": {"weight": 1}}}, "unknown key 'finetune.regulariser.weight' of kind none"),
    ],
)
def test_a_field_or_kind_that_does_not_belong_is_named_without_tags_in_its_path(values, said):
    with pytest.raises(UsageError) as caught:
        Recipe.from_mapping(values)
    assert str(caught.value).startswith(f"recipe: {said}")
    assert ";" not in str(caught.value)


def test_old_keys_are_answered_with_the_new_ones_beside_all_other_mistakes():
    with pytest.raises(UsageError) as caught:
        Recipe.from_mapping(
            {"phase": {"reg_every": 5, "foo": 1}, "sao": None, "finetune": {"mixup": 0.2, "epoch": 3}, "seed": -1}
        )
    assert str(caught.value) == (
        "recipe: phase.reg_every is now method.reg_every; phase is now method; sao is now init; "
        "finetune.mixup is now finetune.loss.mixup; unknown key 'finetune.epoch' (Did you mean 'epochs'?); "
        "seed: Input should be greater than or equal to 0, not -1"
    )


TPP = {"kind": "tpp", "lr": 0.5, "reg_every": 2}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([TPP, "tpp"], TPP),
        ([TPP, {"reg_every": 3}], {**TPP, "reg_every": 3}),
        (["tpp", {"reg_every": 3}], {"kind": "tpp", "reg_every": 3}),
        ([{"reg_every": 3}, "tpp"], {"kind": "tpp", "reg_every": 3}),
        ([TPP, "greg"], "greg"),
        ([TPP, {"kind": "greg", "variant": 2}], {"kind": "greg", "variant": 2}),
        ([TPP, {"stabilise": 3}, "greg"], {"kind": "greg", "stabilise": 3}),
        (["tpp", "greg"], "greg"),
        ([TPP, {"penalty": "fixed"}], {"kind": "tpp", "lr": 0.5, "penalty": "fixed"}),
        ([TPP, {"penalty": "fixed", "reg_every": 3}], {**TPP, "penalty": "fixed", "reg_every": 3}),
        ([TPP, None], None),
    ],
)
def test_a_section_starts_anew_where_a_later_layer_names_another_kind(layers, expected):
    assert layered(*({"method": layer} for layer in layers)) == {"method": expected}


def test_sections_of_no_kind_are_merged_as_ever():
    assert layered({"target": "macs=50%"}, {"target": {"metric": "macs"}}) == {"target": {"metric": "macs"}}
    words = ["finetune.schedule=step", "finetune.schedule.gamma=0.2", "finetune.epochs=3"]
    assert parse_assignments(words) == {"finetune": {"schedule": {"kind": "step", "gamma": 0.2}, "epochs": 3}}


@pytest.mark.parametrize("name", packaged.names())
def test_packaged_recipes_repeat_themselves(name):
    recipe = packaged.validate(name)
    assert Recipe.from_mapping(yaml.safe_load(recipe.to_yaml())) == recipe


def test_an_update_is_validated():
    with pytest.raises(ValueError, match="learns from the dense model"):
        Recipe().finetune.updated(loss="cskd", distill={"alpha": 0.5})
    assert Recipe().finetune.updated(loss="cskd").loss.temperature == 4.0
