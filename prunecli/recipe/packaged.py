"""The packaged recipes: found in the installed package, or beside it in a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

from prunecli.errors import UsageError, nearest
from prunecli.recipe.reading import parse_yaml, read_yaml
from prunecli.recipe.recipe import Recipe

_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Where the packaged recipes lie. Raises UsageError where the installation has none."""
    for candidate in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if candidate.is_dir():
            return candidate
    raise UsageError("This installation of prunecli has no packaged recipes.")


def names() -> list[str]:
    """Every packaged recipe: ``quickstart``, ``papers/…``."""
    root = folder()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def path_of(name: str) -> Path:
    """The file of a packaged recipe. Raises UsageError with the nearest name."""
    path = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise UsageError(f"There is no packaged recipe {name!r}.", hint=nearest(name, names()))
    return path


def read(source: str) -> dict[str, object]:
    """A recipe's keys from ``-`` (standard input), a file, or a packaged name. Raises UsageError."""
    if source == "-":
        return parse_yaml(sys.stdin.read(), origin="standard input")
    if Path(source).is_file() or (source.endswith((".yaml", ".yml")) and not (folder() / source).is_file()):
        return read_yaml(Path(source))
    return read_yaml(path_of(source))


def summary(name: str) -> str:
    """The first comment line of a packaged recipe: what it is for."""
    first = path_of(name).read_text(encoding="utf-8").splitlines()[:1]
    return first[0].lstrip("# ").strip() if first and first[0].startswith("#") else ""


def validate(source: str) -> Recipe:
    """Raises UsageError naming every mistake."""
    return Recipe.from_mapping(read(source), origin=source)
