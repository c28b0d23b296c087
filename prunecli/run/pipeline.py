"""The job: load → graph → plan → (train) → cut → recover → fine-tune → export → verify → report.

``compress`` only composes ``stages``. What a finished stage leaves behind is a file in the run folder, so that a run
which was killed goes on behind the last finished stage, and inside fine-tuning behind the last saved step.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from prunecli.data.images import Images
from prunecli.errors import PruneError, TargetError, UsageError
from prunecli.files import write_json, write_tensors, write_text
from prunecli.graph.build import build_graph
from prunecli.measure import cost
from prunecli.measure.weights import weight_spectra
from prunecli.methods import gateable, phase
from prunecli.methods.start import start_anew_
from prunecli.models.user_function import Function
from prunecli.planning.budget import Learned
from prunecli.planning.score import Scores
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.recovery.choose import recover_stage
from prunecli.run import folder, phases
from prunecli.run.job import (
    Job,
    Notify,
    Past,
    finetune_settings,
    interruptible,
    learning_rate,
    learning_rate_at,
    measured_stage,
    open_job,
    past_of,
    recommended_lr,
    reload_,
)
from prunecli.run.recovery_context import recovery_context
from prunecli.run.scores import gate_scores, open_gates, scores_of
from prunecli.run.source import Planned, Source, cut, make_plan, proven_plan
from prunecli.run.summary import rounded, summarise
from prunecli.show import page
from prunecli.training import finetune as finetuning
from prunecli.values.groups import Graph
from prunecli.values.plan import Cost, Plan
from prunecli.values.report import RecoveryStep, Report, TargetResult

TARGET_TOLERANCE: Final = 0.01

Magnitudes = Mapping[str, Tensor]  # of learnt gates: |a| [width] by group name


# ---------------------------------------------------------------------------------------------- resumable stages


def _dense(job: Job) -> None:
    """Measure the model as it came."""
    if job.progress.stage("dense"):
        return
    began = time.perf_counter()
    model = job.source.model
    stage, values = measured_stage(job, "dense", model, began)
    spectra = {name: rounded(sv) for name, sv in weight_spectra(model).items()}
    job.save(job.progress.with_stage(stage, values, dense_spectra=spectra))


def _planned(job: Job) -> Planned:
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
        _dense(job)
        learnt = phases.before_plan(job, planned.plan)
        job.notify({"event": "start", "name": "plan"})
        source = replace(job.source, model=learnt.model)
        planned, proof = plan_and_prove(source, job.recipe, job.images, learnt.gates)
    write_json(job.folder.path / folder.PLAN, planned.plan.model_dump(mode="json"))
    job.say("plan", groups=len(planned.plan.cut_groups), macs=planned.plan.predicted.macs, proof=proof)
    made = {"target": planned.target, "plan_sha256": planned.plan.sha256(), "warnings": planned.notes}
    job.save(job.progress.model_copy(update=made))
    return planned


def plan_and_prove(
    source: Source, recipe: Recipe, images: Images | None, gates: Magnitudes | None = None
) -> tuple[Planned, str]:
    """Trace, score, plan and prove; what ``--dry-run`` shows. Before gates are learnt, the plan is one on trial.

    Raises as ``scores_of``, ``make_plan`` and ``proven_plan``, and UsageError where there is no target, or where a
    phase before the cut has nothing to train with or is too short for this plan.
    """
    phase.require_possible(recipe, images)
    if recipe.target is None and recipe.method != "abp":
        raise UsageError("No target was given.", hint="For example --target macs=50%.")
    graph = build_graph(source.model, source.spec.size, engine=recipe.prune.graph)
    goal: _Goal
    if gates is not None:
        goal = _gated_goal(graph, recipe, gates)
    elif recipe.method == "abp":
        found = gateable.gateable(source, graph, recipe.target, recipe.prune, seed=recipe.seed)
        goal = _Goal(found.graph, found.scores, found.target, found.settings, before=found.notes)
    else:
        assert recipe.target is not None
        goal = _Goal(graph, scores_of(source, graph, recipe, images), recipe.target, recipe.prune)
    if recipe.equivalence_check:
        proven = proven_plan(source, goal.graph, goal.scores, goal.target, goal.settings)
        planned, error = proven.planned, proven.proof.relative_error
        proof = f"pruned net equals silenced dense net to {error:.1e} (relative, float64)"
    else:
        planned = make_plan(source, goal.graph, goal.scores, goal.target, goal.settings)
        proof = "the equivalence check was switched off"
    phase.require_time(recipe, planned.plan.groups)
    if recipe.init is not None:
        start_anew_(cut(source.model, planned.plan), recipe, source.spec.size)  # a sparsity no layer has is said now
    return replace(planned, notes=(*goal.before, *planned.notes, *goal.after)), proof


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


def _pruned(job: Job, planned: Planned) -> nn.Module:
    """Measure dense, train before the cut, cut, measure again; the target is checked on the model itself, not on the
    prediction.
    """
    _dense(job)
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


def _recovered_stage(job: Job, planned: Planned, smaller: nn.Module) -> None:
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


def _finetuned(job: Job, model: nn.Module) -> nn.Module:
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
        device=job.device,
        seed=job.recipe.seed,
        folder=job.folder.checkpoints / "finetune",
        teacher=job.source.model,
        on_event=job.relay,
    )
    stage, values = measured_stage(job, "finetuned", model, began)
    write_tensors(weights, model.state_dict())
    job.save(job.progress.with_stage(stage, values, finetune=result))
    return model


# ---------------------------------------------------------------------------------------------- the end of a job


def _finish(job: Job, plan: Plan, model: nn.Module) -> Report:
    """Export, verify in a fresh process, report. The report is written last: it marks the run as finished."""
    began = time.perf_counter()
    model = model.cpu().eval()
    size = cost.measure(model, job.source.spec.size)
    job.notify({"event": "start", "name": "export"})
    write_json(job.folder.path / folder.PLAN, plan.model_dump(mode="json"))
    folder.export(job.folder, model, ref=job.source.ref, base=job.source.cost, final=size)
    verified = folder.verify(job.folder.path, Function.of(job.source.ref))
    job.say("verify", seconds=round(time.perf_counter() - began, 3), **verified.model_dump())
    report = summarise(job, model, size, verified)
    html = page.report_page(report, plan, jacobians=job.progress.jacobians, recipe=job.recipe.to_yaml())
    write_text(job.folder.path / folder.PAGE, html)
    write_json(job.folder.path / folder.REPORT, report.model_dump(mode="json"))
    for name in ("grow", "regularise", "push", "gate", "gates", "recovered", "finetuned"):
        (job.folder.checkpoints / f"{name}.safetensors").unlink(missing_ok=True)
    job.say("done", seconds=round(time.perf_counter() - job.started, 3))
    return report


# ---------------------------------------------------------------------------------------------- the job


def compress(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> Report:
    """Run the whole job; the run folder is ``out`` or ``runs/NAME-N``.

    Raises:
        PruneError: every failure, as the subclass whose exit code INTERFACE names. Finished stages stay on disk.
    """
    job = open_job("compress", recipe, out=out, resume=resume, force=force, notify=notify)
    with interruptible(job):
        planned = _planned(job)
        smaller = _pruned(job, planned)
        _recovered_stage(job, planned, smaller)
        return _finish(job, planned.plan, _finetuned(job, smaller))


def finetune(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: bool = False,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> Report:
    """Fine-tune a model or a run without pruning it. Raises as ``compress``."""
    if recipe.data.name is None:
        raise UsageError("Fine-tuning needs data.", hint="Give --data.")
    if recipe.finetune.epochs == 0:
        raise UsageError("Fine-tuning for 0 epochs would change nothing.", hint="Give --epochs.")
    job = open_job("finetune", recipe, out=out, resume=resume, force=force, notify=notify)
    with interruptible(job):
        model = copy.deepcopy(job.source.model)  # the dense model stays as it came: the report and distillation need it
        started = (start_anew_(model, recipe, job.source.spec.size),) if recipe.init is not None else ()
        job.begin()
        _dense(job)
        if job.progress.lr is None:
            past, notes = _past(recipe)
            recommended = recommended_lr(job, model, past)
            found = {"lr": recommended, "recovery": started, "warnings": notes}
            job.save(job.progress.model_copy(update=found))
        return _finish(job, empty_plan(job.source, recipe.seed), _finetuned(job, model))


def _past(recipe: Recipe) -> tuple[Past, tuple[str, ...]]:
    """What the run that a model comes from did to it, and what there is to say where that run does not tell."""
    try:
        return past_of(recipe), ()
    except PruneError as error:
        return Past(), (f"{error} So the recommended learning rate is that of an uncut model.",)


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
