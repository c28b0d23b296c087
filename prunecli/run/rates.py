"""``prunecli lr --measure``: one cut, fine-tuned briefly at several learning rates, without and with recovery.

The cut and the recovery are the stages of ``compress``; in place of its fine-tuning there is one for each arm and rate.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import nn
from torch.nn.functional import cross_entropy

from prunecli.errors import DivergedError, UsageError
from prunecli.files import write_json, write_tensors, write_text
from prunecli.measure.accuracy import answers
from prunecli.models.tensors import state_digest
from prunecli.models.user_function import Function
from prunecli.recipe.layers import layered
from prunecli.recipe.recipe import Recipe
from prunecli.recovery.steps import apply_steps, has_batch_norm
from prunecli.run.export import read_config, require_consent
from prunecli.run.folder import RunFolder
from prunecli.run.job import Job, Notify, interruptible, open_job, reload_
from prunecli.run.learning_rate import finetune_settings, recommended_lr
from prunecli.run.measured import measured_stage
from prunecli.run.progress import FinishedRates, JudgedTrial
from prunecli.run.recovery_context import recovery_context
from prunecli.run.source import run_of
from prunecli.run.stages import (
    cut_stage,
    dense_stage,
    fine_tune_,
    phase_stage,
    pick_stage,
    plan_stage,
    recover_stage_,
    repeated_plan_stage,
)
from prunecli.run.summary import versions
from prunecli.show.rates_page import rates_page
from prunecli.training.rate_outcomes import Judged, outcomes, rates_around, regret, verdicts
from prunecli.values.measured_rates import PLAIN, Answers, MeasuredRates, RateArm, RateTrial
from prunecli.values.plan import Plan
from prunecli.values.report import RecoveryStep

_EPOCHS: Final = 1  # of each fine-tuning, unless asked for otherwise


def measure_rates(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> MeasuredRates:
    """Fine-tune the cut of ``recipe`` at five rates around the recommended one, from three starts.

    The starts, called arms, are the plain cut, OrthP (with BatchNorm re-estimated), and the recovery of the recipe; all
    see the same images in the same order. Where the recipe names a run folder and no target, the cut is that of the
    run, made again from the run's own base, and its recovery the one that the run kept.

    Args:
        recipe: the job, of which ``finetune.epochs`` is the length of each fine-tuning; 1 where it is not given.
        out: the folder; ``None`` for ``runs/NAME-N``.
        resume: whether to continue a measurement; finished fine-tunings are not repeated.
        force: whether to replace what is in the folder.
        notify: called with every event.

    Raises:
        PruneError: as ``compress``.
    """
    asked = resolved(recipe)
    if asked.run is not None and out is not None and out.resolve() == asked.run.path.resolve():
        raise UsageError(f"{out} is the run to measure and cannot be replaced.", hint="Choose another --out.")
    job = open_job("lr --measure", asked.recipe, out=out, resume=resume, force=force, notify=notify)
    with interruptible(job):
        planned = plan_stage(job) if asked.run is None else repeated_plan_stage(job, asked.run)
        dense_stage(job)
        planned = pick_stage(job, planned)
        trained = phase_stage(job, planned.plan)
        smaller = cut_stage(job, planned, trained)
        recovered = copy.deepcopy(smaller)
        recover_stage_(job, planned.plan, trained, recovered)
        starts = _arms(job, planned.plan, trained, smaller, recovered)
        _train_all(job, starts)
        return _finish(job)


# ---------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be measured.

    Attributes:
        recipe: the job, from the dense model on.
        run: the run whose plan is repeated; ``None`` where the cut is planned.
    """

    recipe: Recipe
    run: RunFolder | None


