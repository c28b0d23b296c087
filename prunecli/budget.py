"""Budget: from scores and a target to the channels that stay. A pure solver; no model is touched.

How many channels each group loses is one number, the *pressure* p in [0, 1]. Groups form *pools*, by the ranking: every
group its own pool (local), all in one (global), or one pool for each kind of sub-structure (isomorphic; Fang et al.,
ECCV 2024). A pool of W channels gives up its ceil(p W) cheapest, no group more than its share ``max_ratio``. Target
``ratio`` sets p itself; for the others p is bisected, since parameters, multiply-adds and bytes fall with p, and the
last per cent is found by moving single steps of single groups.

Rounding happens inside: kept widths are multiples of ``round_to``, halved until at least four steps fit into the group
(a width of 16 with round_to 8 moves in steps of 4), because one step of half a group would make any ratio meaningless.
Heads are always counted singly. The full width is always allowed.

Costs are made comparable between groups by dividing by the group's mean, except where a criterion's own unit already
means the same everywhere: ``taylor`` (loss), ``lamp`` and ``bn_scale`` (made for global thresholds), ``random``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from torch import Tensor

from prunecli.errors import NothingPrunedError, TargetError, UnsupportedError
from prunecli.groups import (
    AttributeConflictError,
    Const,
    Graph,
    Group,
    Product,
    Size,
    Sum,
    Width,
)
from prunecli.plan import Cost
from prunecli.recipe import PruneSettings, Target

TOLERANCE: Final = 0.01  # of the metric
_COMPARABLE: Final = frozenset({"taylor", "lamp", "bn_scale", "random"})
_PAIRED: Final = 200
_ROUNDS: Final = 200  # moves of the final search; each brings the metric closer, so few are ever needed


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the solver decided.

    Attributes:
        keep: kept channels, ascending, of every group that loses some.
        cost: predicted cost of the pruned model.
        asked: the target as an absolute value in the metric's own unit (multiply-adds, parameters, bytes; the factor
            for ``speedup``, the share of removed channels for ``ratio``).
        reached: what this choice gives, same unit.
        reachable: lowest and highest value that these settings can give, same unit.
        notes: groups left out and why, and what rounding did.
    """

    keep: Mapping[str, tuple[int, ...]]
    cost: Cost
    asked: float
    reached: float
    reachable: tuple[float, float]
    notes: tuple[str, ...]


def choose(
    graph: Graph,
    scores: Mapping[str, Tensor],
    target: Target,
    settings: PruneSettings,
    *,
    parameters: Sequence[str],
    stored: Sequence[str],
    base: Cost,
    bytes_per_element: int = 4,
) -> Choice:
    """Decide which channels of which groups stay.

    Groups are left whole that the name patterns leave out, that have no score, that are the other factor of a product,
    or whose attributes cannot express the new widths (those are found by asking ``graph.solve``, then all is chosen
    again without them).

    Args:
        graph: groups, sizes and the attribute solver.
        scores: importance ``[width]`` by group name, low leaves first.
        target: what to reach.
        settings: ranking, patterns, rounding, limits.
        parameters: tensor names that count as parameters.
        stored: tensor names that count as bytes.
        base: measured cost of the dense model; predictions are differences to it.
        bytes_per_element: of the stored tensors.

    Raises:
        TargetError: out of the reachable range, or missed by more than 1 %.
        NothingPrunedError: no channel would be removed.
        UnsupportedError: the attributes cannot express the cut, and no group is to blame.
    """
    prices = _Prices(graph=graph, parameters=parameters, stored=stored, base=base, bytes_per_element=bytes_per_element)
    locked: dict[str, str] = {}
    while True:
        units, notes = _units(graph, scores, settings, locked)
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


