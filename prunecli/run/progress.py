"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from prunecli.values.learning_rate import LRReport
from prunecli.values.plan import Plan
from prunecli.values.report import FinetuneReport, PhaseReport, RecoveryStep, Stage, StageName, TargetResult
from prunecli.values.value import Value

Command = Literal["compress", "finetune"]


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
