"""What is wrong with a recipe, in a user's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from prunecli.errors import nearest
from prunecli.recipe.by_kind import Section, choices_of, tag_values

_SHOULD_BE: Final = "Input should be "


@dataclass(frozen=True)
class _Place:
    """Where a mistake lies.

    Attributes:
        keys: Keys from the recipe down, without the segments that pydantic adds for tags and plain types.
        tags: The tags of the section that holds the last key, such as ``kind tpp``.
        parent: The value type that holds the last key, ``None`` where that is no value type.
        models: The value types that may stand at the place.
    """

    keys: tuple[str, ...]
    tags: tuple[str, ...]
    parent: type[BaseModel] | None
    models: tuple[type[BaseModel], ...]

    @property
    def path(self) -> str:
        return ".".join(self.keys)


def explained(model: type[BaseModel], details: Sequence[ErrorDetails]) -> list[str]:
    """Every validation error as one sentence: full key, what is wrong, nearest key.

    Args:
        model: The type that was validated.
        details: The errors of one validation.
    """
    sentences: list[str] = []
    refused: dict[str, tuple[object, list[str]]] = {}  # a value of several plain types fails once for each of them
    for detail in details:
        place = _place(model, detail["loc"])
        match detail["type"]:
            case "extra_forbidden":
                sentences.append(_unknown_key(place))
            case "union_tag_invalid":
                sentences.append(_unknown_tag(place, **detail["ctx"]))
            case "value_error":
                sentences.append(f"{place.path or 'recipe'}: {detail['msg'].removeprefix('Value error, ')}")
            case "model_attributes_type" if place.models:
                sentences.append(f"{place.path}: {_SHOULD_BE}a kind or key: value pairs, not {detail['input']!r}")
            case _:
                refused.setdefault(place.path, (detail["input"], []))[1].append(detail["msg"])
    for path, (given, found) in refused.items():
        also = [message.removeprefix(_SHOULD_BE) for message in found[1:]]
        sentences.append(f"{path}: {' or '.join([found[0], *also])}, not {given!r}")
    return sentences


def _place(model: type[BaseModel], location: Sequence[int | str]) -> _Place:
    keys: list[str] = []
    tags: list[str] = []
    parent: type[BaseModel] | None = None
    models: tuple[type[BaseModel], ...] = (model,)
    annotation: Any = model
    for part in location:
        if isinstance(part, int) and not models:  # of a list; the tag of a section may be a number too
            keys.append(str(part))
        elif len(models) > 1:
            tags += sorted({f"{tag} {part}" for choice in models for tag in _tags_with(choice, part)})
            models = tuple(choice for choice in models if _tags_with(choice, part))
        elif models:
            (parent,) = models
            field = parent.model_fields.get(str(part))
            annotation = field.annotation if field else None
            models = choices_of(annotation)
            keys.append(str(part))
    return _Place(keys=tuple(keys), tags=tuple(tags), parent=parent, models=models)


def _tags_with(choice: type[BaseModel], value: int | str) -> list[str]:
    """The tags of a section that may have a value; none where the choice is no section."""
    tags = choice.tags if issubclass(choice, Section) else ()
    return [tag for tag in tags if value in tag_values(choice, tag)]


def _unknown_key(place: _Place) -> str:
    known = list(place.parent.model_fields) if place.parent else []
    hint = nearest(place.keys[-1], known)
    which = f" of {', '.join(place.tags)}" if place.tags else ""
    return f"unknown key {place.path!r}{which}" + (f" ({hint})" if hint else "")


def _unknown_tag(place: _Place, *, discriminator: str, tag: str, expected_tags: str) -> str:
    """An unknown kind, or another tag, of a section; pydantic quotes names and choices."""
    known = [choice.strip("'") for choice in expected_tags.split(", ")]
    return f"{place.path}: unknown {discriminator.strip(chr(39))} {tag!r} ({nearest(str(tag), known)})"
