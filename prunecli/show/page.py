"""A run's report as one self-contained HTML file: no scripts, nothing loaded from anywhere, fit for paper.

This module makes the values, ``report.html.j2`` has the layout and ``report.css`` the looks. The template escapes
everything a user can influence (names, warnings, notes, the recipe); only the plots, inline SVG, enter it as markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prunecli.show import plots, wording
from prunecli.show.templates import rendered
from prunecli.values.plan import Plan, UnitAllocation
from prunecli.values.report import FinetuneReport, LayerReport, PhaseReport, RecoveryStep, Report, Stage
from prunecli.values.sensitivity import Sensitivity

_Rows = Sequence[tuple[str, ...]]


class _Tile(NamedTuple):
    """One figure at the head of the page: its name, the final value, and a note on the change."""

    name: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """Plot and table of all stages, and the stages' notes; for the Jacobian only of those where it was measured."""

    plot: str
    rows: _Rows
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class _Training:
    """A training in one sentence and by epoch; ``plot`` is empty without a history."""

    heading: str
    text: str
    plot: str


@dataclass(frozen=True, kw_only=True)
class _Rate:
    """The recommended learning rate, why, and the tables it rests on."""

    recommended: str
    rule: str
    candidates: _Rows
    evidence: _Rows


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """A plot of layers, of which only the first ``shown`` out of ``count`` have a place; empty without layers."""

    plot: str
    count: int
    shown: int
    text: str = ""
    rows: _Rows = ()


def report_page(
    report: Report, plan: Plan, *, jacobians: Mapping[str, Sequence[float]] | None = None, recipe: str = ""
) -> str:
    """The whole page.

    Args:
        report: all figures of the run.
        plan: the cut, with the way it was chosen.
        jacobians: all Jacobian singular values by stage name, for histograms; without them ranges are drawn.
        recipe: the resolved recipe as YAML.

    Raises:
        ValueError: The report has no stages.
    """
    title = wording.headline(report)
    rate = report.lr and _Rate(
        recommended=f"{report.lr.recommended:g}",
        rule=report.lr.rule,
        candidates=wording.candidate_rows(report.lr),
        evidence=wording.evidence_rows(report.lr),
    )
    versions = [*report.versions.items(), ("seed", str(report.seed)), ("recipe sha256", report.recipe_sha256)]
    return rendered(
        "report.html.j2",
        title=title,
        heading=re.sub(r"(?<=\d) (?=(?:[kMGT%]|[kMG]?B)\b|%)", "\N{NO-BREAK SPACE}", title),  # a number and its unit
        target=wording.target_line(report.target) if report.target else "",
        tiles=_tiles(report),
        warnings=report.warnings,
        stages=_stages(report.stages),
        jacobian=_jacobian(report.stages, jacobians or {}),
        phases=[_phase(done) for done in report.phases],
        recovery=[_recovery_row(step) for step in report.recovery],
        rate=rate,
        finetuning=_finetuning(report.finetune, wording.budget_line(report)) if report.finetune else None,
        widths=_widths(report.layers, plan),
        allocation=_allocation(plan.allocation) if plan.allocation else None,
        spectra=_spectra(report.layers),
        checks=_checks(report),
        versions=versions,
        recipe=recipe,
    )


def sensitivity_page(found: Sensitivity) -> str:
    """The page of ``prunecli sensitivity``: the whole model's curves first, then every unit's."""
    units = _Layers(
        plot=plots.curves_plot(found.units) if found.units else "",
        count=len(found.units),
        shown=plots.UNITS_SHOWN,
        rows=wording.sensitivity_unit_rows(found),
    )
    points = _Stages(plot=plots.cost_plot(found), rows=wording.sensitivity_point_rows(found))
    return rendered(
        "sensitivity.html.j2",
        title=f"What cutting costs {found.model}",
        images=wording.sensitivity_images(found),
        notes=found.notes,
        points=points,
        point_columns=wording.POINT_COLUMNS,
        units=units,
        unit_columns=wording.UNIT_COLUMNS,
        versions=list(found.versions.items()),
    )


def _tiles(report: Report) -> list[_Tile]:
    first, last = wording.ends(report)
    tiles = [
        _Tile("top-1", wording.percent(last.top1), f"dense {wording.percent(first.top1)}"),
        _Tile("parameters", wording.count(last.params), wording.relative(first.params, last.params)),
        _Tile("multiply-adds", wording.count(last.macs), wording.factor(first.macs, last.macs)),
        _Tile("weights", wording.size(last.bytes), wording.relative(first.bytes, last.bytes)),
    ]
    if last.jsv:
        dense = wording.figure(first.jsv.mean) if first.jsv else wording.DASH
        tiles.append(_Tile("mean Jacobian singular value", wording.figure(last.jsv.mean), f"dense {dense}"))
    if report.lr:
        tiles.append(_Tile("fine-tuning LR", f"{report.lr.recommended:g}", "recommended"))
    return tiles


