"""What short fine-tunings at several rates say: how much a larger rate alone is worth, how much with recovery, and
whether the recommended rate was the best of them. Pure: values in, values out.

The experiment is that of Wang et al. 2023, "Why is the State of Neural Network Pruning so Confusing?" (arXiv
2301.05219): much of what a pruning method seems to gain is gained by a larger fine-tuning rate alone, which makes up
for the dynamical isometry that the cut has broken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prunecli.values.measured_rates import PLAIN, Answers, ArmOutcome, Difference, Regret

_FACTORS: Final = (1 / 9, 1 / 3, 1, 3, 9)


def rates_around(recommended: float) -> tuple[float, ...]:
    """Five rates, each about three times the one before, with the recommended one in the middle; two digits each."""
    return tuple(recommended if factor == 1 else float(f"{recommended * factor:.2g}") for factor in _FACTORS)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A top-1 accuracy with the noise that it has.

    Attributes:
        top1: percent.
        images: number of validation images.
        answers: which of them were right; ``None`` for the accuracy of guessing, which stands for a training that
            diverged.
    """

    top1: float
    images: int
    answers: Answers | None

    @classmethod
    def of(cls, answers: Answers) -> Judged:
        """The accuracy of these answers."""
        return cls(top1=answers.top1, images=answers.images, answers=answers)


def difference(first: Judged, second: Judged) -> Difference:
    """``first`` less ``second``; paired image by image where both have answers (McNemar's variance).

    With b images that only the first answers right and c that only the second does, of n, the difference is
    ``(b - c) / n`` and its variance ``(b + c - (b - c)^2 / n) / n^2``.
    """
    n = first.images
    if first.answers is None or second.answers is None:
        shares = (first.top1 / 100, second.top1 / 100)
        variance = math.fsum(share * (1 - share) for share in shares) / n
    else:
        one, other = first.answers.bits, second.answers.bits
        b, c = (one & ~other).bit_count(), (other & ~one).bit_count()
        variance = (b + c - (b - c) ** 2 / n) / n**2
    return Difference(points=first.top1 - second.top1, error=100 * math.sqrt(variance))


#: The accuracies of one arm by rate.
Curve = Mapping[float, Judged]


def best_rate(curve: Curve, recommended: float) -> float:
    """The rate with the highest top-1; of equals the recommended one, else the smallest."""
    return min(curve, key=lambda lr: (-curve[lr].top1, lr != recommended, lr))


def outcomes(curves: Mapping[str, Curve], dense: Judged, recommended: float) -> tuple[ArmOutcome, ...]:
    """What the choice of the rate does for each arm.

    Args:
        curves: accuracies by name of the arm and by rate; ``none`` is the plain cut.
        dense: the model before the cut.
        recommended: the recommended rate.
    """
    plain = curves[PLAIN]
    best_plain = plain[best_rate(plain, recommended)]
    found = []
    for arm, curve in curves.items():
        smallest, best = min(curve), best_rate(curve, recommended)
        gap, gained = difference(dense, curve[smallest]), difference(curve[best], curve[smallest])
        found.append(
            ArmOutcome(
                arm=arm,
                smallest=smallest,
                best=best,
                gained=gained,
                closed=gained.points / gap.points if gap.points > 0 and gap.beyond_noise else None,
                left=difference(dense, curve[best]),
                over_plain=None if arm == PLAIN else difference(curve[best], best_plain),
            )
        )
    return tuple(found)


def regret(curves: Mapping[str, Curve], chosen: str, recommended: float) -> Regret:
    """What the recommended rate gives away with the chosen recovery."""
    curve = curves[chosen]
    best = best_rate(curve, recommended)
    missed = difference(curve[best], curve[recommended])
    return Regret(arm=chosen, recommended=recommended, best=best, missed=missed)


# ---------------------------------------------------------------------------------------------- in words


