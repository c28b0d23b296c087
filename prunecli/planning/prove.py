"""Proving a plan: cuts that turn out wrong are left out, and the rest is planned again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from prunecli.errors import UnsupportedError
from prunecli.models.source import Source
from prunecli.planning import budget
from prunecli.planning.make import Planned, make_plan
from prunecli.planning.score import Scores
from prunecli.proof import equivalence
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.values.groups import Graph
from prunecli.values.plan import Plan

EQUIVALENCE_TOLERANCE: Final = 1e-9
_MOST_SPARED: Final = 4  # times that a group is left whole for the proof's sake; a model that needs more is unsupported


@dataclass(frozen=True, kw_only=True)
class Proven:
    """A plan that was shown to be right.

    Attributes:
        planned: the plan, its target and its notes.
        proof: the comparison of the cut net with the silenced dense net.
        graph: the graph of the plan, in which groups that could not be cut correctly are frozen.
    """

    planned: Planned
    proof: equivalence.Equivalence
    graph: Graph


def proven_plan(
    source: Source, graph: Graph, scores: Scores, target: Target | budget.Learned, settings: PruneSettings
) -> Proven:
    """Plan a cut and show that it is right, before any work is spent on it.

    A group that cannot be cut correctly, against what the graph claims, is looked for by halving; it stays whole, and
    all is planned again from the same scores.

    Args:
        source: the dense model.
        graph: the model's coupled groups.
        scores: importance of the channels of these groups.
        target: the value of a metric to reach, or learnt widths.
        settings: ranking, name patterns, rounding and limits.

    Raises:
        UnsupportedError: the cut net does not equal the dense net with those channels silenced, whatever stays whole.
        TargetError: the target is out of reach; names the reachable range.
        NothingPrunedError: no channel would be removed.
    """
    notes: tuple[str, ...] = ()
    seed = scores.seed
    while True:
        planned = make_plan(source, graph, scores, target, settings)
        proof = _proof(source, graph, planned.plan, _kept(planned.plan), seed=seed)
        if proof.relative_error <= EQUIVALENCE_TOLERANCE:
            return Proven(planned=replace(planned, notes=(*notes, *planned.notes)), proof=proof, graph=graph)
        refusal = _refusal(planned.plan, proof)
        if len(notes) == _MOST_SPARED:
            raise refusal
        names = proof.unseen or _culprits(source, graph, planned.plan, seed=seed)
        problem = proof.reason or f"the outputs differ by {proof.relative_error:.2g}"
        graph = graph.without(names, f"a cut of it was tried and is not right: {problem}")
        notes = (*notes, f"{', '.join(names)}: all channels stay, a cut was tried and is not right ({problem})")
        if not graph.groups:
            raise refusal


def proof_of(source: Source, plan: Plan) -> equivalence.Equivalence:
    """Show that a plan which lies before us is right for this model; nothing is planned again.

    Raises:
        UnsupportedError: the plan does not fit the model, or the cut net does not equal the silenced dense net.
    """
    proof = equivalence.equivalence_error(
        source.model,
        groups=plan.groups,
        attributes=plan.attributes,
        folds=plan.folds,
        input_size=source.spec.size,
        seed=plan.seed,
    )
    if proof.relative_error > EQUIVALENCE_TOLERANCE:
        raise _refusal(plan, proof)
    return proof


def _kept(plan: Plan) -> dict[str, int]:
    return {group.name: len(group.keep) for group in plan.cut_groups}


def _culprits(source: Source, graph: Graph, plan: Plan, *, seed: int) -> tuple[str, ...]:
    """The groups of the first tie with which a correct cut of those before becomes a wrong one, found by bisection."""
    kept = _kept(plan)
    units = [tuple(name for name in tie.groups if name in kept) for tie in graph.all_ties()]
    units = [unit for unit in units if unit]
    good, bad = 0, len(units)
    while bad - good > 1:
        middle = (good + bad) // 2
        some = {name: kept[name] for unit in units[:middle] for name in unit}
        right = _proof(source, graph, plan, some, seed=seed).relative_error <= EQUIVALENCE_TOLERANCE
        good, bad = (middle, bad) if right else (good, middle)
    return units[bad - 1]


def _proof(source: Source, graph: Graph, plan: Plan, kept: Mapping[str, int], *, seed: int) -> equivalence.Equivalence:
    """The proof of a plan of which only the groups in ``kept`` (width by name) are cut."""
    whole = {group.name: tuple(range(group.width)) for group in plan.groups if group.name not in kept}
    return equivalence.equivalence_error(
        source.model,
        groups=tuple(g.model_copy(update={"keep": whole.get(g.name, g.keep)}) for g in plan.groups),
        attributes=graph.solve(kept),
        folds=plan.folds,
        input_size=source.spec.size,
        seed=seed,
    )


def _refusal(plan: Plan, proof: equivalence.Equivalence) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.model.name} cannot be pruned correctly: the pruned net differs from the dense net with those "
        f"channels silenced by {proof.relative_error:.2g} (relative, float64; limit {EQUIVALENCE_TOLERANCE:g}). "
        f"{proof.reason}".rstrip(),
        hint="Exclude the layers with prune.exclude, and please report the model.",
    )
