"""Allocation: the widths with the least total loss at a cost, from the loss curve of every unit.

``min sum_u D_u(k_u)`` with ``cost(k) <= goal``. The losses of units add up, since each was taken with all other units
whole; their costs multiply, since a layer costs the product of the widths that it joins. So a price, the loss for one
unit of cost, holds at the present widths only, and changes are made one at a time:

1. *Descent* from dense: the unit and the smaller width that lose least for what they save, until the goal is met. Any
   number of steps of one unit is one change, so no dent in a curve holds it up (the steepest chord, which on convex
   curves is the steepest step).
2. *Exchanges*: one unit gets wider, another makes up for it, as long as that lowers the total loss.
3. *Other starts*: a unit that shares layers with many others, as a residual stream does, is priced by the descent while
   these are still wide. So it is put to other widths, the others follow by 1 and 2, and the best is kept.

A net's allocation is no convex problem, and nothing here proves an optimum; the tests compare with all widths of small
nets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from heapq import heappop, heappush
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prunecli.planning.cut_units import Unit
from prunecli.planning.losses import Curve
from prunecli.planning.prices import Meter

_STARTS: Final = 8  # units that are put to other widths, and number of these widths
_AS_CHEAP: Final = 0.01  # share by which a longer step may cost more than the cheapest one and still be taken for it
_LEAST_GAIN: Final = 1e-9  # share of the total loss by which a change has to lower it, so that rounding moves nothing


def allocate(units: Sequence[Unit], curves: Sequence[Curve], meter: Meter, goal: float) -> list[int]:
    """The kept width of each unit. The meter is left at these widths.

    Args:
        units: the units, none of which shares a group with another.
        curves: the loss curve of each unit.
        meter: the cost, at the dense widths.
        goal: the highest cost allowed. Where even the smallest widths cost more, these are the answer.
    """
    state = _State(units, curves, meter)
    everyone = range(len(units))
    _descend(state, goal, everyone)
    _ascend(state, goal, everyone)
    _exchange(state, goal)
    for unit in sorted(everyone, key=lambda unit: -len(state.partners[unit]))[:_STARTS]:
        _start_elsewhere(state, goal, unit)
    return state.kept


class _State:
    """Widths of all units, as positions in what each is allowed, widest first.

    Args:
        units: the units, known by their number.
        curves: the loss curve of each.
        meter: the cost at the dense widths.

    Attributes:
        at: present position of each unit.
        losses: loss of each unit at its positions.
        partners: units of which the cost depends on this unit's width.
    """

    def __init__(self, units: Sequence[Unit], curves: Sequence[Curve], meter: Meter) -> None:
        self._allowed = [np.array(unit.allowed) for unit in units]
        self._widths = [unit.widths(allowed) for unit, allowed in zip(units, self._allowed, strict=True)]
        self._meter = meter
        self._changes: dict[int, NDArray[np.int64]] = {}
        self.losses = [
            np.array([curve.losses[width] for width in unit.allowed]) for unit, curve in zip(units, curves, strict=True)
        ]
        self.at = [0] * len(units)
        products = [meter.products(unit.order) for unit in units]
        self.partners = [
            [other for other, shared in enumerate(products) if other != unit and not own.isdisjoint(shared)]
            for unit, own in enumerate(products)
        ]

    @property
    def cost(self) -> int:
        return self._meter.total

    @property
    def kept(self) -> list[int]:
        return [int(allowed[at]) for allowed, at in zip(self._allowed, self.at, strict=True)]

    @property
    def loss(self) -> float:
        return math.fsum(losses[at] for losses, at in zip(self.losses, self.at, strict=True))

    def changes(self, unit: int) -> NDArray[np.int64]:
        """By how much the cost changes if this unit goes to each of its positions."""
        if unit not in self._changes:
            self._changes[unit] = self._meter.trials(self._widths[unit]) - self.cost
        return self._changes[unit]

    def changes_after(self, unit: int, at: int, other: int) -> NDArray[np.int64]:
        """By how much the cost changes if one unit goes to ``at``, and another one to each of its positions."""
        moved = {name: own[at] for name, own in self._widths[unit].items()}
        return self._meter.trials({**moved, **self._widths[other]}) - self.cost

    def move(self, positions: Mapping[int, int]) -> None:
        """Put these units to these positions."""
        for unit, at in positions.items():
            if at != self.at[unit]:
                self._meter.commit({name: int(own[at]) for name, own in self._widths[unit].items()})
                self.at[unit] = at
                for stale in (unit, *self.partners[unit]):
                    self._changes.pop(stale, None)


# ---------------------------------------------------------------------------------------------- one unit at a time

_Step = tuple[float, int]  # price of a change, low first, and the position it leads to


def _greedily(state: _State, units: Collection[int], cheapest: Callable[[int], _Step | None]) -> None:
    """Make the cheapest change of any of these units, again and again until none has one left.

    ``cheapest`` gives a unit's own, whose price may only rise while the other units move. So a price from before bounds
    it, and is taken anew only where it is the lowest of all (the accelerated greedy algorithm of Minoux, 1978).
    """
    queue = [(-math.inf, unit) for unit in units]
    while queue:
        _, unit = heappop(queue)
        step = cheapest(unit)
        if step is None:
            continue
        price, at = step
        if queue and price > queue[0][0]:
            heappush(queue, (price, unit))
        else:
            state.move({unit: at})
            heappush(queue, (-math.inf, unit))


def _descend(state: _State, goal: float, units: Collection[int]) -> None:
    """Narrow these units until the cost is at most ``goal``, least loss for a saved unit of cost first."""

    def cheapest(unit: int) -> _Step | None:
        excess, at = state.cost - goal, state.at[unit]
        saved = -state.changes(unit)[at + 1 :]
        if excess <= 0 or not saved.any():
            return None
        # What a step saves beyond the goal is worth nothing.
        prices = (state.losses[unit][at + 1 :] - state.losses[unit][at]) / np.clip(saved, 1e-9, excess)
        furthest = np.flatnonzero(prices <= prices.min() * (1 + _AS_CHEAP))[-1]
        return float(prices.min()), at + 1 + int(furthest)

    _greedily(state, units, cheapest)


def _ascend(state: _State, goal: float, units: Collection[int]) -> None:
    """Widen these units while the cost stays at most ``goal``, most gain for a unit of cost first."""

    def cheapest(unit: int) -> _Step | None:
        at = state.at[unit]
        costs, gains = state.changes(unit)[:at], state.losses[unit][at] - state.losses[unit][:at]
        fits = (costs <= goal - state.cost) & (gains > 0)
        if not fits.any():
            return None
        prices = np.where(fits, -gains / np.maximum(costs, 1e-9), np.inf)
        furthest = np.flatnonzero(prices <= prices.min() * (1 - _AS_CHEAP))[0]
        return float(prices.min()), int(furthest)

    _greedily(state, units, cheapest)


# ---------------------------------------------------------------------------------------------- two units at a time


def _exchange(state: _State, goal: float) -> None:
    """Widen one unit and narrow another one for it, until no such change lowers the total loss."""
    while _exchange_once(state, goal):
        _ascend(state, goal, range(len(state.at)))


def _exchange_once(state: _State, goal: float) -> bool:
    """Make every promising exchange that holds when it is checked; whether there was any.

    Promising are the best that each narrowed unit has to offer if both changes of cost simply add up. Where the two
    share layers the narrower one saves more than that, so what is found is never too little.
    """
    least = _LEAST_GAIN * state.loss
    moved: set[int] = set()
    for _, wider, at, narrower in sorted(_promising(state, goal), reverse=True):
        if wider in moved or narrower in moved:
            continue
        gain = state.losses[wider][state.at[wider]] - state.losses[wider][at]
        below = state.at[narrower] + 1
        fits = state.changes_after(wider, at, narrower)[below:] <= goal - state.cost
        first = below + int(fits.argmax())
        if fits.any() and gain - (state.losses[narrower][first] - state.losses[narrower][below - 1]) > least:
            state.move({narrower: first, wider: at})
            moved.update((wider, narrower))
    return bool(moved)


def _promising(state: _State, goal: float) -> list[tuple[float, int, int, int]]:
    """Exchanges as (fall of the total loss, unit to widen, its new position, unit to narrow)."""
    slack = goal - state.cost
    units = [unit for unit, at in enumerate(state.at) if at > 0]
    if not units:
        return []
    ladders = [state.at[unit] - _distances(state.at[unit]) for unit in units]
    positions = np.concatenate(ladders)
    wider = np.repeat(units, [len(ladder) for ladder in ladders])
    gains = np.concatenate(
        [state.losses[u][state.at[u]] - state.losses[u][at] for u, at in zip(units, ladders, strict=True)]
    )
    needed = np.concatenate([state.changes(u)[at] for u, at in zip(units, ladders, strict=True)]) - slack
    found = []
    for narrower, at in enumerate(state.at):
        saved = -state.changes(narrower)[at + 1 :]
        lost = state.losses[narrower][at + 1 :] - state.losses[narrower][at]
        first = np.searchsorted(saved, needed)
        possible = (first < len(saved)) & (wider != narrower)
        if possible.any():
            falls = np.where(possible, gains - lost[np.minimum(first, len(lost) - 1)], -np.inf)
            best = int(falls.argmax())
            if falls[best] > 0:
                found.append((float(falls[best]), int(wider[best]), int(positions[best]), narrower))
    return found


def _distances(most: int) -> NDArray[np.int64]:
    """Numbers of steps from 1 to ``most``: all up to 16, then each a quarter more than the one before."""
    found = [1]
    while (further := max(found[-1] + 1, found[-1] * 5 // 4 if found[-1] >= 16 else 0)) <= most:
        found.append(further)
    return np.array(found)


# ---------------------------------------------------------------------------------------------- other starts


def _start_elsewhere(state: _State, goal: float, unit: int) -> None:
    """Put a unit to widths all over its range, let the others follow, and stay where the total loss is lowest."""
    best, positions = state.loss, list(state.at)
    others = [other for other in range(len(state.at)) if other != unit]
    last = len(state.losses[unit]) - 1
    for at in sorted({last * part // (_STARTS - 1) for part in range(_STARTS)} - {state.at[unit]}):
        state.move({unit: at})
        _descend(state, goal, others)
        if state.cost <= goal:
            _ascend(state, goal, others)
            _exchange(state, goal)
            if state.loss < best * (1 - _LEAST_GAIN):
                best, positions = state.loss, list(state.at)
        state.move(dict(enumerate(positions)))
