"""The stages of a job, one function each, in the order in which ``pipeline`` calls them.

A stage that an earlier start finished is not repeated: what it left is reloaded. ``stage_`` is the frame that all of
them share; a stage hands it the work, and what is to be recorded once the result has been measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from torch import nn

from prunecli.errors import PruneError, TargetError
from prunecli.files import read_json, write_json, write_tensors, write_text
from prunecli.measure import cost
from prunecli.measure.weights import weight_spectra
from prunecli.methods.initialisation import initialise_
from prunecli.models.source import Source
from prunecli.models.user_function import Function
from prunecli.planning.make import Planned
from prunecli.recipe.settings import FinetuneSettings
from prunecli.recovery.choose import recover_stage
from prunecli.run import phases, verify
from prunecli.run.export import export
from prunecli.run.folder import RunFolder
from prunecli.run.job import Job, reload_
from prunecli.run.learning_rate import finetune_settings, learning_rate, learning_rate_at, recommended_lr
from prunecli.run.measured import measured_stage
from prunecli.run.plan_and_prove import plan_and_prove, prove_again
from prunecli.run.recovery_context import recovery_context
from prunecli.run.summary import rounded, summarise
from prunecli.show import page
from prunecli.surgery.cut import cut
from prunecli.training import finetune as finetuning
from prunecli.training.loop import TrainingRun
from prunecli.values.plan import Cost, Plan
from prunecli.values.report import FinetuneReport, RecoveryStep, Report, Stage, StageName, TargetResult

TARGET_TOLERANCE: Final = 0.01


# ---------------------------------------------------------------------------------------------- the frame of a stage


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage did to its model, as far as the frame has to know.

    Attributes:
        record: the further entries of the progress, as a function of the measured stage.
        notes: remarks for the report.
        seconds: time that was spent before the frame began to count.
        unchanged_since: stage whose measurement still holds, because the model is the same; ``None``: measure it.
    """

    record: Callable[[Stage], Mapping[str, object]] = lambda _: {}
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    unchanged_since: StageName | None = None


def stage_(
    job: Job, name: StageName, model: nn.Module, work: Callable[[], Work], *, weights: Path | None = None
) -> None:
    """Run one stage: work, measure, write the weights, save. A stage that an earlier start finished is reloaded.

    Args:
        job: the run; its progress gains the stage.
        name: of the stage.
        model: the model that the stage works on, in place.
        work: the stage's own part. It is called only where no earlier start finished the stage.
        weights: file that keeps the model's weights for a resume; ``None``: the stage leaves them as they were.
    """
    if job.progress.stage(name):
        if weights is not None:
            reload_(model, weights)
        return
    began = time.perf_counter()
    done = work()
    if done.unchanged_since is None:
        stage, jacobian = measured_stage(job, name, model, began - done.seconds, notes=done.notes)
    else:
        stage, jacobian = _carried_over(job, done.unchanged_since, name, began, notes=done.notes)
    record = done.record(stage)
    if weights is not None:
        write_tensors(weights, model.state_dict())
    job.save(job.progress.with_stage(stage, jacobian, **record))


def _carried_over(
    job: Job, earlier: StageName, name: StageName, began: float, *, notes: tuple[str, ...]
) -> tuple[Stage, tuple[float, ...] | None]:
    """The measurement of an earlier stage under a new name."""
    measured = job.progress.stage(earlier)
    assert measured is not None
    seconds = round(time.perf_counter() - began, 3)
    stage = measured.model_copy(update={"name": name, "seconds": seconds, "notes": notes})
    return stage, job.progress.jacobians.get(earlier)


# ---------------------------------------------------------------------------------------------- the plan


def plan_stage(job: Job) -> Planned:
    """The plan: read back where an earlier start made it, else made and proved before anything is written.

    Where the method picks channels only after a training phase, it is a plan on trial: ``pick_stage`` makes the final
    one.
    """
    if job.progress.target is not None:
        plan = job.folder.plan()
        if plan.sha256() != job.progress.plan_sha256:
            raise PruneError(
                f"{job.folder.plan_file} was changed after the run had started.", hint="--force starts again."
            )
        job.begin()
        return Planned(plan=plan, target=job.progress.target, notes=())
    job.notify({"event": "start", "name": "plan"})
    planned, proof = plan_and_prove(job.source, job.recipe, job.images, calibration=job.calibration, notify=job.notify)
    job.begin()
    if not phases.pick_late(job.recipe):
        _record_plan(job, planned, proof)
    return planned


