"""Widths under pressure: every pool of units gives up the same share of its channels, cheapest first.

One number decides how many channels each unit loses, the *pressure* p in [0, 1]. Units form *pools*, by the ranking:
every unit its own pool (local), all in one (global), or one pool for each kind of sub-structure (isomorphic; Fang et
al., ECCV 2024). A pool of W channels gives up its cheapest, no group more than its share ``max_ratio``. Target
``ratio`` sets p itself, and ceil(p W) leave, as in the papers. For a cost p is bisected, since parameters,
multiply-adds and bytes fall with p, and floor(p W) leave: with ceil, any pressure > 0 removes a full step from every
narrow pool (for example 1 of 3 heads) before wide pools lose a channel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunecli.planning.cut_units import Unit
from prunecli.planning.search import Search


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Units ranked together.

    Attributes:
        leaving: the unit number of every channel that may leave, cheapest first. Within a unit the cheapest channels
            leave first, so the number alone identifies them.
        size: number of channels, with those that have to stay.
    """

    leaving: Sequence[int]
    size: int


def pools_of(units: Sequence[Unit], ranking: str) -> list[Pool]:
    """The pools of a ranking: ``local``, ``global`` or ``isomorphic``."""
    members: dict[object, list[int]] = {}
    for at, unit in enumerate(units):
        key: object = {"local": at, "global": 0}.get(ranking, unit.shape)
        members.setdefault(key, []).append(at)
    found = []
    for pool in members.values():
        ranked = sorted((cost, at) for at in pool for cost in units[at].costs[: units[at].most])
        found.append(Pool(leaving=[at for _, at in ranked], size=sum(units[at].width for at in pool)))
    return found


def under_pressure(
    units: Sequence[Unit], pools: Sequence[Pool], pressure: float, *, at_least: bool = False
) -> list[int]:
    """Kept widths when every pool gives up its pressure * size cheapest channels: floor of that, or ceil ``at_least``.

    A channel that its group has to keep is not in the pool's leaving: the pool gives up its next cheapest one instead.
    """
    lost: Counter[int] = Counter()
    for pool in pools:
        share = pressure * pool.size
        # 0.3 * 10 is 3 plus or minus rounding, and has to count as 3 either way.
        lost.update(pool.leaving[: math.ceil(share - 1e-9) if at_least else math.floor(share + 1e-9)])
    return [unit.nearest(unit.width - lost[at]) for at, unit in enumerate(units)]


def press(search: Search, pools: Sequence[Pool], goal: float) -> None:
    """Find the pressure at which the metric passes the goal, and go there step by step.

    Where one step of a coarse unit passes the goal by more than the tolerance, that unit stays on the nearer side, and
    the others make up for it under another pressure.
    """
    held: dict[int, int] = {}  # widths that no pressure changes any more; each round adds one, so the loop ends

    def under(pressure: float) -> dict[int, int]:
        return dict(enumerate(under_pressure(search.units, pools, pressure))) | held

    while True:
        # The metric falls with the pressure, so it is bisected; but many units step at once where it passes the goal.
        low, high = 0.0, 1.0  # too little, enough (or the highest there is)
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (low, middle) if search.price(under(middle)) <= goal else (middle, high)
        # So the units that differ between both sides are moved one at a time, and the last of them is the coarse one.
        search.move(under(low))
        passed = _walk(search, under(high), goal)
        if passed is None or search.close_to(goal):
            return
        at, before = passed
        if abs(search.price({at: before}) - goal) < abs(search.meter.total - goal):
            search.move({at: before})
        # Nearer side or not, it is settled: bisecting with it free would end at the same step again.
        held[at] = search.kept[at]


def _walk(search: Search, end: Mapping[int, int], goal: float) -> tuple[int, int] | None:
    """Go from the present widths towards the smaller ones of ``end``, cheapest step first, until the goal is met.

    Returns:
        The unit that took the last step and its width before, or ``None`` where the end came first.
    """
    passed = None
    while search.meter.total > goal:
        ahead = [at for at, width in end.items() if search.kept[at] > width]
        if not ahead:
            return None
        at = min(ahead, key=lambda at: (_next_cost(search, at), at))
        smaller = search.units[at].step(search.kept[at], 1)
        assert smaller is not None, "end is an allowed width below the present one"
        passed = at, search.kept[at]
        search.move({at: smaller})
    return passed


def _next_cost(search: Search, at: int) -> float:
    """The cost of the next channel that unit ``at`` loses."""
    unit = search.units[at]
    return unit.costs[unit.width - search.kept[at]]
