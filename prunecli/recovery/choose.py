"""Which recovery a net gets: the steps that the recipe names, or the sequence that is shown to help.

``auto`` tries sequences of steps (``CANDIDATES``), each in for a reason:

* ``bn``: re-estimates BatchNorm statistics only.
* ``lstsq, bn``: keeps the features, each reader solved on the dense net's inputs. The best start on deep nets with
  BatchNorm and after heavy cuts.
* ``onepass``: each reader solved on what it is really given. The best on nets with LayerNorm; deep nets overfit.
* ``lstsq, onepass``: half way between both.
* ``lstsq, blend, bn`` and ``blend, bn``: better conditioned weights, which let large learning rates work.
* ``orthp, bn``: the isometry of the paper, right for linear and nearly linear nets.

All are judged by the KL divergence from the dense net on held-out images, which needs no label and no training. Where
the net will be fine-tuned, that is not enough: the best of them then go through a short fine-tuning, since after a
heavy cut a net that answers better at once may train worse at a normal rate. Each candidate in turn, best first, is
held to plain pruning on images that did not rank it, until one holds: so one unlucky favourite does not cost the
runner-up its place.
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
from prunecli.measure.divergence import divergences, log_probabilities
from prunecli.recovery.steps import RecoveryContext, RecoveryResult, apply_steps, has_batch_norm
from prunecli.training.probe import ProbeResult, probe_loss
from prunecli.values.report import RecoveryStep

CANDIDATES: Final = (
    ("bn",),
    ("lstsq", "bn"),
    ("onepass",),
    ("lstsq", "onepass"),
    ("lstsq", "blend", "bn"),
    ("blend", "bn"),
    ("orthp", "bn"),
)
_CONDITIONS: Final = frozenset({"blend", "orthp"})  # steps for training rather than for the answers at once
_MARGIN: Final = 0.01  # share of the loss; a smaller gain is ignored, however certain
_ERRORS: Final = 2.0  # standard errors that a gain must exceed
_SHARE: Final = 0.25  # share of the fine-tuning's steps that all trials together may take
_TRIED: Final = 3  # candidates that go through a trial, best first by KL; and one that conditions
_LEAST: Final = 1e-6  # nats; two answers that are nearer count as equal
_WORST: Final = 1e4  # nats; the value of a loss that is not finite

#: Learning rate of a net by the share of the dense top-1 that it lost; ``None`` where that share is unknown.
Rate = Callable[[float | None], float]


def recover_stage(context: RecoveryContext, model: nn.Module, rate: Rate) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Apply the recovery of the recipe.

    Steps named in the recipe are applied without a trial. ``auto`` needs images: without them nothing is tried.

    Args:
        context: images, settings and callables of the job.
        model: the pruned net; it is not changed.
        rate: the learning rate that the fine-tuning would take.

    Returns:
        The recovered net, and a row of the report for each named step or tried candidate.

    Raises:
        PruneError: a layer with NaN or infinite weights.
    """
    if "auto" not in context.settings.steps:
        return _apply_named(context, model, context.settings.steps)
    if context.calibration is None:
        return model, ()
    chosen, rows = _choose(context, model, rate)
    rows = tuple(_with_spectra(context, row, model, chosen) if row.kept else row for row in rows)
    for row in rows:
        context.tell(row)
    return chosen, rows


def _apply_named(
    context: RecoveryContext, model: nn.Module, steps: tuple[str, ...]
) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Apply each step on its own, so that its row shows its own effect."""
    rows: list[RecoveryStep] = []
    measure = None if context.calibration is None else _Measure(context, labels=context.images is not None)
    before = None if measure is None else measure(model)
    for name in steps:
        began = time.perf_counter()
        result = apply_steps(context, model, (name,), after=rows[-1].name if rows else None)
        rule = "asked for in the recipe" + (f": {result.summary}" if result.summary else "")
        row = RecoveryStep(name=name, kept=True, rule=rule, residual=result.residual, shrinkage=result.shrinkage)
        row = _with_spectra(context, row, model, result.model)
        if measure is not None and before is not None:
            after = measure(result.model)
            row, before = _with_effect(row, before, after), after
        rows.append(row.model_copy(update={"seconds": round(time.perf_counter() - began, 3)}))
        model = result.model
    for row in rows:
        context.tell(row)
    return model, tuple(rows)


# ---------------------------------------------------------------------------------------------- measures


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a net does as it is.

    Attributes:
        kl: KL divergence from the dense net of each held-out image, in nats.
        labelled: losses and accuracy on labelled held-out images; ``None`` without labels.
    """

    kl: tuple[float, ...]
    labelled: ProbeResult | None

    @property
    def mean_kl(self) -> float:
        """The mean divergence in nats."""
        return math.fsum(self.kl) / len(self.kl)


