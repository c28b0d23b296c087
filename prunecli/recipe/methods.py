"""Settings of the pruning methods: what happens before the cut. Counts are optimiser steps, one batch each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from prunecli.recipe.by_kind import KIND, Section, Tagged


class OneshotMethod(Section):
    """Channels are ranked and cut at once."""

    kind: Literal["oneshot"] = "oneshot"


class PhaseMethod(Section):
    """Base of the methods that train before the cut, by SGD at a constant rate with ``finetune.weight_decay``."""

    lr: float = Field(default=1e-3, gt=0, description="constant learning rate of the phase")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")


class PushMethod(PhaseMethod):
    """Base of the methods that push channels towards zero by an L2 penalty.

    The defaults are the papers' for CIFAR; for ImageNet ``reg_every`` is 5 and ``stabilise`` 40000.
    """

    tags: ClassVar[tuple[str, ...]] = (KIND, "variant", "penalty")

    reg_ceiling: float = Field(default=1.0, gt=0, description="largest factor of the penalty")
    stabilise: int = Field(default=10_000, ge=0, description="steps at reg_ceiling before the cut")
    bn_term: bool = Field(default=False, description="push norm scales and shifts of the channels too")


class GrowingPush(PushMethod):
    """Base of the methods whose penalty grows step by step."""

    penalty: Literal["growing"] = Field(
        default="growing", description="growing: up to reg_ceiling; fixed: at reg_ceiling from the first step on"
    )
    reg_step: float = Field(default=1e-4, gt=0, description="increase of the penalty's factor at each growth")
    reg_every: int = Field(default=10, gt=0, description="steps from one growth to the next")


class FixedPush(PushMethod):
    """Base of the methods whose penalty is ``reg_ceiling`` from the first step on."""

    penalty: Literal["fixed"]
    steps: int = Field(default=50_000, gt=0, description="steps with the fixed penalty, before those of stabilise")


class TppMethod(PushMethod):
    """TPP (Wang and Fu 2022, arXiv 2207.12534): the channels that leave are decorrelated from the kept ones too."""

    kind: Literal["tpp"] = "tpp"
    bn_term: bool = Field(default=True, description="push norm scales and shifts of the channels too")
    zero_every: int = Field(
        default=100, gt=0, description="while stabilising: steps from one group set to zero to the next"
    )
    gram_weight: float = Field(default=1000.0, ge=0, description="weight of the decorrelation, times the factor")


class TppGrowing(TppMethod, GrowingPush):
    """TPP with a penalty that grows."""


class TppFixed(TppMethod, FixedPush):
    """TPP with a fixed penalty."""


class GregMethod(PushMethod):
    """GReg (Wang et al. 2021, arXiv 2012.09243)."""

    kind: Literal["greg"] = "greg"
    variant: Literal[1, 2]


class GregGrowing(GregMethod, GrowingPush):
    """GReg-1: channels are picked, then pushed by a penalty that grows."""

    variant: Literal[1] = Field(
        default=1, description="2: channels are picked after a small penalty has grown on all of them"
    )


class GregFixed(GregMethod, FixedPush):
    """GReg-1 with a fixed penalty."""

    variant: Literal[1] = 1


class GregPicking(GregMethod, GrowingPush):
    """GReg-2: a small penalty grows on all channels, the channels are picked, then those are pushed."""

    variant: Literal[2]
    pick_step: float = Field(
        default=1e-5, gt=0, description="increase of the penalty's factor at each growth before channels are picked"
    )
    pick_ceiling: float = Field(default=1e-2, gt=0, description="factor of the penalty at which channels are picked")

    @model_validator(mode="after")
    def _picks_before_the_end(self) -> Self:
        if self.pick_ceiling >= self.reg_ceiling:
            raise ValueError("pick_ceiling must be below reg_ceiling")
        return self


class OrthogonalMethod(PhaseMethod):
    """A regulariser makes all weights more orthogonal before the channels are picked."""

    kind: Literal["kernorth", "orthconv"]
    steps: int = Field(default=50_000, gt=0, description="length of the phase in steps")
    weight: float = Field(default=0.1, gt=0, description="weight of the regulariser in the loss")


class AbpMethod(PhaseMethod):
    """ABP: gates learn which channels leave, and how many where there is no target."""

    kind: Literal["abp"] = "abp"
    lr: float = Field(default=0.1, gt=0, description="constant learning rate of the phase")
    steps: int = Field(default=50_000, gt=0, description="length of the phase in steps")
    gate_l1: float = Field(default=0.0, ge=0, description="pressure on the gates to close; 1e-4 is the authors' figure")


class EpsdMethod(Section):
    """EPSD: channels are ranked by their worth to the first steps of the fine-tuning to come."""

    kind: Literal["epsd"] = "epsd"
    steps: int = Field(default=3, gt=0, description="plain SGD steps, a batch each; one more batch is judged on")
    lr: float = Field(default=0.1, gt=0, description="learning rate of these steps")


Tpp = Annotated[TppGrowing | TppFixed, Field(discriminator="penalty"), Tagged("penalty")]
GregFirst = Annotated[GregGrowing | GregFixed, Field(discriminator="penalty"), Tagged("penalty")]
Greg = Annotated[GregFirst | GregPicking, Field(discriminator="variant"), Tagged("variant")]
Method = Annotated[
    OneshotMethod | Tpp | Greg | OrthogonalMethod | AbpMethod | EpsdMethod, Field(discriminator=KIND), Tagged()
]


class SaoInit(Section):
    """SAO (Esguerra et al. 2023): a start for training from scratch, with sparse orthogonal weights.

    A layer whose widths do not allow the sparsity asked for gets the next lower one that they allow.
    """

    kind: Literal["sao"] = "sao"
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="share of channel pairs without a connection; null: 0.5, or by degree"
    )
    degree: int | None = Field(
        default=None, gt=0, description="connections of each channel of a layer's narrow side, instead of sparsity"
    )
    activation: Literal["auto", "relu", "tanh"] = Field(
        default="auto", description="auto: relu (mirrored matrices) for ReLU-like activations, else tanh (plain ones)"
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.sparsity is not None and self.degree is not None:
            raise ValueError("sparsity and degree both say how sparse; leave one out")
        return self


Init = Annotated[SaoInit, Tagged()]
