"""Short fine-tunings of one cut at several learning rates, without and with recovery (``lr.json``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal, Self

from pydantic import Field

from prunecli.values.learning_rate import LRReport, Positive
from prunecli.values.report import Stage
from prunecli.values.value import Value

PLAIN: Final = "none"  # the arm of the plain cut

Percent = Annotated[float, Field(ge=0, le=100)]


class Answers(Value):
    """Which validation images a model answers right, so that two models can be compared image by image.

    Attributes:
        images: number of images.
        correct: a bit an image as hexadecimal digits, the first image highest.
    """

    images: Annotated[int, Field(gt=0)]
    correct: Annotated[str, Field(pattern="[0-9a-f]+")]

    @classmethod
    def of(cls, correct: Iterable[bool]) -> Self:
        """From whether each image was answered right.

        Raises:
            pydantic.ValidationError: there is no image.
        """
        digits = "".join("1" if right else "0" for right in correct)
        return cls(images=len(digits), correct=f"{int(digits or '0', 2):x}")

    @property
    def bits(self) -> int:
        """The answers as one number."""
        return int(self.correct, 16)

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * self.bits.bit_count() / self.images


class RateArm(Value):
    """One start of the fine-tunings.

    Attributes:
        name: the steps in one word (``lstsq+bn``); ``none`` for the plain cut.
        steps: the recovery steps behind the cut.
        start: the model before any training.
        recommended: the rate that is recommended for this start.
    """

    name: str
    steps: tuple[str, ...]
    start: Stage
    recommended: Positive


class RateTrial(Value):
    """One short fine-tuning.

    Attributes:
        arm: name of the start.
        lr: the peak learning rate.
        top1: validation accuracy after the last epoch in percent; that of guessing where the training diverged.
        best_top1: the same after the best epoch.
        loss: mean validation cross-entropy after the last epoch in nats; ``None`` where the training diverged.
        diverged: whether a loss or a weight was no longer a finite number.
        seconds: wall time.
    """

    arm: str
    lr: Positive
    top1: Percent
    best_top1: Percent
    loss: float | None
    diverged: bool = False
    seconds: float


class Difference(Value):
    """How much higher one top-1 is than another on the same images.

    Attributes:
        points: the difference in percentage points.
        error: its standard error over the images, in points.
    """

    points: float
    error: Annotated[float, Field(ge=0)]

    @property
    def margin(self) -> float:
        """Two standard errors, in points."""
        return 2 * self.error

    @property
    def beyond_noise(self) -> bool:
        """Whether the difference exceeds two standard errors."""
        return abs(self.points) > self.margin


class ArmOutcome(Value):
    """What the choice of the rate does for one start.

    Attributes:
        arm: name of the start.
        smallest: the smallest rate.
        best: the rate with the highest top-1.
        gained: top-1 at the best rate less that at the smallest.
        closed: share of the gap from the smallest rate to the dense model that this closes; ``None`` without a gap
            beyond noise.
        left: dense top-1 less that at the best rate.
        over_plain: top-1 at the best rate less the best without recovery; ``None`` for the plain cut itself.
    """

    arm: str
    smallest: Positive
    best: Positive
    gained: Difference
    closed: float | None
    left: Difference
    over_plain: Difference | None


class Regret(Value):
    """What the recommended rate gives away.

    Attributes:
        arm: the start that would be fine-tuned.
        recommended: the recommended rate.
        best: the best of the measured rates.
        missed: top-1 at the best rate less that at the recommended one.
    """

    arm: str
    recommended: Positive
    best: Positive
    missed: Difference


class MeasuredRates(Value):
    """All figures of ``prunecli lr --measure``.

    Attributes:
        model: name of the dense model.
        chosen: name of the arm that the recipe's recovery is.
        images: number of validation images.
        epochs: length of each fine-tuning.
        steps: its optimiser steps.
        distill: share of its loss that is distillation from the dense model.
        dense: the model before the cut.
        arms: the starts, the plain cut first.
        rates: the peak learning rates, ascending; the same for all arms.
        lr: the recommended rate of the chosen start, and why.
        trials: the fine-tunings, arm by arm.
        outcomes: what the choice of the rate does for each start.
        regret: what the recommended rate gives away with the chosen start.
        verdicts: the outcome as sentences.
        warnings: limits of the result.
    """

    schema_version: Literal[1] = 1
    model: str
    chosen: str
    images: int
    epochs: int
    steps: int
    distill: float
    dense: Stage
    arms: tuple[RateArm, ...]
    rates: tuple[float, ...]
    lr: LRReport
    trials: tuple[RateTrial, ...]
    outcomes: tuple[ArmOutcome, ...]
    regret: Regret
    verdicts: tuple[str, ...]
    recipe_sha256: str
    versions: dict[str, str]
    seed: int
    warnings: tuple[str, ...] = ()

    def trials_of(self, arm: str) -> tuple[RateTrial, ...]:
        """The fine-tunings of one arm, by ascending rate."""
        return tuple(sorted((trial for trial in self.trials if trial.arm == arm), key=lambda trial: trial.lr))
