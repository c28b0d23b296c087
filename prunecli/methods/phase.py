"""A training phase before the cut, as a value: what it is made of and what it costs.

Three kinds. One pushes channels of coupled groups towards zero by an L2 penalty that grows (GReg, arXiv 2012.09243) and
decorrelates them from the kept ones (TPP, arXiv 2207.12534); one makes all weights more orthogonal before the
channels are picked (KernOrth, OrthConv); one learns which channels are needed (ABP, see `gates`). Counts are optimiser
steps, the papers' iterations.

In a coupled group, "filter" j of those papers is the slice of channel j of each member that produces the channel, and
each producing matrix has its own Gram matrix (of its rows: a head is many filters that leave together); biases, norm
scales and shifts of the channel are pushed with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from prunecli.errors import UsageError
from prunecli.recipe.methods import (
    AbpMethod,
    GregFixed,
    GregGrowing,
    GregPicking,
    OrthogonalMethod,
    TppFixed,
    TppGrowing,
)
from prunecli.recipe.recipe import Recipe
from prunecli.values.plan import PlannedGroup
from prunecli.values.report import PhaseCost, PhaseName


class TrainingSize(Protocol):
    """What has to be known of the training images."""

    @property
    def steps_per_epoch(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase, as a value: its figures are those of the recipe and nothing else.

    Attributes:
        name: ``grow`` pushes all channels a little, so that the plan can be made from what that does to them (the first
            half of GReg-2); ``push`` pushes those that a plan removes; ``regularise`` makes weights orthogonal;
            ``gate`` learns a gate for every channel.
        steps: optimiser steps in all.
        lr: learning rate, constant.
        momentum: of SGD.
        reg_start: the penalty's factor at step 0.
        reg_step: what it grows by, every ``reg_every`` steps.
        reg_ceiling: where it stops.
        gram_weight: of the decorrelation, times the factor; 0: none.
        bn_term: whether norm scales and shifts are pushed too.
        zero_from: the step from which groups are set to zero, one more every ``zero_every`` steps; none: never.
        zero_every: see there.
        regulariser: of a phase that pushes nothing.
        regulariser_weight: of it.
        gate_l1: what is added to a gate's gradient, times its sign.
    """

    name: PhaseName
    steps: int
    lr: float
    momentum: float
    reg_start: float = 0.0
    reg_step: float = 0.0
    reg_every: int = 1
    reg_ceiling: float = 0.0
    gram_weight: float = 0.0
    bn_term: bool = True
    zero_from: int | None = None
    zero_every: int = 1
    regulariser: Literal["none", "kernorth", "orthconv"] = "none"
    regulariser_weight: float = 0.0
    gate_l1: float = 0.0

    @property
    def before_plan(self) -> bool:
        """Whether the plan is made from the weights that this phase leaves."""
        return self.name != "push"

    def reg(self, step: int) -> float:
        """The penalty's factor λ at a step: it grows by ``reg_step`` every ``reg_every`` steps up to the ceiling."""
        return min(self.reg_ceiling, self.reg_start + self.reg_step * (step // self.reg_every))

    def zeroed(self, steps: int, groups: int) -> int:
        """How many of ``groups`` are zero after so many steps."""
        if self.zero_from is None:
            return 0
        return min(groups, max(0, (steps - self.zero_from) // self.zero_every))


def phases_of(recipe: Recipe) -> tuple[Phase, ...]:
    """The phases of the recipe's method, in order; none for ``oneshot`` and ``epsd``."""
    match recipe.method:
        case AbpMethod() as asked:
            return (Phase(name="gate", steps=asked.steps, lr=asked.lr, momentum=asked.momentum, gate_l1=asked.gate_l1),)
        case OrthogonalMethod() as asked:
            return (
                Phase(
                    name="regularise",
                    steps=asked.steps,
                    lr=asked.lr,
                    momentum=asked.momentum,
                    regulariser=asked.kind,
                    regulariser_weight=asked.weight,
                ),
            )
        case GregPicking() as asked:
            return (_grow(asked), _push(asked))
        case TppGrowing() | TppFixed() | GregGrowing() | GregFixed() as asked:
            return (_push(asked),)
    return ()


def _grow(asked: GregPicking) -> Phase:
    return Phase(
        name="grow",
        steps=_growth(asked.pick_ceiling, asked.pick_step, asked.reg_every),
        lr=asked.lr,
        momentum=asked.momentum,
        reg_step=asked.pick_step,
        reg_every=asked.reg_every,
        reg_ceiling=asked.pick_ceiling,
        bn_term=asked.bn_term,
    )


def _push(asked: TppGrowing | TppFixed | GregGrowing | GregFixed | GregPicking) -> Phase:
    start = asked.pick_ceiling if isinstance(asked, GregPicking) else 0.0
    pushing = (
        asked.steps if asked.penalty == "fixed" else _growth(asked.reg_ceiling - start, asked.reg_step, asked.reg_every)
    )
    phase = Phase(
        name="push",
        steps=pushing + asked.stabilise,
        lr=asked.lr,
        momentum=asked.momentum,
        reg_start=start,
        reg_ceiling=asked.reg_ceiling,
        bn_term=asked.bn_term,
    )
    if asked.penalty == "fixed":
        phase = replace(phase, reg_start=asked.reg_ceiling)
    else:
        phase = replace(phase, reg_step=asked.reg_step, reg_every=asked.reg_every)
    if asked.kind == "tpp":
        return replace(phase, gram_weight=asked.gram_weight, zero_from=pushing, zero_every=asked.zero_every)
    return phase


def _growth(height: float, step: float, every: int) -> int:
    """Steps until a factor has grown by ``height``."""
    return math.ceil(height / step - 1e-9) * every


def costs_of(recipe: Recipe, steps_per_epoch: int) -> tuple[PhaseCost, ...]:
    """How long the phases of the recipe's method are."""
    return tuple(
        PhaseCost(
            name=phase.name,
            method=recipe.method.kind,
            steps=phase.steps,
            epochs=phase.steps / steps_per_epoch,
            lr=phase.lr,
        )
        for phase in phases_of(recipe)
    )


def require_possible(recipe: Recipe, images: TrainingSize | None) -> None:
    """Raises UsageError where the method trains before the cut and there is nothing to train with."""
    if not phases_of(recipe):
        return
    if images is None:
        raise UsageError(f"Method {recipe.method.kind} trains before the cut, so it needs data.", hint="Give --data.")
    if images.steps_per_epoch < 1:
        raise UsageError(
            f"Method {recipe.method.kind} trains before the cut, and data {recipe.data.name} has no training images."
        )


def require_time(recipe: Recipe, groups: Sequence[PlannedGroup]) -> None:
    """Raises UsageError where a phase ends before every group had its turn to be set to zero."""
    cut = sum(group.is_cut for group in groups)
    for phase in phases_of(recipe):
        if phase.zero_from is not None and phase.zeroed(phase.steps, cut) < cut:
            raise UsageError(
                f"method.stabilise is {phase.steps - phase.zero_from} steps: too few to set {cut} groups to zero, one "
                f"every {phase.zero_every} steps.",
                hint=f"method.stabilise={cut * phase.zero_every}, or a smaller method.zero_every.",
            )
