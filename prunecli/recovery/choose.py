"""Which recovery a net gets: the steps that the recipe names, or the sequence that a probe shows to help.

``auto`` tries sequences of steps (``CANDIDATES``), each in for a reason:

* ``bn``: re-estimates BatchNorm statistics only. Costs no training; every other candidate ends with it.
* ``lstsq``: keeps the features, which is worth most on residual nets and at small learning rates.
* ``lstsq, blend``: the same, better conditioned, which lets large learning rates work.
* ``blend``: conditions without new features; where few filters are left, least squares has little to work with.
* ``orthp``: the isometry of the paper, right for linear and nearly linear nets.

The rule: a candidate must do better than plain pruning after the same short fine-tuning, by more than the probe's own
noise. Two other measures are not used: the loss before any fine-tuning, which hardly predicts what comes after (arXiv
2412.00143), and the uncalibrated loss, which a few steps lower most where the net has forgotten everything and guesses
evenly.
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
from prunecli.recovery.steps import RecoveryContext, RecoveryResult, apply_steps, has_batch_norm
from prunecli.training.probe import ProbeResult, probe_loss
from prunecli.values.report import RecoveryStep

CANDIDATES: Final = (("bn",), ("lstsq", "bn"), ("lstsq", "blend", "bn"), ("blend", "bn"), ("orthp", "bn"))
_MARGIN: Final = 0.01  # share of the loss; a smaller gain is ignored, however certain
_ERRORS: Final = 2.0  # standard errors that a gain must exceed
_SHARE: Final = 0.25  # share of the fine-tuning's steps that all probes together may take
_WORST: Final = 1e4  # nats; the value of a loss that is not finite

#: Learning rate of a net by the share of the dense top-1 that it lost; ``None`` where that share is unknown.
Rate = Callable[[float | None], float]


def recover_stage(context: RecoveryContext, model: nn.Module, rate: Rate) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Apply the recovery of the recipe.

    Steps named in the recipe are applied without a probe. ``auto`` needs images: without them nothing is tried.

    Args:
        context: images, settings and callables of the job.
        model: the pruned net; it is not changed.
        rate: the learning rate that the fine-tuning would take.

    Returns:
        The recovered net, and a row of the report for each named step or tried candidate.

    Raises:
        PruneError: a layer with NaN or infinite weights.
    """
    steps = context.settings.steps
    if "auto" not in steps:
        return _apply_named(context, model, steps)
    if context.images is None:
        return model, ()
    return _choose_candidate(context, model, rate)


