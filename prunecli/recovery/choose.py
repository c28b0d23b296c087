"""Which recovery a net gets: the steps that the recipe names, or the sequence that a probe shows to help.

``auto`` tries sequences of steps (``CANDIDATES``), each in for a reason:

* ``bn``: nothing but BatchNorm's statistics; free, and what every other one on a BatchNorm net ends with.
* ``lstsq``: keeps the features, which is worth most on residual nets and at small learning rates.
* ``lstsq, blend``: the same, better conditioned, which lets large learning rates work.
* ``blend``: conditions without new features; where few filters are left, least squares has little to work with.
* ``orthp``: the isometry of the paper, right for linear and nearly linear nets.

The rule: a candidate must do better than plain pruning after the same short fine-tuning, by more than the probe's own
noise. It is not asked how good it is before any fine-tuning, which hardly predicts what comes after (arXiv 2412.00143),
nor for its plain loss, which a few steps lower most where the net has forgotten everything and guesses evenly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from prunecli.measure.accuracy import lost_top1
from prunecli.recovery.steps import Applied, RecoveryContext, apply_steps, has_batch_norm
from prunecli.training.probe import ProbeResult, probe_loss
from prunecli.values.report import RecoveryStep

CANDIDATES: Final = (("bn",), ("lstsq", "bn"), ("lstsq", "blend", "bn"), ("blend", "bn"), ("orthp", "bn"))
_MARGIN: Final = 0.01  # a smaller gain is none, however sure
_ERRORS: Final = 2.0  # standard errors that a gain must exceed
_SHARE: Final = 0.25  # of the fine-tuning's steps that all probes together may take
_WORST: Final = 1e4  # nats: what a loss that is not finite counts as


Rate = Callable[[float | None], float]  # learning rate of a net that lost this share of the dense top-1


def recover_stage(context: RecoveryContext, model: nn.Module, rate: Rate) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Apply the recovery of the recipe; the recovered net, and a row for each named step or tried candidate.

    Steps named in the recipe are applied without asking. ``auto`` needs images: without them nothing is tried.
    ``model`` stays as it is. ``rate`` is what the fine-tuning would take.
    """
    steps = context.settings.steps
    if "auto" not in steps:
        return _asked(context, model, steps)
    if context.images is None:
        return model, ()
    return _auto(context, model, rate)


def _asked(
    context: RecoveryContext, model: nn.Module, steps: tuple[str, ...]
) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    rows = []
    for name in steps:
        began = time.perf_counter()
        applied = apply_steps(context, model, (name,))
        rule = "asked for in the recipe" + (f": {applied.said}" if applied.said else "")
        row = RecoveryStep(name=name, kept=True, rule=rule, residual=applied.residual)
        row = _with_spectra(context, row, model, applied.model)
        if context.images is not None:
            row = _with_effect(row, _at_once(context, model), _at_once(context, applied.model))
        rows.append(_timed(row, began))
        model = applied.model
    _tell(context, rows)
    return model, tuple(rows)


# ---------------------------------------------------------------------------------------------- auto


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """The short fine-tuning that candidates are compared by, each at the rate that fits its own start."""

    context: RecoveryContext
    steps: int
    rate: Rate
    dense_top1: float  # on the images that ``_at_once`` judges on

    def __call__(self, model: nn.Module, at_once: ProbeResult, *, again: bool = False) -> ProbeResult:
        """Judge one starting point; ``again`` in another order of the training images."""
        if not self.steps:
            return at_once
        images = self.context.images
        assert images is not None
        lost = lost_top1(self.dense_top1, at_once.val_top1, classes=images.num_classes)
        return _probed(self.context, model, steps=self.steps, lr=self.rate(lost), again=again)

    def says(self, result: ProbeResult) -> str:
        """How a result came about."""
        return f"after {self.steps} optimiser steps at LR {result.lr:g}" if self.steps else "without fine-tuning"


