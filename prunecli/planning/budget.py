"""Budget: from scores and a target to the channels that stay. A pure solver; no model is touched.

One number decides how many channels each unit loses, the *pressure* p in [0, 1]. Units form *pools*, by the ranking:
every unit its own pool (local), all in one (global), or one pool for each kind of sub-structure (isomorphic; Fang et
al., ECCV 2024). A pool of W channels gives up its cheapest, no group more than its share ``max_ratio``. Target
``ratio`` sets p itself, and ceil(p W) leave, as in the papers. For a cost p is bisected, since parameters,
multiply-adds and bytes fall with p, and floor(p W) leave: with ceil, any pressure > 0 removes a full step from every
narrow pool (for example 1 of 3 heads) before wide pools lose a channel. The last per cent is found by moving single
steps of single groups. Where training has learnt how wide each group has to be, there is nothing to solve: each gets
the next width that rounding and ties allow.

Units, and the widths that rounding allows them, come from `prunecli.planning.cut_units`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from prunecli.errors import NothingPrunedError, TargetError, UnsupportedError
from prunecli.planning.cut_units import Unit, find_units
from prunecli.planning.prices import Meter, Prices
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.values.groups import AttributeConflictError, Graph
from prunecli.values.plan import Cost

TOLERANCE: Final = 0.01  # share of the target by which the metric may miss it
_PAIRED: Final = 200  # most changes for which every pair with another unit is tried
_ROUNDS: Final = 200  # moves of the final search; each brings the metric closer, so few are ever needed


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The channels that stay, with what they cost.

    Attributes:
        keep: kept channels, ascending, by the name of every group that loses some.
        cost: predicted cost of the pruned model.
        asked: the target as an absolute value in the metric's own unit (multiply-adds, parameters, bytes; the factor
            for ``speedup``, the share of removed channels for ``ratio``).
        reached: the value that this choice gives, in the same unit.
        reachable: lowest and highest value that these settings can give, in the same unit.
        notes: sentences about groups left out, with the reason, and about rounding.
    """

    keep: Mapping[str, tuple[int, ...]]
    cost: Cost
    asked: float
    reached: float
    reachable: tuple[float, float]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Learnt widths, instead of a target. Rounding, limits and ties only add channels to them.

    Attributes:
        widths: number of channels that each scored group needs, by name.
    """

    widths: Mapping[str, int]


def choose(
    graph: Graph,
    scores: Mapping[str, Tensor],
    target: Target | Learned,
    settings: PruneSettings,
    *,
    parameters: Sequence[str],
    stored: Sequence[str],
    base: Cost,
    bytes_per_element: int = 4,
) -> Choice:
    """Decide which channels of which groups stay.

    Groups are left whole that the name patterns leave out, that have no score, or that are the other factor of a
    product. Ties keep to what the attributes can express; should ``graph.solve`` refuse a choice all the same, the
    groups it blames stay whole too, and all is chosen again.

    Args:
        graph: groups, sizes and the attribute solver.
        scores: importance ``[width]`` by group name; low leaves first.
        target: the value of a metric to reach, or learnt widths of every scored group.
        settings: ranking, name patterns, rounding and limits.
        parameters: names of the tensors that count as parameters.
        stored: names of the tensors that count as bytes.
        base: measured cost of the dense model, from which predictions are differences.
        bytes_per_element: size of one element of the stored tensors.

    Raises:
        TargetError: out of the reachable range, or missed by more than 1 %.
        NothingPrunedError: no channel would be removed.
        UnsupportedError: the attributes cannot express the cut, and no group is to blame.
    """
    prices = Prices(graph=graph, parameters=parameters, stored=stored, base=base, bytes_per_element=bytes_per_element)
    locked: dict[str, str] = {}
    while True:
        units, notes = find_units(graph, scores, settings, locked)
        choice = _solve(units, target, settings, prices, notes)
        try:
            graph.solve({name: len(keep) for name, keep in choice.keep.items()})
        except AttributeConflictError as conflict:
            blamed = [name for name in conflict.groups if name in choice.keep]
            if not blamed:
                raise UnsupportedError(f"The model's attributes cannot express this cut: {conflict}.") from conflict
            locked.update((name, f"{name} keeps all channels: {conflict}") for name in blamed)
        else:
            return choice


# ---------------------------------------------------------------------------------------------- solving


@dataclass(kw_only=True)
class _Search:
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


@dataclass(frozen=True, kw_only=True)
class _Solution:
    """Kept widths by unit, with ``asked``, ``reached`` and ``reachable`` as in `Choice`."""

    kept: Sequence[int]
    asked: float
    reached: float
    reachable: tuple[float, float]


def _solve(
    units: Sequence[Unit], target: Target | Learned, settings: PruneSettings, prices: Prices, notes: Sequence[str]
) -> Choice:
    """The choice for units that are settled. Raises TargetError and NothingPrunedError."""
    if not units:
        raise NothingPrunedError("No coupled group may be cut.", hint=" ".join(notes) or None)
    if isinstance(target, Learned):
        found = _as_learned(units, target)
    elif target.metric == "ratio":
        kept = _under_pressure(units, _pools(units, settings.ranking), target.value, at_least=True)
        found = _at_ratio(units, kept, target.value)
    else:
        found = _at_cost(units, target, settings, prices, hint="; ".join(notes) or None)
    keep = {
        name: tuple(sorted(unit.order[name][-own:]))
        for unit, width in zip(units, found.kept, strict=True)
        for name, own in unit.widths(width).items()
        if width < unit.width
    }
    if not keep:
        raise _nothing_removed(target, found)
    cost = prices.cost({name: len(channels) for name, channels in keep.items()})
    notes = (*notes, *_remarks(target, found, keep, settings))
    return Choice(
        keep=keep, cost=cost, asked=found.asked, reached=found.reached, reachable=found.reachable, notes=notes
    )


def _at_ratio(units: Sequence[Unit], kept: Sequence[int], asked: float) -> _Solution:
    """A solution whose metric is the share of removed channels."""
    total = sum(unit.width for unit in units)
    return _Solution(
        kept=kept,
        asked=asked,
        reached=1 - sum(kept) / total,
        reachable=(0.0, sum(unit.most for unit in units) / total),
    )


def _as_learned(units: Sequence[Unit], learned: Learned) -> _Solution:
    """The smallest allowed widths that keep as many channels as every group needs; ``asked`` ignores rounding."""

    def enough(unit: Unit, kept: int) -> bool:
        return all(width >= learned.widths[name] for name, width in unit.widths(kept).items())

    needed = [next(kept for kept in range(unit.width + 1) if enough(unit, kept)) for unit in units]
    kept = [min(width for width in unit.allowed if enough(unit, width)) for unit in units]
    return _at_ratio(units, kept, 1 - sum(needed) / sum(unit.width for unit in units))


def _at_cost(
    units: Sequence[Unit], target: Target, settings: PruneSettings, prices: Prices, *, hint: str | None
) -> _Solution:
    """Widths that bring a cost of the whole model to the target. Raises TargetError."""
    metric = {"macs": "macs", "speedup": "macs", "params": "params", "size": "bytes"}[target.metric]
    dense = getattr(prices.base, metric)
    goal = dense / target.value if target.metric == "speedup" else target.value * (dense if target.relative else 1)
    search = _Search(units=units, meter=prices.meter(metric))
    least = search.price({at: unit.allowed[-1] for at, unit in enumerate(units)})
    pools = _pools(units, settings.ranking)
    _reach(search, pools, goal, least=least, dense=dense, text=f"{target}", metric=metric, hint=hint)
    value = search.meter.total
    if target.metric == "speedup":
        asked, reached, reachable = target.value, dense / max(value, 1), (1.0, dense / max(least, 1))
    else:
        asked, reached, reachable = goal, float(value), (float(least), float(dense))
    return _Solution(kept=search.kept, asked=asked, reached=reached, reachable=reachable)


def _nothing_removed(target: Target | Learned, found: _Solution) -> NothingPrunedError:
    if isinstance(target, Target):
        return NothingPrunedError(
            f"Target {target} removes no channel.", hint="Ask for more, or switch rounding off with prune.round_to=1."
        )
    return NothingPrunedError(
        f"The gates close {found.asked:.4g} of the channels, and rounded to allowed widths no channel leaves.",
        hint="Train longer (phase.steps), push gates towards closing (phase.gate_l1), or set prune.round_to=1.",
    )


def _remarks(
    target: Target | Learned, found: _Solution, keep: Mapping[str, tuple[int, ...]], settings: PruneSettings
) -> list[str]:
    """Sentences for the user about widths that differ from the ones asked for."""
    if isinstance(target, Learned):
        rest = [name for name, channels in keep.items() if not target.widths[name]]
        closed = [f"{name}: every gate closed, the {len(keep[name])} that were nearest to open stay" for name in rest]
        return [*closed, f"the gates close {found.asked:.4g} of the channels; {found.reached:.4g} leave"]
    if target.metric == "ratio" and settings.round_to > 1:
        return [f"with widths rounded to {settings.round_to}, {found.reached:.4g} of the channels leave"]
    return []


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Units ranked together.

    Attributes:
        losses: the unit number of every channel that may leave, cheapest first. Within a unit the cheapest channels
            leave first, so the number alone identifies them.
        size: number of channels, with those that have to stay.
    """

    losses: Sequence[int]
    size: int


