"""Making a plan from scores and a target: the stage that decides and does nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    ranking = settings.ranking if isinstance(target, Target) else "learned"
    plan = plan_of(source, graph, choice.keep, scores=scores, ranking=ranking).model_copy(
        update={"predicted": choice.cost, "allocation": choice.allocation, "predicted_kl": choice.predicted_kl}
    )
    result = TargetResult(
        metric=target.metric if isinstance(target, Target) else "ratio",
        asked=choice.asked,
        reached=choice.reached,
        reachable=choice.reachable,
    )
    return Planned(plan=plan, target=result, notes=choice.notes)


def plan_of(
    source: Source,
    graph: Graph,
    keep: Mapping[str, Sequence[int]],
    *,
    scores: Scores | None = None,
    ranking: str = "none",
) -> Plan:
    """The plan that keeps these channels; other groups stay whole. Its predicted cost is that of the dense model.

    Args:
        source: the dense model.
        graph: the model's coupled groups.
        keep: kept channels, ascending, by group name.
        scores: importance behind the choice; ``None`` for a choice that has none.
        ranking: name of the ranking behind the choice.

    Raises:
        AttributeConflictError: the model's attributes cannot express these widths.
    """
    kept = {name: len(channels) for name, channels in keep.items()}
    values = {} if scores is None else scores.channels
    groups = tuple(
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            width=group.width,
            keep=tuple(keep.get(group.name, range(group.width))),
            score=tuple(values[group.name].tolist()) if group.name in values else None,
            members=group.members,
            norms=group.norms,
        )
        for group in graph.groups
    )
    return Plan(
        model=source.ref,
        engine=graph.engine,
        criterion="none" if scores is None else scores.criterion,
        ranking=ranking,
        seed=0 if scores is None else scores.seed,
        groups=groups,
        attributes=graph.solve(kept),
        folds=tuple(fold for fold in graph.folds if kept.get(fold.group, 0)),
        base=source.cost,
        predicted=source.cost,
    )
