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
    """Random widths for these groups: at most one of each exclusive set, tied groups alike."""
    kept: dict[str, int] = {}
    for name in names:
        tied = {name}.union(*(set(tie) for tie in graph.ties if name in tie))
        rivals = {other for pair in graph.exclusive if tied & set(pair) for other in pair} - tied
        if not rivals & set(kept) and name not in kept:
            width = rng.randint(1, min(graph.group(n).width for n in tied))
            kept.update(dict.fromkeys(tied, width))
    return kept


def expressible(graph: Graph, kept: dict[str, int]) -> tuple[dict[str, int], tuple[AttributeEdit, ...]]:
    """Leave uncut what the attributes cannot express, as the conflict says."""
    kept = dict(kept)
    while True:
        try:
            return kept, graph.solve(kept)
        except AttributeConflictError as conflict:
            assert set(conflict.groups) & set(kept), f"the conflict names no cut group: {conflict}"
            for name in conflict.groups:
                kept.pop(name, None)


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
