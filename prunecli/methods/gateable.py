"""What may be gated, shown before any work is spent: a closed gate has to be the removal of its channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from prunecli.methods.gates import Gated, planned_gates
from prunecli.models.source import Source
from prunecli.planning.make import make_plan
from prunecli.planning.prove import EQUIVALENCE_TOLERANCE
from prunecli.planning.score import Scores, score_model
from prunecli.proof.gating import gating_error
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.values.groups import Graph
from prunecli.values.plan import PlannedGroup


@dataclass(frozen=True, kw_only=True)
class Gateable:
    """What can have gates, with the pieces of a plan on trial: it removes a random half of every group that gets gates.

    Attributes:
        graph: the groups that may be cut after it.
        scores: random ones, for the plan on trial.
        target: of the plan on trial.
        settings: of the plan on trial.
        notes: groups left out, and why.
    """

    graph: Graph
    scores: Scores
    target: Target
    settings: PruneSettings
    notes: tuple[str, ...]


def gateable(source: Source, graph: Graph, target: Target | None, settings: PruneSettings, *, seed: int) -> Gateable:
    """Leave out the groups whose gates would not mean removal: those with a norm whose statistic runs over their
    channels, and those where a comparison of the gated with the silenced net finds a difference.

    Args:
        source: the dense model.
        graph: its coupled groups.
        target: what the cut is to reach, if anything was asked.
        settings: of the cut.
        seed: of the random scores and of the images that the comparison runs on.

    Raises:
        TargetError: the target cannot be reached without these groups.
        NothingPrunedError: no group is left.
    """
    graph, notes = without_norms(graph)
    scores = score_model(source.model, graph.groups, criterion="random", seed=seed)
    half = Target(metric="ratio", value=0.5)
    trial = settings.updated(criterion="random", ranking="local")
    while True:
        gated = make_plan(source, graph, scores, half, trial).plan.cut_groups
        wrong = _wrong(source, gated, seed=seed)
        if not wrong:
            break
        graph = graph.without(wrong, "a closed gate on it was tried and is not its channel's removal")
        notes = (*notes, f"{', '.join(wrong)}: all channels stay, a closed gate was tried and is not their removal")
    if target is not None:
        make_plan(source, graph, scores, target, trial)
    return Gateable(graph=graph, scores=scores, target=half, settings=trial, notes=notes)


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
        error = gating_error(source.model, close, groups=some, input_size=source.spec.size, seed=seed)
        return error > EQUIVALENCE_TOLERANCE

    if not differs(groups):
        return ()
    alone = tuple(group.name for group in groups if differs([group]))
    return alone or tuple(group.name for group in groups)


def _closed(net: nn.Module, *, groups: Sequence[PlannedGroup]) -> nn.Module:
    return Gated(net, groups, planned_gates(groups))
