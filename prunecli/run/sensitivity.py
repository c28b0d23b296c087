"""What every width of every unit costs a model, and what the whole model keeps at less and less cost, untrained.

Everything measured is kept in the cache as soon as it is known (see ``known_losses``): the same command goes on where
it was interrupted, and ``compress`` plans from the same curves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from prunecli.data.images import Images
from prunecli.errors import InterruptedRunError, NothingPrunedError, TargetError, UsageError
from prunecli.files import write_json, write_text
from prunecli.graph.build import build_graph
from prunecli.interrupts import interrupted_as
from prunecli.measure import accuracy as measure_accuracy
from prunecli.measure.calibration import Calibration
from prunecli.measure.divergence import divergences, log_probabilities
from prunecli.models.source import Source
from prunecli.planning.make import Planned, make_plan
from prunecli.planning.prices import Prices
from prunecli.planning.prove import proven_plan
from prunecli.planning.score import Scores
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.target import Target
from prunecli.recovery.choose import recover_stage
from prunecli.run.job import Notify
from prunecli.run.known_losses import KnownLosses, digest, known_losses
from prunecli.run.recovery_context import untrained_context
from prunecli.run.scores import scores_of
from prunecli.run.source import load_source, open_calibration, open_images
from prunecli.run.summary import versions
from prunecli.show import page
from prunecli.surgery.cut import cut
from prunecli.values.groups import Graph
from prunecli.values.plan import Plan, UnitAllocation
from prunecli.values.report import Accuracy
from prunecli.values.sensitivity import MeasuredPoint, Sensitivity, SensitivityPoint, UnitSensitivity

_SHARES: Final = tuple(range(95, 25, -5))  # of the dense multiply-adds, percent: the predicted curve
_MEASURED: Final = 10  # every share that this divides is cut and measured too


@dataclass(frozen=True, kw_only=True)
class Found:
    """The sensitivity of a model, and the folder that it was written to; ``None`` where there is none."""

    sensitivity: Sensitivity
    folder: Path | None


def sensitivity(recipe: Recipe, *, out: Path | None = None, notify: Notify = lambda _: None) -> Found:
    """Measure the curves of all units, then cut the whole model to several costs, recover it and measure it.

    Widths are chosen by loss, whatever ranking the recipe names; the recovery is the recipe's, and nothing is trained.
    The lowest cut is proved, as every cut of ``compress`` is.

    Args:
        recipe: model, data, and the settings of cut and recovery; a target or a method is not looked at.
        out: folder for ``sensitivity.json`` and ``sensitivity.html``; ``None``: beside the cached measurements.
        notify: called with every event.

    Raises:
        UsageError: there are no images to calibrate with, or an argument is wrong.
        NothingPrunedError: no unit may be cut.
        UnsupportedError: a cut is wrong.
        InterruptedRunError: Ctrl-C or SIGTERM; what was measured is kept.
    """

    def explain() -> InterruptedRunError:
        return InterruptedRunError("Interrupted; what was measured is kept.", hint="The same command goes on from it.")

    with interrupted_as(explain):
        notify({"event": "start", "name": "load"})
        source = load_source(recipe)
        images = open_images(recipe, source)
        calibration = open_calibration(recipe, source, images)
        if calibration is None:
            raise UsageError(
                "Sensitivity is measured on images.",
                hint="Give --data, or a folder of images without labels: data.calibration=FOLDER.",
            )
        prune = recipe.prune.updated(ranking="loss").decided(by_data=True)
        return _measured(recipe.updated(prune=prune), source, images, calibration, out, notify)


def _measured(
    recipe: Recipe, source: Source, images: Images | None, calibration: Calibration, out: Path | None, notify: Notify
) -> Found:
    graph = build_graph(source.model, source.spec.size, engine=recipe.prune.graph)
    known = known_losses(source, graph, recipe, calibration, criterion=recipe.prune.criterion)
    notify({"event": "start", "name": "plan"})
    scores = scores_of(source, graph, recipe, images, calibration, notify=notify)
    plans, notes = _plans(source, graph, scores, recipe)
    notify({"event": "start", "name": "cuts"})
    dense = _dense(known, recipe, source, images, calibration)
    points = []
    for share, planned in plans.items():
        point = None
        if share % _MEASURED == 0:
            point = _point(known, recipe, source, images, calibration, planned.plan)
            top1 = point.accuracy.top1 if point.accuracy else None
            notify({"event": "cut", "asked": share, "kl": point.kl, "recovery": point.recovery, "top1": top1})
        plan = planned.plan
        points.append(
            SensitivityPoint(asked=share, cost=plan.predicted, predicted_kl=plan.predicted_kl, measured=point)
        )
    last = plans[min(plans)]
    found = Sensitivity(
        model=source.ref.name,
        base=source.cost,
        dense=dense,
        calibration_images=sum(map(len, calibration.batches)),
        held_out_images=len(calibration.held_out),
        units=_units(source, graph, last.plan.allocation),
        points=tuple(points),
        notes=(*source.notes, *last.notes, *notes),
        versions=versions(),
    )
    folder = out or (known.path if known else None)
    if folder is not None:
        write_text(folder / "sensitivity.html", page.sensitivity_page(found))
        write_json(folder / "sensitivity.json", found.model_dump(mode="json"))
    return Found(sensitivity=found, folder=folder)


def _plans(
    source: Source, graph: Graph, scores: Scores, recipe: Recipe
) -> tuple[Mapping[int, Planned], tuple[str, ...]]:
    """The plan for each share that can be reached, highest first, and a sentence on those that cannot."""

    def made(graph: Graph) -> tuple[dict[int, Planned], tuple[str, ...]]:
        plans: dict[int, Planned] = {}
        for share in _SHARES:
            try:
                plans[share] = make_plan(source, graph, scores, Target.parse(f"macs={share}%"), recipe.prune)
            except NothingPrunedError:
                if share == _SHARES[-1]:
                    raise
            except TargetError as error:
                if not plans:
                    raise
                return plans, (f"Nothing below {min(plans)} % was tried: {error}",)
        return plans, ()

    plans, notes = made(graph)
    if recipe.equivalence_check:
        lowest = Target.parse(f"macs={min(plans)}%")
        proven = proven_plan(source, graph, scores, lowest, recipe.prune)
        if proven.graph is not graph:  # groups that cannot be cut correctly stay whole
            plans, notes = made(proven.graph)
            notes = (*proven.planned.notes, *notes)
    return plans, notes


def _point(
    known: KnownLosses | None,
    recipe: Recipe,
    source: Source,
    images: Images | None,
    calibration: Calibration,
    plan: Plan,
) -> MeasuredPoint:
    """One cut, from the cache or measured."""
    name = f"cuts/{digest([plan.sha256(), recipe.recover.model_dump(mode='json'), _validation(recipe, images)])}.json"
    found = known.value(MeasuredPoint, name) if known else None
    if found is None:
        found = _cut_and_measured(recipe, source, images, calibration, plan)
        if known:
            known.keep(name, found)
    return found


def _dense(
    known: KnownLosses | None, recipe: Recipe, source: Source, images: Images | None, calibration: Calibration
) -> Accuracy | None:
    """The dense model's accuracy, from the cache or measured; ``None`` without labels."""
    name = f"dense/{digest(_validation(recipe, images))}.json"
    found = known.value(Accuracy, name) if known else None
    if found is None:
        found = _accuracy(source.model, images, calibration)
        if known and found is not None:
            known.keep(name, found)
    return found


