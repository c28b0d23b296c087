"""Which learning rate to fine-tune with: published rules applied to measured inputs. Pure; the evidence names it all.

Rules in force:

* **short**: small images and few optimiser steps (SGD 10,000, AdamW 1,000), about what ``benchmarks/lr_regret.py``
  measured. SGD: 3e-2, less where the steps are too few to anneal it:
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
from typing import Any, Final, Literal

from prunecli.values.report import LRReport

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

Optimizer = Literal["sgd", "adamw"]
_NAMES: Final[dict[Optimizer, str]] = {"sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Points of top-1 below the best of seven rates, mean and worst over some short fine-tunings on small images.

    ``short`` is of that rule with its constants fitted to other nets, where there are others; ``fixed`` of the rates
    that it is keyed by.
    """

    cases: int
    of: str
    short: tuple[float, float]
    fixed: Mapping[float, tuple[float, float]]


# What was measured of fine-tunings of one kind (benchmarks/lr_regret.py).
EVIDENCE: Final = {
    "SGD": Evidence(
        cases=32,
        of="MLP-7 and LeNet-5 on MNIST, ResNet-20/56 and VGG-11 on CIFAR-10, 40 to 6,000 steps",
        short=(0.58, 12.75),
        fixed={0.01: (3.06, 67.62), 0.001: (14.17, 76.92)},
    ),
    "AdamW": Evidence(
        cases=18,
        of="a small ConvNeXt and a small ViT on CIFAR-10, 40 to 640 steps",
        short=(1.41, 8.67),
        fixed={1.25e-4: (4.42, 14.28)},
    ),
    "SGD, with a teacher": Evidence(
        cases=8,
        of="ResNet-20 on CIFAR-10, 40 to 160 steps",
        short=(0.35, 1.07),
        fixed={0.01: (0.13, 0.82), 0.001: (4.57, 8.85)},
    ),
    "AdamW, with a teacher": Evidence(
        cases=8,
        of="a small ConvNeXt and a small ViT on CIFAR-10, 40 to 160 steps",
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
    optimizer: Optimizer,
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
    """The peak learning rate of the fine-tuning, the rule behind it and every input that was at hand.

    Args:
        optimizer: what will fine-tune.
        epochs: length of the fine-tuning.
        batch_size: images a step, over all processes.
        small_images: CIFAR-like (64 px or less) rather than ImageNet-like.
        removed_channels: share of channels removed in the layers that were cut (the papers' pruning ratio), 0 to 1.
        removed_params: share of the parameters removed, 0 to 1.
        steps: optimiser steps of the fine-tuning; none: not known, as where there is no data.
        narrowest_width: channels left in the narrowest cut layer; recorded, no rule reads it yet.
        jsv_ratio: mean Jacobian singular value now over the dense one; recorded, no rule reads it yet.
        lost_top1: share of the dense model's top-1 above guessing that is gone (``evaluation.lost_top1``), 0 to 1;
            none: not measured, or the dense model does not know the data.
        base_peak_lr: highest rate the base was trained at; none: 0.1 is assumed for SGD, and said.
        from_scratch: the weights are random.
        distill_share: share of the loss that is distillation, 0 to 1.
        distill_temperature: T of it.

    Raises:
        ValueError: a share outside [0, 1], or a count or rate that is not positive.
    """
    inputs: dict[str, Any] = {
        "optimizer": optimizer,
        "epochs": epochs,
        "batch_size": batch_size,
        "small_images": small_images,
        "removed_channels": removed_channels,
        "removed_params": removed_params,
        "steps": steps,
        "narrowest_width": narrowest_width,
        "jsv_ratio": jsv_ratio,
        "lost_top1": lost_top1,
        "base_peak_lr": base_peak_lr,
        "from_scratch": from_scratch,
        "distill_share": distill_share,
        "distill_temperature": distill_temperature,
    }
    _check(inputs)
    if optimizer == "sgd" and from_scratch:
        fired = [_scratch()]
        candidates = [_candidate("usual peak", fired[-1]["lr"], "what nets with BatchNorm are trained at", taken=True)]
    else:
        published = _published(optimizer, base_peak_lr, removed_channels, batch_size)
        pull = distillation_pull(distill_share, distill_temperature)
        if beyond := _beyond(inputs):
            fired = published
        elif optimizer == "sgd":
            assert steps is not None
            fired = [_short_sgd(steps, removed_channels, pull)]
        else:
            assert lost_top1 is not None
            fired = [_short_adamw(removed_channels, lost_top1, pull)]
        if not beyond and base_peak_lr is not None:
            fired[0]["says"] += " It does not depend on the base's own rate."
        kind = kind_of(optimizer, taught=distill_share > 0)
        candidates = _candidates(kind, published[-1]["lr"], fired[-1], beyond)
    recommended = fired[-1]["lr"]
    fired.append(_end(recommended, small_images=small_images))
    return LRReport(
        recommended=recommended,
        rule=" ".join(rule["says"] for rule in fired),
        evidence={**inputs, "final_lr": fired[-1]["lr"], "rules": fired, "candidates": candidates},
    )


def _published(
    optimizer: Optimizer, base_peak_lr: float | None, removed: float, batch_size: int
) -> list[dict[str, Any]]:
    """The rules of the papers, of which the last one has the rate."""
    if optimizer == "adamw":
        return [_adamw_peak(base_peak_lr, batch_size)]
    peak = _sgd_peak(base_peak_lr)
    return [peak, _damage(peak["lr"], removed)]


def _beyond(inputs: Mapping[str, Any]) -> str | None:
    """Why the rule of short fine-tunings does not hold here; none where it does."""
    optimizer, steps = inputs["optimizer"], inputs["steps"]
    if inputs["from_scratch"]:
        return "measured on trained nets"
    if not inputs["small_images"]:
        return "measured up to 64 px only"
    if steps is None:
        return "the number of steps is not known without data"
    if steps > SHORT_STEPS[optimizer]:
        return f"{steps} steps are more than the {SHORT_STEPS[optimizer]} it is trusted for"
    if inputs["removed_channels"] <= SMALL_DAMAGE:
        return f"trusted where more than {SMALL_DAMAGE:.0%} of the channels are removed"
    if optimizer == "adamw" and inputs["lost_top1"] is None:
        return "it needs the accuracy of a dense model that knows the data"
    return None


def _candidates(kind: str, published: float, taken: dict[str, Any], beyond: str | None) -> list[dict[str, Any]]:
    """The rates that were weighed up, with what was measured of each where these measurements hold."""
    is_short, evidence = taken["name"] == "short", EVIDENCE[kind]
    practice = "what papers take for 60 epochs and more" if kind.startswith("SGD") else "the only published practice"
    rows = [
        _candidate("short", taken["lr"] if is_short else None, beyond or _told(kind, evidence.short), taken=is_short),
        _candidate("published", published, practice, taken=not is_short),
    ]
    if not is_short:
        return rows
    for lr, regret in evidence.fixed.items():
        if math.isclose(lr, published, rel_tol=0.05):
            rows[1]["says"] += f"; {_told(kind, regret)}"
        elif lr < published:
            rows.append(_candidate("smaller", lr, _told(kind, regret), taken=False))
    return rows


def _candidate(name: str, lr: float | None, says: str, *, taken: bool) -> dict[str, Any]:
    return {"name": name, "lr": lr, "taken": taken, "says": says}


def _told(kind: str, regret: tuple[float, float]) -> str:
    mean, worst = regret
    cases = f"{EVIDENCE[kind].cases} cases of {kind}"
    return f"{mean:g} points below the best of seven rates (mean; worst {worst:g}) in {cases}"


def kind_of(optimizer: Optimizer, *, taught: bool) -> str:
    """The key of ``EVIDENCE`` for fine-tunings like this one."""
    return _NAMES[optimizer] + ", with a teacher" * taught


def short_peak(steps: int, removed: float, *, peak: float = SHORT_PEAK, annealing: float = ANNEALING_STEPS) -> float:
    """``peak * min(1, sqrt(steps / (annealing * (1 - removed))))``: few steps cannot anneal the noise of a large rate.

    A net that lost much has more to gain from the rate than to fear from its noise. Form and both constants are fitted
    to the cases of ``benchmarks/lr_regret.py``; no paper states it.
    """
    return peak * min(1.0, math.sqrt(steps / (annealing * max(1 - removed, 1e-9))))


def short_peak_adamw(removed: float, lost_top1: float, *, peak: float = SHORT_PEAK_ADAMW) -> float:
    """``peak * lost_top1 / sqrt(1 - removed)``: what is nearly as good as before the cut is moved as little.

    SGD's steps shrink by themselves near a good place, AdamW's do not. Less than 3 % of the accuracy counts as 3 %
    (validation images tell no less), more than nine tenths removed as nine tenths (the largest cut that was measured).
    Form and constant are fitted to the cases of ``benchmarks/lr_regret.py``, in which the best rate did not follow the
    number of steps; no paper states it.
    """
    return peak * max(lost_top1, LEAST_LOST) / math.sqrt(max(1 - removed, LEAST_KEPT))


def distillation_pull(share: float, temperature: float) -> float:
    """``sqrt(1 - a + a T)``: how much larger gradients are taken to be than those of the labels alone.

    That of ``a T^2 KL(p_T || q_T)`` in the logits is ``a T (q_T - p_T)``, that of cross-entropy ``q - p``, and both
    differences are at most 1 in each class: up to ``1 - a + a T`` times as large in all. But soft targets differ less
    than labels do, so it can also be no larger. This is the geometric mean of both ends; no paper states it.
    """
    return math.sqrt(1 - share + share * temperature)


def _short_sgd(steps: int, removed: float, pull: float) -> dict[str, Any]:
    alone = short_peak(steps, removed)
    lr = float(f"{alone / pull:.2g}")
    says = f"Of seven rates, {SHORT_PEAK:g} was best or near it in short fine-tunings on small images"
    if alone < SHORT_PEAK:
        says += (
            f"; {steps} steps are few to anneal it with {removed:.0%} of the channels removed, so it is {alone:.2g}."
        )
    else:
        says += f", and {steps} steps are enough to anneal it."
    if pull > 1:
        says += f" Distillation pulls harder than labels alone, by {pull:.2g} as a middle estimate, so it is {lr:g}."
    return {"name": "short", "lr": lr, "says": says, "source": _source("sgd")}


def _short_adamw(removed: float, lost_top1: float, pull: float) -> dict[str, Any]:
    alone = short_peak_adamw(removed, lost_top1)
    lr = float(f"{alone * pull:.2g}")
    lost = f"{lost_top1:.0%}" if lost_top1 >= LEAST_LOST else f"less than {LEAST_LOST:.0%}"
    says = (
        "In short fine-tunings by AdamW on small images the best of seven rates grew with the damage; with "
        f"{lost} of the accuracy above guessing lost and {removed:.0%} of the channels removed it is near {alone:.2g}."
    )
    if pull > 1:  # the gradients' size is divided out; that they are less noisy is not, and it was worth as much
        says += f" A teacher's answers are less noisy than labels, so it can be {lr:g}."
    return {"name": "short", "lr": lr, "says": says, "source": _source("adamw")}


def _source(optimizer: Optimizer) -> str:
    found = (EVIDENCE[kind_of(optimizer, taught=taught)] for taught in (False, True))
    return "benchmarks/lr_regret.py: " + "; with a teacher ".join(f"{each.cases} cases of {each.of}" for each in found)


def _sgd_peak(base_peak_lr: float | None) -> dict[str, Any]:
    peak = SGD_BASE_PEAK if base_peak_lr is None else base_peak_lr
    origin = "assumed, as finetune.original does not say it" if base_peak_lr is None else "given"
    lr = peak / 10
    return {
        "name": "peak",
        "lr": lr,
        "says": f"A tenth of the base's peak rate {peak:g} ({origin}) is {lr:g}.",
        "source": f"{_TPP}; {_CONFUSING}; {_GREG}; {_DEPGRAPH}: all fine-tune bases trained at 0.1 from 0.01",
    }


def _scratch() -> dict[str, Any]:
    return {
        "name": "scratch",
        "lr": SGD_BASE_PEAK,
        "says": f"The weights are random, so this is a training from scratch: the usual peak is {SGD_BASE_PEAK:g}.",
        "source": "He et al. 2016, arXiv 1512.03385, section 4.2: 0.1 for 128 images of CIFAR-10",
    }


def _damage(lr: float, removed: float) -> dict[str, Any]:
    if removed <= SMALL_DAMAGE:
        says = f"{removed:.0%} of the channels are removed, so little that a ten times smaller rate does better."
        measured = "ResNet-34 on ImageNet100, 10 % removed, 60 epochs: 84.21 from 1e-3, 83.72 from 1e-2"
        lr = lr / 10
    elif removed <= LARGE_DAMAGE:
        says = f"{removed:.0%} of the channels are removed: the rate matters little, and it stays."
        measured = "ResNet-34 on ImageNet100, 30 % removed, 60 epochs: 83.87 from 1e-3, 83.88 from 1e-2"
    else:
        says = f"{removed:.0%} of the channels are removed: a smaller rate would recover less, so it stays."
        measured = "ResNet-34 on ImageNet100, 50 % removed, 60 epochs: 82.90 from 1e-3, 83.67 from 1e-2"
    return {"name": "damage", "lr": lr, "says": says, "source": f"{_CONFUSING}: {measured}"}


def _adamw_peak(base_peak_lr: float | None, batch_size: int) -> dict[str, Any]:
    lead = "No published pruning rule was measured with AdamW or on transformers;"
    if base_peak_lr is not None:
        lr, says = base_peak_lr, f"{lead} the base's own peak rate {base_peak_lr:g} is kept."
    else:
        lr = ADAMW_PEAK_PER_512 * batch_size / 512
        says = f"{lead} DeiT's rate 5e-4 for 512 images, scaled to a batch of {batch_size}, is {lr:g}."
    return {"name": "adamw", "lr": lr, "says": says, "source": f"{_DEIT}; {_ISOMORPHIC} fine-tunes pruned DeiT at it"}


def _end(lr: float, *, small_images: bool) -> dict[str, Any]:
    final = min(1e-4 if small_images else 1e-5, lr / 100)
    size = "small images" if small_images else "ImageNet-sized images"
    return {
        "name": "end",
        "lr": final,
        "says": f"The schedule should end at {final:.2g} or below ({size}).",
        "source": f"{_CONFUSING}: ending at 1e-4 instead of 1e-3 alone is worth 0.5 to 0.8 points",
    }


def _check(inputs: dict[str, Any]) -> None:
    for name in ("removed_channels", "removed_params", "lost_top1", "distill_share"):
        if inputs[name] is not None and not 0 <= inputs[name] <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {inputs[name]}")
    for name in ("batch_size", "steps", "narrowest_width", "base_peak_lr", "distill_temperature"):
        if inputs[name] is not None and not inputs[name] > 0:
            raise ValueError(f"{name} must be above 0, not {inputs[name]}")
