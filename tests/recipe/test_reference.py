"""The reference of recipe keys and the JSON Schema for editors: complete, fresh, and of one mind with the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunecli.errors import UsageError
from prunecli.recipe import packaged, reference
from prunecli.recipe.by_kind import KIND
from prunecli.recipe.moved_keys import MOVED
from prunecli.recipe.recipe import Recipe
from toys.jobs import call, sentence

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_pages_in_docs_are_fresh() -> None:
    stale = "stale: run python -m prunecli.recipe.reference docs"
    assert (DOCS / reference.PAGE).read_text(encoding="utf-8") == reference.page(), stale
    assert (DOCS / reference.SCHEMA).read_text(encoding="utf-8") == reference.schema(), stale


def test_every_key_is_described() -> None:
    assert [key.name for key in reference.recipe_keys() if not key.description] == []


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        elif key != KIND:
            found.add(f"{prefix}{key}")
    return found


def test_every_key_of_a_resolved_recipe_is_in_the_reference_and_so_is_every_new_name_of_an_old_key() -> None:
    known = {key.name for key in reference.recipe_keys()}
    for name in packaged.names():
        recipe = packaged.validate(name).updated(model_args={})
        assert leaves(recipe.to_mapping()) <= known
    assert set(MOVED.values()) <= known


def test_a_prefix_selects_keys_and_a_wrong_one_gets_the_nearest() -> None:
    assert [key.name for key in reference.recipe_keys("init")] == [
        "init",
        "init.sparsity",
        "init.degree",
        "init.activation",
    ]
    (gamma,) = reference.recipe_keys("finetune.schedule.gamma")
    assert (gamma.kinds, gamma.type, gamma.default) == (("step",), "number > 0, < 1", "0.1")
    with pytest.raises(UsageError, match=r"'finetune.schedule'\?"):
        reference.recipe_keys("finetune.shedule")


def test_the_command_prints_them() -> None:
    shown = call("recipes", "keys", "finetune.regulariser", "--json")
    assert [(key["name"], key["kinds"]) for key in json.loads(shown.stdout)] == [
        ("finetune.regulariser", []),
        ("finetune.regulariser.weight", ["kernorth", "orthconv"]),
    ]
    assert "method.reg_every" in call("recipes", "keys").stdout
    wrong = call("recipes", "keys", "metod")
    assert (wrong.exit_code, "'method'" in sentence(wrong)) == (2, True)


# ------------------------------------------------------------------------------------------------- the schema


def fits(schema: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """Whether a JSON value satisfies what pydantic writes of JSON Schema."""
    if "$ref" in schema:
        return fits(definitions[schema["$ref"].rpartition("/")[2]], value, definitions)
    if "anyOf" in schema:
        return any(fits(choice, value, definitions) for choice in schema["anyOf"])
    if "oneOf" in schema:
        return sum(fits(choice, value, definitions) for choice in schema["oneOf"]) == 1
    types = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}
    if "type" in schema and not isinstance(value, types.get(schema["type"], type(None))):
        return False
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    if isinstance(value, list):
        return all(fits(schema["items"], part, definitions) for part in value) if "items" in schema else True
    if isinstance(value, dict) and "properties" in schema:
        return set(schema.get("required", [])) <= value.keys() <= schema["properties"].keys() and all(
            fits(schema["properties"][key], part, definitions) for key, part in value.items()
        )
    return True


SCHEMA = json.loads(reference.schema())


def allowed(recipe: dict[str, Any]) -> bool:
    return fits(SCHEMA, recipe, SCHEMA["$defs"])


@pytest.mark.parametrize("name", packaged.names())
def test_packaged_recipes_and_their_resolved_form_satisfy_the_schema(name: str) -> None:
    assert allowed(packaged.read(name))
    assert allowed(packaged.validate(name).to_mapping())


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "tpp"},
        {"method": {"kind": "greg", "variant": 2, "pick_step": 1e-3}},
        {"method": {"kind": "tpp", "penalty": "fixed", "steps": 3}},
        {"method": {"kind": "orthconv", "weight": 0.5}},
        {"init": "sao", "pretrained": False},
        {"init": {"sparsity": 0.5}, "pretrained": False},
        {"finetune": {"schedule": {"min_lr": 0.1}, "loss": {"mixup": 0.2}, "regulariser": "kernorth"}},
    ],
)
def test_the_schema_takes_what_the_tool_takes(recipe: dict[str, Any]) -> None:
    assert allowed(recipe)
    Recipe.from_mapping(recipe)


@pytest.mark.parametrize(
    "text",
    [
        "method: tp",
        "method: {reg_every: 5}",
        "method: {kind: tpp, penalty: fixed, reg_step: 1.0e-3}",
        "method: {kind: greg, pick_step: 1.0e-3}",
        "init: {kind: sao, sparsty: 0.5}",
        "finetune: {schedule: {gamma: 0.5}}",
        "finetune: {schedule: {kind: rewind, min_lr: 0.1}, original: {lr: 0.1, epochs: 3}}",
        "finetune: {loss: {kind: pskd, temperature: 2.0}}",
        "phase: {reg_every: 5}",
    ],
)
def test_the_schema_refuses_what_the_tool_refuses(text: str) -> None:
    recipe = yaml.safe_load(text)
    assert not allowed(recipe)
    with pytest.raises(UsageError):
        Recipe.from_mapping(recipe)
