"""Cut units: groups that are cut as one, and the widths they may have. The budget decides how far each unit shrinks.

A unit is a group by itself, or the groups that a tie cuts together: these keep one share of their channels. Of the
factors of a product (heads, head_dim) one is cut, else its ratio would apply twice: the one ``prune.attention`` names,
unless a tie then moves in fewer than four steps and another factor gives it more (192 channels = 3 heads x 64: with the
heads a third at a time, with the head width a 64th).

Kept widths are multiples of ``round_to``, halved until at least four steps fit into the group (a width of 16 with
round_to 8 moves in steps of 4), because one step of half a group would make any ratio meaningless. Heads are always
counted singly. In a tie every group keeps to its own rounding; where that leaves fewer than four steps and there are
more, the widest rounding is halved, and that is noted. The full width is always allowed.

Costs are made comparable between groups by dividing by the group's mean, except where a criterion's own unit already
means the same everywhere: ``taylor`` (loss), ``lamp`` and ``bn_scale`` (made for global thresholds), ``random`` and
learned gates.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from torch import Tensor

from prunecli.recipe.settings import PruneSettings
from prunecli.values.groups import Bundle, Graph, Group, Tie, common_parts

_COMPARABLE: Final = frozenset({"taylor", "lamp", "bn_scale", "varw", "random", "gates"})
_FEWEST_STEPS: Final = 4


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Groups that keep the same share of their channels, counted in channels of the widest one.

    Attributes:
        order: channels of each group by name, least important first.
        width: number of channels of the widest group.
        costs: cost of each lost channel of the widest group, ascending: the mean over the groups of the score at that
            share of their channels.
        allowed: kept widths that the widest group may have, largest first; the other groups then keep a whole number.
        shape: key that is equal for isomorphic units.
    """

    order: Mapping[str, tuple[int, ...]]
    width: int
    costs: tuple[float, ...]
    allowed: tuple[int, ...]
    shape: tuple[object, ...]

    @property
    def most(self) -> int:
        """Largest number of channels of the widest group that may leave."""
        return self.width - self.allowed[-1]

    def widths(self, kept: int) -> dict[str, int]:
        """The kept width of each group by name, where the widest group keeps ``kept``."""
        return {name: kept * len(order) // self.width for name, order in self.order.items()}

    def nearest(self, kept: int) -> int:
        """The allowed width nearest to ``kept``; of two equally near ones the larger."""
        at = bisect_left(self.allowed, -kept, key=lambda width: -width)
        around = self.allowed[max(at - 1, 0) : at + 1]
        return min(around, key=lambda width: (abs(width - kept), -width))

    def step(self, kept: int, by: int) -> int | None:
        """The next smaller (``by`` 1) or larger (``by`` -1) allowed width; ``None`` at the end."""
        at = self.allowed.index(kept) + by
        return self.allowed[at] if 0 <= at < len(self.allowed) else None


def find_units(
    graph: Graph, scores: Mapping[str, Tensor], settings: PruneSettings, locked: Mapping[str, str]
) -> tuple[list[Unit], list[str]]:
    """The units that may be cut, in network order, and notes on the groups that may not.

    Args:
        graph: groups and ties.
        scores: importance ``[width]`` by group name; low leaves first.
        settings: name patterns, rounding, limits, and which factor of a product to cut.
        locked: notes by the name of each group to leave whole.

    Raises:
        ValueError: scores of another width than their group.
    """
    notes = list(locked.values())
    free = [g for g in _select_groups(graph.groups, settings, notes) if g.name not in locked and g.width > 1]
    unscored = [g.name for g in free if g.name not in scores]
    if unscored:
        notes.append(f"{len(unscored)} groups have no {settings.criterion} score and stay: {', '.join(unscored)}")
    chosen = _choose_bundles(graph, {g.name: g for g in free if g.name in scores}, settings, notes)
    units = (_unit(graph, bundles, scores, settings, notes) for bundles in chosen)
    return [unit for unit in units if unit.most > 0], notes


# ---------------------------------------------------------------------------------------------- which groups


def _select_groups(groups: Iterable[Group], settings: PruneSettings, notes: list[str]) -> list[Group]:
    """The groups that ``select`` matches and ``exclude`` does not, by their name or a producing layer's."""
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


def _choose_bundles(
    graph: Graph, free: Mapping[str, Group], settings: PruneSettings, notes: list[str]
) -> list[tuple[Bundle, ...]]:
    """The bundles cut together, in network order: at most one factor of each product, one bundle a choice of a tie.

    Ties that hold more than factors of products come first, as nothing else could stand in for them; then what
    ``settings.attention`` names, then the widest, then the earliest. A factor that is no candidate (a single head)
    leaves its place to the other.
    """
    ties = graph.all_ties()
    outside = [_rivals(tie, graph.exclusive) for tie in ties]

    def rank(at: int) -> tuple[bool, bool, int]:
        groups = [graph.group(name) for name in ties[at].groups]
        others = all(group.kind != settings.attention for group in groups)
        return all(outside[at][group.name] for group in groups), others, -max(group.width for group in groups)

    def preference(bundle: Bundle) -> tuple[bool, int]:
        return all(free[name].kind != settings.attention for name in bundle.groups), -bundle.parts

    taken: set[str] = set()
    chosen: dict[int, tuple[Bundle, ...]] = {}
    for at in sorted(range(len(ties)), key=rank):
        names = ties[at].groups
        possible = {name for name in names if name in free and outside[at][name].isdisjoint(taken)}
        choices = (tuple(b for b in choice if possible >= set(b.groups)) for choice in ties[at].choices)
        bundles = Tie(choices=tuple(choices)).selected(preference, fewest=_FEWEST_STEPS)
        if bundles is not None:
            chosen[at] = bundles
            taken.update(name for bundle in bundles for name in bundle.groups)
        elif len(names) > 1 and not rank(at)[0] and not free.keys().isdisjoint(names):
            notes.append(f"{', '.join(names)} can only be cut together and not all of them may be: they stay.")
    return [chosen[at] for at in sorted(chosen)]


def _rivals(tie: Tie, exclusive: Iterable[tuple[str, ...]]) -> dict[str, set[str]]:
    """By each group of a tie, the groups outside the tie that share a product with it."""
    names = set(tie.groups)
    products = [product for product in exclusive if not names.isdisjoint(product)]
    return {name: {other for p in products if name in p for other in p} - names for name in names}


# ---------------------------------------------------------------------------------------------- one unit


def _unit(
    graph: Graph, bundles: Sequence[Bundle], scores: Mapping[str, Tensor], settings: PruneSettings, notes: list[str]
) -> Unit:
    """The unit of bundles that are cut together. Raises ValueError where scores and width differ."""
    groups = [graph.group(name) for bundle in bundles for name in bundle.groups]
    width, parts = max(group.width for group in groups), common_parts(bundles)
    order, costs = {}, []
    for group in groups:
        values = scores[group.name].tolist()
        if len(values) != group.width:
            raise ValueError(f"group {group.name} has {group.width} channels and {len(values)} scores")
        ranked = sorted(range(group.width), key=values.__getitem__)
        order[group.name] = tuple(ranked)
        mean = math.fsum(values) / group.width
        scale = 1.0 if settings.criterion in _COMPARABLE or mean <= 0 else mean
        costs.append([values[ranked[r * group.width // width]] / scale for r in range(width)])
    return Unit(
        order=order,
        width=width,
        costs=tuple(math.fsum(column) / len(groups) for column in zip(*costs, strict=True)),
        allowed=(width, *(width * kept // parts for kept in _allowed_parts(groups, parts, settings, notes))),
        shape=tuple(_shape(graph, group) for group in groups),
    )


def _allowed_parts(groups: Sequence[Group], parts: int, settings: PruneSettings, notes: list[str]) -> list[int]:
    """The numbers of ``parts`` equal parts, below all of them, that the groups may keep, largest first."""

    def widths(kept: int) -> list[int]:
        return [group.width * kept // parts for group in groups]

    least = [max(g.width - int(settings.max_ratio * g.width + 1e-9), settings.min_width, 1) for g in groups]
    within = [k for k in range(parts - 1, 0, -1) if all(w >= low for w, low in zip(widths(k), least, strict=True))]
    steps = own = [_rounding(group, settings) for group in groups]
    while True:
        rounded = [k for k in within if not any(w % step for w, step in zip(widths(k), steps, strict=True))]
        widest = max(steps)
        if widest == 1 or len(rounded) >= min(len(within), _FEWEST_STEPS - 1):
            break
        steps = [min(step, widest // 2) for step in steps]
    if steps != own and len(groups) > 1:
        notes.append(
            f"{groups[0].name} and {len(groups) - 1} groups tied to it have too few common shares for rounding to"
            f" {max(own)}: they are rounded to {widest}."
        )
    return rounded


def _rounding(group: Group, settings: PruneSettings) -> int:
    """The number of which the kept widths of a group by itself are multiples."""
    step = 1 if group.kind == "heads" else settings.round_to
    while step > 1 and group.width < _FEWEST_STEPS * step:
        step //= 2
    return step


def _shape(graph: Graph, group: Group) -> tuple[object, ...]:
    """A key that is equal for isomorphic groups: kind, and how the axis runs through tensors, whatever their sizes."""
    members = sorted(
        (m.role, m.dim, len(graph.tensors.get(m.tensor, ())), m.tensor.rpartition(".")[2]) for m in group.members
    )
    return (group.kind, *members)
