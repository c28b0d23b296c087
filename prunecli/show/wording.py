"""Numbers and outcomes in words, shared by terminal and page: one convention for counts, sizes and changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prunecli.values.learning_rate import LRReport
from prunecli.values.measured_rates import PLAIN, MeasuredRates
from prunecli.values.report import (
    FinetuneReport,
    PhaseCost,
    PhaseName,
    PhaseReport,
    Report,
    SpectrumSummary,
    Stage,
    TargetResult,
)
from prunecli.values.sensitivity import Sensitivity, UnitSensitivity

DASH: Final = "-"
_ARMS: Final = 3  # of a measurement of rates: plain cut, OrthP, the recipe's recovery
STAGE_NAMES: Final = {
    "dense": "dense",
    "regularised": "regularised",
    "pruned": "pruned",
    "recovered": "recovered",
    "finetuned": "fine-tuned",
}
SPECTRUM_METHODS: Final = {"exact": "exact", "lanczos": "a Lanczos estimate"}
UNIT_COLUMNS: Final = ("unit", "channels", "half saves", "KL at 3/4", "at 1/2", "at 1/4")
POINT_COLUMNS: Final = ("MACs", "parameters", "predicted KL", "KL", "top-1", "recovery")
TRIAL_COLUMNS: Final = ("arm", "LR", "last epoch", "best epoch", "to dense", "")
START_COLUMNS: Final = ("arm", "top-1", "loss", "mean JSV", "recommended LR")


def count(value: float) -> str:
    """Parameters or multiply-adds at three to four significant digits: ``853.0 k``, ``4.089 G``."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.99995:
            scaled = value / factor
            return f"{scaled:.{3 if scaled < 10 else 2 if scaled < 100 else 1}f} {unit}"
    return f"{value:g}"


def classes(number: int) -> str:
    """``1000 classes``; ``no classifier`` for 0."""
    return f"{number} classes" if number else "no classifier"


def size(num_bytes: float) -> str:
    """Bytes in decimal units (1 kB = 1000 B), like size targets: ``3.41 MB``."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:g} B"


def figure(value: float | None, digits: int = 3) -> str:
    """A measured number at ``digits`` significant digits, a dash for ``None``; exponents only far from 1."""
    if value is None:
        return DASH
    if not 1 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}"


def spectrum_bounds(jsv: SpectrumSummary) -> tuple[str, str, str]:
    """Marks for the mean, the smallest value and the condition number; all empty for an exact spectrum.

    A Lanczos estimate has two standard errors behind its mean. It finds the smallest value from above, so that value is
    an upper bound and the condition number a lower one.
    """
    if jsv.method == "exact":
        return "", "", ""
    return f" ± {figure(2 * (jsv.mean_error or 0.0), 2)}", "≤ ", "≥ "


def epochs(value: float) -> str:
    """``281 epochs``, ``0.4 epochs``: whole numbers from ten on."""
    return f"{value:.0f} epochs" if value >= 10 or value == round(value) else f"{value:.1f} epochs"


PHASE_AIMS: Final[dict[PhaseName, str]] = {
    "grow": "a small penalty grows on all channels, then they are picked",
    "push": "channels that leave are pushed towards zero",
    "regularise": "weights are made more orthogonal, then channels are picked",
    "gate": "every channel has a gate that learns whether it is needed",
}


def phase_line(phase: PhaseCost) -> str:
    """Method, aim and length of a phase before the cut: ``tpp, channels that leave are pushed towards zero: 600 …``."""
    length = f"{phase.steps:,} steps = {epochs(phase.epochs)} at LR {phase.lr:g}"
    return f"{phase.method}, {PHASE_AIMS[phase.name]}: {length}"


def phase_outcome(done: PhaseReport) -> str:
    """Teacher, channel norm, penalty and open gates of a phase, before and after; only those it has."""
    parts = [*distillation(done)]
    if done.norm_before is not None and done.norm_after is not None:
        channels = "pushed" if done.name == "push" else "all"
        parts.append(f"norm of {channels} channels {figure(done.norm_before)} → {figure(done.norm_after)}")
    if done.penalty_before is not None and done.penalty_after is not None:
        penalised = "Gram loss" if done.method == "tpp" else done.method
        parts.append(f"{penalised} {figure(done.penalty_before)} → {figure(done.penalty_after)}")
    if done.open_before is not None and done.open_after is not None:
        parts.append(f"open gates {100 * done.open_before:.1f} % → {100 * done.open_after:.1f} %")
    return "; ".join(parts)


def budget_line(report: Report) -> str | None:
    """The epochs of all training together; ``None`` for a run without a phase before the cut."""
    if not report.phases or report.total_epochs is None:
        return None
    return f"{epochs(report.total_epochs)} of training in all, the phase before the cut included"


def distillation(done: FinetuneReport | PhaseReport | MeasuredRates) -> tuple[str, ...]:
    """The share of the loss distilled from the dense model; empty for training on labels alone."""
    return (f"{done.distill:g} of the loss distilled from the dense model",) if done.distill else ()


def percent(value: float | None) -> str:
    """A percentage (0 to 100) at two decimals, a dash for ``None``."""
    return DASH if value is None else f"{value:.2f} %"


def duration(seconds: float) -> str:
    """``0.4 s``, ``75 s``, ``12.5 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def relative(before: float, after: float) -> str:
    """Change in per cent of ``before``: ``-49.8 %``; a dash where ``before`` is 0."""
    return DASH if before == 0 else f"{100 * (after / before - 1):+.1f} %"


