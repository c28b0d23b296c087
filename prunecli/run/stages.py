"""The stages of a job, one function each."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from typing import Final

from torch import nn

from prunecli.errors import PruneError, TargetError
from prunecli.files import write_json, write_tensors, write_text
from prunecli.measure import cost
from prunecli.measure.weights import weight_spectra
from prunecli.methods.start import start_anew_
from prunecli.models.source import Source
from prunecli.models.user_function import Function
from prunecli.planning.make import Planned
from prunecli.recovery.choose import recover_stage
from prunecli.run import folder, phases, verify
from prunecli.run.export import export
from prunecli.run.job import Job, reload_
from prunecli.run.learning_rate import finetune_settings, learning_rate, learning_rate_at, recommended_lr
from prunecli.run.measured import measured_stage
from prunecli.run.plan_and_prove import plan_and_prove
from prunecli.run.recovery_context import recovery_context
from prunecli.run.summary import rounded, summarise
from prunecli.show import page
from prunecli.surgery.cut import cut
from prunecli.training import finetune as finetuning
from prunecli.training.loop import TrainingRun
from prunecli.values.plan import Cost, Plan
from prunecli.values.report import RecoveryStep, Report, TargetResult

TARGET_TOLERANCE: Final = 0.01


# ---------------------------------------------------------------------------------------------- resumable stages


def dense_stage(job: Job) -> None:
    """Measure the model as it came."""
    if job.progress.stage("dense"):
        return
    began = time.perf_counter()
    model = job.source.model
    stage, values = measured_stage(job, "dense", model, began)
    spectra = {name: rounded(sv) for name, sv in weight_spectra(model).items()}
    job.save(job.progress.with_stage(stage, values, dense_spectra=spectra))


def planned_stage(job: Job) -> Planned:
    """The plan: read back where an earlier start made it, else made and proved before anything is written."""
    if job.progress.target is not None:
        plan = job.folder.plan()
        if plan.sha256() != job.progress.plan_sha256:
            raise PruneError(
                f"{job.folder.path / folder.PLAN} was changed after the run had started.", hint="--force starts again."
            )
        job.begin()
        return Planned(plan=plan, target=job.progress.target, notes=())
    job.notify({"event": "start", "name": "plan"})
    planned, proof = plan_and_prove(job.source, job.recipe, job.images)
    job.begin()
    if phases.plans_late(job):
        dense_stage(job)
        learnt = phases.before_plan(job, planned.plan)
        job.notify({"event": "start", "name": "plan"})
        source = replace(job.source, model=learnt.model)
        planned, proof = plan_and_prove(source, job.recipe, job.images, learnt.gates)
    write_json(job.folder.path / folder.PLAN, planned.plan.model_dump(mode="json"))
    job.say("plan", groups=len(planned.plan.cut_groups), macs=planned.plan.predicted.macs, proof=proof)
    made = {"target": planned.target, "plan_sha256": planned.plan.sha256(), "warnings": planned.notes}
    job.save(job.progress.model_copy(update=made))
    return planned


def _regularised(job: Job, plan: Plan) -> nn.Module:
    """Train through the phases before the cut, if the method has any, and measure what they made of the dense net."""
    trained = phases.before_cut(job, plan)
    if job.progress.stage("regularised") or not job.progress.phases:
        return trained
    began = time.perf_counter() - math.fsum(done.seconds for done in job.progress.phases)
    norms = sorted({norm for group in plan.cut_groups for norm in group.norms})
    note = f"the statistics of {len(norms)} norms, first {norms[0]}, change with the cut" if norms else None
    stage, values = measured_stage(job, "regularised", trained, began, notes=(note,) if note else ())
    job.save(job.progress.with_stage(stage, values))
    return trained


def pruned_stage(job: Job, planned: Planned) -> nn.Module:
    """Measure dense, train before the cut, cut, measure again; the target is checked on the model itself, not on the
    prediction.
    """
    dense_stage(job)
    trained = _regularised(job, planned.plan)
    began = time.perf_counter()
    smaller = cut(trained, planned.plan)
    if job.progress.stage("pruned"):
        return smaller
    stage, values = measured_stage(job, "pruned", smaller, began)
    size = Cost(params=stage.params, macs=stage.macs, bytes=stage.bytes)
    if size != planned.plan.predicted:
        job.say("warning", text=f"predicted {planned.plan.predicted}, measured {size}")
    _check_target(planned.target, size, job.source.cost)
    recommended = recommended_lr(job, smaller, job.past(planned.plan, stage))
    job.save(job.progress.with_stage(stage, values, lr=recommended))
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


def recovered_stage(job: Job, planned: Planned, smaller: nn.Module) -> None:
    """Recover in place of ``smaller``'s weights; the recovered weights are kept on disk for a resume."""
    weights = job.folder.checkpoints / "recovered.safetensors"
    if job.progress.stage("recovered"):
        reload_(smaller, weights)
        return
    began = time.perf_counter()
    assert job.progress.lr is not None
    job.notify({"event": "start", "name": "recover"})
    steps: tuple[RecoveryStep, ...]
    if job.recipe.init is not None:
        steps = (start_anew_(smaller.cpu(), job.recipe, job.source.spec.size),)
    else:
        context = recovery_context(job, phases.before_cut(job, planned.plan), planned.plan)
        model, steps = recover_stage(context, smaller, partial(learning_rate_at, job, planned.plan, smaller))
        smaller.load_state_dict(model.state_dict())
    if not any(step.kept for step in steps):
        pruned = job.progress.stage("pruned")
        assert pruned is not None
        seconds = round(time.perf_counter() - began, 3)
        stage = pruned.model_copy(
            update={
                "name": "recovered",
                "seconds": seconds,
                "notes": ("no recovery step was kept: the pruned weights",),
            }
        )
        values = job.progress.jacobians.get("pruned")
    else:
        stage, values = measured_stage(job, "recovered", smaller, began)
    recommended = recommended_lr(job, smaller, job.past(planned.plan, stage))
    write_tensors(weights, smaller.state_dict())
    job.save(job.progress.with_stage(stage, values, recovery=steps, lr=recommended))


