"""Pages from templates: ``layout.html.j2`` is their frame, ``parts.html.j2`` their tables and figures."""

from __future__ import annotations

from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES: Final = Environment(
    loader=PackageLoader("prunecli", "show"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def rendered(template: str, **values: object) -> str:
    """The page that a template of this folder makes of ``values``; it escapes all that is not marked as safe."""
    return _TEMPLATES.get_template(template).render(values)
