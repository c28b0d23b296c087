"""A search for widths: the present width of every unit, the metric that these give, and the last steps to a goal."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from prunecli.planning.cut_units import Unit
from prunecli.planning.prices import Meter

TOLERANCE: Final = 0.01  # share of the target by which the metric may miss it
_PAIRED: Final = 200  # most changes for which every pair with another unit is tried
_ROUNDS: Final = 200  # moves of the final search; each brings the metric closer, so few are ever needed


@dataclass(kw_only=True)
class Search:
    """Kept widths of all units, and the metric they give.

    Attributes:
        units: the units, known by their number.
        meter: the metric at the present widths.
        kept: the present width of each unit.
    """

    units: Sequence[Unit]
    meter: Meter
    kept: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = [unit.width for unit in self.units]

    def widths(self, kept: Mapping[int, int]) -> dict[str, int]:
        """Widths by unit number as widths by group name."""
        return {name: own for at, width in kept.items() for name, own in self.units[at].widths(width).items()}

    def move(self, kept: Mapping[int, int]) -> int:
        """Set these units' widths and return the metric."""
        self.meter.commit(self.widths(kept))
        for at, width in kept.items():
            self.kept[at] = width
        return self.meter.total

    def close_to(self, goal: float) -> bool:
        """Whether the metric is within the tolerance around ``goal``."""
        return abs(self.meter.total - goal) <= TOLERANCE * goal

    def price(self, kept: Mapping[int, int]) -> int:
        """The metric if these units had these widths."""
        return self.meter.trial(self.widths(kept))


def settle(search: Search, goal: float) -> bool:
    """Bring the metric closest to the goal, a change of one or two units at a time, until it is within the tolerance.

    Returns:
        Whether it is.
    """
    for _ in range(_ROUNDS):
        if search.close_to(goal):
            return True
        better = _better_move(search, goal)
        if better is None:
            break
        search.move(better)
    return False


def _better_move(search: Search, goal: float) -> dict[int, int] | None:
    """The change that brings the metric closest to the goal, or ``None`` where no change helps.

    First single steps of single units are tried; if no step helps, changes of one unit that another one makes up for.
    """
    steps = [
        {at: width}
        for at, unit in enumerate(search.units)
        for width in (unit.step(search.kept[at], 1), unit.step(search.kept[at], -1))
        if width is not None
    ]
    # Pairs matter in small nets, where one step is much; large ones have too many, and steps that are fine enough.
    changes = [{at: width} for at, unit in enumerate(search.units) for width in unit.allowed]
    made_up = (
        _made_up_for(search, change, by, goal)
        for change in (changes if len(changes) <= _PAIRED else steps[:_PAIRED])
        for by in range(len(search.units))
        if by not in change
    )
    for moves in (steps, made_up):
        best = min(moves, key=lambda move: abs(search.price(move) - goal), default=None)
        if best is not None and abs(search.price(best) - goal) < abs(search.meter.total - goal):
            return best
    return None


def _made_up_for(search: Search, change: Mapping[int, int], by: int, goal: float) -> dict[int, int]:
    """``change`` together with the width of unit ``by`` that then comes closest to the goal.

    The metric falls along ``allowed``, so that width is found by bisection.
    """
    allowed = search.units[by].allowed
    first = bisect_left(allowed, -goal, key=lambda width: -search.price({**change, by: width}))
    around = allowed[max(first - 1, 0) : first + 1]
    return min(({**change, by: width} for width in around), key=lambda move: abs(search.price(move) - goal))
