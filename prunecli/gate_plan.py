"""What may be gated, shown before any work is spent: a closed gate has to be the removal of its channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from prunecli import check
from prunecli.gates import Gated, planned_gates
from prunecli.groups import Graph
from prunecli.plan import PlannedGroup
from prunecli.recipe import Recipe, Target
from prunecli.stages import EQUIVALENCE_TOLERANCE, Source, make_plan


@dataclass(frozen=True, kw_only=True)
class Gateable:
    """What can have gates.

    Attributes:
        graph: the groups that may be cut after it.
        trial: a recipe whose plan removes a random half of every group that gets gates.
        notes: groups left out, and why.
    """

    graph: Graph
    trial: Recipe
    notes: tuple[str, ...]


def gateable(source: Source, graph: Graph, recipe: Recipe) -> Gateable:
    """Leave out the groups whose gates would not mean removal: those with a norm whose statistic runs over their
    channels, and those where a comparison of the gated with the silenced net finds a difference.

    Raises:
        TargetError: the recipe's target cannot be reached without these groups.
        NothingPrunedError: no group is left.
    """
    graph, notes = without_norms(graph)
    random = recipe.prune.model_copy(update={"criterion": "random", "ranking": "local"})
    trial = recipe.model_copy(update={"prune": random, "target": Target(metric="ratio", value=0.5)})
    while True:
        gated = make_plan(source, graph, trial, None).plan.cut_groups
        wrong = _wrong(source, gated, seed=recipe.seed)
        if not wrong:
            break
        graph = graph.without(wrong, "a closed gate on it was tried and is not its channel's removal")
        notes = (*notes, f"{', '.join(wrong)}: all channels stay, a closed gate was tried and is not their removal")
    if recipe.target is not None:
        make_plan(source, graph, recipe.model_copy(update={"prune": random}), None)
    return Gateable(graph=graph, trial=trial, notes=notes)


def without_norms(graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """The graph without groups that a norm takes statistics over, and a note on them."""
    named = [group.name for group in graph.groups if group.norms]
    if not named:
        return graph, ()
    reason = "a norm takes its statistic over these channels, and a closed gate would not take part in that"
    left = graph.without(named, reason)
    total = len(graph.groups)
    gone = total - len(left.groups)
    return left, (f"{gone} of {total} coupled groups have no gates and stay whole, first {named[0]}: {reason}",)


def _wrong(source: Source, groups: Sequence[PlannedGroup], *, seed: int) -> tuple[str, ...]:
    """The groups whose closed gates do not silence them."""

    def differs(some: Sequence[PlannedGroup]) -> bool:
        close = partial(_closed, groups=some)
        error = check.gating_error(source.model, close, groups=some, input_size=source.spec.size, seed=seed)
        return error > EQUIVALENCE_TOLERANCE

    if not differs(groups):
        return ()
    alone = tuple(group.name for group in groups if differs([group]))
    return alone or tuple(group.name for group in groups)


def _closed(net: nn.Module, *, groups: Sequence[PlannedGroup]) -> nn.Module:
    return Gated(net, groups, planned_gates(groups))
