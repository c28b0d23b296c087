"""The reference of all recipe keys, and the JSON Schema that editors check recipes with, both made from the models.

``python -m prunecli.recipe.reference docs`` writes them as ``docs/recipe.md`` and ``docs/recipe.schema.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prunecli.errors import UsageError, nearest
from prunecli.recipe.by_kind import KIND, Section, choices_of, tag_values
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.target import Target

PAGE: Final = "recipe.md"
SCHEMA: Final = "recipe.schema.json"
_BOUNDS: Final = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES: Final = {"integer": "integer", "number": "number", "string": "text", "null": "null", "object": "key: value"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: Full key, such as ``finetune.schedule.gamma``.
        kinds: Kinds of the section that have this key; empty outside sections by kind.
        type: Type or choices, with bounds.
        default: Default value as YAML writes it, empty where the key is required.
        description: What the key sets.
    """

    name: str
    kinds: tuple[str, ...]
    type: str
    default: str
    description: str


def recipe_keys(prefix: str = "") -> tuple[Key, ...]:
    """All keys of a recipe, or those at and below a key, in the order of the models.

    Args:
        prefix: A full key, such as ``finetune.schedule``; empty for all.

    Raises:
        UsageError: No key has this prefix; names the nearest one.
    """
    every = tuple(_keys_of(Recipe, ""))
    found = tuple(key for key in every if not prefix or f"{key.name}.".startswith(f"{prefix}."))
    if not found:
        prefixes = {known for key in every for known in accumulate(key.name.split("."), "{}.{}".format)}
        raise UsageError(f"There is no recipe key {prefix!r}.", hint=nearest(prefix, prefixes))
    return found


def _keys_of(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        full = f"{prefix}{name}"
        choices = choices_of(field.annotation)
        if Target in choices:
            yield _key(full, field, "METRIC=VALUE | null")
            continue
        if not choices:
            yield _key(full, field, _type_of(schemas[name]))
            continue
        sections = [choice for choice in choices if issubclass(choice, Section)]
        if sections:
            kinds = [str(kind) for kind in _values(sections, KIND)]
            yield _key(full, field, " | ".join(kinds if field.default else [*kinds, "null"]))
            yield from _keys_by_kind(sections, f"{full}.")
            continue
        if field.default is None:
            yield _key(full, field, "key: value | null")
        yield from _keys_of(choices[0], f"{full}.")


def _keys_by_kind(sections: Sequence[type[Section]], prefix: str) -> Iterator[Key]:
    """The keys of all kinds of a section; kinds that have an equal key share a row."""
    rows: dict[Key, list[str]] = {}
    for kind in _values(sections, KIND):
        choices = [section for section in sections if kind in tag_values(section, KIND)]
        for name in dict.fromkeys(name for choice in choices for name in choice.model_fields if name != KIND):
            holders = [choice for choice in choices if name in choice.model_fields]
            typed = (
                " | ".join(str(value) for value in _values(holders, name))
                if name in holders[0].tags
                else _type_of(holders[0].model_json_schema()["properties"][name])
            )
            row = _key(f"{prefix}{name}", holders[0].model_fields[name], typed)
            rows.setdefault(row, []).append(" with ".join([str(kind), *_where(holders, choices)]))
    names = list(dict.fromkeys(row.name for row in rows))
    for row in sorted(rows, key=lambda row: names.index(row.name)):
        yield replace(row, kinds=tuple(rows[row]))


def _values(choices: Sequence[type[Section]], tag: str) -> list[Any]:
    return list(dict.fromkeys(value for choice in choices for value in tag_values(choice, tag)))


def _where(holders: Sequence[type[Section]], choices: Sequence[type[Section]]) -> list[str]:
    """The tag that tells the choices of a kind which have a key from those that lack it; none where all have it."""
    for tag in holders[0].tags:
        values = _values(holders, tag)
        named = [choice for choice in choices if set(values) & set(tag_values(choice, tag))]
        if len(named) == len(holders) < len(choices):
            return [f"{tag} {' or '.join(str(value) for value in values)}"]
    return []


def _key(name: str, field: FieldInfo, typed: str) -> Key:
    default = "" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
    return Key(name=name, kinds=(), type=typed, default=default, description=field.description or "")


def _yaml(value: object) -> str:
    """A default as YAML writes it; of a section by kind its kind."""
    if isinstance(value, Section):
        return value.kind
    return value if isinstance(value, str) else json.dumps(value)


def _type_of(schema: dict[str, Any]) -> str:
    """A type in words, with its bounds, from its JSON Schema."""
    if "anyOf" in schema:
        return " | ".join(_type_of(choice) for choice in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return " | ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "boolean":
        return "true | false"
    if schema["type"] == "array":
        parts = [schema["items"]] if "items" in schema else schema["prefixItems"][:1]
        count = f"{schema['maxItems']} " if "maxItems" in schema else ""
        return f"list of {count}({' '.join(_type_of(part) for part in parts)})"
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in _BOUNDS.items() if bound in schema]
    return " ".join([_TYPES[schema["type"]], *([", ".join(bounds)] if bounds else [])])


# ---------------------------------------------------------------------------------------------- pages


def page() -> str:
    """The reference of all keys as Markdown."""
    every = recipe_keys()
    parts = [key.name.partition(".")[0] for key in every]
    sections = [part for part in dict.fromkeys(parts) if parts.count(part) > 1]
    job = [key for key, part in zip(every, parts, strict=True) if part not in sections]
    blocks = [_INTRODUCTION, _block("The job", job)]
    blocks += [
        _block(f"`{part}`", [key for key in every if f"{key.name}.".startswith(f"{part}.")]) for part in sections
    ]
    return "\n\n".join(blocks) + "\n"


_INTRODUCTION: Final = f"""<!-- Generated: python -m prunecli.recipe.reference docs -->
# Recipe keys

Every key of a recipe, as `prunecli recipes keys [PREFIX]` prints it. A recipe is a YAML file; `KEY=VALUE` on the
command line takes the full keys below.

**Sections by kind.** `method`, `init`, `finetune.schedule`, `finetune.loss` and `finetune.regulariser` have a `kind`,
and each kind has its own keys (second column). The plain name is short for the kind alone: `schedule: step` is
`schedule: {{kind: step}}`. Without `kind` a section has its default kind. Where `KEY=VALUE` or a flag names another
kind than the recipe, the section starts anew; keys of the new kind may be given beside it:
`--method tpp method.reg_every=5`.

**In an editor.** With the YAML language server, this first line of a recipe completes and checks its keys against
[{SCHEMA}]({SCHEMA}):

```yaml
# yaml-language-server: $schema=path/to/docs/{SCHEMA}
```"""


def _block(title: str, rows: Sequence[Key]) -> str:
    by_kind = any(row.kinds for row in rows)
    columns = ["key", *(["kinds"] if by_kind else []), "type", "default", "what it sets"]
    lines = [f"## {title}", "", _line(columns), _line("---" for _ in columns)]
    for row in rows:
        kinds = [", ".join(row.kinds)] if by_kind else []
        default = f"`{row.default}`" if row.default else "required"
        lines.append(_line([f"`{row.name}`", *kinds, row.type, default, row.description]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def schema() -> str:
    """The JSON Schema of a recipe, short forms included."""
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(described, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write both files into the folder that is the only argument."""
    folder = Path(sys.argv[1])
    (folder / PAGE).write_text(page(), encoding="utf-8")
    (folder / SCHEMA).write_text(schema(), encoding="utf-8")


if __name__ == "__main__":
    main()