# ---------------------------------------------------------------------------------------------- units


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Groups that lose equally many channels: one group, or several tied ones.

    ``order`` holds each group's channels, least important first; ``costs`` what the r-th loss costs (mean over the
    groups, ascending); ``allowed`` the kept widths, largest first.
    """

    order: Mapping[str, tuple[int, ...]]
    width: int
    costs: tuple[float, ...]
    allowed: tuple[int, ...]
    shape: tuple[object, ...]

    @property
    def most(self) -> int:
        """Most channels that may leave."""
        return self.width - self.allowed[-1]

    def nearest(self, kept: int) -> int:
        """The allowed width nearest to ``kept``, the larger of two."""
        return min(self.allowed, key=lambda width: (abs(width - kept), -width))

    def step(self, kept: int, by: int) -> int | None:
        """The next smaller (``by`` 1) or larger (-1) allowed width, if there is one."""
        at = self.allowed.index(kept) + by
        return self.allowed[at] if 0 <= at < len(self.allowed) else None


def _units(
    graph: Graph, scores: Mapping[str, Tensor], settings: PruneSettings, locked: Mapping[str, str]
) -> tuple[list[_Unit], list[str]]:
    """What may be cut, in network order, and notes on what may not."""
    notes = list(locked.values())
    free = [g for g in _selected(graph.groups, settings, notes) if g.name not in locked and g.width > 1]
    unscored = [g.name for g in free if g.name not in scores]
    if unscored:
        notes.append(f"{len(unscored)} groups have no {settings.criterion} score and stay: {', '.join(unscored)}")
    chosen = _one_factor_each([g for g in free if g.name in scores], graph.exclusive, settings)
    units = []
    for tied in _tied(graph):
        together = [chosen[name] for name in tied if name in chosen]
        if not together:
            continue
        if len(together) < len(tied) or len({g.width for g in together}) > 1:
            notes.append(
                f"{', '.join(tied)} must keep equally many channels and not all of them may be cut: they stay."
            )
            continue
        unit = _unit(graph, together, scores, settings)
        if unit.most > 0:
            units.append(unit)
    return units, notes


def _selected(groups: Iterable[Group], settings: PruneSettings, notes: list[str]) -> list[Group]:
    """Groups with a producing layer (or name) that ``select`` matches and none that ``exclude`` matches."""
    used: set[str] = set()

    def matches(group: Group, patterns: Sequence[str]) -> bool:
        names = (group.name, *group.layers("out"))
        hits = {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)}
        used.update(hits)
        return bool(hits)

    selected = [(g, matches(g, settings.select), matches(g, settings.exclude)) for g in groups]
    unused = [pattern for pattern in (*settings.select, *settings.exclude) if pattern not in used]
    notes.extend(f"The pattern {pattern!r} matches no group." for pattern in unused)
    return [group for group, wanted, unwanted in selected if wanted and not unwanted]


def _one_factor_each(
    groups: Sequence[Group], exclusive: Sequence[tuple[str, ...]], settings: PruneSettings
) -> dict[str, Group]:
    """At most one factor of each product, else its ratio would apply twice.

    The factor that ``settings.attention`` names comes first, then the widest, then the earliest; a factor that is no
    candidate (a single head) leaves its place to the other.
    """
    taken: dict[str, Group] = {}
    ranked = sorted(groups, key=lambda group: (group.kind != settings.attention, -group.width))
    for group in ranked:
        rivals = {name for product in exclusive if group.name in product for name in product}
        if rivals.isdisjoint(taken):
            taken[group.name] = group
    return taken


def _tied(graph: Graph) -> list[list[str]]:
    """All group names in network order, those that share a tie (also through others) in one list."""
    sets = {group.name: [group.name] for group in graph.groups}
    for tie in graph.ties:
        known = [name for name in tie if name in sets]
        for name in known[1:]:
            joined, other = sets[known[0]], sets[name]
            if joined is not other:
                joined.extend(other)
                sets.update((member, joined) for member in other)
    place = {group.name: at for at, group in enumerate(graph.groups)}
    unique = {id(names): names for names in sets.values()}
    return [sorted(names, key=place.__getitem__) for names in unique.values()]


def _unit(graph: Graph, groups: Sequence[Group], scores: Mapping[str, Tensor], settings: PruneSettings) -> _Unit:
    order, sorted_costs = {}, []
    for group in groups:
        values = [float(value) for value in scores[group.name]]
        if len(values) != group.width:
            raise ValueError(f"group {group.name} has {group.width} channels and {len(values)} scores")
        ranked = sorted(range(group.width), key=lambda j: values[j])
        order[group.name] = tuple(ranked)
        mean = math.fsum(values) / group.width
        scale = 1.0 if settings.criterion in _COMPARABLE or mean <= 0 else mean
        sorted_costs.append([values[j] / scale for j in ranked])
    width = groups[0].width
    return _Unit(
        order=order,
        width=width,
        costs=tuple(math.fsum(column) / len(groups) for column in zip(*sorted_costs, strict=True)),
        allowed=_allowed_widths(width, 1 if groups[0].kind == "heads" else settings.round_to, settings),
        shape=tuple(_shape(graph, group) for group in groups),
    )


def _allowed_widths(width: int, round_to: int, settings: PruneSettings) -> tuple[int, ...]:
    """Widths a group of ``width`` channels may keep, largest first."""
    step = round_to
    while step > 1 and width < 4 * step:
        step //= 2
    most = int(settings.max_ratio * width + 1e-9)
    least = max(width - most, settings.min_width, 1)
    return (width, *(kept for kept in range(width - 1, least - 1, -1) if kept % step == 0))


def _shape(graph: Graph, group: Group) -> tuple[object, ...]:
    """What makes two groups isomorphic: kind, and how the axis runs through which kinds of tensors, sizes aside."""
    members = sorted(
        (m.role, m.dim, len(graph.tensors.get(m.tensor, ())), m.tensor.rpartition(".")[2]) for m in group.members
    )
    return (group.kind, *members)


# ---------------------------------------------------------------------------------------------- prices


@dataclass(frozen=True, kw_only=True)
class _Prices:
    """Where the metric's numbers come from."""

    graph: Graph
    parameters: Sequence[str]
    stored: Sequence[str]
    base: Cost
    bytes_per_element: int

    def meter(self, metric: str) -> _Meter:
        """A running total of ``macs``, ``params`` or ``bytes``, starting from the dense model."""
        tensors = self.graph.tensors
        if metric == "macs":
            return _Meter([op.extents for op in self.graph.ops], start=self.base.macs)
        if metric == "params":
            return _Meter([tensors[n] for n in self.parameters if n in tensors], start=self.base.params)
        extents = [tensors[n] for n in self.stored if n in tensors]
        return _Meter(extents, start=self.base.bytes, unit=self.bytes_per_element)

    def cost(self, kept: Mapping[str, int]) -> Cost:
        totals = {}
        for metric in ("params", "macs", "bytes"):
            meter = self.meter(metric)
            meter.commit(kept)
            totals[metric] = meter.total
        return Cost(**totals)


