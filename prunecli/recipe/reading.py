"""Recipes as text: YAML, KEY=VALUE, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import ErrorDetails

from prunecli.errors import UsageError, nearest
from prunecli.values.value import Value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises UsageError for a missing file, broken YAML, or something that is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"Recipe {path} does not exist.", hint="`prunecli recipes ls` lists the packaged ones."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Recipe {path} cannot be read: {error}.") from None
    return parse_yaml(text, origin=str(path))


def parse_yaml(text: str, *, origin: str) -> dict[str, Any]:
    """YAML text to a mapping. Raises UsageError."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{origin} is not valid YAML{where}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{origin} must hold key: value pairs, not {type(values).__name__}.")
    return values


def parse_assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """``["finetune.lr=0.01", "seed=3"]`` → nested mapping; values are read as YAML. Raises UsageError."""
    merged: dict[str, Any] = {}
    for pair in pairs:
        key, separator, raw = pair.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"{pair!r} is not KEY=VALUE.")
        try:
            value = yaml.safe_load(raw) if raw.strip() else None
        except yaml.YAMLError:
            raise UsageError(f"The value of {pair!r} cannot be read.") from None
        merged = layered(merged, nested(key.strip(), value))
    return merged


def nested(key: str, value: object) -> dict[str, Any]:
    """``nested("finetune.lr", 0.01)`` → ``{"finetune": {"lr": 0.01}}``."""
    section, dot, rest = key.partition(".")
    return {section: nested(rest, value) if dot else value}


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge, later layers win; lists and scalars are replaced whole."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = layered(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def explain(model: type[Value], detail: ErrorDetails) -> str:
    """One validation error in a user's words: path, what is wrong, nearest key."""
    location = [str(part) for part in detail["loc"]]
    path = ".".join(location)
    if detail["type"] == "extra_forbidden":
        hint = nearest(location[-1], _keys_at(model, location[:-1]))
        return f"unknown key {path!r}" + (f" ({hint})" if hint else "")
    message = detail["msg"].removeprefix("Value error, ")
    return (
        f"{path}: {message}, not {detail['input']!r}"
        if detail["type"] != "value_error"
        else f"{path or 'recipe'}: {message}"
    )


def _keys_at(model: type[Value], path: Sequence[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, Value)):
            return []
        model = annotation
    return list(model.model_fields)
