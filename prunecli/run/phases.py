"""The training phases of a job as resumable stages: those that the plan waits for, and those that follow it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from prunecli.files import read_tensors, write_tensors
from prunecli.methods.gates import Gated, drawn_gates
from prunecli.methods.phase import Phase, phases_of
from prunecli.methods.train_phase import train_phase_
from prunecli.run.job import Job, reload_
from prunecli.run.learning_rate import finetune_settings
from prunecli.training.loop import TrainingRun
from prunecli.values.plan import Plan


def plans_late(job: Job) -> bool:
    """Whether the plan is made from weights that a phase leaves."""
    return any(phase.before_plan for phase in phases_of(job.recipe))


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What the plan is to be made from: weights, on the CPU, and where gates were learnt their |a| by group name."""

    model: nn.Module
    gates: dict[str, Tensor] | None


def before_plan(job: Job, first: Plan) -> Learnt:
    """What the phases before the plan leave; ``first`` is the plan for the weights as they came."""
    model = _through(job, first, before=True).cpu()
    return Learnt(model=model, gates=read_tensors(_gates_file(job)) if job.recipe.method == "abp" else None)


def before_cut(job: Job, plan: Plan) -> nn.Module:
    """The weights that are cut: those of the source, where the method has no phase the very module."""
    return _through(job, plan, before=False) if phases_of(job.recipe) else job.source.model


def _through(job: Job, plan: Plan, *, before: bool) -> nn.Module:
    """A copy of the source's model after the phases before the plan, or after all."""
    model = copy.deepcopy(job.source.model)
    for phase in phases_of(job.recipe):
        if phase.before_plan or not before:
            _train_(job, model, phase, plan)
    return model


def _train_(job: Job, model: nn.Module, phase: Phase, plan: Plan) -> None:
    """One phase, or what an earlier start kept of it."""
    weights = job.folder.checkpoints / f"{phase.name}.safetensors"
    if any(done.name == phase.name for done in job.progress.phases):
        reload_(model, weights)
        return
    assert job.images is not None
    job.notify({"event": "start", "name": phase.name})
    gated = plan.cut_groups if phase.name == "gate" else ()
    net = Gated(model, gated, drawn_gates(gated, seed=job.recipe.seed)) if gated else model
    report = train_phase_(
        net,
        phase,
        plan.groups,
        job.images,
        finetune_settings(job),
        method=job.recipe.method,
        run=TrainingRun(
            device=job.device,
            seed=job.recipe.seed,
            folder=job.folder.checkpoints / phase.name,
            on_event=lambda event: job.relay({**event, "phase": phase.name}),
        ),
        teacher=job.source.model,
    )
    if isinstance(net, Gated):
        net.fold_()
        write_tensors(_gates_file(job), net.magnitudes())
    write_tensors(weights, model.state_dict())
    job.save(job.progress.model_copy(update={"phases": (*job.progress.phases, report)}))


def _gates_file(job: Job) -> Path:
    return job.folder.checkpoints / "gates.safetensors"
