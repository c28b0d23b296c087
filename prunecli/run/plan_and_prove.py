"""From a loaded model to a proven plan: scores are taken once, then it is planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from prunecli.data.images import Images
from prunecli.errors import UsageError
from prunecli.graph.build import build_graph
from prunecli.measure.calibration import Calibration
from prunecli.methods import gateable, phase
from prunecli.methods.initialisation import initialise_
from prunecli.models.source import Source
from prunecli.planning.budget import Learned
from prunecli.planning.make import Planned, make_plan
from prunecli.planning.prove import proof_of, proven_plan
from prunecli.planning.score import Scores
from prunecli.proof.equivalence import Equivalence
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DATA_DRIVEN, PruneSettings
from prunecli.recipe.target import Target
from prunecli.run.job import Notify
from prunecli.run.scores import gate_scores, open_gates, scores_of
from prunecli.surgery.cut import cut
from prunecli.values.groups import Graph
from prunecli.values.plan import Plan

Magnitudes = Mapping[str, Tensor]  # of learnt gates: |a| [width] by group name

_UNPROVED: Final = "the equivalence check was switched off"


def plan_and_prove(
    source: Source,
    recipe: Recipe,
    images: Images | None,
    gates: Magnitudes | None = None,
    *,
    calibration: Calibration | None = None,
    notify: Notify = lambda _: None,
) -> tuple[Planned, str]:
    """Trace, score, plan and prove; what ``--dry-run`` shows. Before gates are learnt, the plan is one on trial.

    Raises as ``scores_of``, ``make_plan`` and ``proven_plan``, and UsageError where there is no target, or where a
    phase before the cut has nothing to train with or is too short for this plan.
    """
    phase.require_possible(recipe, images)
    by_data = calibration is not None and _chooses_freely(recipe)
    remarks = _remarks(recipe, images, calibration)
    recipe = recipe.updated(prune=recipe.prune.decided(by_data=by_data))
    if recipe.target is None and recipe.method.kind != "abp":
        raise UsageError("No target was given.", hint="For example --target macs=50%.")
    graph = build_graph(source.model, source.spec.size, engine=recipe.prune.graph)
    goal: _Goal
    if gates is not None:
        goal = _gated_goal(graph, recipe, gates)
    elif recipe.method.kind == "abp":
        found = gateable.gateable(source, graph, recipe.target, recipe.prune, seed=recipe.seed)
        goal = _Goal(found.graph, found.scores, found.target, found.settings, before=found.notes)
    else:
        assert recipe.target is not None
        scores = scores_of(source, graph, recipe, images, calibration, notify=notify)
        goal = _Goal(graph, scores, recipe.target, recipe.prune)
    if recipe.equivalence_check:
        proven = proven_plan(source, goal.graph, goal.scores, goal.target, goal.settings)
        planned, proof = proven.planned, _proved(proven.proof)
    else:
        planned = make_plan(source, goal.graph, goal.scores, goal.target, goal.settings)
        proof = _UNPROVED
    phase.require_time(recipe, planned.plan.groups)
    if recipe.init is not None:
        # A sparsity that no layer can have is refused now.
        initialise_(cut(source.model, planned.plan), recipe.init, source.spec.size, seed=recipe.seed)
    return replace(planned, notes=(*remarks, *goal.before, *planned.notes, *goal.after)), proof


def prove_again(source: Source, recipe: Recipe, plan: Plan) -> str:
    """The proof of a plan that another run has left, as a sentence.

    Raises:
        UnsupportedError: it does not fit the model, or is not right for it.
    """
    return _proved(proof_of(source, plan)) if recipe.equivalence_check else _UNPROVED


def _proved(proof: Equivalence) -> str:
    return f"pruned net equals silenced dense net to {proof.relative_error:.1e} (relative, float64)"


def _chooses_freely(recipe: Recipe) -> bool:
    """Whether what layers read may decide: a plain cut of weights that stay.

    Methods that train before the cut keep the choice of their papers, weight norms layer by layer.
    """
    return recipe.method.kind == "oneshot" and recipe.init is None


def _remarks(recipe: Recipe, images: Images | None, calibration: Calibration | None) -> tuple[str, ...]:
    """Sentences on what the images that channels are chosen by mean for the result."""
    if not _chooses_freely(recipe) or recipe.prune.criterion not in {"auto", *DATA_DRIVEN}:
        return ()
    if calibration is None:
        return (
            "Channels were chosen by their weights alone. With some 200 photographs, without labels, far more of the "
            "accuracy stays: data.calibration=FOLDER.",
        )
    if images is not None and not images.train_size and recipe.data.calibration is None:
        return (
            "There are no training images, so channels are chosen by validation images: accuracy on them flatters the "
            "result. data.calibration=FOLDER takes others.",
        )
    return ()


@dataclass(frozen=True)
class _Goal:
    """All that decides a plan, and notes for before and behind its own."""

    graph: Graph
    scores: Scores
    target: Target | Learned
    settings: PruneSettings
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def _gated_goal(graph: Graph, recipe: Recipe, gates: Magnitudes) -> _Goal:
    """Learnt gates rank the channels; without a target they also say how many stay."""
    graph, notes = gateable.without_norms(graph)
    scores = gate_scores(gates, seed=recipe.seed)
    needed = open_gates(scores)
    if recipe.target is None:
        return _Goal(graph, scores, Learned(widths=needed), recipe.prune, before=notes)
    closed = 1 - sum(needed.values()) / sum(len(values) for values in scores.channels.values())
    remark = f"left to themselves, the gates would close {closed:.4g} of the channels"
    return _Goal(graph, scores, recipe.target, recipe.prune, before=notes, after=(remark,))