def _pools(units: Sequence[Unit], ranking: str) -> list[_Pool]:
    """The pools of a ranking: ``local``, ``global`` or ``isomorphic``."""
    members: dict[object, list[int]] = {}
    for at, unit in enumerate(units):
        key: object = {"local": at, "global": 0}.get(ranking, unit.shape)
        members.setdefault(key, []).append(at)
    pools = []
    for pool in members.values():
        ranked = sorted((cost, at) for at in pool for cost in units[at].costs[: units[at].most])
        pools.append(_Pool(losses=[at for _, at in ranked], size=sum(units[at].width for at in pool)))
    return pools


def _under_pressure(
    units: Sequence[Unit], pools: Sequence[_Pool], pressure: float, *, at_least: bool = False
) -> list[int]:
    """Kept widths when every pool gives up its pressure * size cheapest channels: floor of that, or ceil ``at_least``.

    A channel that its group has to keep is not in the pool's losses: the pool gives up its next cheapest one instead.
    """
    lost: Counter[int] = Counter()
    for pool in pools:
        share = pressure * pool.size
        # 0.3 * 10 is 3 plus or minus rounding, and has to count as 3 either way.
        lost.update(pool.losses[: math.ceil(share - 1e-9) if at_least else math.floor(share + 1e-9)])
    return [unit.nearest(unit.width - lost[at]) for at, unit in enumerate(units)]