class _Measure:
    """The measure of nets against one dense net, whose answers are taken once.

    Args:
        context: images, settings and callables of the job, with calibration images.
        labels: whether losses on labelled images are taken too.
    """

    def __init__(self, context: RecoveryContext, *, labels: bool) -> None:
        assert context.calibration is not None
        self._context, self._images, self._labels = context, context.calibration.held_out, labels
        self._dense = log_probabilities(context.dense.to(context.device), self._images)

    def __call__(self, model: nn.Module) -> _State:
        """The state of a net, which is moved to the job's device."""
        kl = divergences(self._dense, log_probabilities(model.to(self._context.device), self._images))
        labelled = _trial(self._context, model, steps=0, lr=0.0) if self._labels else None
        return _State(kl=tuple(kl.tolist()), labelled=labelled)


def _trial(context: RecoveryContext, model: nn.Module, *, steps: int, lr: float, again: bool = False) -> ProbeResult:
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
        return self.without - self.with_it > self._noise

    @property
    def worse(self) -> bool:
        """Whether the loss rises by as much."""
        return self.with_it - self.without > self._noise

    @property
    def _noise(self) -> float:
        return max(_ERRORS * self.error, _MARGIN * self.without)


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


# ---------------------------------------------------------------------------------------------- auto


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A candidate that was applied and measured; plain pruning is the one without steps.

    Attributes:
        steps: names of the steps.
        recovered: the net with these steps applied.
        state: the net as it is.
        seconds: time that applying and measuring took.
        trial: losses after the trial's fine-tuning; ``None`` before, or where it does not take part.
    """

    steps: tuple[str, ...]
    recovered: RecoveryResult
    state: _State
    seconds: float = 0.0
    trial: ProbeResult | None = None

    @property
    def name(self) -> str:
        """The steps in one word."""
        return "+".join(self.steps)

    @property
    def rank(self) -> float:
        """Mean loss on the half of the images that ranks; the other half confirms."""
        losses = self.trial.calibrated if self.trial else self.state.kl
        return float(_finite(losses[::2] if len(losses) > 1 else losses).mean())


def _choose(context: RecoveryContext, model: nn.Module, rate: Rate) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Try every candidate, and keep the best that holds against plain pruning, or else the plain pruned net."""
    steps = _trial_steps(context)
    measure = _Measure(context, labels=steps > 0)
    plain = _Candidate(steps=(), recovered=RecoveryResult(model=model), state=measure(model))
    found = [_tried(context, measure, model, names) for names in candidates_for(model)]
    if steps:
        trial = _Trial(context=context, steps=steps, rate=rate, dense=measure(context.dense))
        found, kept, verdicts = _by_trial(trial, plain, found)
    else:
        kept, verdicts = _first_that_holds(plain, found, lambda one: _answers_better(plain, one, half=True))
    return kept.recovered.model, tuple(_row(plain, one, kept, verdicts) for one in found)