def _apply_named(
    context: RecoveryContext, model: nn.Module, steps: tuple[str, ...]
) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Apply each step on its own, so that its row shows its own effect."""
    rows = []
    for name in steps:
        began = time.perf_counter()
        result = apply_steps(context, model, (name,))
        rule = "asked for in the recipe" + (f": {result.summary}" if result.summary else "")
        row = RecoveryStep(name=name, kept=True, rule=rule, residual=result.residual, shrinkage=result.shrinkage)
        row = _with_spectra(context, row, model, result.model)
        if context.images is not None:
            row = _with_effect(row, _at_once(context, model), _at_once(context, result.model))
        rows.append(row.model_copy(update={"seconds": round(time.perf_counter() - began, 3)}))
        model = result.model
    for row in rows:
        context.tell(row)
    return model, tuple(rows)


# ---------------------------------------------------------------------------------------------- auto


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """The short fine-tuning by which candidates are compared, each at the rate that fits its own start.

    Attributes:
        context: images, settings and callables of the job.
        steps: optimiser steps of one probe; 0 judges a net as it is.
        rate: learning rate by the share of the dense top-1 that was lost.
        dense_top1: accuracy of the dense net on the same held-out images.
    """

    context: RecoveryContext
    steps: int
    rate: Rate
    dense_top1: float

    def __call__(self, model: nn.Module, at_once: ProbeResult, *, again: bool = False) -> ProbeResult:
        """Probe one starting point.

        Args:
            model: the starting point; it is not changed.
            at_once: the result of ``model`` without any fine-tuning.
            again: train on another order of the training images.
        """
        if not self.steps:
            return at_once
        images = self.context.images
        assert images is not None
        lost = lost_top1(self.dense_top1, at_once.val_top1, classes=images.num_classes)
        return _probe_net(self.context, model, steps=self.steps, lr=self.rate(lost), again=again)

    def conditions(self, result: ProbeResult) -> str:
        """Length and learning rate of the fine-tuning behind a result, in words."""
        return f"after {self.steps} optimiser steps at LR {result.lr:g}" if self.steps else "without fine-tuning"


def _at_once(context: RecoveryContext, model: nn.Module) -> ProbeResult:
    """The losses of a net without any fine-tuning."""
    return _probe_net(context, model, steps=0, lr=0.0)


def _probe_net(
    context: RecoveryContext, model: nn.Module, *, steps: int, lr: float, again: bool = False
) -> ProbeResult:
    """Fine-tune a copy for a few steps, on the images and with the settings of the fine-tuning to come."""
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
class _ProbedCandidate:
    """A candidate after its first probe.

    Attributes:
        recovered: the net with the candidate's steps applied.
        row: the candidate's row of the report, without the decision.
        at_once: losses without any fine-tuning.
        probed: losses after the probe's fine-tuning.
    """

    recovered: RecoveryResult
    row: RecoveryStep
    at_once: ProbeResult
    probed: ProbeResult

    @property
    def rank(self) -> float:
        """Mean loss on the half of the images that selects; the other half confirms."""
        return float(_finite(self.probed.calibrated[::2]).mean())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Losses without and with a recovery on the same images.

    Attributes:
        without: mean loss without the recovery, in nats.
        with_it: mean loss with the recovery, in nats.
        error: standard error of the mean difference, in nats.
    """

    without: float
    with_it: float
    error: float

    @property
    def better(self) -> bool:
        """Whether the loss falls by more than two standard errors and by more than 1 %."""
        return self.without - self.with_it > max(_ERRORS * self.error, _MARGIN * self.without)


def compare(without: Sequence[float], with_it: Sequence[float]) -> Comparison:
    """The comparison of two nets, image by image.

    Args:
        without: loss of each image without the recovery, in nats; one that is not finite counts as 1e4.
        with_it: loss of each image with it, in the same order.
    """
    first, second = _finite(without), _finite(with_it)
    error = float((first - second).std()) / math.sqrt(len(first)) if len(first) > 1 else math.inf
    return Comparison(without=float(first.mean()), with_it=float(second.mean()), error=error)


def _finite(losses: Sequence[float]) -> Tensor:
    """Losses ``[n]`` in float64; a diverged one is ``_WORST``."""
    return torch.tensor(losses, dtype=torch.float64).nan_to_num(nan=_WORST).clamp(max=_WORST)


def _choose_candidate(
    context: RecoveryContext, model: nn.Module, rate: Rate
) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Probe every candidate, confirm the best, keep it or the plain pruned net.

    A probe is a short fine-tuning on labels, at the learning rate that this net would get without a teacher. It is
    judged by the loss on held-out training images, image by image, each net at its own best temperature. The best of
    the first round, by one half of these images, is probed once more against plain pruning with another order of the
    training images, and judged on the other half: the luck that made it the best does not count there. It is kept if
    ``Comparison.better``. Probes take ``probe_steps`` steps each, or fewer, so that all together stay within a quarter
    of the fine-tuning.

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
    pair = (probe(model, at_once, again=True), probe(best.recovered.model, best.at_once, again=True))
    found = compare(*(result.calibrated[1::2] for result in pair))  # [::2] chose the best, see ``rank``
    how = "probed again, in another order, on other images" if steps else "on other images"
    rows = [_with_decision(row, plain, best.row.name, found, how) for row in rows]
    chosen = best.recovered.model if found.better else model
    if not found.better and len(starts) < len(candidates):
        statistics = _probe_candidate(replace(probe, steps=0), model, ("bn",), at_once)
        found = compare(at_once.calibrated, statistics.probed.calibrated)
        rows.append(_with_decision(statistics.row, at_once, "bn", found, "image by image"))
        chosen = statistics.recovered.model if found.better else model
    rows = [_with_spectra(context, row, model, chosen) if row.kept else row for row in rows]
    for row in rows:
        context.tell(row)
    return chosen, tuple(rows)


