"""Which groups may have gates, found before any training: a closed gate must equal the removal of its channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """The groups that can have gates, and what makes a trial plan that removes a random half of each of them.

    Attributes:
        graph: the groups that can have gates and may be cut once these are learnt.
        scores: random scores, for the trial plan.
        target: the trial plan's target, half of the channels.
        settings: the trial plan's settings.
        notes: sentences that name the groups left out, with the reason.
    """

    graph: Graph
    scores: Scores
    target: Target
    settings: PruneSettings
    notes: tuple[str, ...]


def gateable(source: Source, graph: Graph, target: Target | None, settings: PruneSettings, *, seed: int) -> Gateable:
    """Leave out the groups whose closed gates would not equal removal.

    These are groups with a norm whose statistic runs over their channels, and those where the outputs of the gated net
    and of the net with these channels silenced differ.

    Args:
        source: the dense model.
        graph: the model's coupled groups.
        target: the target of the cut; ``None`` without one.
        settings: the settings of the cut.
        seed: seed of the random scores and of the images that the comparison runs on.

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
    """The graph without the groups over whose channels a norm takes statistics, and a note that names them."""
    named = [group.name for group in graph.groups if group.norms]
    if not named:
        return graph, ()
    reason = "a norm takes its statistic over these channels, and a closed gate would not take part in that"
    left = graph.without(named, reason)
    total = len(graph.groups)
    gone = total - len(left.groups)
    return left, (f"{gone} of {total} coupled groups have no gates and stay whole, first {named[0]}: {reason}",)


def _wrong(source: Source, groups: Sequence[PlannedGroup], *, seed: int) -> tuple[str, ...]:
    """The groups whose closed gates do not silence them: each that fails alone, else all if they fail together."""

    def differs(some: Sequence[PlannedGroup]) -> bool:
        def close(net: nn.Module) -> nn.Module:
            return Gated(net, some, planned_gates(some))

        error = gating_error(source.model, close, groups=some, input_size=source.spec.size, seed=seed)
        return error > EQUIVALENCE_TOLERANCE

    if not differs(groups):
        return ()
    alone = tuple(group.name for group in groups if differs([group]))
    return alone or tuple(group.name for group in groups)
