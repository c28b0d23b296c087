"""Recipes in layers: ``KEY=VALUE`` words, and how layers of keys are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Final

import yaml

from prunecli.errors import UsageError
from prunecli.recipe.by_kind import KIND, choice_of, sections_by_kind
from prunecli.recipe.recipe import Recipe

_SECTIONS: Final = sections_by_kind(Recipe)


def parse_assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """``["finetune.lr=0.01", "seed=3"]`` → nested mapping; values are read as YAML. Raises UsageError."""
    layers = []
    for pair in pairs:
        key, separator, raw = pair.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"{pair!r} is not KEY=VALUE.")
        try:
            value = yaml.safe_load(raw) if raw.strip() else None
        except yaml.YAMLError:
            raise UsageError(f"The value of {pair!r} cannot be read.") from None
        layers.append(nested(key.strip(), value))
    return layered(*layers)


def nested(key: str, value: object) -> dict[str, Any]:
    """``nested("finetune.lr", 0.01)`` → ``{"finetune": {"lr": 0.01}}``."""
    section, dot, rest = key.partition(".")
    return {section: nested(rest, value) if dot else value}


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge, later layers win; lists and scalars are replaced whole.

    A section by kind starts anew where a later layer names another kind. Where only its other tags change (a penalty,
    a variant), it keeps the fields that the new choice has too.
    """
    # From the last layer down: in `method.reg_every=5 --method tpp` over a recipe of another method, the rate of growth
    # belongs to tpp, and merged upwards it would leave with that other method.
    return reduce(lambda above, below: _merged(below, above, ""), reversed(layers), {})


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under, path = below.get(key), f"{prefix}{key}"
        if path in _SECTIONS:
            merged[key] = _section(under, value, _SECTIONS[path])
        elif isinstance(value, Mapping) and isinstance(under, Mapping):
            merged[key] = _merged(under, value, f"{path}.")
        else:
            merged[key] = value
    return merged


def _section(below: object, above: object, annotation: Any) -> object:
    """A section by kind; a plain string is the kind alone."""
    if not isinstance(below, Mapping) and not isinstance(above, Mapping):
        return above
    under, over = ({KIND: value} if isinstance(value, str) else value for value in (below, above))
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return above
    if KIND in under and KIND in over and under[KIND] != over[KIND]:
        return above
    merged = {**under, **over}
    before, now = choice_of(annotation, under), choice_of(annotation, merged)
    if before is None or now is None:
        return merged
    foreign = before.model_fields.keys() - now.model_fields.keys() - over.keys()
    return {key: value for key, value in merged.items() if key not in foreign}