def finetuned_stage(job: Job, model: nn.Module) -> nn.Module:
    """Fine-tune, or say that nothing was fine-tuned."""
    weights = job.folder.checkpoints / "finetuned.safetensors"
    if job.progress.stage("finetuned"):
        reload_(model, weights)
        return model
    if job.epochs == 0:
        return model
    assert job.images is not None
    began = time.perf_counter()
    job.notify({"event": "start", "name": "finetune", "epochs": job.epochs})
    result = finetuning.finetune(
        model,
        job.images,
        finetune_settings(job),
        lr=learning_rate(job),
        epochs=job.epochs,
        run=TrainingRun(
            device=job.device,
            seed=job.recipe.seed,
            folder=job.folder.checkpoints / "finetune",
            on_event=job.relay,
        ),
        teacher=job.source.model,
    )
    stage, values = measured_stage(job, "finetuned", model, began)
    write_tensors(weights, model.state_dict())
    job.save(job.progress.with_stage(stage, values, finetune=result))
    return model


# ---------------------------------------------------------------------------------------------- the end of a job


def finish(job: Job, plan: Plan, model: nn.Module) -> Report:
    """Export, verify in a fresh process, report. The report is written last: it marks the run as finished."""
    began = time.perf_counter()
    model = model.cpu().eval()
    size = cost.measure(model, job.source.spec.size)
    job.notify({"event": "start", "name": "export"})
    write_json(job.folder.path / folder.PLAN, plan.model_dump(mode="json"))
    export(job.folder, model, ref=job.source.ref, base=job.source.cost, final=size)
    verified = verify.verify(job.folder.path, Function.of(job.source.ref))
    job.say("verify", seconds=round(time.perf_counter() - began, 3), **verified.model_dump())
    report = summarise(job, model, size, verified)
    html = page.report_page(report, plan, jacobians=job.progress.jacobians, recipe=job.recipe.to_yaml())
    write_text(job.folder.path / folder.PAGE, html)
    write_json(job.folder.path / folder.REPORT, report.model_dump(mode="json"))
    for name in ("grow", "regularise", "push", "gate", "gates", "recovered", "finetuned"):
        (job.folder.checkpoints / f"{name}.safetensors").unlink(missing_ok=True)
    job.say("done", seconds=round(time.perf_counter() - job.started, 3))
    return report


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