class _Meter:
    """A sum of products of extents that follows changes of single groups without adding up everything again."""

    def __init__(self, terms: Iterable[Sequence[Size]], *, start: int, unit: int = 1) -> None:
        self._terms = [tuple(extents) for extents in terms]
        self._unit = unit
        self._kept: dict[str, int] = {}
        self._values = [self._value(term, {}) for term in self._terms]
        self._of: dict[str, set[int]] = {}
        for at, term in enumerate(self._terms):
            for name in set().union(*map(_names, term)):
                self._of.setdefault(name, set()).add(at)
        self.total = start

    def _value(self, term: Sequence[Size], kept: Mapping[str, int]) -> int:
        return self._unit * math.prod(extent.evaluate(kept) for extent in term)

    def _changed(self, widths: Mapping[str, int]) -> dict[int, int]:
        touched = set().union(*(self._of.get(name, ()) for name in widths))
        kept = self._kept | dict(widths)
        return {at: self._value(self._terms[at], kept) for at in touched}

    def trial(self, widths: Mapping[str, int]) -> int:
        """The total if these groups had these widths."""
        return self.total + sum(value - self._values[at] for at, value in self._changed(widths).items())

    def commit(self, widths: Mapping[str, int]) -> None:
        """Let these groups have these widths."""
        for at, value in self._changed(widths).items():
            self.total += value - self._values[at]
            self._values[at] = value
        self._kept.update(widths)


def _names(size: Size) -> set[str]:
    """The groups a size depends on."""
    match size:
        case Width():
            return {size.group}
        case Product() | Sum():
            return set().union(*map(_names, size.parts))
        case Const():
            return set()
    raise TypeError(f"unknown size {size!r}")


# ---------------------------------------------------------------------------------------------- solving


@dataclass(kw_only=True)
class _Search:
    """Kept widths of all units, and the metric they give."""

    units: Sequence[_Unit]
    meter: _Meter
    kept: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = [unit.width for unit in self.units]

    def widths(self, kept: Mapping[int, int]) -> dict[str, int]:
        """Unit number → width as group name → width."""
        return {name: width for at, width in kept.items() for name in self.units[at].order}

    def move(self, kept: Mapping[int, int]) -> int:
        """Set these units' widths; the metric."""
        self.meter.commit(self.widths(kept))
        for at, width in kept.items():
            self.kept[at] = width
        return self.meter.total

    def price(self, kept: Mapping[int, int]) -> int:
        """The metric if these units had these widths."""
        return self.meter.trial(self.widths(kept))


