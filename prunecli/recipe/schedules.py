"""Settings of the fine-tuning's learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import Field

from prunecli.recipe.by_kind import KIND, Section, Tagged
from prunecli.values.value import Value

Retraining = Literal["rewind", "slr", "clr", "allr"]
RETRAINING: Final = get_args(Retraining)

_LAST = "last rate; null: the recommendation's (1e-4 up to 64 px, else 1e-5)"
_WARMUP = "epochs of linear warm-up"
Milestones = tuple[float, ...]


class CosineSchedule(Section):
    """Half a cosine from the peak down to ``min_lr``."""

    kind: Literal["cosine"] = "cosine"
    min_lr: float | None = Field(default=None, ge=0, description=_LAST)
    warmup_epochs: float = Field(default=0.0, ge=0, description=_WARMUP)


class StepSchedule(Section):
    """A drop by ``gamma`` at each milestone, never below ``min_lr``."""

    kind: Literal["step"] = "step"
    milestones: Milestones = Field(default=(0.5, 0.75), description="where the rate drops, as shares of the epochs")
    gamma: float = Field(default=0.1, gt=0, lt=1, description="factor of each drop")
    min_lr: float | None = Field(default=None, ge=0, description=_LAST)
    warmup_epochs: float = Field(default=0.0, ge=0, description=_WARMUP)


class ConstantSchedule(Section):
    """The peak rate throughout."""

    kind: Literal["constant"] = "constant"
    warmup_epochs: float = Field(default=0.0, ge=0, description=_WARMUP)


class RetrainingSchedule(Section):
    """A published retraining schedule, with a start and an end of its own, that goes by ``finetune.original``."""

    kind: Retraining


Schedule = Annotated[
    CosineSchedule | StepSchedule | ConstantSchedule | RetrainingSchedule, Field(discriminator=KIND), Tagged()
]


class OriginalSchedule(Value):
    """The schedule that the base was trained with: what rewind replays, and whose peak slr, clr and allr start from."""

    lr: float = Field(gt=0, description="peak rate")
    epochs: int = Field(gt=0, description="length of the base's training")
    schedule: Literal["step", "cosine"] = Field(default="step", description="how the rate fell")
    milestones: Milestones = Field(default=(0.5, 0.75), description="step: where the rate fell, as shares of epochs")
    gamma: float = Field(default=0.1, gt=0, lt=1, description="step: factor of each drop")
    min_lr: float = Field(default=0.0, ge=0, description="last rate")