def repeated_plan_stage(job: Job, run: RunFolder) -> Planned:
    """The plan of a finished run, for the dense model that it has cut; proved again, since files can change.

    Raises:
        PruneError: the run has no plan and target, or the model is not the one that it has cut.
    """
    if job.progress.target is not None:
        return plan_stage(job)
    plan, target = run.plan(), run.report().target
    if target is None or not plan.cut_groups:
        raise PruneError(f"{run.path} has cut nothing, so there is no cut to repeat.", hint="--target plans one.")
    if plan.base != job.source.cost or _base_digest(run) not in {None, job.source.digest}:
        raise PruneError(
            f"{job.source.ref.name} is not the model that {run.path} has cut: its weights or its shape differ.",
            hint="--target plans a cut of the model in that folder.",
        )
    proof = prove_again(job.source, job.recipe, plan)
    job.begin()
    planned = Planned(plan=plan, target=target, notes=(f"The cut is that of {run.path}.",))
    _record_plan(job, planned, proof)
    return planned


def _base_digest(run: RunFolder) -> str | None:
    """The digest of the weights that a run has cut; ``None`` where its progress is gone or was never written.

    The key alone is read: the progress of an earlier version may have another shape.
    """
    try:
        digest = read_json(run.progress_file)["source_digest"]
    except (PruneError, KeyError, TypeError):
        return None
    return str(digest)


def pick_stage(job: Job, planned: Planned) -> Planned:
    """The final plan: for a method that picks channels late, made from what its first phases leave."""
    if job.progress.target is not None:
        return planned
    learnt = phases.train_before_plan(job, planned.plan)
    job.notify({"event": "start", "name": "plan"})
    source = replace(job.source, model=learnt.model)
    planned, proof = plan_and_prove(
        source, job.recipe, job.images, learnt.gates, calibration=job.calibration, notify=job.notify
    )
    _record_plan(job, planned, proof)
    return planned


def _record_plan(job: Job, planned: Planned, proof: str) -> None:
    write_json(job.folder.plan_file, planned.plan.model_dump(mode="json"))
    job.say("plan", groups=len(planned.plan.cut_groups), macs=planned.plan.predicted.macs, proof=proof)
    made = {"target": planned.target, "plan_sha256": planned.plan.sha256(), "warnings": planned.notes}
    job.save(job.progress.model_copy(update=made))


def empty_plan(source: Source, seed: int) -> Plan:
    """The plan of a job that cuts nothing."""
    return Plan(
        model=source.ref,
        engine="none",
        criterion="none",
        ranking="none",
        seed=seed,
        groups=(),
        base=source.cost,
        predicted=source.cost,
    )


# ---------------------------------------------------------------------------------------------- from dense to smaller


def dense_stage(job: Job) -> None:
    """Measure the model as it came."""
    model = job.source.model

    def record(_: Stage) -> Mapping[str, object]:
        return {"dense_spectra": {name: rounded(values) for name, values in weight_spectra(model).items()}}

    stage_(job, "dense", model, lambda: Work(record=record))


def phase_stage(job: Job, plan: Plan) -> nn.Module:
    """The weights that are cut: those of the source, trained through the phases of the method where it has any."""
    trained = phases.train_before_cut(job, plan)
    if job.progress.phases:
        norms = plan.cut_norms
        note = f"the statistics of {len(norms)} norms, first {norms[0]}, change with the cut" if norms else None
        seconds = math.fsum(done.seconds for done in job.progress.phases)
        stage_(job, "regularised", trained, lambda: Work(notes=(note,) if note else (), seconds=seconds))
    return trained


def cut_stage(job: Job, planned: Planned, trained: nn.Module) -> nn.Module:
    """The smaller model. The target is checked on the model itself, not on the prediction.

    Raises TargetError where it was missed.
    """
    began = time.perf_counter()
    smaller = cut(trained, planned.plan)
    seconds = time.perf_counter() - began

    def record(stage: Stage) -> Mapping[str, object]:
        size = Cost(params=stage.params, macs=stage.macs, bytes=stage.bytes)
        if size != planned.plan.predicted:
            job.say("warning", text=f"predicted {planned.plan.predicted}, measured {size}")
        _check_target(planned.target, size, job.source.cost)
        return {"lr": recommended_lr(job, smaller, job.history(planned.plan, stage))}

    stage_(job, "pruned", smaller, lambda: Work(record=record, seconds=seconds))
    return smaller


