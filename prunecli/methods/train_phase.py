"""The training of a phase before the cut, resumable as fine-tuning is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import torch
from torch import nn

from prunecli.methods.gates import Gated, GateSteps
from prunecli.methods.growing_penalty import GrowingPenalty
from prunecli.methods.phase import Phase
from prunecli.recipe.schedules import ConstantSchedule
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.loop import Loop, TrainingRun, settle_, train_
from prunecli.training.objective import build_objective
from prunecli.training.penalty import Orthogonality, Penalty
from prunecli.training.step import TrainingImages, TrainingPlan
from prunecli.values.plan import PlannedGroup
from prunecli.values.report import PhaseReport


def train_phase_(
    model: nn.Module,
    phase: Phase,
    groups: Sequence[PlannedGroup],
    images: TrainingImages,
    settings: FinetuneSettings,
    *,
    method: str,
    run: TrainingRun,
    teacher: nn.Module | None = None,
) -> PhaseReport:
    """Train ``model`` through one phase, in place: SGD at a constant rate on cross-entropy and the penalty.

    Interrupted or killed, it resumes as `training.loop.train_` describes.

    Args:
        model: starting weights, for a phase of gates a `Gated` net; it stays on the device, in evaluation mode.
        phase: penalty, length and learning rate.
        groups: coupled groups of the plan.
        images: training images; validation is not looked at.
        settings: fine-tuning settings, of which weight decay, precision, memory format, distillation and the distance
            of checkpoints hold for the phase too.
        method: name of the pruning method, for the report.
        run: device, seed, folder of the checkpoints and listener.
        teacher: dense model, needed where ``settings.distill.share`` is above 0.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; the state is saved.
        PruneError: a loss that is not finite, a full disk, a frozen model, no training images.
        UsageError: distillation without a teacher.
    """
    plain = _plain(settings, phase)
    plan = TrainingPlan(
        settings=plain,
        lr=phase.lr,
        steps=phase.steps,
        steps_per_epoch=images.steps_per_epoch,
        checkpoint_every=settings.checkpoint_every,
    )
    return train_(
        model,
        images,
        plan,
        run,
        facts={
            "phase": asdict(phase),
            "settings": plain.model_dump(mode="json"),
            "keep": [(group.name, group.keep) for group in groups if group.is_cut],
        },
        make_objective=lambda device: build_objective(
            plain, num_classes=images.num_classes, teacher=teacher, device=device
        ),
        make_penalty=lambda trained: _penalty(trained, groups, phase),
        make_loop=partial(_PhaseTraining, phase=phase, method=method),
    )


@dataclass(kw_only=True, eq=False)
class _PhaseTraining(Loop[PhaseReport]):
    """One phase under way; its history begins with the state before the first step, as epoch 0."""

    name = "The phase before the cut"
    divergence_hint = "Use a smaller method.lr, or less of method.gram_weight."

    phase: Phase
    method: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.advance(history=({"epoch": 0.0, "step": 0.0, **self._figures()},))

    def measured(self, mean_loss: float) -> dict[str, float]:
        """The epoch's mean cross-entropy, and the penalty at its end. Raises PruneError where that is not finite."""
        figures = self._figures()
        for name, value in figures.items():
            if not math.isfinite(value):
                raise self.diverged(f"The {name} after epoch {self.progress.epoch + 1} is {value}", self.lr)
        return {"step": float(self.done), "lr": self.lr, "train_loss": mean_loss, **figures}

    @torch.no_grad()
    def _figures(self) -> dict[str, float]:
        """The penalty's value; of a pushing phase also the factor λ of the last step and the norm of what is pushed; of
        gates only the share that is open.
        """
        penalty = self.trainer.penalty
        if isinstance(penalty, GateSteps):
            return {"open": penalty.open_share()}
        if isinstance(penalty, Orthogonality):
            return {"penalty": float(penalty.value())}
        assert isinstance(penalty, GrowingPenalty)
        figures = {"reg": self.phase.reg(max(self.done - 1, 0)), "norm": penalty.norm()}
        return figures | ({"penalty": float(penalty.gram())} if self.phase.gram_weight else {})

    def finished(self) -> PhaseReport:
        settle_(self.trainer)
        plan = self.trainer.plan
        history = self.progress.history
        first, last = history[0], history[-1]
        return PhaseReport(
            name=self.phase.name,
            method=self.method,
            steps=plan.steps,
            epochs=plan.steps / plan.steps_per_epoch,
            lr=plan.lr,
            reg=last.get("reg"),
            penalty_before=first.get("penalty"),
            penalty_after=last.get("penalty"),
            norm_before=first.get("norm"),
            norm_after=last.get("norm"),
            open_before=first.get("open"),
            open_after=last.get("open"),
            distill=plan.settings.distill.share,
            seconds=round(math.fsum(entry.get("seconds", 0.0) for entry in history), 3),
            history=history,
        )


def _penalty(model: nn.Module, groups: Sequence[PlannedGroup], phase: Phase) -> Penalty:
    if phase.regulariser != "none":
        return Orthogonality(model, phase.regulariser, phase.regulariser_weight)
    if phase.name == "gate":
        assert isinstance(model, Gated)
        return GateSteps(model.gate, phase.gate_l1)
    return GrowingPenalty(model, groups, phase)


_PLAIN: Final = FinetuneSettings(optimizer="sgd", schedule=ConstantSchedule())


def _plain(settings: FinetuneSettings, phase: Phase) -> FinetuneSettings:
    """The papers' plain SGD, with the recipe's weight decay, precision, memory format and distillation."""
    shared = ("weight_decay", "decay_norms", "amp", "channels_last", "distill")
    return _PLAIN.updated(momentum=phase.momentum, **{name: getattr(settings, name) for name in shared})