def _reach(
    search: _Search,
    pools: Sequence[_Pool],
    goal: float,
    *,
    least: int,
    dense: int,
    text: str,
    metric: str,
    hint: str | None,
) -> None:
    """Bring the metric to ``goal`` within the tolerance. Raises TargetError."""
    reach = f"between {least:,} and {dense:,} {metric} can be reached"
    if not least * (1 - TOLERANCE) <= goal <= dense * (1 + TOLERANCE):
        raise TargetError(f"Target {text} asks for {goal:,.0f} {metric}: {reach}.", hint=hint)
    _press(search, pools, goal)
    for _ in range(_ROUNDS):
        if search.close_to(goal):
            return
        better = _better_move(search, goal)
        if better is None:
            break
        search.move(better)
    raise TargetError(
        f"Target {text} asks for {goal:,.0f} {metric}, the nearest found is {search.meter.total:,}: {reach}.",
        hint="Smaller steps may meet it: prune.round_to=1.",
    )


def _press(search: _Search, pools: Sequence[_Pool], goal: float) -> None:
    """Find the pressure at which the metric passes the goal, and go there step by step.

    Where one step of a coarse unit passes the goal by more than the tolerance, that unit stays on the nearer side, and
    the others make up for it under another pressure.
    """
    held: dict[int, int] = {}  # widths that no pressure changes any more; each round adds one, so the loop ends

    def under(pressure: float) -> dict[int, int]:
        return dict(enumerate(_under_pressure(search.units, pools, pressure))) | held

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


def _walk(search: _Search, end: Mapping[int, int], goal: float) -> tuple[int, int] | None:
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


def _next_cost(search: _Search, at: int) -> float:
    """The cost of the next channel that unit ``at`` loses."""
    unit = search.units[at]
    return unit.costs[unit.width - search.kept[at]]


def _better_move(search: _Search, goal: float) -> dict[int, int] | None:
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


def _made_up_for(search: _Search, change: Mapping[int, int], by: int, goal: float) -> dict[int, int]:
    """``change`` together with the width of unit ``by`` that then comes closest to the goal.

    The metric falls along ``allowed``, so that width is found by bisection.
    """
    allowed = search.units[by].allowed
    first = bisect_left(allowed, -goal, key=lambda width: -search.price({**change, by: width}))
    around = allowed[max(first - 1, 0) : first + 1]
    return min(({**change, by: width} for width in around), key=lambda move: abs(search.price(move) - goal))