def candidates_for(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The sequences of steps that ``auto`` tries: ``CANDIDATES``, with ``bn`` left out on a net without BatchNorm."""
    if has_batch_norm(model):
        return CANDIDATES
    bare = (tuple(step for step in steps if step != "bn") for steps in CANDIDATES)
    return tuple(steps for steps in bare if steps)


def _probe_steps(context: RecoveryContext, candidates: int) -> int:
    """Optimiser steps of one probe.

    There are at most three more probes than candidates: plain pruning, and both nets again to confirm the best.
    """
    fair = math.ceil(_SHARE * context.finetune_steps / (candidates + 3))
    return min(context.settings.probe_steps, fair)


def _first_round(
    probe: _Probe, model: nn.Module, starts: Sequence[tuple[str, ...]], at_once: ProbeResult
) -> tuple[_ProbedCandidate, list[RecoveryStep]]:
    """The best candidate and every row; only the best so far is held in memory."""
    best: _ProbedCandidate | None = None
    rows = []
    for steps in starts:
        candidate = _probe_candidate(probe, model, steps, at_once)
        rows.append(candidate.row)
        if best is None or candidate.rank < best.rank:
            best = candidate
    assert best is not None
    return best, rows


def _probe_candidate(probe: _Probe, model: nn.Module, steps: tuple[str, ...], before: ProbeResult) -> _ProbedCandidate:
    """Apply a candidate and probe it; its row compares it with ``before``, the pruned net, without fine-tuning."""
    began = time.perf_counter()
    recovered = apply_steps(probe.context, model, steps)
    at_once = _at_once(probe.context, recovered.model)
    probed = probe(recovered.model, at_once)
    rule = f"{recovered.summary}; " if recovered.summary else ""
    loss = float(_finite(probed.calibrated).mean())
    rule += f"calibrated held-out loss {probe.conditions(probed)} is {loss:.4g} with it"
    row = RecoveryStep(
        name="+".join(steps),
        kept=False,
        rule=rule,
        residual=recovered.residual,
        shrinkage=recovered.shrinkage,
        seconds=round(time.perf_counter() - began, 3),
    )
    return _ProbedCandidate(recovered=recovered, row=_with_effect(row, before, at_once), at_once=at_once, probed=probed)


def _with_decision(row: RecoveryStep, plain: ProbeResult, best: str, comparison: Comparison, how: str) -> RecoveryStep:
    """The row completed by what it was compared with, and why it was kept or left out."""
    rule = f"{row.rule}, {float(_finite(plain.calibrated).mean()):.4g} without it"
    if plain.lr is not None:
        rule += f" at LR {plain.lr:g}"
    if row.name != best:
        return row.model_copy(update={"rule": f"left out: {rule}; {best} did better"})
    rule += (
        f"; {how} {comparison.with_it:.4g} against {comparison.without:.4g}, "
        f"standard error of the difference {comparison.error:.2g} (kept if lower by more than {_ERRORS:g} of these and "
        f"by more than {_MARGIN:.0%})"
    )
    kept = comparison.better
    return row.model_copy(update={"kept": kept, "rule": f"{'kept' if kept else 'left out'}: {rule}"})


# ---------------------------------------------------------------------------------------------- rows


def _with_effect(row: RecoveryStep, before: ProbeResult, after: ProbeResult) -> RecoveryStep:
    """The row with loss (nats) and top-1 on the held-out images before and after the step, without fine-tuning."""
    return row.model_copy(
        update={
            "loss_before": before.val_loss,
            "loss_after": after.val_loss,
            "top1_before": before.val_top1,
            "top1_after": after.val_top1,
        }
    )


def _with_spectra(context: RecoveryContext, row: RecoveryStep, before: nn.Module, after: nn.Module) -> RecoveryStep:
    """The row with the Jacobian spectra before and after the step, where these are measured."""
    spectra = [context.spectrum_of(model) for model in (before, after)]
    jsv_before, jsv_after = (found.summary if found else None for found in spectra)
    return row.model_copy(update={"jsv_before": jsv_before, "jsv_after": jsv_after})