def verdicts(
    curves: Mapping[str, Curve], dense: Judged, found: Sequence[ArmOutcome], given_away: Regret
) -> tuple[str, ...]:
    """The outcome as sentences; each difference with two standard errors.

    Args:
        curves: accuracies by name of the arm and by rate.
        dense: the model before the cut.
        found: what `outcomes` has made of them.
        given_away: what `regret` has.
    """
    plain = next(outcome for outcome in found if outcome.arm == PLAIN)
    return (
        _of_plain(plain, curves[PLAIN], dense),
        *(_of_recovery(outcome, curves[outcome.arm]) for outcome in found if outcome is not plain),
        _of_recommendation(given_away, curves[given_away.arm]),
        *_of_diverged(curves),
        f"Each ± is two standard errors over the {dense.images} validation images, paired. Another order of the "
        "training images would add to it, and the best of several rates is partly the luckiest.",
    )


def _of_plain(outcome: ArmOutcome, curve: Curve, dense: Judged) -> str:
    small, best = curve[outcome.smallest], curve[outcome.best]
    at_small = f"Without recovery, the smallest rate {outcome.smallest:g} ends at {small.top1:.2f} %"
    if outcome.closed is None:
        gap = "there is no gap beyond noise that a rate could close"
        return f"{at_small}, the dense model at {dense.top1:.2f} %: {gap}."
    if outcome.best == outcome.smallest:
        left = f"{_points(outcome.left)} below the dense {dense.top1:.2f} %"
        return f"{at_small}, {left}, and no larger one does better: a larger rate alone closes nothing of the gap."
    noise = "" if outcome.gained.beyond_noise else " (within noise)"
    return (
        f"{at_small} and {outcome.best:g} at {best.top1:.2f} %: a larger rate alone gains {_points(outcome.gained)}"
        f"{noise}, {100 * outcome.closed:.0f} % of the gap to the dense {dense.top1:.2f} %, and {_left(outcome.left)}."
    )


def _of_recovery(outcome: ArmOutcome, curve: Curve) -> str:
    assert outcome.over_plain is not None
    small, best, over = curve[outcome.smallest], curve[outcome.best], outcome.over_plain
    if outcome.best == outcome.smallest:
        rates = f"the smallest rate {outcome.smallest:g} is the best, {best.top1:.2f} %"
    else:
        noise = "" if outcome.gained.beyond_noise else ", within noise"
        rates = (
            f"a larger rate gains {_points(outcome.gained)}{noise}: {small.top1:.2f} % at {outcome.smallest:g}, "
            f"{best.top1:.2f} % at {outcome.best:g}"
        )
    side = f"{_points(over)} {'above' if over.points >= 0 else 'below'} the best without recovery"
    side += "" if over.beyond_noise else " (within noise)"
    return f"With {outcome.arm}, {rates}. That is {side}, and {_left(outcome.left)}."


def _of_recommendation(found: Regret, curve: Curve) -> str:
    there = f"The recommended rate {found.recommended:g} ends at {curve[found.recommended].top1:.2f} %"
    start = "without recovery" if found.arm == PLAIN else f"with {found.arm}"
    if found.best == found.recommended:
        return f"{there} {start}, the best of the {len(curve)} rates."
    noise = "beyond noise" if found.missed.beyond_noise else "within noise"
    text = f"{there} {start}, {_points(found.missed)} below the best of the {len(curve)}, {found.best:g}: {noise}."
    if found.best in (min(curve), max(curve)):
        end = "smallest" if found.best == min(curve) else "largest"
        text += f" That is the {end} rate of all, so one beyond it may be better still."
    return text


def _of_diverged(curves: Mapping[str, Curve]) -> tuple[str, ...]:
    """A sentence where a training diverged."""
    lost = [
        f"{arm} at {lr:g}" for arm, curve in curves.items() for lr, judged in curve.items() if judged.answers is None
    ]
    return (f"Diverged, and counted as guessing: {', '.join(lost)}.",) if lost else ()


def _left(found: Difference) -> str:
    """What is left to the dense model."""
    return f"leaves {_points(found)}" if found.points >= 0 else f"ends {_points(found)} above the dense model"


def _points(found: Difference) -> str:
    """The size of a difference with its margin: ``3.10 ± 1.20 points``."""
    return f"{abs(found.points):.2f} ± {found.margin:.2f} points"
