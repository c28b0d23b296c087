"""Making a plan from scores and a target: the stage that decides and does nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from prunecli.models.source import Source
from prunecli.planning import budget
from prunecli.planning.score import Scores
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.values.groups import Graph
from prunecli.values.plan import Plan, PlannedGroup
from prunecli.values.report import TargetResult


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan, with what its target became.

    Attributes:
        plan: the plan.
        target: the asked, reached and reachable values of the metric.
        notes: sentences about groups left out and about rounding.
    """

    plan: Plan
    target: TargetResult
    notes: tuple[str, ...]


def make_plan(
    source: Source, graph: Graph, scores: Scores, target: Target | budget.Learned, settings: PruneSettings
) -> Planned:
    """Choose the channels that stay and predict the costs. Scores nothing, trains nothing, changes nothing.

    Args:
        source: the dense model.
        graph: the model's coupled groups.
        scores: importance of the channels of these groups or of more.
        target: the value of a metric to reach, or learnt widths.
        settings: ranking, name patterns, rounding and limits.

    Raises:
        TargetError: the target is out of reach; names the reachable range.
        NothingPrunedError: no channel would be removed.
        UnsupportedError: the model's attributes cannot express the cut.
    """
    names = [name for name, _ in source.model.named_parameters()]
    stored = list(source.model.state_dict())
    values = scores.channels
    choice = budget.choose(
        graph, values, target, settings, parameters=names, stored=stored, base=source.cost, losses=scores.losses
    )
    kept = {name: len(keep) for name, keep in choice.keep.items()}
    groups = tuple(
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            width=group.width,
            keep=choice.keep.get(group.name, tuple(range(group.width))),
            score=tuple(values[group.name].tolist()) if group.name in values else None,
            members=group.members,
            norms=group.norms,
        )
        for group in graph.groups
    )
    plan = Plan(
        model=source.ref,
        engine=graph.engine,
        criterion=scores.criterion,
        ranking=settings.ranking if isinstance(target, Target) else "learned",
        seed=scores.seed,
        groups=groups,
        attributes=graph.solve(kept),
        folds=tuple(fold for fold in graph.folds if kept.get(fold.group, 0)),
        base=source.cost,
        predicted=choice.cost,
        allocation=choice.allocation,
    )
    result = TargetResult(
        metric=target.metric if isinstance(target, Target) else "ratio",
        asked=choice.asked,
        reached=choice.reached,
        reachable=choice.reachable,
    )
    return Planned(plan=plan, target=result, notes=choice.notes)
