"""A made-up measurement of learning rates: 1,000 images, of which a model that answers N right answers the first N."""

from __future__ import annotations

from collections.abc import Mapping

from prunecli.training.rate_outcomes import Judged, outcomes, regret, verdicts
from prunecli.values.learning_rate import FinetuneSituation, LRReport, Rule
from prunecli.values.measured_rates import Answers, MeasuredRates, RateArm, RateTrial
from prunecli.values.report import Stage
from toys import sample_report

IMAGES = 1_000
RATES = (0.0033, 0.01, 0.03, 0.09, 0.27)
RECOMMENDED = 0.03
GUESSING = Judged(top1=10.0, images=IMAGES, answers=None)


def judged(right: int) -> Judged:
    """A model that answers the first ``right`` images."""
    return Judged.of(Answers.of(at < right for at in range(IMAGES)))


def curve(*right: int | None) -> dict[float, Judged]:
    """Accuracies at `RATES`; ``None`` where the training diverged."""
    return {lr: GUESSING if count is None else judged(count) for lr, count in zip(RATES, right, strict=False)}


CURVES = {
    "none": curve(402, 655, 812, 841, None),
    "orthp+bn": curve(310, 520, 744, 803, 790),
    "lstsq+bn": curve(838, 861, 874, 871, 702),
}
STARTS = {"none": 10.4, "orthp+bn": 12.0, "lstsq+bn": 61.25}


def measured(
    curves: Mapping[str, Mapping[float, Judged]] = CURVES, *, chosen: str = "lstsq+bn", dense: int = 915
) -> MeasuredRates:
    """The whole result, as the job makes it."""
    first, small = sample_report.stages()[:2]
    dense_stage, whole = first.model_copy(update={"top1": dense / 10}), judged(dense)
    arms = tuple(
        RateArm(
            name=name,
            steps=() if name == "none" else tuple(name.split("+")),
            start=_start(small, name),
            recommended=RECOMMENDED,
        )
        for name in curves
    )
    trials = tuple(
        RateTrial(
            arm=name,
            lr=lr,
            top1=found.top1,
            best_top1=found.top1,
            loss=None if found.answers is None else 0.5,
            diverged=found.answers is None,
            seconds=9.5,
        )
        for name, by_rate in curves.items()
        for lr, found in by_rate.items()
    )
    found, given_away = outcomes(curves, whole, RECOMMENDED), regret(curves, chosen, RECOMMENDED)
    reason = "Of seven rates, 0.03 was best or near it in short fine-tunings on small images."
    return MeasuredRates(
        model="cifar_resnet20",
        chosen=chosen,
        images=IMAGES,
        epochs=1,
        steps=40,
        distill=0.9,
        dense=dense_stage,
        arms=arms,
        rates=RATES,
        lr=LRReport(
            recommended=RECOMMENDED,
            rule=reason,
            inputs=FinetuneSituation.model_construct(optimizer="sgd", epochs=1, steps=40),
            rules=(Rule(name="short", lr=RECOMMENDED, reason=reason, source="arXiv 2301.05219"),),
        ),
        trials=trials,
        outcomes=found,
        regret=given_away,
        verdicts=verdicts(curves, whole, found, given_away),
        recipe_sha256="0f" * 32,
        versions={"prunecli": "0.1.0", "torch": "2.6.0"},
        seed=0,
        warnings=("2 images were unreadable and left out: <script>alert(1)</script>.png.",),
    )


def _start(small: Stage, name: str) -> Stage:
    stage = "pruned" if name == "none" else "recovered"
    return small.model_copy(update={"name": stage, "top1": STARTS.get(name, 10.0)})
