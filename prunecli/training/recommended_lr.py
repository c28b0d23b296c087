"""Which learning rate to fine-tune with: published rules applied to measured inputs. Pure: values in, values out.

Rules in force:

* **short**: small images and few optimiser steps (SGD 10,000, AdamW 1,000), about what
  ``benchmarks/accuracy/lr_regret.py`` measured. SGD: 3e-2, less where the steps are too few to anneal it:
  ``3e-2 * min(1, sqrt(steps / (1000 * share of channels kept)))``, divided by ``sqrt(1 - a + a T)`` where a share a of
  the loss is distillation at temperature T. AdamW: ``1e-3 * share of top-1 lost / sqrt(share of channels kept)``,
  whatever the steps, times ``sqrt(1 - a + a T)`` with a teacher: it divides gradients by their own size, so it moves
  weights as far from a good place as from a bad one, and what is left of a teacher is that its targets are less noisy.

and otherwise, for nets trained with SGD:

* **peak**: start from a tenth of the rate the base was trained at (1e-2 for the usual 0.1).
* **damage**: the more is removed, the more the larger rate gains; at about 10 % and below a smaller one can win.
* **scratch**: random weights are no fine-tuning; they get the usual peak of training, 0.1.
* **end**: finish at 1e-4 or below on small images, at 1e-5 or below on ImageNet-sized ones, and at a hundredth of the
  peak or below, as in the measurements.

None of the latter was measured on AdamW or on transformers, where the base's own peak is the published practice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from prunecli.values.learning_rate import Candidate, FinetuneSituation, LRReport, OptimizerName, Rule

SGD_BASE_PEAK: Final = 0.1
ADAMW_PEAK_PER_512: Final = 5e-4
SMALL_DAMAGE: Final = 0.10
LARGE_DAMAGE: Final = 0.30
SHORT_PEAK: Final = 0.03
SHORT_PEAK_ADAMW: Final = 1e-3  # for a net that lost all of its accuracy and none of its channels
LEAST_KEPT: Final = 0.1  # share of channels
LEAST_LOST: Final = 0.03  # share of top-1 above guessing, about what 1,000 validation images can tell
SHORT_STEPS: Final = {"sgd": 10_000, "adamw": 1_000}  # a little more than was measured: 6,000 and 640
ANNEALING_STEPS: Final = 1_000  # for a net that keeps all of its channels

_NAMES: Final[dict[OptimizerName, str]] = {"sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True, kw_only=True)
class MeasuredRegret:
    """Points of top-1 below the best of seven rates, mean and worst over some short fine-tunings on small images.

    Attributes:
        cases: the number of fine-tunings.
        scope: the nets, the data and the numbers of steps.
        short: the regret of the short rule, with its constants fitted to other nets where there are others.
        fixed: the regret of each of some fixed rates.
    """

    cases: int
    scope: str
    short: tuple[float, float]
    fixed: Mapping[float, tuple[float, float]]


# By the kind of fine-tuning, see ``kind_of`` (measured by benchmarks/accuracy/lr_regret.py).
MEASURED_REGRETS: Final = {
    "SGD": MeasuredRegret(
        cases=32,
        scope="MLP-7 and LeNet-5 on MNIST, ResNet-20/56 and VGG-11 on CIFAR-10, 40 to 6,000 steps",
        short=(0.58, 12.75),
        fixed={0.01: (3.06, 67.62), 0.001: (14.17, 76.92)},
    ),
    "AdamW": MeasuredRegret(
        cases=18,
        scope="a small ConvNeXt and a small ViT on CIFAR-10, 40 to 640 steps",
        short=(1.41, 8.67),
        fixed={1.25e-4: (4.42, 14.28)},
    ),
    "SGD, with a teacher": MeasuredRegret(
        cases=8,
        scope="ResNet-20 on CIFAR-10, 40 to 160 steps",
        short=(0.35, 1.07),
        fixed={0.01: (0.13, 0.82), 0.001: (4.57, 8.85)},
    ),
    "AdamW, with a teacher": MeasuredRegret(
        cases=8,
        scope="a small ConvNeXt and a small ViT on CIFAR-10, 40 to 160 steps",
        short=(0.39, 2.45),
        fixed={1.25e-4: (8.85, 18.77)},
    ),
}

_CONFUSING = "Wang et al. 2023, arXiv 2301.05219"
_TPP = "Wang and Fu 2023, arXiv 2207.12534"
_GREG = "Wang et al. 2021, arXiv 2012.09243"
_DEPGRAPH = "Fang et al. 2023, arXiv 2301.12900"
_DEIT = "Touvron et al. 2021, arXiv 2012.12877"
_ISOMORPHIC = "Fang et al. 2024, arXiv 2407.04616"


def recommend_lr(
    *,
    optimizer: OptimizerName,
    epochs: int,
    batch_size: int,
    small_images: bool,
    removed_channels: float,
    removed_params: float,
    steps: int | None = None,
    narrowest_width: int | None = None,
    jsv_ratio: float | None = None,
    lost_top1: float | None = None,
    base_peak_lr: float | None = None,
    from_scratch: bool = False,
    distill_share: float = 0.0,
    distill_temperature: float = 1.0,
) -> LRReport:
    """The recommended learning rate for a ``FinetuneSituation``, whose fields are the arguments.

    Raises:
        ValueError: a share outside [0, 1], or a count or rate that is not positive.
    """
    return recommendation(
        FinetuneSituation(
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            small_images=small_images,
            removed_channels=removed_channels,
            removed_params=removed_params,
            steps=steps,
            narrowest_width=narrowest_width,
            jsv_ratio=jsv_ratio,
            lost_top1=lost_top1,
            base_peak_lr=base_peak_lr,
            from_scratch=from_scratch,
            distill_share=distill_share,
            distill_temperature=distill_temperature,
        )
    )


def recommendation(situation: FinetuneSituation) -> LRReport:
    """The recommended learning rate, the rules behind it and the rates that were weighed up."""
    if situation.optimizer == "sgd" and situation.from_scratch:
        applied: tuple[Rule, ...] = (_scratch(),)
        reason = "what nets with BatchNorm are trained at"
        candidates: tuple[Candidate, ...] = (
            Candidate(name="usual peak", lr=applied[-1].lr, taken=True, reason=reason),
        )
    else:
        published, why_not_short = _published(situation), _why_not_short(situation)
        applied = published if why_not_short else (_short(situation),)
        candidates = _candidates(situation, applied[-1], published=published[-1].lr, why_not_short=why_not_short)
    recommended = applied[-1].lr
    end = _end(recommended, small_images=situation.small_images)
    rules = (*applied, end)
    return LRReport(
        recommended=recommended,
        rule=" ".join(rule.reason for rule in rules),
        inputs=situation,
        final_lr=end.lr,
        rules=rules,
        candidates=candidates,
    )


def _published(situation: FinetuneSituation) -> tuple[Rule, ...]:
    """The rules of the papers, of which the last one has the rate."""
    if situation.optimizer == "adamw":
        return (_adamw_peak(situation.base_peak_lr, situation.batch_size),)
    peak = _sgd_peak(situation.base_peak_lr)
    return peak, _damage(peak.lr, situation.removed_channels)


def _why_not_short(situation: FinetuneSituation) -> str | None:
    """Why the rule of short fine-tunings does not hold here; ``None`` where it does."""
    optimizer, steps = situation.optimizer, situation.steps
    if situation.from_scratch:
        return "measured on trained nets"
    if not situation.small_images:
        return "measured up to 64 px only"
    if steps is None:
        return "the number of steps is not known without data"
    if steps > SHORT_STEPS[optimizer]:
        return f"{steps} steps are more than the {SHORT_STEPS[optimizer]} it is trusted for"
    if situation.removed_channels <= SMALL_DAMAGE:
        return f"trusted where more than {SMALL_DAMAGE:.0%} of the channels are removed"
    if optimizer == "adamw" and situation.lost_top1 is None:
        return "it needs the accuracy of a dense model that knows the data"
    return None


def _candidates(
    situation: FinetuneSituation, taken: Rule, *, published: float, why_not_short: str | None
) -> tuple[Candidate, ...]:
    """The rates that were weighed up, with the measured regret of each where the short rule applies.

    Args:
        situation: the fine-tuning.
        taken: the rule whose rate is recommended.
        published: the rate of the published rules.
        why_not_short: the reason not to apply the short rule, if any.
    """
    sgd = situation.optimizer == "sgd"
    practice = "what papers take for 60 epochs and more" if sgd else "the only published practice"
    if why_not_short:
        return (
            Candidate(name="short", lr=None, taken=False, reason=why_not_short),
            Candidate(name="published", lr=published, taken=True, reason=practice),
        )
    kind = kind_of(situation.optimizer, taught=situation.distill_share > 0)
    measured, smaller = MEASURED_REGRETS[kind], []
    for lr, regret in measured.fixed.items():
        if math.isclose(lr, published, rel_tol=0.05):
            practice += f"; {_regret_sentence(kind, regret)}"
        elif lr < published:
            smaller.append(Candidate(name="smaller", lr=lr, taken=False, reason=_regret_sentence(kind, regret)))
    return (
        Candidate(name="short", lr=taken.lr, taken=True, reason=_regret_sentence(kind, measured.short)),
        Candidate(name="published", lr=published, taken=False, reason=practice),
        *smaller,
    )


def _regret_sentence(kind: str, regret: tuple[float, float]) -> str:
    mean, worst = regret
    cases = f"{MEASURED_REGRETS[kind].cases} cases of {kind}"
    return f"{mean:g} points below the best of seven rates (mean; worst {worst:g}) in {cases}"


def kind_of(optimizer: OptimizerName, *, taught: bool) -> str:
    """The key of ``MEASURED_REGRETS`` for fine-tunings like this one."""
    return _NAMES[optimizer] + ", with a teacher" * taught


def short_peak(steps: int, removed: float, *, peak: float = SHORT_PEAK, annealing: float = ANNEALING_STEPS) -> float:
    """``peak * min(1, sqrt(steps / (annealing * (1 - removed))))``: few steps cannot anneal the noise of a large rate.

    A net that lost much has more to gain from the rate than to fear from its noise. Form and both constants are fitted
    to the cases of ``benchmarks/accuracy/lr_regret.py``; no paper states it.
    """
    return peak * min(1.0, math.sqrt(steps / (annealing * max(1 - removed, 1e-9))))


def short_peak_adamw(removed: float, lost_top1: float, *, peak: float = SHORT_PEAK_ADAMW) -> float:
    """``peak * lost_top1 / sqrt(1 - removed)``: what is nearly as good as before the cut is moved as little.

    SGD's steps shrink by themselves near a good place, AdamW's do not. Less than 3 % of the accuracy counts as 3 %
    (validation images tell no less), more than nine tenths removed as nine tenths (the largest cut that was measured).
    Form and constant are fitted to the cases of ``benchmarks/accuracy/lr_regret.py``, in which the best rate did not
    follow the number of steps; no paper states it.
    """
    return peak * max(lost_top1, LEAST_LOST) / math.sqrt(max(1 - removed, LEAST_KEPT))


def distillation_gain(share: float, temperature: float) -> float:
    """``sqrt(1 - a + a T)``: how much larger gradients are taken to be than those of the labels alone.

    That of ``a T^2 KL(p_T || q_T)`` in the logits is ``a T (q_T - p_T)``, that of cross-entropy ``q - p``, and both
    differences are at most 1 in each class: up to ``1 - a + a T`` times as large in all. But soft targets differ less
    than labels do, so it can also be no larger. This is the geometric mean of both ends; no paper states it.

    Args:
        share: the share a of the loss that is distillation, 0 to 1.
        temperature: the temperature T.
    """
    return math.sqrt(1 - share + share * temperature)


def _short(situation: FinetuneSituation) -> Rule:
    """The rule of short fine-tunings, where ``_why_not_short`` has nothing against it."""
    gain = distillation_gain(situation.distill_share, situation.distill_temperature)
    removed = situation.removed_channels
    if situation.optimizer == "sgd":
        assert situation.steps is not None
        lr, reason = _short_sgd(situation.steps, removed, gain)
    else:
        assert situation.lost_top1 is not None
        lr, reason = _short_adamw(removed, situation.lost_top1, gain)
    if situation.base_peak_lr is not None:
        reason += " It does not depend on the base's own rate."
    return Rule(name="short", lr=lr, reason=reason, source=_source(situation.optimizer))


def _short_sgd(steps: int, removed: float, gain: float) -> tuple[float, str]:
    alone = short_peak(steps, removed)
    lr = float(f"{alone / gain:.2g}")
    reason = f"Of seven rates, {SHORT_PEAK:g} was best or near it in short fine-tunings on small images"
    if alone < SHORT_PEAK:
        reason += (
            f"; {steps} steps are few to anneal it with {removed:.0%} of the channels removed, so it is {alone:.2g}."
        )
    else:
        reason += f", and {steps} steps are enough to anneal it."
    if gain > 1:
        reason += f" Distillation pulls harder than labels alone, by {gain:.2g} as a middle estimate, so it is {lr:g}."
    return lr, reason


def _short_adamw(removed: float, lost_top1: float, gain: float) -> tuple[float, str]:
    alone = short_peak_adamw(removed, lost_top1)
    lr = float(f"{alone * gain:.2g}")
    lost = f"{lost_top1:.0%}" if lost_top1 >= LEAST_LOST else f"less than {LEAST_LOST:.0%}"
    reason = (
        "In short fine-tunings by AdamW on small images the best of seven rates grew with the damage; with "
        f"{lost} of the accuracy above guessing lost and {removed:.0%} of the channels removed it is near {alone:.2g}."
    )
    if gain > 1:  # the gradients' size is divided out; that they are less noisy is not, and it was worth as much
        reason += f" A teacher's answers are less noisy than labels, so it can be {lr:g}."
    return lr, reason


def _source(optimizer: OptimizerName) -> str:
    measured = (MEASURED_REGRETS[kind_of(optimizer, taught=taught)] for taught in (False, True))
    cases = (f"{regrets.cases} cases of {regrets.scope}" for regrets in measured)
    return "benchmarks/accuracy/lr_regret.py: " + "; with a teacher ".join(cases)


def _sgd_peak(base_peak_lr: float | None) -> Rule:
    peak = SGD_BASE_PEAK if base_peak_lr is None else base_peak_lr
    origin = "assumed, as finetune.original does not say it" if base_peak_lr is None else "given"
    lr = peak / 10
    return Rule(
        name="peak",
        lr=lr,
        reason=f"A tenth of the base's peak rate {peak:g} ({origin}) is {lr:g}.",
        source=f"{_TPP}; {_CONFUSING}; {_GREG}; {_DEPGRAPH}: all fine-tune bases trained at 0.1 from 0.01",
    )


def _scratch() -> Rule:
    return Rule(
        name="scratch",
        lr=SGD_BASE_PEAK,
        reason=f"The weights are random, so this is a training from scratch: the usual peak is {SGD_BASE_PEAK:g}.",
        source="He et al. 2016, arXiv 1512.03385, section 4.2: 0.1 for 128 images of CIFAR-10",
    )


def _damage(lr: float, removed: float) -> Rule:
    if removed <= SMALL_DAMAGE:
        reason = f"{removed:.0%} of the channels are removed, so little that a ten times smaller rate does better."
        measured = "ResNet-34 on ImageNet100, 10 % removed, 60 epochs: 84.21 from 1e-3, 83.72 from 1e-2"
        lr = lr / 10
    elif removed <= LARGE_DAMAGE:
        reason = f"{removed:.0%} of the channels are removed: the rate matters little, and it stays."
        measured = "ResNet-34 on ImageNet100, 30 % removed, 60 epochs: 83.87 from 1e-3, 83.88 from 1e-2"
    else:
        reason = f"{removed:.0%} of the channels are removed: a smaller rate would recover less, so it stays."
        measured = "ResNet-34 on ImageNet100, 50 % removed, 60 epochs: 82.90 from 1e-3, 83.67 from 1e-2"
    return Rule(name="damage", lr=lr, reason=reason, source=f"{_CONFUSING}: {measured}")


def _adamw_peak(base_peak_lr: float | None, batch_size: int) -> Rule:
    lead = "No published pruning rule was measured with AdamW or on transformers;"
    if base_peak_lr is not None:
        lr, reason = base_peak_lr, f"{lead} the base's own peak rate {base_peak_lr:g} is kept."
    else:
        lr = ADAMW_PEAK_PER_512 * batch_size / 512
        reason = f"{lead} DeiT's rate 5e-4 for 512 images, scaled to a batch of {batch_size}, is {lr:g}."
    return Rule(name="adamw", lr=lr, reason=reason, source=f"{_DEIT}; {_ISOMORPHIC} fine-tunes pruned DeiT at it")


def _end(lr: float, *, small_images: bool) -> Rule:
    final = min(1e-4 if small_images else 1e-5, lr / 100)
    size = "small images" if small_images else "ImageNet-sized images"
    return Rule(
        name="end",
        lr=final,
        reason=f"The schedule should end at {final:.2g} or below ({size}).",
        source=f"{_CONFUSING}: ending at 1e-4 instead of 1e-3 alone is worth 0.5 to 0.8 points",
    )
