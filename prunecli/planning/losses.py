"""What a unit's widths cost the model: the values that ranking ``loss`` plans by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prunecli.planning.cut_units import Unit


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss of one unit at its widths.

    Attributes:
        losses: loss by kept width of the unit's widest group, for every allowed width; 0 at the full width, and not
            smaller at a smaller one.
        measured: KL divergence to the dense net in nats, by kept width, where it was measured.
    """

    losses: Mapping[int, float]
    measured: Mapping[int, float] = field(default_factory=dict)


class UnitLosses(Protocol):
    """A function from a unit to its curve. The first call for a unit may take seconds."""

    def __call__(self, unit: Unit) -> Curve:
        """The unit's curve."""
