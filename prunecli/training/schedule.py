"""Learning-rate schedules as pure functions of the optimiser step ``t``, counted from 0 over the whole training.

A rate depends on its step alone, so a resumed training needs only its position. ``T`` is the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Literal

from prunecli.errors import UsageError
from prunecli.recipe.schedules import ConstantSchedule, OriginalSchedule, RetrainingSchedule, StepSchedule
from prunecli.recipe.settings import FinetuneSettings

Schedule = Callable[[int], float]  # optimiser step, from 0 -> learning rate

_RISE: Final = 0.1  # share of the steps in which slr, clr and allr rise to their peak
_RISE_FROM: Final = 0.01  # where slr and clr start, as a share of the peak (1e-3 of the authors' 0.1)


def cosine(step: int, *, peak: float, lowest: float, steps: int) -> float:
    """Half a cosine, ``lowest + (peak - lowest) (1 + cos(pi t / (T - 1))) / 2``: ``peak`` at the first of T steps,
    ``lowest`` at the last one (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5, without restarts).
    """
    return lowest + 0.5 * (peak - lowest) * (1 + math.cos(math.pi * step / max(steps - 1, 1)))


def stepped(step: int, *, peak: float, gamma: float, milestones: Iterable[int]) -> float:
    """``peak gamma^n``, where n is the number of milestones m with ``m <= t``: the rate falls at step m itself."""
    passed: int = sum(milestone <= step for milestone in milestones)
    return peak * gamma**passed


def linear_warmup(step: int, *, peak: float, steps: int) -> float:
    """A line from ``peak / W`` at step 0 to ``peak`` at step W, behind the last of W warm-up steps."""
    first = peak / steps
    return first + step * ((peak - first) / steps)


def slr(step: int, *, peak: float, steps: int) -> float:
    """A rise from ``peak / 100`` over the first tenth of T steps, then the peak; a tenth of it after half of the other
    steps, and a hundredth after three quarters of them (SLR; Le and Hua 2021, arXiv 2105.03193).
    """
    rise = round(_RISE * steps)
    drops = tuple(round(share * (steps - rise)) for share in (0.5, 0.75))
    fallen = stepped(step - rise, peak=peak, gamma=0.1, milestones=drops)
    return fallen * _risen(step, steps=rise, start=_RISE_FROM)


def clr(step: int, *, peak: float, steps: int) -> float:
    """The rise of `slr`, then half a cosine from ``peak`` down to ``peak / 10,000`` at the last step: one cycle (CLR;
    Le and Hua 2021, arXiv 2105.03193).
    """
    rise = round(_RISE * steps)
    fallen = cosine(max(step - rise, 0), peak=peak, lowest=peak * _RISE_FROM**2, steps=steps - rise)
    return fallen * _risen(step, steps=rise, start=_RISE_FROM)


def allr(step: int, *, peak: float, steps: int) -> float:
    """A rise from 0 over the first W = T / 10 steps, then ``peak (T - t) / (T - W)``, linear towards 0 (ALLR; Zimmer et
    al. 2023, arXiv 2111.00843). `retraining_rates.adaptive_peak` gives its ``peak``.
    """
    rise = round(_RISE * steps)
    fallen = peak * (1 - max(step - rise, 0) / (steps - rise))
    return fallen * _risen(step, steps=rise, start=0.0)


def _risen(step: int, *, steps: int, start: float) -> float:
    """The share of the peak at a step of a rise: half a cosine from ``start`` at step 0 to 1 at step ``steps``."""
    if step >= steps:
        return 1.0
    return start + (1 - start) * ((1 - math.cos(math.pi * step / steps)) / 2)


# ---------------------------------------------------------------------------------------------- from the settings


def build_schedule(settings: FinetuneSettings, *, lr: float, steps_per_epoch: int, epochs: int) -> Schedule:
    """The schedule that the settings name, over ``steps_per_epoch * epochs`` = T steps.

    * ``cosine``, ``step``, ``constant``: linear warm-up to ``lr`` over ``warmup_epochs``, then as named. The last step
      of a cosine runs at ``min_lr`` exactly; a stepped rate never falls below it. A milestone is a share of T, counted
      from the end of the warm-up: without one, share 0.5 of 120 epochs drops the rate at the start of epoch 61.
    * ``rewind``: the last T steps of the base's own schedule, ``settings.original`` (learning-rate rewinding; Renda et
      al. 2020, arXiv 2003.02389); ``lr`` is not read.
    * ``slr``, ``clr``, ``allr``: the functions of these names, with the peak ``lr``.

    Raises:
        UsageError: ``rewind`` over more epochs than the original schedule has.
    """
    total = steps_per_epoch * epochs
    match settings.schedule:
        case RetrainingSchedule(kind="slr"):
            return partial(slr, peak=lr, steps=total)
        case RetrainingSchedule(kind="clr"):
            return partial(clr, peak=lr, steps=total)
        case RetrainingSchedule(kind="allr"):
            return partial(allr, peak=lr, steps=total)
        case RetrainingSchedule():
            return _rewound(settings.original, epochs=epochs, steps_per_epoch=steps_per_epoch)
        case asked:
            drops = asked if isinstance(asked, StepSchedule) else StepSchedule()
            return _falling(
                asked.kind,
                peak=lr,
                lowest=0.0 if isinstance(asked, ConstantSchedule) else asked.min_lr or 0.0,
                milestones=drops.milestones,
                gamma=drops.gamma,
                steps=total,
                warmup=min(round(asked.warmup_epochs * steps_per_epoch), total - 1),
            )


def _rewound(original: OriginalSchedule | None, *, epochs: int, steps_per_epoch: int) -> Schedule:
    """The last ``epochs`` of the schedule that the base was trained with. Raises UsageError where it had fewer."""
    assert original is not None  # the settings see to it
    if epochs > original.epochs:
        raise UsageError(
            f"finetune.schedule rewind cannot replay {epochs} epochs of a schedule that had {original.epochs}."
        )
    whole = _falling(
        original.schedule,
        peak=original.lr,
        lowest=original.min_lr,
        milestones=original.milestones,
        gamma=original.gamma,
        steps=original.epochs * steps_per_epoch,
    )
    skipped = (original.epochs - epochs) * steps_per_epoch
    return lambda step: whole(step + skipped)


def _falling(
    name: Literal["cosine", "step", "constant"],
    *,
    peak: float,
    lowest: float,
    milestones: Iterable[float],
    gamma: float,
    steps: int,
    warmup: int = 0,
) -> Schedule:
    """A schedule that never rises above where its ``warmup`` steps end; ``milestones`` are shares of all ``steps``."""
    lowest = min(lowest, peak)
    drops = tuple(round(share * steps) for share in milestones)

    def rate(step: int) -> float:
        if step < warmup:
            return linear_warmup(step, peak=peak, steps=warmup)
        match name:
            case "cosine":
                return cosine(step - warmup, peak=peak, lowest=lowest, steps=steps - warmup)
            case "step":
                return max(stepped(step - warmup, peak=peak, gamma=gamma, milestones=drops), lowest)
            case "constant":
                return peak

    return rate