def _check_target(target: TargetResult, size: Cost, base: Cost) -> None:
    """Raises TargetError where the cut model misses its target by more than the tolerance."""
    measured = {
        "macs": size.macs,
        "params": size.params,
        "size": size.bytes,
        "speedup": base.macs / max(size.macs, 1),
        "ratio": target.reached,
    }[target.metric]
    if target.metric != "ratio" and abs(measured - target.asked) > TARGET_TOLERANCE * target.asked:
        raise TargetError(
            f"Target {target.metric}={target.asked:g} was missed: the cut model has {measured:g}.",
            hint=f"Reachable: {target.reachable[0]:g} to {target.reachable[1]:g}.",
        )


def recover_stage_(job: Job, plan: Plan, trained: nn.Module, smaller: nn.Module) -> None:
    """Recover, in place, what the cut of ``trained`` to ``smaller`` broke."""

    def work() -> Work:
        assert job.progress.lr is not None
        job.notify({"event": "start", "name": "recover"})
        steps = _recover_(job, plan, trained, smaller)

        def record(stage: Stage) -> Mapping[str, object]:
            return {"recovery": steps, "lr": recommended_lr(job, smaller, job.history(plan, stage))}

        if any(step.kept for step in steps):
            return Work(record=record)
        note = "no recovery step was kept: the pruned weights"
        return Work(record=record, notes=(note,), unchanged_since="pruned")

    stage_(job, "recovered", smaller, work, weights=job.folder.weights_after("recovered"))


def _recover_(job: Job, plan: Plan, trained: nn.Module, smaller: nn.Module) -> tuple[RecoveryStep, ...]:
    """The recovery of the recipe; a recipe that trains from scratch starts anew instead."""
    if job.recipe.init is not None:
        return (initialise_(smaller.cpu(), job.recipe.init, job.source.spec.size, seed=job.recipe.seed),)
    context = recovery_context(job, trained, plan)
    model, steps = recover_stage(context, smaller, partial(learning_rate_at, job, plan, smaller))
    smaller.load_state_dict(model.state_dict())
    return steps


def finetune_stage_(job: Job, model: nn.Module) -> None:
    """Fine-tune in place; nothing happens where the budget is 0 epochs."""
    if job.epochs == 0:
        return

    def work() -> Work:
        job.notify({"event": "start", "name": "finetune", "epochs": job.epochs})
        result = fine_tune_(job, model, finetune_settings(job), lr=learning_rate(job))
        return Work(record=lambda _: {"finetune": result})

    stage_(job, "finetuned", model, work, weights=job.folder.weights_after("finetuned"))


def fine_tune_(job: Job, model: nn.Module, settings: FinetuneSettings, *, lr: float) -> FinetuneReport:
    """Fine-tune in place for the job's epochs, with its dense model as teacher; continues where it was broken off.

    Raises DivergedError where a loss or a weight is no longer a finite number.
    """
    assert job.images is not None
    return finetuning.finetune(
        model,
        job.images,
        settings,
        lr=lr,
        epochs=job.epochs,
        run=TrainingRun(
            device=job.device,
            seed=job.recipe.seed,
            folder=job.folder.training_state("finetune"),
            on_event=job.relay,
        ),
        teacher=job.source.model,
    )


# ---------------------------------------------------------------------------------------------- the end of a job


def finish(job: Job, plan: Plan, model: nn.Module) -> Report:
    """Export, verify in a fresh process, report. The report is written last: it marks the run as finished."""
    began = time.perf_counter()
    model = model.cpu().eval()
    size = cost.measure(model, job.source.spec.size)
    job.notify({"event": "start", "name": "export"})
    write_json(job.folder.plan_file, plan.model_dump(mode="json"))
    export(job.folder, model, ref=job.source.ref, base=job.source.cost, final=size)
    verified = verify.verify(job.folder.path, Function.of(job.source.ref))
    job.say("verify", seconds=round(time.perf_counter() - began, 3), **verified.model_dump())
    report = summarise(job, plan, model, size, verified)
    html = page.report_page(report, plan, jacobians=job.progress.jacobians, recipe=job.recipe.to_yaml())
    write_text(job.folder.page_file, html)
    write_json(job.folder.report_file, report.model_dump(mode="json"))
    job.folder.drop_stage_weights()
    job.say("done", seconds=round(time.perf_counter() - job.started, 3))
    return report