def points(before: float | None, after: float | None) -> str:
    """Change of a percentage in points: ``-0.59``; a dash where one is ``None``."""
    return DASH if before is None or after is None else f"{after - before:+.2f}"


def factor(before: float, after: float) -> str:
    """Ratio of ``before`` to ``after``: ``1.99x fewer``; a dash where ``after`` is 0."""
    return DASH if after == 0 else f"{before / after:.2f}x fewer" if after < before else "unchanged"


def metric_value(metric: str, value: float) -> str:
    """A target's value in its metric's own unit."""
    if metric == "size":
        return size(value)
    if metric in ("macs", "params"):
        return count(value)
    return f"{value:.3g}x" if metric == "speedup" else f"{value:.3g}"


def target_line(target: TargetResult) -> str:
    """The asked, the reached and the reachable values of a target in one sentence."""
    asked, reached, low, high = (
        metric_value(target.metric, value) for value in (target.asked, target.reached, *target.reachable)
    )
    return f"{target.metric}: asked {asked}, reached {reached} (reachable {low} to {high})"


def ends(report: Report) -> tuple[Stage, Stage]:
    """The first and the last stage of a run.

    Raises:
        ValueError: The report has no stages.
    """
    if not report.stages:
        raise ValueError("a report needs at least one stage")
    return report.stages[0], report.stages[-1]


def headline(report: Report) -> str:
    """The result of a run in one sentence.

    Raises:
        ValueError: The report has no stages.
    """
    first, last = ends(report)
    if last.macs < first.macs or last.params < first.params:
        result = (
            f"{report.model} now has {count(last.params)} parameters ({relative(first.params, last.params)})"
            f" and {count(last.macs)} multiply-adds ({factor(first.macs, last.macs)})"
        )
    else:
        result = f"{report.model} keeps its {count(last.params)} parameters"
    if last.top1 is None:
        return f"{result}; its accuracy was not measured."
    if first.top1 is None or first is last:
        return f"{result}, at {last.top1:.2f} % top-1."
    return f"{result}, at {last.top1:.2f} % top-1 (dense {first.top1:.2f} %)."


def unit_name(groups: Sequence[str]) -> str:
    """The first of the groups that are cut together, and how many more there are."""
    return groups[0] + (f" +{len(groups) - 1}" if len(groups) > 1 else "")


def predicted_line(kl: float) -> str:
    """The predicted divergence of a plan."""
    return f"KL {figure(kl)} nats from the dense model's answers, the sum of what each unit loses alone; untrained"


def sensitivity_unit_rows(found: Sensitivity) -> list[tuple[str, ...]]:
    """Each unit under ``UNIT_COLUMNS``: what half of it saves of the multiply-adds, and the KL of cutting it alone."""
    return [
        (
            unit_name(unit.groups),
            str(unit.width),
            f"{unit.saved[min(unit.saved, key=lambda kept: abs(2 * kept - unit.width))]:.1f} %",
            *(_nearest_kl(unit, share) for share in (0.75, 0.5, 0.25)),
        )
        for unit in found.units
    ]


