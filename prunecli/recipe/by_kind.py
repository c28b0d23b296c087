"""Sections of a recipe whose fields depend on a choice, such as the schedule's: ``kind`` names the choice.

Each choice is a value type of its own, so a field of another choice is an unknown key. In a recipe the plain string
``step`` is short for ``{kind: step}``, and a section without ``kind`` is of the default kind, the first of its union.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Union, get_args, get_origin

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from prunecli.values.value import Value

KIND: Final = "kind"


class Section(Value):
    """Base of the choices of a section by kind.

    Attributes:
        tags: The fields that tell the choices of a section apart.
    """

    tags: ClassVar[tuple[str, ...]] = (KIND,)

    kind: str


@dataclass(frozen=True)
class Tagged:
    """Annotation of a union of sections that the field ``tag`` tells apart; its first choice is the default.

    Attributes:
        tag: Name of the field. The tag ``kind`` has a short form, a plain string.
    """

    tag: str = KIND

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        default = tag_values(choices_of(source)[0], self.tag)[0]

        def complete(given: object) -> object:
            if isinstance(given, str) and self.tag == KIND:
                return {KIND: given}
            if isinstance(given, Mapping) and self.tag not in given:
                return {self.tag: default, **given}
            return given

        return core_schema.no_info_before_validator_function(complete, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The section, with its tag required in all choices but the default one, or the short form."""
        section = handler(schema)
        section.pop("discriminator", None)  # of OpenAPI; it cannot express a default
        choices = [handler.resolve_ref_schema(choice) for choice in _leaves(section)]
        fields = [choice["properties"][self.tag] for choice in choices]
        values = [field["enum"] if "enum" in field else [field["const"]] for field in fields]
        for choice, tags in zip(choices, values, strict=True):
            required = choice.setdefault("required", [])
            if tags[0] != values[0][0] and self.tag not in required:
                required.append(self.tag)
        if self.tag != KIND:
            return section
        kinds = list(dict.fromkeys(tag for tags in values for tag in tags))
        return {"anyOf": [{"type": "string", "enum": kinds}, section]}


def _leaves(section: JsonSchemaValue) -> list[JsonSchemaValue]:
    """The choices of a section's JSON Schema, those of unions inside its union included."""
    if "oneOf" not in section:
        return [section]
    return [leaf for choice in section["oneOf"] for leaf in _leaves(choice)]


def choices_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The value types in an annotation, unions inside unions flattened, in order; none where it has no such type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    if get_origin(annotation) is Annotated:
        return choices_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for part in get_args(annotation) for choice in choices_of(part))
    return ()


def tag_values(choice: type[BaseModel], tag: str) -> tuple[Any, ...]:
    """The values of a tag that stand for a choice; empty where the choice has no such field."""
    field = choice.model_fields.get(tag)
    return get_args(field.annotation) if field else ()


def choice_of(annotation: Any, given: Mapping[str, Any]) -> type[Section] | None:
    """The choice that a section's tags name, the first where it gives none; ``None`` where no choice has these tags."""
    for choice in choices_of(annotation):
        if issubclass(choice, Section) and all(
            given[tag] in tag_values(choice, tag) for tag in choice.tags if tag in given and tag in choice.model_fields
        ):
            return choice
    return None


def sections_by_kind(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The sections by kind of a recipe: their full key and their annotation."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        for choice in choices_of(field.annotation):
            if issubclass(choice, Section):
                found[f"{prefix}{name}"] = field.annotation
            else:
                found |= sections_by_kind(choice, f"{prefix}{name}.")
    return found
