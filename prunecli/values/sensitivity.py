"""What every width of every unit costs a model, and what the whole model keeps at less and less cost, untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from prunecli.values.plan import Cost
from prunecli.values.report import Accuracy
from prunecli.values.value import Value


class UnitSensitivity(Value):
    """One unit of groups that are cut together: its loss at every width it may have, all others being whole.

    Losses have no unit of their own (see `prunecli.sensitivity.measured_losses`); only their ratios mean something.
    """

    groups: tuple[str, ...]
    width: int = Field(gt=0)
    curve: Mapping[int, float] = Field(description="loss by kept width")
    kl: Mapping[int, float] = Field(description="KL divergence in nats of cutting this unit alone, by kept width")
    saved: Mapping[int, float] = Field(
        description="share of the dense multiply-adds, percent, that cutting this unit alone saves, by kept width"
    )


class MeasuredPoint(Value):
    """The cut model after its recovery, on images that no choice looked at."""

    kl: float = Field(description="KL divergence from the dense model's answers, nats, on the held-out images")
    recovery: str = Field(description="recovery steps that were kept")
    accuracy: Accuracy | None = Field(description="on the validation images; null without labels")
    seconds: float


class SensitivityPoint(Value):
    """The whole model at one cost, cut to the widths that lose least, without any training."""

    asked: float = Field(gt=0, description="multiply-adds asked for, percent of the dense model's")
    cost: Cost
    predicted_kl: float | None = Field(
        description="sum over the units of the KL divergence that each causes alone, nats; null: not measured"
    )
    measured: MeasuredPoint | None = Field(default=None, description="null: predicted only")


class Sensitivity(Value):
    """The result of ``prunecli sensitivity`` (``sensitivity.json``)."""

    schema_version: int = 1
    model: str
    base: Cost
    dense: Accuracy | None = Field(description="the dense model on the validation images; null without labels")
    calibration_images: int
    held_out_images: int
    units: tuple[UnitSensitivity, ...]
    points: tuple[SensitivityPoint, ...] = Field(description="by cost, highest first")
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str]

    @property
    def measured(self) -> Sequence[SensitivityPoint]:
        """The points at which the whole model was cut and measured, highest cost first."""
        return [point for point in self.points if point.measured is not None]
