"""Random cuts of a graph for the tests, and their check."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import nn

from prunecli.check import Equivalence, equivalence_error
from prunecli.groups import AttributeConflictError, AttributeEdit, Graph
from prunecli.plan import PlannedGroup


def planned(graph: Graph, kept: Mapping[str, int], rng: random.Random) -> tuple[PlannedGroup, ...]:
    """A plan that keeps that many channels of each group, drawn at random."""
    return tuple(
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            width=group.width,
            keep=tuple(sorted(rng.sample(range(group.width), kept.get(group.name, group.width)))),
            members=group.members,
            norms=group.norms,
        )
        for group in graph.groups
    )


def allowed(graph: Graph, names: Sequence[str], rng: random.Random) -> dict[str, int]:
    """Random widths for these groups: at most one of each exclusive set, tied groups alike.

    No axis is cut to one channel, over which a norm would give a constant.
    """
    kept: dict[str, int] = {}
    for name in names:
        tied = {name}.union(*(set(tie) for tie in graph.ties if name in tie))
        rivals = {other for pair in graph.exclusive if tied & set(pair) for other in pair} - tied
        if not rivals & set(kept) and name not in kept:
            width = min(graph.group(n).width for n in tied)
            kept.update(dict.fromkeys(tied, rng.randint(max(2, width // 3) if width > 2 else 1, width)))
    return kept


def expressible(graph: Graph, kept: dict[str, int]) -> tuple[dict[str, int], tuple[AttributeEdit, ...]]:
    """Leave uncut what the attributes cannot express, as the conflict says."""
    kept = dict(kept)
    while True:
        try:
            return kept, graph.solve(kept)
        except AttributeConflictError as conflict:
            blamed = set(conflict.groups) & set(kept)
            if not blamed:
                raise
            kept = {name: width for name, width in kept.items() if name not in blamed}


def error_of(
    model: nn.Module, graph: Graph, kept: dict[str, int], input_size: tuple[int, int, int], rng: random.Random
) -> tuple[dict[str, int], Equivalence]:
    """The widths that could be cut, and how far the cut net is from the silenced one."""
    kept, edits = expressible(graph, kept)
    outcome = equivalence_error(
        model,
        groups=planned(graph, kept, rng),
        attributes=edits,
        folds=graph.folds,
        input_size=input_size,
        seed=rng.randrange(1000),
    )
    return kept, outcome
