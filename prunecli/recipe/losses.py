"""Settings of the fine-tuning loss, and of the regulariser added to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prunecli.recipe.by_kind import KIND, Section, Tagged

_SMOOTHING = "share of the target spread over all classes"


class CeLoss(Section):
    """Cross-entropy with the labels."""

    kind: Literal["ce"] = "ce"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description=_SMOOTHING)
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup's Beta distribution; 0 is off")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of CutMix's Beta distribution; 0 is off")


class CskdLoss(Section):
    """CS-KD: the net also learns from its answers to another image of the class, two images for one."""

    kind: Literal["cskd"] = "cskd"
    weight: float = Field(default=1.0, gt=0, description="weight of the part that the net learns from itself")
    temperature: float = Field(default=4.0, gt=0, description="temperature of the answers it learns from")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description=_SMOOTHING)


class PskdLoss(Section):
    """PS-KD: the targets are softened by the net's own answers of the epoch before."""

    kind: Literal["pskd"] = "pskd"
    weight: float = Field(default=0.8, gt=0, le=1, description="share of the own answers, reached in the last epoch")


class DlbLoss(Section):
    """DLB: the net also learns from its answers to another view of the image one step before, two images for one."""

    kind: Literal["dlb"] = "dlb"
    weight: float = Field(default=1.0, gt=0, description="weight of the part that the net learns from itself")
    temperature: float = Field(default=3.0, gt=0, description="temperature of the answers it learns from")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description=_SMOOTHING)


Loss = Annotated[CeLoss | CskdLoss | PskdLoss | DlbLoss, Field(discriminator=KIND), Tagged()]


def supervised_part(loss: CeLoss | CskdLoss | PskdLoss | DlbLoss) -> CeLoss:
    """The cross-entropy inside a loss, without the part that the net learns from itself."""
    if isinstance(loss, CeLoss):
        return loss
    return CeLoss(label_smoothing=0.0 if isinstance(loss, PskdLoss) else loss.label_smoothing)


class NoRegulariser(Section):
    """Nothing is added to the loss."""

    kind: Literal["none"] = "none"


class OrthogonalRegulariser(Section):
    """Orthogonality of the weights, added to the loss in all of fine-tuning."""

    kind: Literal["kernorth", "orthconv"]
    weight: float = Field(default=0.1, gt=0, description="weight of the regulariser in the loss")


Regulariser = Annotated[NoRegulariser | OrthogonalRegulariser, Field(discriminator=KIND), Tagged()]
