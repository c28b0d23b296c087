"""Loss curves: what each width of a unit costs in accuracy. Measured elsewhere; the allocation reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from prunecli.planning.cut_units import Unit


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss of one unit at each of its allowed widths, all other units being whole.

    Attributes:
        losses: loss D by kept width of the unit's widest group; 0 at the full width, and never less at a smaller one.
        measured: KL divergence from the dense model's answers, in nats, by the kept widths at which it was measured.
        divergences: that divergence by kept width, interpolated where it was not measured; empty where it never was.
    """

    losses: Mapping[int, float]
    measured: Mapping[int, float] = field(default_factory=dict)
    divergences: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError where the losses are no such curve."""
        values = [self.losses[width] for width in sorted(self.losses, reverse=True)]
        rising = all(a <= b for a, b in pairwise(values))
        if not values or values[0] != 0 or not rising or not math.isfinite(values[-1]):
            raise ValueError(f"losses must rise from 0 at the full width as the width falls: {dict(self.losses)}")
        if not self.measured.keys() <= self.losses.keys():
            raise ValueError(f"measured at {sorted(self.measured)}, losses at {sorted(self.losses)}")
        if self.divergences and self.divergences.keys() != self.losses.keys():
            raise ValueError(f"divergences at {sorted(self.divergences)}, losses at {sorted(self.losses)}")


class UnitLosses(Protocol):
    """A source of loss curves, such as one that measures them when they are first asked for."""

    def __call__(self, unit: Unit) -> Curve:
        """The curve of a unit, with the loss at every width in ``unit.allowed``."""