def candidates_for(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The sequences of steps that ``auto`` tries: ``CANDIDATES``, with ``bn`` left out on a net without BatchNorm."""
    if has_batch_norm(model):
        return CANDIDATES
    bare = (tuple(step for step in steps if step != "bn") for steps in CANDIDATES)
    return tuple(steps for steps in bare if steps)


def _tried(context: RecoveryContext, measure: _Measure, model: nn.Module, steps: tuple[str, ...]) -> _Candidate:
    """Apply a candidate and measure what it gives."""
    began = time.perf_counter()
    recovered = apply_steps(context, model, steps)
    state = measure(recovered.model)
    return _Candidate(steps=steps, recovered=recovered, state=state, seconds=time.perf_counter() - began)


#: Names of the candidates that were held to plain pruning, each with what came of it.
_Verdicts = dict[str, str]


def _first_that_holds(
    plain: _Candidate, ranked: Sequence[_Candidate], held: Callable[[_Candidate], tuple[bool, str]]
) -> tuple[_Candidate, _Verdicts]:
    """The first candidate, best first, that ``held`` finds better than plain pruning; else plain pruning itself."""
    verdicts: _Verdicts = {}
    for one in sorted(ranked, key=lambda candidate: candidate.rank):
        holds, verdicts[one.name] = held(one)
        if holds:
            return one, verdicts
    return plain, verdicts


def _answers_better(plain: _Candidate, one: _Candidate, *, half: bool) -> tuple[bool, str]:
    """Whether a candidate's answers are nearer to the dense net's; on the ``half`` of the images that did not rank.

    A few images hold most of the divergence, so that its mean is known badly where nearly every image gains: the mean
    has to be lower, and the logarithms have to be so beyond noise.
    """
    without, with_it = (c.state.kl[1::2] if half and len(c.state.kl) > 1 else c.state.kl for c in (plain, one))
    found = compare(without, with_it)
    logs = compare(*([math.log(kl + _LEAST) for kl in kls] for kls in (without, with_it)))
    gains = logs.without - logs.with_it > _ERRORS * logs.error and found.with_it < (1 - _MARGIN) * found.without
    return gains, f"KL from the dense model {_against(found)}"


def _against(comparison: Comparison) -> str:
    return f"{comparison.with_it:.3g} against {comparison.without:.3g} (+-{comparison.error:.2g})"


# ---------------------------------------------------------------------------------------------- trials


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """The short fine-tuning by which candidates are compared, each at the rate that fits its own start.

    Attributes:
        context: images, settings and callables of the job.
        steps: optimiser steps of one trial.
        rate: learning rate by the share of the dense top-1 that was lost.
        dense: state of the dense net.
    """

    context: RecoveryContext
    steps: int
    rate: Rate
    dense: _State

    def __call__(self, candidate: _Candidate, *, again: bool = False) -> ProbeResult:
        """The losses of a candidate after the trial; ``again`` in another order of the training images."""
        assert self.context.images is not None
        assert self.dense.labelled is not None
        assert candidate.state.labelled is not None
        top1 = candidate.state.labelled.val_top1
        lost = lost_top1(self.dense.labelled.val_top1, top1, classes=self.context.images.num_classes)
        return _trial(self.context, candidate.recovered.model, steps=self.steps, lr=self.rate(lost), again=again)


def _trial_steps(context: RecoveryContext) -> int:
    """Optimiser steps of one trial; 0 where nothing will be fine-tuned, or nothing has labels.

    Plain pruning and the shortlist are tried, then plain pruning and the best once more, perhaps the next one too.
    """
    if context.images is None:
        return 0
    fair = math.ceil(_SHARE * context.finetune_steps / (_TRIED + 5))
    return min(context.settings.probe_steps, fair)


def _by_trial(
    trial: _Trial, plain: _Candidate, found: Sequence[_Candidate]
) -> tuple[list[_Candidate], _Candidate, _Verdicts]:
    """The candidates with the losses of their trials, the one that is kept, and what was found on the way.

    Only some go through a trial: the best by their answers, and the best that conditions weights. New BatchNorm
    statistics alone are no starting point of their own, since training never reads them. One that trains better is
    kept; so is one that trains as well, within noise, and answers better at once.
    """
    by_kl = sorted((c for c in found if c.steps != ("bn",)), key=lambda candidate: candidate.rank)
    keeping = [candidate.name for candidate in by_kl if _CONDITIONS.isdisjoint(candidate.steps)]
    conditioning = [candidate.name for candidate in by_kl if not _CONDITIONS.isdisjoint(candidate.steps)]
    shortlist = {*keeping[:_TRIED], *conditioning[:1]}
    found = [replace(c, trial=trial(c)) if c.name in shortlist else c for c in found]
    plain = replace(plain, trial=trial(plain))
    once_more = trial(plain, again=True)

    def held(one: _Candidate) -> tuple[bool, str]:
        result = trial(one, again=True)
        trained = compare(once_more.calibrated[1::2], result.calibrated[1::2])
        answers, words = _answers_better(plain, one, half=False)
        said = f"loss after {trial.steps} optimiser steps at LR {result.lr:g} {_against(trained)}, {words}"
        return trained.better or (answers and not trained.worse), said

    kept, verdicts = _first_that_holds(plain, [c for c in found if c.trial], held)
    statistics = next((c for c in found if c.steps == ("bn",)), None)
    if kept is plain and statistics is not None:
        answers, verdicts["bn"] = _answers_better(plain, statistics, half=False)
        kept = statistics if answers else plain
    return found, kept, verdicts


# ---------------------------------------------------------------------------------------------- rows


def _row(plain: _Candidate, one: _Candidate, kept: _Candidate, verdicts: _Verdicts) -> RecoveryStep:
    """The row of a candidate, with why it was kept or left out."""
    why = verdicts.get(one.name) or f"{kept.name or 'plain pruning'} did better"
    if one.name not in verdicts and one.trial:
        why = f"loss after the trial {float(_finite(one.trial.calibrated).mean()):.3g} at LR {one.trial.lr:g}; {why}"
    summary = f"; {one.recovered.summary}" if one.recovered.summary else ""
    row = RecoveryStep(
        name=one.name,
        kept=one is kept,
        rule=f"{'kept' if one is kept else 'left out'}: {why}{summary}",
        residual=one.recovered.residual,
        shrinkage=one.recovered.shrinkage,
        seconds=round(one.seconds, 3),
    )
    return _with_effect(row, plain.state, one.state)


def _with_effect(row: RecoveryStep, before: _State, after: _State) -> RecoveryStep:
    """The row with KL, loss (nats) and top-1 on the held-out images before and after the step, without fine-tuning."""
    values: dict[str, float] = {"kl_before": before.mean_kl, "kl_after": after.mean_kl}
    for name, labelled in (("before", before.labelled), ("after", after.labelled)):
        if labelled is not None:
            values |= {f"loss_{name}": labelled.val_loss, f"top1_{name}": labelled.val_top1}
    return row.model_copy(update=values)


def _with_spectra(context: RecoveryContext, row: RecoveryStep, before: nn.Module, after: nn.Module) -> RecoveryStep:
    """The row with the Jacobian spectra before and after the step, where these are measured."""
    spectra = [context.spectrum_of(model) for model in (before, after)]
    jsv_before, jsv_after = (found.summary if found else None for found in spectra)
    return row.model_copy(update={"jsv_before": jsv_before, "jsv_after": jsv_after})