def _validation(recipe: Recipe, images: Images | None) -> dict[str, Any] | None:
    """What decides on the validation images; ``None`` without any."""
    return recipe.data.model_dump(mode="json", exclude={"batch_size", "workers"}) if images else None


def _cut_and_measured(
    recipe: Recipe, source: Source, images: Images | None, calibration: Calibration, plan: Plan
) -> MeasuredPoint:
    began = time.perf_counter()
    context = untrained_context(recipe, source, plan, calibration, calibration.device)
    model, rows = recover_stage(context, cut(source.model, plan), lambda _: 0.0)
    held_out = calibration.held_out
    kept = [row.name for row in rows if row.kept]
    return MeasuredPoint(
        kl=float(divergences(*(log_probabilities(net, held_out) for net in (source.model, model))).mean()),
        recovery="+".join(kept) or "none",
        accuracy=_accuracy(model, images, calibration),
        seconds=round(time.perf_counter() - began, 3),
    )


def _accuracy(model: nn.Module, images: Images | None, calibration: Calibration) -> Accuracy | None:
    if images is None:
        return None
    device = calibration.device
    return measure_accuracy.evaluate(model.to(device), images.val_loader(), device=device)


def _units(source: Source, graph: Graph, units: Sequence[UnitAllocation]) -> tuple[UnitSensitivity, ...]:
    """The curves of all units, with what each width saves."""
    names = [name for name, _ in source.model.named_parameters()]
    meter = Prices(graph=graph, parameters=names, stored=(), base=source.cost, bytes_per_element=4).meter("macs")
    return tuple(
        UnitSensitivity(
            groups=unit.groups,
            width=unit.width,
            curve=unit.curve,
            kl=unit.kl,
            saved={kept: 100 * (1 - meter.trial(_widths(graph, unit, kept)) / source.cost.macs) for kept in unit.curve},
        )
        for unit in units
    )


def _widths(graph: Graph, unit: UnitAllocation, kept: int) -> dict[str, int]:
    return {name: kept * graph.group(name).width // unit.width for name in unit.groups}
