"""The training phases of a job as resumable stages: those that the plan waits for, and those that follow it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from prunecli.files import read_tensors, write_tensors
from prunecli.methods.gates import Gated, drawn_gates
from prunecli.methods.phase import Phase, phases_of
from prunecli.methods.train_phase import train_phase_
from prunecli.recipe.recipe import Recipe
from prunecli.run.job import Job, reload_
from prunecli.run.learning_rate import finetune_settings
from prunecli.training.loop import TrainingRun
from prunecli.values.plan import Plan


def pick_late(recipe: Recipe) -> bool:
    """True if the method picks channels from weights that a training phase leaves."""
    return any(phase.before_plan for phase in phases_of(recipe))


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What the plan is to be made from.

    Attributes:
        model: the trained weights, on the CPU.
        gates: magnitudes |a| ``[width]`` by group name; ``None`` where the method learns no gates.
    """

    model: nn.Module
    gates: dict[str, Tensor] | None


def train_before_plan(job: Job, first: Plan) -> Learnt:
    """What the phases before the plan leave; ``first`` is the plan on trial, for the weights as they came."""
    model = _through(job, first, before=True).cpu()
    return Learnt(model=model, gates=read_tensors(job.folder.gates_file) if job.recipe.method.kind == "abp" else None)


def train_before_cut(job: Job, plan: Plan) -> nn.Module:
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
    """Train through one phase, in place; a phase that an earlier start finished is reloaded."""
    weights = job.folder.weights_after(phase.name)
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
        method=job.recipe.method.kind,
        run=TrainingRun(
            device=job.device,
            seed=job.recipe.seed,
            folder=job.folder.training_state(phase.name),
            on_event=lambda event: job.relay({**event, "phase": phase.name}),
        ),
        teacher=job.source.model,
    )
    if isinstance(net, Gated):
        net.fold_()
        write_tensors(job.folder.gates_file, net.magnitudes())
    write_tensors(weights, model.state_dict())
    job.save(job.progress.model_copy(update={"phases": (*job.progress.phases, report)}))
