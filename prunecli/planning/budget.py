"""Budget: from scores and a target to the channels that stay. A pure solver; no model is touched.

Under a target, widths come from one *pressure* on all units (`prunecli.planning.pressure`), and the last per cent from
single steps of single units (`prunecli.planning.search`). Where training has learnt how wide each group has to be,
there is nothing to solve: each gets the next width that rounding and ties allow. Units, and the widths that rounding
allows them, come from `prunecli.planning.cut_units`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from prunecli.errors import NothingPrunedError, TargetError, UnsupportedError, UsageError
from prunecli.planning.allocate import allocate
from prunecli.planning.cut_units import Unit, find_units
from prunecli.planning.losses import UnitLosses
from prunecli.planning.pressure import pools_of, press, under_pressure
from prunecli.planning.prices import Meter, Prices
from prunecli.planning.search import TOLERANCE, Search, settle
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.values.groups import AttributeConflictError, Graph, Width
from prunecli.values.plan import Cost, UnitAllocation


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
        allocation: with ranking ``loss``, how the width of each unit was found.
        predicted_kl: sum of the divergences that the units cause alone, nats; ``None`` where none was measured.
    """

    keep: Mapping[str, tuple[int, ...]]
    cost: Cost
    asked: float
    reached: float
    reachable: tuple[float, float]
    notes: tuple[str, ...]
    allocation: tuple[UnitAllocation, ...] = ()
    predicted_kl: float | None = None


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
    losses: UnitLosses | None = None,
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
        losses: what the widths of each unit cost; needed for ranking ``loss``.

    Raises:
        UsageError: ranking ``loss`` without losses.
        TargetError: out of the reachable range, or missed by more than 1 %.
        NothingPrunedError: no channel would be removed.
        UnsupportedError: the attributes cannot express the cut, and no group is to blame.
    """
    prices = Prices(graph=graph, parameters=parameters, stored=stored, base=base, bytes_per_element=bytes_per_element)
    if settings.ranking == "loss" and losses is None and isinstance(target, Target):
        raise UsageError(
            "Ranking loss weighs widths by what they cost the answers, which was not measured.",
            hint="Use prune.ranking=local, global or isomorphic.",
        )
    locked: dict[str, str] = {}
    while True:
        units, notes = find_units(graph, scores, settings, locked)
        choice = _solve(units, target, settings, prices, notes, losses if settings.ranking == "loss" else None)
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


@dataclass(frozen=True, kw_only=True)
class _Solution:
    """Kept widths by unit, with ``asked``, ``reached`` and ``reachable`` as in `Choice`."""

    kept: Sequence[int]
    asked: float
    reached: float
    reachable: tuple[float, float]
    allocation: tuple[UnitAllocation, ...] = ()


def _solve(
    units: Sequence[Unit],
    target: Target | Learned,
    settings: PruneSettings,
    prices: Prices,
    notes: Sequence[str],
    losses: UnitLosses | None,
) -> Choice:
    """The choice for units that are settled. Raises TargetError and NothingPrunedError."""
    if not units:
        raise NothingPrunedError("No coupled group may be cut.", hint=" ".join(notes) or None)
    if isinstance(target, Learned):
        found = _as_learned(units, target)
    elif target.metric == "ratio" and losses is not None:
        widths = [Width(group=_widest(unit), full=unit.width) for unit in units]
        total = sum(unit.width for unit in units)
        meter = Meter([(width,) for width in widths], start=total)
        kept = allocate(units, [losses(unit) for unit in units], meter, (1 - target.value) * total)
        found = replace(_at_ratio(units, kept, target.value), allocation=_allocation(units, kept, losses, meter, total))
    elif target.metric == "ratio":
        kept = under_pressure(units, pools_of(units, settings.ranking), target.value, at_least=True)
        found = _at_ratio(units, kept, target.value)
    else:
        found = _at_cost(units, target, settings, prices, losses, hint="; ".join(notes) or None)
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
        keep=keep,
        cost=cost,
        asked=found.asked,
        reached=found.reached,
        reachable=found.reachable,
        notes=notes,
        allocation=found.allocation,
        predicted_kl=None if losses is None else _predicted_kl(units, found.kept, losses),
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
    units: Sequence[Unit],
    target: Target,
    settings: PruneSettings,
    prices: Prices,
    losses: UnitLosses | None,
    *,
    hint: str | None,
) -> _Solution:
    """Widths that bring a cost of the whole model to the target. Raises TargetError."""
    metric = {"macs": "macs", "speedup": "macs", "params": "params", "size": "bytes"}[target.metric]
    dense = getattr(prices.base, metric)
    goal = dense / target.value if target.metric == "speedup" else target.value * (dense if target.relative else 1)
    search = Search(units=units, meter=prices.meter(metric))
    least = search.price({at: unit.allowed[-1] for at, unit in enumerate(units)})
    reach = f"between {least:,} and {dense:,} {metric} can be reached"
    if not least * (1 - TOLERANCE) <= goal <= dense * (1 + TOLERANCE):
        raise TargetError(f"Target {target} asks for {goal:,.0f} {metric}: {reach}.", hint=hint)
    if losses is not None:
        search.kept = allocate(units, [losses(unit) for unit in units], search.meter, goal)
    else:
        press(search, pools_of(units, settings.ranking), goal)
    if not settle(search, goal):
        raise TargetError(
            f"Target {target} asks for {goal:,.0f} {metric}, the nearest found is {search.meter.total:,}: {reach}.",
            hint="Smaller steps may meet it: prune.round_to=1.",
        )
    value = search.meter.total
    if target.metric == "speedup":
        asked, reached, reachable = target.value, dense / max(value, 1), (1.0, dense / max(least, 1))
    else:
        asked, reached, reachable = goal, float(value), (float(least), float(dense))
    allocation = () if losses is None else _allocation(units, search.kept, losses, search.meter, dense)
    return _Solution(kept=search.kept, asked=asked, reached=reached, reachable=reachable, allocation=allocation)


def _allocation(
    units: Sequence[Unit], kept: Sequence[int], losses: UnitLosses, meter: Meter, dense: int
) -> tuple[UnitAllocation, ...]:
    """What each unit was given; ``meter`` stands at the kept widths, ``dense`` is its total at the full ones."""
    found = []
    for unit, width in zip(units, kept, strict=True):
        curve, smaller = losses(unit), unit.step(width, 1)
        saved = 0 if smaller is None else meter.total - meter.trial(unit.widths(smaller))
        marginal = None if smaller is None or saved <= 0 else curve.losses[smaller] - curve.losses[width]
        found.append(
            UnitAllocation(
                groups=tuple(unit.order),
                width=unit.width,
                kept=width,
                loss=curve.losses[width],
                marginal=None if marginal is None else marginal * dense / (100 * saved),
                curve=dict(curve.losses),
                kl=dict(curve.measured),
            )
        )
    return tuple(found)


def _predicted_kl(units: Sequence[Unit], kept: Sequence[int], losses: UnitLosses) -> float | None:
    known = [(losses(unit).divergences, width) for unit, width in zip(units, kept, strict=True)]
    return math.fsum(by_width[width] for by_width, width in known) if all(by for by, _ in known) else None


def _widest(unit: Unit) -> str:
    """The name of the group by which the unit's width is counted."""
    return next(name for name, order in unit.order.items() if len(order) == unit.width)


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
