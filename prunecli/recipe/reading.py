"""Recipes as text: YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from prunecli.errors import UsageError


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
