"""What measured rates say, against hand-made accuracies and a plain mean over images."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from pydantic import ValidationError

from prunecli.training.rate_outcomes import Judged, best_rate, difference, outcomes, rates_around, regret, verdicts
from prunecli.values.measured_rates import Answers
from toys.sample_rates import CURVES, GUESSING, RECOMMENDED, curve, judged


def said(curves, chosen="lstsq+bn", dense=915):
    whole = judged(dense)
    return verdicts(curves, whole, outcomes(curves, whole, RECOMMENDED), regret(curves, chosen, RECOMMENDED))


@pytest.mark.parametrize("recommended", [0.03, 0.0076, 1.25e-4])
def test_five_rates_are_about_three_times_apart_around_the_recommended_one(recommended):
    rates = rates_around(recommended)
    assert len(rates) == 5
    assert rates[2] == recommended
    assert all(2.8 < large / small < 3.2 for small, large in itertools.pairwise(rates))
    assert all(float(f"{lr:.2g}") == lr for at, lr in enumerate(rates) if at != 2)


def test_answers_keep_every_image():
    right = [False, False, True, True, False, True, False, False, True]  # leading and trailing wrong ones count too
    found = Answers.of(right)
    assert [bit == "1" for bit in f"{found.bits:0{found.images}b}"] == right
    assert found.top1 == pytest.approx(100 * 4 / 9)
    assert Answers.model_validate(found.model_dump(mode="json")) == found
    with pytest.raises(ValidationError):
        Answers.of([])


def test_a_difference_is_the_paired_mean_over_images():
    draw = random.Random(0)
    first = [draw.random() < 0.8 for _ in range(300)]
    second = [right if draw.random() < 0.9 else not right for right in first]
    found = difference(Judged.of(Answers.of(first)), Judged.of(Answers.of(second)))
    per_image = [100 * (a - b) for a, b in zip(first, second, strict=True)]
    assert found.points == pytest.approx(statistics.fmean(per_image))
    assert found.error == pytest.approx(statistics.pstdev(per_image) / 300**0.5)
    assert found.error < difference(Judged.of(Answers.of(first)), GUESSING).error, "pairing takes noise away"


def test_a_diverged_training_is_compared_without_pairs():
    found = difference(judged(500), GUESSING)
    assert found.points == pytest.approx(40.0)
    assert found.error == pytest.approx(100 * ((0.5 * 0.5 + 0.1 * 0.9) / 1000) ** 0.5)


def test_noise_is_two_standard_errors():
    near, far = difference(judged(503), judged(500)), difference(judged(510), judged(500))
    assert (near.beyond_noise, far.beyond_noise) == (False, True)
    assert far.margin == pytest.approx(2 * 100 * ((10 - 10**2 / 1000) / 1000**2) ** 0.5)


def test_of_equal_rates_the_recommended_one_is_the_best_and_else_the_smallest():
    assert best_rate(curve(800, 850, 850, 850, 800), RECOMMENDED) == 0.03
    assert best_rate(curve(800, 850, 840, 850, 800), RECOMMENDED) == 0.01


def test_the_gap_is_split_by_hand():
    plain, orthp, chosen = outcomes(CURVES, judged(915), RECOMMENDED)
    assert (plain.smallest, plain.best) == (0.0033, 0.09)
    assert plain.gained.points == pytest.approx(84.1 - 40.2)
    assert plain.closed == pytest.approx((84.1 - 40.2) / (91.5 - 40.2))
    assert plain.left.points == pytest.approx(91.5 - 84.1)
    assert plain.over_plain is None
    assert orthp.over_plain
    assert chosen.over_plain
    assert orthp.over_plain.points == pytest.approx(80.3 - 84.1)
    assert (chosen.best, chosen.over_plain.points) == (0.03, pytest.approx(87.4 - 84.1))
    assert chosen.gained.points == pytest.approx(87.4 - 83.8)


def test_the_outcome_in_words():
    plain, orthp, chosen, recommended, diverged, noise = said(CURVES)
    assert plain == (
        "Without recovery, the smallest rate 0.0033 ends at 40.20 % and 0.09 at 84.10 %: a larger rate alone gains "
        "43.90 ± 3.14 points, 86 % of the gap to the dense 91.50 %, and leaves 7.40 ± 1.66 points."
    )
    assert "With orthp+bn, a larger rate gains 49.30" in orthp
    assert "That is 3.80 ± 1.21 points below the best without recovery" in orthp
    assert "With lstsq+bn, a larger rate gains 3.60 ± 1.18 points: 83.80 % at 0.0033, 87.40 % at 0.03." in chosen
    assert "3.30 ± 1.13 points above the best without recovery, and leaves 4.10 ± 1.25 points." in chosen
    assert recommended == "The recommended rate 0.03 ends at 87.40 % with lstsq+bn, the best of the 5 rates."
    assert diverged == "Diverged, and counted as guessing: none at 0.27."
    assert "1000 validation images, paired" in noise


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (curve(800, 860, 858, 850, 800), "0.20 ± 0.28 points below the best of the 5, 0.01: within noise."),
        (curve(800, 890, 858, 850, 800), "3.20 ± 1.11 points below the best of the 5, 0.01: beyond noise."),
        (curve(900, 890, 858, 850, 800), "beyond noise. That is the smallest rate of all, so one beyond it may be"),
        (curve(800, 810, 858, 850, 900), "beyond noise. That is the largest rate of all, so one beyond it may be"),
    ],
)
def test_a_recommendation_that_was_not_the_best_says_by_how_much(chosen, words):
    assert any(words in sentence for sentence in said({"none": CURVES["none"], "lstsq+bn": chosen}))


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (curve(914, 914, 914, 900, 880), "there is no gap beyond noise that a rate could close"),
        (curve(940, 914, 914, 900, 880), "there is no gap beyond noise that a rate could close"),
        (curve(850, 840, 800, 700, 500), "a larger rate alone closes nothing of the gap"),
        (curve(700, 700, 700, 701, 500), "a larger rate alone gains 0.10 ± 0.20 points (within noise), 0 % of the gap"),
        (curve(700, 950, 700, 701, 500), "and ends 3.50 ± 1.16 points above the dense model."),
    ],
)
def test_a_plain_cut_that_a_larger_rate_does_not_help_is_not_praised(plain, words):
    sentences = said({"none": plain}, chosen="none")
    assert words in sentences[0]
    assert "without recovery" in sentences[1]


def test_a_recovery_whose_smallest_rate_is_the_best_is_told_so():
    sentence = said({"none": CURVES["none"], "lstsq+bn": curve(842, 830, 820, 800, 700)})[1]
    assert sentence.startswith("With lstsq+bn, the smallest rate 0.0033 is the best, 84.20 %.")
    assert "0.10 ± 0.20 points above the best without recovery (within noise)" in sentence
