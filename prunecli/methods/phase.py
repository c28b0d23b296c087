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
    """The length of an epoch of training images."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase, as a value: its figures are those of the recipe and nothing else.

    Attributes:
        name: ``grow`` pushes all channels a little, so that the plan can be made from what that does to them (the first
            half of GReg-2); ``push`` pushes those that a plan removes; ``regularise`` makes weights orthogonal;
            ``gate`` learns a gate for every channel.
        steps: number of optimiser steps.
        lr: learning rate, constant over the phase.
        momentum: momentum of SGD.
        reg_start: the penalty's factor λ at step 0.
        reg_step: growth of λ, every ``reg_every`` steps.
        reg_every: steps between two growths of λ.
        reg_ceiling: largest λ.
        gram_weight: weight of the decorrelation in the loss, multiplied by λ; 0 switches it off.
        bn_term: whether norm scales and shifts are pushed too.
        zero_from: the step after which groups are set to zero one by one; ``None`` sets none to zero.
        zero_every: steps between two groups being set to zero.
        regulariser: the regulariser of a ``regularise`` phase.
        regulariser_weight: weight of the regulariser in the loss.
        gate_l1: L1 weight of the gates: this times the gate's sign is added to its gradient.
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
        """True if the plan is made from the weights that this phase leaves."""
        return self.name != "push"

    def reg(self, step: int) -> float:
        """The penalty's factor λ at a step: it grows by ``reg_step`` every ``reg_every`` steps up to the ceiling."""
        return min(self.reg_ceiling, self.reg_start + self.reg_step * (step // self.reg_every))

    def zeroed(self, steps: int, groups: int) -> int:
        """Number of groups that are zero.

        Args:
            steps: number of optimiser steps taken.
            groups: number of groups that the phase cuts.
        """
        if self.zero_from is None:
            return 0
        return min(groups, max(0, (steps - self.zero_from) // self.zero_every))


def phases_of(recipe: Recipe) -> tuple[Phase, ...]:
    """The phases of the recipe's method, in order; empty for ``oneshot`` and ``epsd``."""
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
    """Steps until a factor has grown by ``height``, at ``step`` every ``every`` steps."""
    return math.ceil(height / step - 1e-9) * every  # 0.5 / 1e-4 may come out just above 5000


def costs_of(recipe: Recipe, steps_per_epoch: int) -> tuple[PhaseCost, ...]:
    """The length of each phase of the recipe's method, in steps and in epochs of ``steps_per_epoch``."""
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
    """Check that there is something to train with if the method trains before the cut.

    Args:
        recipe: the recipe with the method.
        images: size of the training data; ``None`` without data.

    Raises:
        UsageError: the method has phases, and there is no data or not one batch of training images.
    """
    if not phases_of(recipe):
        return
    if images is None:
        raise UsageError(f"Method {recipe.method.kind} trains before the cut, so it needs data.", hint="Give --data.")
    if images.steps_per_epoch < 1:
        raise UsageError(
            f"Method {recipe.method.kind} trains before the cut, and data {recipe.data.name} has no training images."
        )


def require_time(recipe: Recipe, groups: Sequence[PlannedGroup]) -> None:
    """Check that each phase is long enough to set every cut group to zero.

    Args:
        recipe: the recipe with the method.
        groups: the groups of the plan.

    Raises:
        UsageError: a phase ends before every group had its turn.
    """
    cut = sum(group.is_cut for group in groups)
    for phase in phases_of(recipe):
        if phase.zero_from is not None and phase.zeroed(phase.steps, cut) < cut:
            raise UsageError(
                f"method.stabilise is {phase.steps - phase.zero_from} steps: too few to set {cut} groups to zero, one "
                f"every {phase.zero_every} steps.",
                hint=f"method.stabilise={cut * phase.zero_every}, or a smaller method.zero_every.",
            )