def _solve(
    units: Sequence[_Unit], target: Target, settings: PruneSettings, prices: _Prices, notes: Sequence[str]
) -> Choice:
    if not units:
        raise NothingPrunedError("No coupled group may be cut.", hint=" ".join(notes) or None)
    pools = _pools(units, settings.ranking)
    if target.metric == "ratio":
        kept = _under_pressure(units, pools, target.value)
        total = sum(unit.width for unit in units)
        asked, reached = target.value, 1 - sum(kept) / total
        reachable = (0.0, sum(unit.most for unit in units) / total)
    else:
        metric = {"macs": "macs", "speedup": "macs", "params": "params", "size": "bytes"}[target.metric]
        dense = getattr(prices.base, metric)
        goal = dense / target.value if target.metric == "speedup" else target.value * (dense if target.relative else 1)
        search = _Search(units=units, meter=prices.meter(metric))
        least = search.price({at: unit.allowed[-1] for at, unit in enumerate(units)})
        hint = "; ".join(notes) or None
        _reach(search, pools, goal, least=least, dense=dense, text=f"{target}", metric=metric, hint=hint)
        kept, value = search.kept, search.meter.total
        if target.metric == "speedup":
            asked, reached, reachable = target.value, dense / max(value, 1), (1.0, dense / max(least, 1))
        else:
            asked, reached, reachable = goal, float(value), (float(least), float(dense))
    keep = {
        name: tuple(sorted(order[unit.width - width :]))
        for unit, width in zip(units, kept, strict=True)
        for name, order in unit.order.items()
        if width < unit.width
    }
    if not keep:
        raise NothingPrunedError(
            f"Target {target} removes no channel.", hint="Ask for more, or switch rounding off with prune.round_to=1."
        )
    if target.metric == "ratio" and settings.round_to > 1:
        notes = [*notes, f"with widths rounded to {settings.round_to}, {reached:.4g} of the channels leave"]
    cost = prices.cost({name: len(channels) for name, channels in keep.items()})
    return Choice(keep=keep, cost=cost, asked=asked, reached=reached, reachable=reachable, notes=tuple(notes))


def _pools(units: Sequence[_Unit], ranking: str) -> list[list[tuple[int, int]]]:
    """Pools of losses (unit number, rank within the unit), cheapest first."""
    members: dict[object, list[int]] = {}
    for at, unit in enumerate(units):
        key: object = {"local": at, "global": 0}.get(ranking, unit.shape)
        members.setdefault(key, []).append(at)
    return [
        sorted(
            ((at, rank) for at in pool for rank in range(units[at].width)),
            key=lambda loss: (units[loss[0]].costs[loss[1]], loss),
        )
        for pool in members.values()
    ]


def _under_pressure(units: Sequence[_Unit], pools: Sequence[Sequence[tuple[int, int]]], pressure: float) -> list[int]:
    """Kept widths when every pool gives up its ceil(pressure * size) cheapest channels.

    A loss that its group may not take counts for nothing: the pool then gives up its next cheapest one.
    """
    lost = [0] * len(units)
    for pool in pools:
        due = math.ceil(pressure * len(pool) - 1e-9)
        for at, rank in pool:
            if due <= 0:
                break
            if rank < units[at].most:
                lost[at] += 1
                due -= 1
    return [unit.nearest(unit.width - gone) for unit, gone in zip(units, lost, strict=True)]


def _reach(
    search: _Search,
    pools: Sequence[Sequence[tuple[int, int]]],
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
    low, high = 0.0, 1.0  # pressure: too little, enough (or all there is)
    while high - low > 1e-7:
        middle = (low + high) / 2
        enough = search.price(dict(enumerate(_under_pressure(search.units, pools, middle)))) <= goal
        low, high = (low, middle) if enough else (middle, high)
    search.move(dict(enumerate(_under_pressure(search.units, pools, low))))
    _walk(search, _under_pressure(search.units, pools, high), goal)
    for _ in range(_ROUNDS):
        if abs(search.meter.total - goal) <= TOLERANCE * goal:
            return
        better = _better_move(search, goal)
        if better is None:
            break
        search.move(better)
    raise TargetError(
        f"Target {text} asks for {goal:,.0f} {metric}, the nearest found is {search.meter.total:,}: {reach}.",
        hint="Smaller steps may meet it: prune.round_to=1.",
    )


def _walk(search: _Search, end: Sequence[int], goal: float) -> None:
    """From the present widths towards the smaller ones of ``end``, cheapest step first, until the goal is met."""
    while search.meter.total > goal:
        ahead = [at for at, width in enumerate(end) if search.kept[at] > width]
        if not ahead:
            return
        at = min(ahead, key=lambda at: (_next_cost(search, at), at))
        smaller = search.units[at].step(search.kept[at], 1)
        assert smaller is not None, "end is an allowed width below the present one"
        search.move({at: smaller})


def _next_cost(search: _Search, at: int) -> float:
    unit = search.units[at]
    return unit.costs[unit.width - search.kept[at]]


def _better_move(search: _Search, goal: float) -> dict[int, int] | None:
    """The change that brings the metric closest to the goal, or None where nothing helps.

    One step of one unit; where none of these helps, any change of one unit that another one makes up for.
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
