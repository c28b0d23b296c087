"""The target of a job: a metric and how much of it."""

from __future__ import annotations

import math
import re
from typing import Literal, Self

from pydantic import Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from prunecli.errors import UsageError, nearest
from prunecli.values.value import Value

Metric = Literal["ratio", "macs", "speedup", "params", "size"]
_LATER = {"latency": "a latency target needs `bench`, which this version does not have"}
_COUNTS = {"": 1.0, "%": 0.01, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_UNITS_OF: dict[str, dict[str, float]] = {
    "ratio": {"": 1.0, "%": 0.01},
    "macs": _COUNTS,
    "speedup": {"": 1.0, "X": 1.0},
    "params": _COUNTS,
    "size": {"": 1.0, "%": 0.01, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20},
}
_TARGET_EXAMPLES = "macs=50%, speedup=2, params=10M, size=20MB or ratio=0.3"


class Target(Value):
    """``macs=50%``, ``speedup=2``, ``params=10M``, ``size=20MB`` or ``ratio=0.3``.

    ``value`` is what is left: a fraction of the dense model where ``relative``, else an absolute count (multiply-adds,
    parameters, bytes). For ``speedup`` it is the MACs factor, for ``ratio`` the share of channels *removed*.
    """

    metric: Metric
    value: float = Field(gt=0)
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError naming the part that cannot be read."""
        metric, _, raw = text.partition("=")
        metric = metric.strip().lower()
        if metric in _LATER:
            raise UsageError(f"Target {text!r}: {_LATER[metric]}.", hint="Use macs=50% or speedup=2.")
        if metric not in _UNITS_OF:
            raise UsageError(f"Unknown target metric {metric!r} in {text!r}.", hint=nearest(metric, _UNITS_OF))
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%|[a-zA-Z]*)\s*", raw)
        if not found:
            raise UsageError(f"Target {text!r} has no readable number.", hint=f"Write {_TARGET_EXAMPLES}.")
        unit = found[2].upper()
        units = _UNITS_OF[metric]
        if unit not in units:
            known = ", ".join(u for u in units if u) or "none"
            raise UsageError(f"Target {text!r} has the unknown unit {found[2]!r}.", hint=f"Units of {metric}: {known}.")
        value = float(found[1]) * units[unit]
        relative = unit == "%" and metric != "ratio"
        lower, upper = (
            (1.0, math.inf) if metric == "speedup" else (0.0, 1.0 if relative or metric == "ratio" else math.inf)
        )
        if not lower < value < upper:
            limits = f"above {lower:g}" + (f" and below {upper:g}" if upper < math.inf else "")
            raise UsageError(f"Target {text!r} must be {limits}.")
        return cls(metric=metric, value=value, relative=relative)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Text, as recipes write a target, or its parts."""
        return {"anyOf": [{"type": "string", "examples": _TARGET_EXAMPLES.split(", ")}, handler(schema)]}

    def __str__(self) -> str:
        if self.relative:
            return f"{self.metric}={self.value * 100:.12g}%"
        return f"{self.metric}={self.value:.15g}"
