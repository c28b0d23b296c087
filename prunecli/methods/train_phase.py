"""The training of a phase before the cut, resumable as fine-tuning is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from torch import nn

from prunecli.errors import PruneError
from prunecli.interrupts import stop_requests
from prunecli.methods.gates import Gated, GateSteps
from prunecli.methods.phase import Phase
from prunecli.methods.push import Push
from prunecli.models.tensors import state_digest
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.loop import Event, Loop, Run, settle_
from prunecli.training.objective import build_objective
from prunecli.training.penalty import Orthogonality, Penalty
from prunecli.training.step import Trainer, TrainingImages, build_trainer, own_randomness
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
    device: torch.device,
    seed: int,
    folder: Path | None = None,
    teacher: nn.Module | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> PhaseReport:
    """Train ``model`` through one phase, in place: SGD at a constant rate on cross-entropy and the penalty.

    Killed at any moment and called again with the same arguments, it goes on from the newest checkpoint in ``folder``
    to the same weights, on a CPU bit for bit. Events are those of `train.finetune`.

    Args:
        model: the starting weights, for a phase of gates a `Gated` net; it stays on ``device``, in evaluation mode.
        phase: what to do.
        groups: of the plan.
        images: training images; validation is not looked at.
        settings: weight decay, precision, memory format, distillation and checkpoints of it hold for the phase too.
        method: for the report.
        device: where to train.
        seed: of all random numbers but the loader's own.
        folder: where checkpoints go; none: no resuming.
        teacher: the dense model, needed where ``settings.distill.share`` is above 0.
        on_event: called between steps.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM; the state is saved.
        PruneError: a loss that is not finite, full disk, frozen model, no training images.
    """
    if images.steps_per_epoch < 1:
        raise PruneError("There is not one batch of training images.")
    plain = _plain(settings, phase)
    job = _job(model, phase, groups, images, plain, seed)
    with own_randomness(device), stop_requests() as stop:
        trainer = build_trainer(
            model,
            plain,
            lr=phase.lr,
            epochs=math.ceil(phase.steps / images.steps_per_epoch),
            steps_per_epoch=images.steps_per_epoch,
            device=device,
            seed=seed,
            make_objective=lambda where: build_objective(
                plain, num_classes=images.num_classes, teacher=teacher, device=where
            ),
            make_penalty=lambda trained: _penalty(trained, groups, phase),
        )
        run = Run(
            job=job,
            steps=phase.steps,
            checkpoint_every=settings.checkpoint_every,
            folder=folder,
            stop=stop,
            emit=on_event or (lambda _: None),
        )
        training = _PhaseTraining(trainer, images, run, phase)
        try:
            training.run()
            return training.finished(method, distill=plain.distill.share)
        finally:
            model.to(memory_format=torch.contiguous_format)


class _PhaseTraining(Loop):
    """One phase under way; its history begins with the state before the first step, as epoch 0."""

    name = "The phase before the cut"
    calmer = "Use a smaller phase.lr, or less of phase.gram_weight."

    def __init__(self, trainer: Trainer, images: TrainingImages, run: Run, phase: Phase) -> None:
        super().__init__(trainer, images, run)
        self._phase = phase
        self.advance(history=({"epoch": 0.0, "step": 0.0, **self._figures()},))

    def measured(self, mean_loss: float) -> dict[str, float]:
        """The mean cross-entropy of the epoch, and the penalty at its end; PruneError where that is not finite."""
        figures = self._figures()
        for name, value in figures.items():
            if not math.isfinite(value):
                raise self.diverged(f"The {name} after epoch {self.progress.epoch + 1} is {value}", self.lr)
        return {"step": float(self.done), "lr": self.lr, "train_loss": mean_loss, **figures}

    @torch.no_grad()
    def _figures(self) -> dict[str, float]:
        """The factor λ of the step before, and what is left to be penalised; zero groups are counted from their end.
        Of gates the share that is open.
        """
        penalty = self.trainer.penalty
        if isinstance(penalty, GateSteps):
            return {"open": penalty.open_share()}
        if isinstance(penalty, Orthogonality):
            return {"penalty": float(penalty.value())}
        assert isinstance(penalty, Push)
        figures = {"reg": self._phase.reg(max(self.done - 1, 0)), "norm": penalty.norm()}
        return figures | ({"penalty": float(penalty.gram())} if self._phase.gram_weight else {})

    def finished(self, method: str, *, distill: float) -> PhaseReport:
        """Leave the model in evaluation mode and report."""
        settle_(self.trainer)
        history = self.progress.history
        first, last = history[0], history[-1]
        return PhaseReport(
            name=self._phase.name,
            method=method,
            steps=self.steps,
            epochs=self.steps / self.images.steps_per_epoch,
            lr=self._phase.lr,
            reg=last.get("reg"),
            penalty_before=first.get("penalty"),
            penalty_after=last.get("penalty"),
            norm_before=first.get("norm"),
            norm_after=last.get("norm"),
            open_before=first.get("open"),
            open_after=last.get("open"),
            distill=distill,
            seconds=round(math.fsum(entry.get("seconds", 0.0) for entry in history), 3),
            history=history,
        )


def _penalty(model: nn.Module, groups: Sequence[PlannedGroup], phase: Phase) -> Penalty:
    if phase.regulariser != "none":
        return Orthogonality(model, phase.regulariser, phase.regulariser_weight)
    if phase.name == "gate":
        assert isinstance(model, Gated)
        return GateSteps(model.gate, phase.gate_l1)
    return Push(model, groups, phase)


_PLAIN: Final = FinetuneSettings(optimizer="sgd", schedule="constant")


def _plain(settings: FinetuneSettings, phase: Phase) -> FinetuneSettings:
    """The papers' plain SGD, with what the recipe says of weight decay, precision, memory and the dense teacher."""
    shared = ("weight_decay", "decay_norms", "amp", "channels_last", "distill")
    return _PLAIN.model_copy(update={"momentum": phase.momentum} | {name: getattr(settings, name) for name in shared})


def _job(
    model: nn.Module,
    phase: Phase,
    groups: Sequence[PlannedGroup],
    images: TrainingImages,
    settings: FinetuneSettings,
    seed: int,
) -> str:
    """Digest of all that decides the resulting weights."""
    parts = {
        "phase": asdict(phase),
        "settings": settings.model_dump(mode="json"),
        "keep": [(group.name, group.keep) for group in groups if group.is_cut],
        "seed": seed,
        "steps_per_epoch": images.steps_per_epoch,
        "weights": state_digest(model.state_dict()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
