"""Random cuts of a graph for the tests, and their check."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from torch import nn

from prunecli.proof.equivalence import Equivalence, equivalence_error
from prunecli.values.groups import Bundle, Graph, Tie
from prunecli.values.plan import PlannedGroup


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
    """Random widths for these groups and all that is tied to them; of each exclusive pair outside a tie at most one.

    No axis is cut to one channel, over which a norm would give a constant.
    """
    kept: dict[str, int] = {}
    for name in names:
        tie = next((tie for tie in graph.ties if name in tie.groups), None)
        bundles = [Bundle(groups=(name,), parts=graph.group(name).width)] if tie is None else drawn(tie, name, rng)
        moving = {moved for bundle in bundles for moved in bundle.groups}
        speaks_of = moving if tie is None else set(tie.groups)
        rivals = {other for pair in graph.exclusive if moving & set(pair) for other in pair} - speaks_of
        if not (rivals | speaks_of) & set(kept):
            kept.update(shrunk(graph, bundles, rng))
    return kept


def drawn(tie: Tie, name: str, rng: random.Random) -> list[Bundle]:
    """One bundle of each choice, with a common share; the one with group ``name`` among them, where possible."""
    choices = [[b for b in choice if name in b.groups] or list(choice) for choice in tie.choices]
    bundles = [rng.choice(choice) for choice in choices]
    while math.gcd(*(bundle.parts for bundle in bundles)) == 1:
        bundles = [rng.choice(choice) for choice in rng.choice([choices, tie.choices])]
    return bundles


def shrunk(graph: Graph, bundles: Sequence[Bundle], rng: random.Random) -> dict[str, int]:
    """A random common share of the groups of these bundles."""
    parts = math.gcd(*(bundle.parts for bundle in bundles))
    widths = {name: graph.group(name).width for bundle in bundles for name in bundle.groups}
    least = {name: max(2, width // 3) if width > 2 else 1 for name, width in widths.items()}
    shares = [k for k in range(1, parts + 1) if all(w * k // parts >= least[name] for name, w in widths.items())]
    share = rng.choice(shares)
    return {name: width * share // parts for name, width in widths.items()}


def error_of(
    model: nn.Module, graph: Graph, kept: dict[str, int], input_size: tuple[int, int, int], rng: random.Random
) -> tuple[dict[str, int], Equivalence]:
    """The widths, and how far the cut net is from the silenced one; the attributes can always express them."""
    outcome = equivalence_error(
        model,
        groups=planned(graph, kept, rng),
        attributes=graph.solve(kept),
        folds=graph.folds,
        input_size=input_size,
        seed=rng.randrange(1000),
    )
    return kept, outcome
