"""The scores of a job: what its method or criterion makes of every channel, taken once, before any plan is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunecli.data.images import Images
from prunecli.errors import UsageError
from prunecli.measure.calibration import Calibration
from prunecli.methods.epsd import epsd_scores
from prunecli.methods.gates import is_open
from prunecli.models.device import resolve_device
from prunecli.models.outputs import logits_of
from prunecli.models.source import Source
from prunecli.planning.score import Scores, score_model
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DATA_DRIVEN
from prunecli.run.job import Notify
from prunecli.run.known_losses import known_losses
from prunecli.sensitivity.measured_losses import MeasuredLosses
from prunecli.values.groups import Graph


def scores_of(
    source: Source,
    graph: Graph,
    recipe: Recipe,
    images: Images | None,
    calibration: Calibration | None = None,
    *,
    notify: Notify = lambda _: None,
) -> Scores:
    """Scores of every group, by the recipe's method or criterion, and losses where its ranking needs them.

    Args:
        source: the dense model; it stays as it is.
        graph: the groups to score.
        recipe: method, criterion, seed and device.
        images: labelled images, for a method or criterion that needs labels.
        calibration: images without labels, for a criterion or ranking that looks at what layers read.
        notify: called with the event of each loss curve that was measured.

    Raises:
        UsageError: a method or criterion that needs data, without data.
        PruneError: as ``epsd_scores`` and ``score.score_groups``.
    """
    if recipe.method.kind == "epsd":
        if images is None or images.steps_per_epoch < 1:
            raise UsageError(
                "Method epsd takes a few training steps, so it needs training images.", hint="Give --data."
            )
        channels = epsd_scores(
            source.model,
            graph.groups,
            images,
            recipe.method,
            recipe.finetune,
            device=resolve_device(recipe.device),
            seed=recipe.seed,
        )
        return Scores(criterion="epsd", seed=recipe.seed, channels=channels)
    criterion, gradients = recipe.prune.criterion, None
    if criterion == "taylor":
        if images is None:
            raise UsageError("Criterion taylor needs gradients, so it needs --data.")
        gradients = _gradients(source.model, *images.calibration(recipe.prune.calibration_images))
    if criterion not in DATA_DRIVEN and recipe.prune.ranking != "loss":
        return score_model(source.model, graph.groups, criterion=criterion, seed=recipe.seed, gradients=gradients)
    if calibration is None:
        what = f"Criterion {criterion}" if criterion in DATA_DRIVEN else "Ranking loss"
        raise UsageError(
            f"{what} looks at what layers read, so it needs images.",
            hint="Give --data, or a folder of images without labels: data.calibration=FOLDER.",
        )
    source.model.to(calibration.device)
    store = known_losses(source, graph, recipe, calibration, criterion=criterion)
    known = store.scores() if store and criterion in DATA_DRIVEN else None
    if known is not None:
        scores = Scores(criterion=criterion, seed=recipe.seed, channels=known)
    else:
        statistics = calibration.statistics(source.model, graph.groups)
        scores = score_model(
            source.model,
            graph.groups,
            criterion=criterion,
            seed=recipe.seed,
            gradients=gradients,
            statistics=statistics,
        )
        if store and criterion in DATA_DRIVEN:
            store.keep_scores(scores.channels)
    if recipe.prune.ranking != "loss":
        return scores
    losses = MeasuredLosses(
        source=source,
        graph=graph,
        scores=scores.channels,
        calibration=calibration,
        ridge=recipe.recover.ridge,
        store=store,
        notify=notify,
    )
    return replace(scores, losses=losses)


def gate_scores(magnitudes: Mapping[str, Tensor], *, seed: int) -> Scores:
    """Scores of learnt gates, |a| ``[width]`` by group name."""
    return Scores(criterion="gates", seed=seed, channels=magnitudes)


def open_gates(scores: Scores) -> dict[str, int]:
    """How many gates of each group are open: the width that the gates ask for."""
    return {name: int(is_open(values).sum()) for name, values in scores.channels.items()}


def _gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss gradients of all parameters on calibration images, model untouched."""
    probe = copy.deepcopy(model).eval()
    loss = nn.functional.cross_entropy(logits_of(probe(inputs)), labels)
    names, parameters = zip(*probe.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