def _stages(stages: Sequence[Stage]) -> _Stages:
    rows = [
        (
            wording.STAGE_NAMES[stage.name],
            wording.percent(stage.top1),
            wording.percent(stage.top5),
            wording.figure(stage.loss),
            wording.count(stage.params),
            wording.count(stage.macs),
            wording.size(stage.bytes),
            wording.duration(stage.seconds),
        )
        for stage in stages
    ]
    notes = [f"{wording.STAGE_NAMES[stage.name]}: {note}" for stage in stages for note in stage.notes]
    return _Stages(plot=plots.stages_plot(stages), rows=rows, notes=notes)


def _jacobian(stages: Sequence[Stage], jacobians: Mapping[str, Sequence[float]]) -> _Stages | None:
    """``None`` where no stage has its Jacobian spectrum."""
    rows = []
    for stage in stages:
        if (jsv := stage.jsv) is None:
            continue
        error, at_most, at_least = wording.spectrum_bounds(jsv)
        rows.append(
            (
                wording.STAGE_NAMES[stage.name],
                f"{wording.figure(jsv.mean)}{error}",
                wording.figure(jsv.std),
                f"{at_most}{wording.figure(jsv.min)}",
                wording.figure(jsv.max),
                f"{at_least}{wording.figure(jsv.condition)}",
                str(jsv.samples),
                wording.SPECTRUM_METHODS[jsv.method],
            )
        )
    return _Stages(plot=plots.jacobian_plot(stages, jacobians), rows=rows) if rows else None


def _phase(done: PhaseReport) -> _Training:
    return _Training(
        heading=f"Before the {'cut' if done.name == 'push' else 'plan'}",
        text=f"{wording.phase_line(done)}; {wording.phase_outcome(done)}.",
        plot=plots.phase_plot(done),
    )


def _recovery_row(step: RecoveryStep) -> tuple[str, ...]:
    def change(before: float | None, after: float | None) -> str:
        if before is None and after is None:
            return wording.DASH
        return f"{wording.figure(before)} → {wording.figure(after)}"

    return (
        step.name,
        "yes" if step.kept else "no",
        change(step.kl_before, step.kl_after),
        change(step.top1_before, step.top1_after),
        change(step.loss_before, step.loss_after),
        change(*(jsv.mean if jsv else None for jsv in (step.jsv_before, step.jsv_after))),
        wording.figure(step.residual, 2),
        step.rule,
    )


def _finetuning(done: FinetuneReport, budget: str | None) -> _Training:
    how = (f"{done.epochs} epochs", f"{done.steps} steps", f"learning rate {done.lr:g}", f"{done.schedule} schedule")
    text = ", ".join((*how, *wording.distillation(done))) + "."
    if done.best_epoch is not None:
        last = wording.percent(done.last_top1)
        text += f" Best top-1 {wording.percent(done.best_top1)} after epoch {done.best_epoch}, last {last}."
    if budget:
        text += f" {budget}."
    plot = plots.finetuning_plot(done.history) if done.history else ""
    return _Training(heading="Fine-tuning", text=text, plot=plot)


def _widths(layers: Sequence[LayerReport], plan: Plan) -> _Layers:
    narrowed = [layer for layer in layers if layer.out_after != layer.out_before]
    text = (
        f"{len(plan.cut_groups)} of {len(plan.groups)} coupled groups were cut, ranked by {plan.criterion} "
        f"({plan.ranking}); {len(narrowed)} of {len(layers)} layers have fewer output channels."
    )
    plot = plots.widths_plot(narrowed) if narrowed else ""
    return _Layers(plot=plot, count=len(narrowed), shown=plots.WIDTHS_SHOWN, text=text)


def _allocation(units: Sequence[UnitAllocation]) -> _Layers:
    rows = [
        (
            wording.unit_name(unit.groups),
            f"{unit.width} → {unit.kept}",
            wording.figure(unit.loss),
            wording.figure(unit.marginal),
            ", ".join(f"{wording.figure(kl)} at {kept}" for kept, kl in sorted(unit.kl.items(), reverse=True)),
        )
        for unit in units
    ]
    return _Layers(plot=plots.allocation_plot(units), count=len(units), shown=plots.UNITS_SHOWN, rows=rows)


def _spectra(layers: Sequence[LayerReport]) -> _Layers | None:
    """``None`` where no layer has its spectrum before and after."""
    known = [layer for layer in layers if layer.sv_before and layer.sv_after]
    if not known:
        return None
    return _Layers(plot=plots.weight_spectra_plot(known), count=len(known), shown=plots.SPECTRA_SHOWN)


def _checks(report: Report) -> _Rows:
    rows = []
    if found := report.verify:
        verdict = "reloads" if found.ok else "FAILED to reload"
        classes = "same number of classes" if found.classes_equal else "another number of classes"
        difference = f"logits differ by {found.reload_max_abs_diff:.1e}"
        rows.append(("export", f"{verdict} in a fresh process: {difference}, {classes}"))
    if pace := report.latency:
        change = f"{pace.base_ms:.3g} ms → {pace.final_ms:.3g} ms on {pace.device}, batch {pace.batch}"
        rows.append(("latency", f"{change} (x{pace.ratio:.2f}, noise {pace.noise:.2f})"))
    return rows