def resolved(recipe: Recipe) -> Asked:
    """The job of a measurement: the recipe's own, or for a run folder without a target the job of that run.

    What was given beside a run (data, epochs, recovery) goes before the run's own recipe, but not its length.

    Raises:
        UsageError: nothing could be measured like this.
        PruneError: the run's files cannot be read.
    """
    run = run_of(recipe) if recipe.target is None else None
    if run is None:
        epochs = _EPOCHS if recipe.finetune.epochs is None else recipe.finetune.epochs
        asked = recipe.updated(finetune=recipe.finetune.updated(epochs=epochs))
    else:
        asked = _repeated(recipe, run)
    if asked.data.name is None:
        raise UsageError("Measuring learning rates needs data.", hint="Give --data.")
    if asked.finetune.epochs == 0:
        raise UsageError("Fine-tuning for 0 epochs tells nothing about rates.", hint="Give --epochs.")
    if asked.finetune.schedule.kind in {"rewind", "allr"}:
        kind = asked.finetune.schedule.kind
        raise UsageError(
            f"Schedule {kind} says its own rates, so there are none to compare.", hint="finetune.schedule=cosine"
        )
    if asked.init is not None:
        raise UsageError(f"init {asked.init.kind} starts anew after the cut, so there is nothing to recover.")
    return Asked(recipe=asked, run=run)