def _at_once(context: RecoveryContext, model: nn.Module) -> ProbeResult:
    """How the model does without any fine-tuning."""
    return _probed(context, model, steps=0, lr=0.0)


def _probed(context: RecoveryContext, model: nn.Module, *, steps: int, lr: float, again: bool = False) -> ProbeResult:
    """The probe of a net, on the images and with the settings of the fine-tuning to come."""
    assert context.images is not None
    return probe_loss(
        model,
        context.images,
        steps=steps,
        lr=lr,
        settings=context.finetune,
        device=context.device,
        seed=context.seed + again,
    )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A candidate after its first probe."""

    applied: Applied
    row: RecoveryStep
    at_once: ProbeResult
    result: ProbeResult

    @property
    def rank(self) -> float:
        """Mean loss on the half of the images that selects; the other half confirms."""
        return _mean(self.result.calibrated[::2])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Mean losses without and with a recovery on the same images, and the standard error of their difference."""

    without: float
    with_it: float
    error: float

    @property
    def better(self) -> bool:
        """Whether the loss falls by more than two standard errors and by more than 1 %."""
        return self.without - self.with_it > max(_ERRORS * self.error, _MARGIN * self.without)


def compare(without: Sequence[float], with_it: Sequence[float]) -> Verdict:
    """Losses of the same images in the same order; one that is not finite counts as 1e4 nats."""
    first, second = _counted(without), _counted(with_it)
    error = float((first - second).std()) / math.sqrt(len(first)) if len(first) > 1 else math.inf
    return Verdict(without=float(first.mean()), with_it=float(second.mean()), error=error)


def _mean(losses: Sequence[float]) -> float:
    return float(_counted(losses).mean())


def _counted(losses: Sequence[float]) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64).nan_to_num(nan=_WORST).clamp(max=_WORST)


