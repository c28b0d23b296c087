"""The base of every value type."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """Base of everything that crosses a file: frozen, strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def updated(self, **changes: object) -> Self:
        """A copy with some fields changed, validated as a new value is (``model_copy`` does not validate).

        Raises:
            pydantic.ValidationError: A field that does not exist, or a value that the type refuses.
        """
        return type(self).model_validate({**dict(self), **changes})
