"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from prunecli.values.learning_rate import LRReport
from prunecli.values.measured_rates import Answers, RateArm, RateTrial
from prunecli.values.plan import Plan
from prunecli.values.report import FinetuneReport, PhaseReport, RecoveryStep, Stage, StageName, TargetResult
from prunecli.values.value import Value

Command = Literal["compress", "finetune", "lr --measure"]  # as the user types it


class JudgedTrial(Value):
    """A finished fine-tuning, and its answers; ``None`` where it diverged."""

    trial: RateTrial
    answers: Answers | None


class FinishedRates(Value):
    """A measurement of learning rates once its arms are made, and the fine-tunings finished so far.

    Attributes:
        dense: answers of the dense model.
        arms: the starts, the plain cut first.
        chosen: name of the one that the recipe's recovery is.
        rates: the peak learning rates, ascending.
        trials: the finished fine-tunings.
    """

    dense: Answers
    arms: tuple[RateArm, ...]
    chosen: str
    rates: tuple[float, ...]
    trials: tuple[JudgedTrial, ...] = ()

    def has(self, arm: str, lr: float) -> bool:
        """Whether this fine-tuning is finished."""
        return any((done.trial.arm, done.trial.lr) == (arm, lr) for done in self.trials)


class FinishedStages(Value):
    """What finished stages measured: ``checkpoints/progress.json``."""

    command: Command
    recipe_sha256: str
    source_digest: str
    plan_sha256: str | None = None
    stages: tuple[Stage, ...] = ()
    phases: tuple[PhaseReport, ...] = ()
    recovery: tuple[RecoveryStep, ...] = ()
    lr: LRReport | None = None
    finetune: FinetuneReport | None = None
    rates: FinishedRates | None = None
    target: TargetResult | None = None
    jacobians: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    dense_spectra: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def with_stage(self, stage: Stage, jacobian: tuple[float, ...] | None = None, **changes: object) -> FinishedStages:
        """The progress after one more stage."""
        jacobians = self.jacobians | ({str(stage.name): jacobian} if jacobian else {})
        return self.model_copy(update={"stages": (*self.stages, stage), "jacobians": jacobians, **changes})

    def stage(self, name: StageName) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)


@dataclass(frozen=True, kw_only=True)
class History:
    """A model's history before its fine-tuning. A field is ``None`` where that step did not happen.

    Attributes:
        plan: the plan by which it was cut.
        dense: the measurements of the model before the cut.
        now: the measurements of the model as it is to be fine-tuned.
        base_peak_lr: the highest rate the dense model was trained at, if known.
    """

    plan: Plan | None = None
    dense: Stage | None = None
    now: Stage | None = None
    base_peak_lr: float | None = None