def _auto(context: RecoveryContext, model: nn.Module, rate: Rate) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Probe every candidate, confirm the best, keep it or the plain pruned net.

    A probe is a short fine-tuning on labels, at the learning rate that this net would get without a teacher. It is
    judged by the loss on held-out training images, image by image, each net at its own best temperature. The best of
    the first round, by one half of these images, is probed once more against plain pruning with another order of the
    training images, and judged on the other half: the luck that made it the best has no say. It is kept if
    ``Verdict.better``. Probes take ``probe_steps`` steps each, or fewer, so that all together stay within a quarter of
    the fine-tuning.

    New BatchNorm statistics alone are no starting point of their own, since training never reads them. They remain
    where nothing else is kept, if they make the loss without any fine-tuning better. Where nothing will be fine-tuned,
    all candidates are judged as they are.
    """
    candidates = candidates_for(model)
    at_once, dense = _at_once(context, model), _at_once(context, context.dense)
    steps = _probe_steps(context, len(candidates))
    probe = _Probe(context=context, steps=steps, rate=rate, dense_top1=dense.val_top1)
    plain = probe(model, at_once)
    starts = [names for names in candidates if names != ("bn",) or not steps]
    best, rows = _first_round(probe, model, starts, at_once)
    pair = (probe(model, at_once, again=True), probe(best.applied.model, best.at_once, again=True))
    verdict = compare(*(result.calibrated[1::2] for result in pair))
    how = "probed again, in another order, on other images" if steps else "on other images"
    rows = [_judged(row, plain, best.row.name, verdict, how) for row in rows]
    chosen = best.applied.model if verdict.better else model
    if not verdict.better and len(starts) < len(candidates):
        statistics = _tried(replace(probe, steps=0), model, ("bn",), at_once)
        verdict = compare(at_once.calibrated, statistics.result.calibrated)
        rows.append(_judged(statistics.row, at_once, "bn", verdict, "image by image"))
        chosen = statistics.applied.model if verdict.better else model
    rows = [_with_spectra(context, row, model, chosen) if row.kept else row for row in rows]
    _tell(context, rows)
    return chosen, tuple(rows)


def candidates_for(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """``CANDIDATES``, on a net without BatchNorm without the step for it."""
    if has_batch_norm(model):
        return CANDIDATES
    bare = (tuple(step for step in steps if step != "bn") for steps in CANDIDATES)
    return tuple(steps for steps in bare if steps)


def _probe_steps(context: RecoveryContext, candidates: int) -> int:
    """Steps of one probe: there are at most two more probes than candidates, for plain pruning and for confirming."""
    fair = math.ceil(_SHARE * context.finetune_steps / (candidates + 3))
    return min(context.settings.probe_steps, fair)


def _first_round(
    probe: _Probe, model: nn.Module, starts: Sequence[tuple[str, ...]], at_once: ProbeResult
) -> tuple[_Trial, list[RecoveryStep]]:
    """The best candidate and every row; only the best so far is held in memory."""
    best: _Trial | None = None
    rows = []
    for steps in starts:
        trial = _tried(probe, model, steps, at_once)
        rows.append(trial.row)
        if best is None or trial.rank < best.rank:
            best = trial
    assert best is not None
    return best, rows


def _tried(probe: _Probe, model: nn.Module, steps: tuple[str, ...], before: ProbeResult) -> _Trial:
    """A candidate applied and probed; its row says what it does without fine-tuning, ``before`` what plain pruning."""
    began = time.perf_counter()
    applied = apply_steps(probe.context, model, steps)
    at_once = _at_once(probe.context, applied.model)
    result = probe(applied.model, at_once)
    rule = f"{applied.said}; " if applied.said else ""
    rule += f"calibrated held-out loss {probe.says(result)} is {_mean(result.calibrated):.4g} with it"
    row = RecoveryStep(name="+".join(steps), kept=False, rule=rule, residual=applied.residual)
    return _Trial(
        applied=applied, row=_timed(_with_effect(row, before, at_once), began), at_once=at_once, result=result
    )


def _judged(row: RecoveryStep, plain: ProbeResult, best: str, verdict: Verdict, how: str) -> RecoveryStep:
    """The row with its end: what it was compared with, and why it was kept or left out."""
    rule = f"{row.rule}, {_mean(plain.calibrated):.4g} without it"
    if plain.lr is not None:
        rule += f" at LR {plain.lr:g}"
    if row.name != best:
        return row.model_copy(update={"rule": f"left out: {rule}; {best} did better"})
    kept = verdict.better
    rule += (
        f"; {how} {verdict.with_it:.4g} against {verdict.without:.4g}, "
        f"standard error of the difference {verdict.error:.2g} (kept if lower by more than {_ERRORS:g} of these and "
        f"by more than {_MARGIN:.0%})"
    )
    return row.model_copy(update={"kept": kept, "rule": f"{'kept' if kept else 'left out'}: {rule}"})


# ---------------------------------------------------------------------------------------------- rows


def _with_effect(row: RecoveryStep, before: ProbeResult, after: ProbeResult) -> RecoveryStep:
    """What was done to the held-out images, without fine-tuning."""
    return row.model_copy(
        update={
            "loss_before": before.val_loss,
            "loss_after": after.val_loss,
            "top1_before": before.val_top1,
            "top1_after": after.val_top1,
        }
    )


def _with_spectra(context: RecoveryContext, row: RecoveryStep, before: nn.Module, after: nn.Module) -> RecoveryStep:
    spectra = [context.spectrum_of(model) for model in (before, after)]
    jsv_before, jsv_after = (found.summary if found else None for found in spectra)
    return row.model_copy(update={"jsv_before": jsv_before, "jsv_after": jsv_after})


def _timed(row: RecoveryStep, began: float) -> RecoveryStep:
    return row.model_copy(update={"seconds": round(time.perf_counter() - began, 3)})


def _tell(context: RecoveryContext, rows: Sequence[RecoveryStep]) -> None:
    for row in rows:
        context.tell(row)