def _nearest_kl(unit: UnitSensitivity, share: float) -> str:
    """The KL at the measured width nearest to a share, with the width where that is not what was asked for."""
    if not unit.kl:
        return DASH
    kept = min(unit.kl, key=lambda width: abs(width - share * unit.width))
    return figure(unit.kl[kept]) + ("" if kept == share * unit.width else f" ({kept})")


def sensitivity_point_rows(found: Sensitivity) -> list[tuple[str, ...]]:
    """Each cost at which the whole model was measured, under ``POINT_COLUMNS``, the dense model first."""
    dense = ("100 %", "100 %", DASH, DASH, percent(found.dense.top1 if found.dense else None), "dense")
    cut = (
        (
            f"{100 * point.cost.macs / found.base.macs:.1f} %",
            f"{100 * point.cost.params / found.base.params:.1f} %",
            figure(point.predicted_kl),
            figure(done.kl),
            percent(done.accuracy.top1 if done.accuracy else None),
            done.recovery,
        )
        for point in found.points
        if (done := point.measured) is not None
    )
    return [dense, *cut]


def sensitivity_images(found: Sensitivity) -> str:
    """The images behind a sensitivity, in words."""
    labelled = f"; top-1 on {found.dense.samples} validation images" if found.dense else ""
    return (
        f"{found.calibration_images} images without labels, KL in nats on {found.held_out_images} others{labelled}; "
        "nothing was trained"
    )


def evidence_rows(found: LRReport) -> list[tuple[str, str]]:
    """What a learning rate rests on, as label and text: the measured inputs, then each rule with its source."""
    rows = [(label.replace("_", " "), _text(value)) for label, value in found.measurements().items()]
    return rows + [(f"rule: {rule.name}", f"{_text(rule.lr)} ({rule.source})") for rule in found.rules]


def candidate_rows(found: LRReport) -> list[tuple[str, str, str, str]]:
    """The rates that were weighed up, a row each: name, rate, whether it was taken, reason."""
    return [
        (candidate.name, _text(candidate.lr), "taken" if candidate.taken else "", candidate.reason)
        for candidate in found.candidates
    ]


def rate_rows(found: MeasuredRates) -> list[tuple[str, ...]]:
    """A row for each fine-tuning, arm by arm: accuracy after the last and the best epoch, distance to dense."""
    rows: list[tuple[str, ...]] = []
    for arm in found.arms:
        best = next(outcome.best for outcome in found.outcomes if outcome.arm == arm.name)
        for trial in found.trials_of(arm.name):
            marks = [
                word
                for word, applies in (
                    ("diverged", trial.diverged),
                    ("best", trial.lr == best),
                    ("recommended", trial.lr == arm.recommended),
                )
                if applies
            ]
            rows.append(
                (
                    arm.name,
                    f"{trial.lr:g}",
                    percent(trial.top1),
                    percent(trial.best_top1),
                    points(found.dense.top1, trial.top1),
                    ", ".join(marks),
                )
            )
    return rows


def start_rows(found: MeasuredRates) -> list[tuple[str, ...]]:
    """A row for each start, the dense model first: top-1, loss and mean Jacobian singular value, recommended rate."""
    starts = [("dense model", found.dense, DASH)]
    starts += [(_arm_name(arm.name, found), arm.start, f"{arm.recommended:g}") for arm in found.arms]
    return [
        (name, percent(at.top1), figure(at.loss), figure(at.jsv.mean if at.jsv else None), rate)
        for name, at, rate in starts
    ]


def _arm_name(name: str, found: MeasuredRates) -> str:
    """The name of an arm, with a word where it is the recovery of the recipe."""
    return f"{name} (chosen)" if name == found.chosen else name


def rates_scope(found: MeasuredRates) -> str:
    """How many fine-tunings of what length, judged on what, and whether two starts are one."""
    length = "1 epoch" if found.epochs == 1 else epochs(found.epochs)
    parts = (
        f"{len(found.trials)} fine-tunings of {length} ({found.steps} steps)",
        *distillation(found),
        f"judged on {found.images} validation images; dense {percent(found.dense.top1)}",
    )
    text = ", ".join(parts)
    if len(found.arms) < _ARMS:
        same = "plain pruning" if found.chosen == PLAIN else found.chosen
        text += f". The recipe's recovery is {same}, which is an arm already and was not trained twice"
    return f"{text}."


def _text(value: float | str | None) -> str:
    match value:
        case None:
            return DASH
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)