def _repeated(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe of a finished run with what was given beside it, and with the recovery that the run kept."""
    if not run.finished:
        raise UsageError(f"{run.path} holds an unfinished run.", hint="--resume continues it.")
    function = Function(name=recipe.function, args=recipe.model_args) if recipe.function else None
    require_consent(run.path, read_config(run.path).model, function)
    recorded, report = run.recipe(), run.report()
    if recorded.method.kind != "oneshot" or recorded.init is not None:
        raise UsageError(
            f"{run.path} trained before its cut, which only the whole job repeats.",
            hint=f"prunecli lr --measure --recipe {run.recipe_file}",
        )
    kept = _kept_steps(report.recovery)
    given = recipe.model_dump(mode="json", exclude_unset=True, exclude={"model", "function", "model_args", "target"})
    own = {"recover": {"steps": kept}, "finetune": {"epochs": _EPOCHS}}
    return Recipe.from_mapping(layered(recorded.to_mapping(), own, given), origin=str(run.recipe_file))


def _kept_steps(rows: Iterable[RecoveryStep]) -> tuple[str, ...]:
    """The steps that a recovery kept, in their order; a row of ``auto`` names several."""
    return tuple(name for row in rows if row.kept for name in row.name.split("+"))


# ---------------------------------------------------------------------------------------------- the arms


def _arms(
    job: Job, plan: Plan, trained: nn.Module, smaller: nn.Module, recovered: nn.Module
) -> Mapping[str, nn.Module]:
    """The start of every arm by name, each measured before any training. Equal starts are one arm."""
    orthp = copy.deepcopy(smaller)
    steps = ("orthp", "bn") if has_batch_norm(smaller) else ("orthp",)
    weights = job.folder.weights_after("orthp")
    chosen = _kept_steps(job.progress.recovery)
    candidates = {(): smaller, steps: orthp, chosen: recovered}  # of equal steps only one is left
    if job.progress.rates is None:
        job.notify({"event": "start", "name": "orthp"})
        orthp.load_state_dict(apply_steps(recovery_context(job, trained, plan), smaller, steps).model.state_dict())
        write_tensors(weights, orthp.state_dict())
        _record_arms(job, plan, candidates, chosen)
    else:
        reload_(orthp, weights)
    assert job.progress.rates is not None
    return {arm.name: candidates[arm.steps] for arm in job.progress.rates.arms}


def _record_arms(
    job: Job, plan: Plan, candidates: Mapping[tuple[str, ...], nn.Module], chosen: tuple[str, ...]
) -> None:
    """Measure the starts and make them durable. A start with the weights of an earlier one is no arm of its own."""
    known = {chosen: job.progress.stage("recovered"), (): job.progress.stage("pruned")}
    names: dict[str, str] = {}  # of the first arm with these weights
    arms: list[RateArm] = []
    for steps, model in candidates.items():
        name = "+".join(steps) or PLAIN
        if names.setdefault(state_digest(model.state_dict()), name) != name:
            continue
        start = known.get(steps) or measured_stage(job, "recovered", model, time.perf_counter())[0]
        recommended = recommended_lr(job, model, job.history(plan, start)).recommended
        arms.append(RateArm(name=name, steps=steps, start=start, recommended=recommended))
    assert job.progress.lr is not None
    rates = FinishedRates(
        dense=_judged(job, job.source.model)[0],
        arms=tuple(arms),
        chosen=names[state_digest(candidates[chosen].state_dict())],
        rates=rates_around(job.progress.lr.recommended),
    )
    job.save(job.progress.model_copy(update={"rates": rates}))


def _judged(job: Job, model: nn.Module) -> tuple[Answers, float]:
    """The answers to all validation images, and the mean cross-entropy in nats."""
    assert job.images is not None
    logits, labels = answers(model, job.images.val_loader(), device=job.device)
    right: list[bool] = (logits.argmax(dim=1) == labels).tolist()
    return Answers.of(right), float(cross_entropy(logits, labels))


# ---------------------------------------------------------------------------------------------- the fine-tunings


def _train_all(job: Job, starts: Mapping[str, nn.Module]) -> None:
    """Every arm at every rate; each is on the disk before the next begins."""
    assert job.progress.rates is not None
    pairs = [(arm, lr) for arm in starts for lr in job.progress.rates.rates]
    for number, (arm, lr) in enumerate(pairs, start=1):
        if job.progress.rates.has(arm, lr):
            continue
        place = {"arm": arm, "lr": lr, "number": number, "of": len(pairs)}
        job.notify({"event": "start", "name": "trial", **place})
        done = _trial(job, starts[arm], arm, lr)
        rates = job.progress.rates
        job.save(job.progress.model_copy(update={"rates": rates.updated(trials=(*rates.trials, done))}))
        job.folder.drop_training_state("finetune")
        job.say("trial", **place, top1=done.trial.top1, diverged=done.trial.diverged)


def _trial(job: Job, start: nn.Module, arm: str, lr: float) -> JudgedTrial:
    """One fine-tuning of a copy of ``start``. A training that diverges ends at the accuracy of guessing."""
    assert job.images is not None
    began = time.perf_counter()
    model = copy.deepcopy(start)
    try:
        # Arms are compared after equal budgets, so the last epoch counts.
        done = fine_tune_(job, model, finetune_settings(job).updated(export="last"), lr=lr)
    except DivergedError:
        guessing = 100 / job.images.num_classes
        seconds = round(time.perf_counter() - began, 3)
        lost = RateTrial(arm=arm, lr=lr, top1=guessing, best_top1=guessing, loss=None, diverged=True, seconds=seconds)
        return JudgedTrial(trial=lost, answers=None)
    right, loss = _judged(job, model)
    seconds = round(time.perf_counter() - began, 3)
    best = max(right.top1, done.best_top1 or 0.0)
    return JudgedTrial(
        trial=RateTrial(arm=arm, lr=lr, top1=right.top1, best_top1=best, loss=loss, seconds=seconds), answers=right
    )


# ---------------------------------------------------------------------------------------------- the end


def _finish(job: Job) -> MeasuredRates:
    """The result, with its page. ``lr.json`` is written last: it marks the measurement as finished."""
    found = _result(job)
    write_text(job.folder.rates_page, rates_page(found, recipe=job.recipe.to_yaml()))
    write_json(job.folder.rates_file, found.model_dump(mode="json"))
    job.folder.drop_stage_weights()
    job.say("done", seconds=round(time.perf_counter() - job.started, 3))
    return found


def _result(job: Job) -> MeasuredRates:
    progress, rates = job.progress, job.progress.rates
    stage = progress.stage("dense")
    assert rates is not None
    assert progress.lr is not None
    assert stage is not None
    assert job.images is not None
    dense = Judged.of(rates.dense)
    curves: dict[str, dict[float, Judged]] = {arm.name: {} for arm in rates.arms}
    for done in rates.trials:
        judged = Judged(top1=done.trial.top1, images=dense.images, answers=done.answers)
        curves[done.trial.arm][done.trial.lr] = judged
    recommended = progress.lr.recommended
    found = outcomes(curves, dense, recommended)
    given_away = regret(curves, rates.chosen, recommended)
    return MeasuredRates(
        model=job.source.ref.name,
        chosen=rates.chosen,
        images=dense.images,
        epochs=job.epochs,
        steps=job.epochs * job.images.steps_per_epoch,
        distill=finetune_settings(job).distill.share,
        dense=stage,
        arms=rates.arms,
        rates=rates.rates,
        lr=progress.lr,
        trials=tuple(done.trial for done in rates.trials),
        outcomes=found,
        regret=given_away,
        verdicts=verdicts(curves, dense, found, given_away),
        recipe_sha256=job.recipe.sha256(),
        versions=versions(),
        seed=job.recipe.seed,
        warnings=tuple(dict.fromkeys((*job.source.notes, *progress.warnings))),
    )
