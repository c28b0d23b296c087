"""Inspection: which part of a model can be cut."""

from __future__ import annotations

from torch import nn

from prunecli.errors import NothingPrunedError, UnsupportedError
from prunecli.graph.build import build_graph
from prunecli.models.source import Source
from prunecli.planning import score
from prunecli.planning.prove import proven_plan
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.target import Target
from prunecli.values.groups import Graph
from prunecli.values.inspection import Inspection


def inspection(source: Source, recipe: Recipe) -> Inspection:
    """The dependency graph of a model, and whether half of every group can be cut correctly.

    Args:
        source: the dense model.
        recipe: the recipe, for the graph engine, the cut's settings and the seed.

    Raises:
        UnsupportedError: there is no graph at all; a wrong cut is reported in the result instead.
    """
    graph = build_graph(source.model, source.spec.size, engine=recipe.prune.graph)
    supported, status = True, "half of every group was cut on trial: the net equals the silenced dense net"
    try:
        scores = score.score_model(source.model, graph.groups, criterion="l1", seed=recipe.seed)
        settings = recipe.prune.updated(criterion="l1", ranking="local")
        proven = proven_plan(source, graph, scores, Target(metric="ratio", value=0.5), settings)
        graph = proven.graph
        status += f" to {proven.proof.relative_error:.1e}"
    except (UnsupportedError, NothingPrunedError) as error:
        supported, status = False, error.message
    return Inspection(
        model=source.ref,
        input_size=source.spec.size,
        cost=source.cost,
        graph=graph,
        prunable_share=prunable_share(source.model, graph),
        supported=supported,
        status=status,
    )


def prunable_share(model: nn.Module, graph: Graph) -> float:
    """The share of a model's parameters, between 0 and 1, that lie in tensors with a prunable axis."""
    prunable = {member.tensor for group in graph.groups for member in group.members}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if name in prunable) / max(sum(sizes.values()), 1)
