"""The base of every value type."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """Base of everything that crosses a file: frozen, strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
