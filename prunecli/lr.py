"""Which learning rate to fine-tune with: published rules applied to measured inputs. Pure; the evidence names it all.

Rules in force, for nets trained with SGD:

* **short**: small images and at most 10,000 optimiser steps, the range that ``benchmarks/lr_regret.py`` measured:
  3e-2, less where the steps are too few to anneal it: ``3e-2 * min(1, sqrt(steps / (600 * share of channels kept)))``,
  divided by ``1 - a + a T`` where a share a of the loss is distillation at temperature T.
* **peak**: otherwise start from a tenth of the rate the base was trained at (1e-2 for the usual 0.1).
* **damage**: the more is removed, the more the larger rate gains; at about 10 % and below a smaller one can win.
* **scratch**: random weights are no fine-tuning; they get the usual peak of training, 0.1.
* **end**: finish at 1e-4 or below on small images, at 1e-5 or below on ImageNet-sized ones.

None of them was measured on AdamW or on transformers, where the base's own peak is the published practice.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from prunecli.report import LRReport

SGD_BASE_PEAK: Final = 0.1
ADAMW_PEAK_PER_512: Final = 5e-4
SMALL_DAMAGE: Final = 0.10
LARGE_DAMAGE: Final = 0.30
SHORT_PEAK: Final = 0.03
SHORT_STEPS: Final = 10_000  # above them nothing was measured
ANNEALING_STEPS: Final = 600  # for a net that keeps all of its channels

# Points of top-1 below the best of seven rates, mean and worst of 24 short fine-tunings on small images
# (benchmarks/lr_regret.py; the first with its constants fitted to other nets).
REGRET: Final = {"short": (0.28, 4.52), "published": (3.82, 67.62), "1e-3": (16.04, 76.92)}

_CONFUSING = "Wang et al. 2023, arXiv 2301.05219"
_TPP = "Wang and Fu 2023, arXiv 2207.12534"
_GREG = "Wang et al. 2021, arXiv 2012.09243"
_DEPGRAPH = "Fang et al. 2023, arXiv 2301.12900"
_DEIT = "Touvron et al. 2021, arXiv 2012.12877"
_ISOMORPHIC = "Fang et al. 2024, arXiv 2407.04616"


def recommend_lr(
    *,
    optimizer: Literal["sgd", "adamw"],
    epochs: int,
    batch_size: int,
    small_images: bool,
    removed_channels: float,
    removed_params: float,
    steps: int | None = None,
    narrowest_width: int | None = None,
    jsv_ratio: float | None = None,
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
        "base_peak_lr": base_peak_lr,
        "from_scratch": from_scratch,
        "distill_share": distill_share,
        "distill_temperature": distill_temperature,
    }
    _check(inputs)
    if optimizer == "sgd" and from_scratch:
        fired = [_scratch()]
        candidates = [_candidate("usual peak", fired[-1]["lr"], "what nets with BatchNorm are trained at", taken=True)]
    elif optimizer == "sgd":
        peak = _sgd_peak(base_peak_lr)
        published = [peak, _damage(peak["lr"], removed_channels)]
        beyond = _beyond(steps, removed_channels, small_images=small_images)
        pull = distillation_pull(distill_share, distill_temperature)
        fired = published if steps is None or beyond else [_short(steps, removed_channels, pull)]
        candidates = _candidates(published[-1]["lr"], fired[-1], beyond)
    else:
        fired = [_adamw_peak(base_peak_lr, batch_size)]
        candidates = [_candidate("published", fired[-1]["lr"], "the only published practice", taken=True)]
    recommended = fired[-1]["lr"]
    fired.append(_end(recommended, small_images=small_images))
    return LRReport(
        recommended=recommended,
        rule=" ".join(rule["says"] for rule in fired),
        evidence={**inputs, "final_lr": fired[-1]["lr"], "rules": fired, "candidates": candidates},
    )


def _beyond(steps: int | None, removed: float, *, small_images: bool) -> str | None:
    """Why the rule of short fine-tunings does not hold here."""
    if not small_images:
        return "measured up to 64 px only"
    if steps is None:
        return "the number of steps is not known without data"
    if steps > SHORT_STEPS:
        return f"{steps} steps are more than the {SHORT_STEPS} it was measured for"
    if removed <= SMALL_DAMAGE:
        return f"measured where more than {SMALL_DAMAGE:.0%} of the channels are removed"
    return None


def _candidates(published: float, taken: dict[str, Any], beyond: str | None) -> list[dict[str, Any]]:
    """The rates that were weighed up, with what was measured of each where these very measurements hold."""
    is_short = taken["name"] == "short"
    rows = [
        _candidate("short", taken["lr"] if is_short else None, beyond or _regret("short"), taken=is_short),
        _candidate(
            "published",
            published,
            "what papers take for 60 epochs and more" + (f"; {_regret('published')}" if is_short else ""),
            taken=not is_short,
        ),
    ]
    if is_short and math.isclose(published / 10, 1e-3):
        rows.append(_candidate("a tenth of it", published / 10, _regret("1e-3"), taken=False))
    return rows


def _candidate(name: str, lr: float | None, says: str, *, taken: bool) -> dict[str, Any]:
    return {"name": name, "lr": lr, "taken": taken, "says": says}


def _regret(which: str) -> str:
    mean, worst = REGRET[which]
    return f"{mean:g} points below the best of seven rates (mean; worst {worst:g}) in 24 cases without a teacher"


def short_peak(steps: int, removed: float, *, peak: float = SHORT_PEAK, annealing: float = ANNEALING_STEPS) -> float:
    """``peak * min(1, sqrt(steps / (annealing * (1 - removed))))``: few steps cannot anneal the noise of a large rate.

    A net that lost much has more to gain from the rate than to fear from its noise. Form and both constants are fitted
    to the cases of ``benchmarks/lr_regret.py``; no paper states it.
    """
    return peak * min(1.0, math.sqrt(steps / (annealing * max(1 - removed, 1e-9))))


def distillation_pull(share: float, temperature: float) -> float:
    """``1 - a + a T``: how much larger gradients can be than those of the labels alone.

    That of ``a T^2 KL(p_T || q_T)`` in the logits is ``a T (q_T - p_T)``, that of cross-entropy ``q - p``, and both
    differences are at most 1 in each class.
    """
    return 1 - share + share * temperature


def _short(steps: int, removed: float, pull: float) -> dict[str, Any]:
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
        says += f" Distillation can pull {pull:.2g} times as hard as labels alone, so it is {lr:g}."
    return {
        "name": "short",
        "lr": lr,
        "says": says,
        "source": "benchmarks/lr_regret.py: 24 cases of MLP-7 on MNIST and ResNet-20/56 on CIFAR-10, 40 to 6,000 steps",
    }


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
    final = min(1e-4 if small_images else 1e-5, lr)
    size = "small images" if small_images else "ImageNet-sized images"
    return {
        "name": "end",
        "lr": final,
        "says": f"The schedule should end at {final:g} or below ({size}).",
        "source": f"{_CONFUSING}: ending at 1e-4 instead of 1e-3 alone is worth 0.5 to 0.8 points",
    }


def _check(inputs: dict[str, Any]) -> None:
    for name in ("removed_channels", "removed_params", "distill_share"):
        if not 0 <= inputs[name] <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {inputs[name]}")
    for name in ("batch_size", "steps", "narrowest_width", "base_peak_lr", "distill_temperature"):
        if inputs[name] is not None and not inputs[name] > 0:
            raise ValueError(f"{name} must be above 0, not {inputs[name]}")
