"""A run's report as one self-contained HTML file: no scripts, nothing loaded from anywhere, fit for paper.

Everything a user can influence (names, warnings, notes, the recipe) is escaped; plots are inline SVG.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from prunecli.show import plots, wording
from prunecli.values.plan import Plan
from prunecli.values.report import LayerReport, PhaseReport, RecoveryStep, Report, SpectrumSummary

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2530;--soft:#5a6675;--line:#d8dee6;--back:#fff;--panel:#f5f7fa;--warn:#8a4b00;
--warnback:#fff4e2;--accent:#b3541a}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#9aa7b6;--line:#37414d;--back:#12171d;--panel:#1b222a;
--warn:#ffc577;--warnback:#33270f;--accent:#f0955a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:62rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .6rem}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:52rem}
.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.2rem,1fr));gap:.6rem;margin:1.2rem 0}
.tile{background:var(--panel);border-radius:8px;padding:.6rem .8rem}
.tile b{display:block;font-size:1.2rem;font-variant-numeric:tabular-nums;white-space:nowrap}
.tile span{color:var(--soft);font-size:.82rem}
.warnings{background:var(--warnback);color:var(--warn);border-left:4px solid var(--warn);border-radius:4px;
padding:.6rem .9rem;margin:1rem 0}
.warnings ul{margin:.2rem 0;padding-left:1.2rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .8rem .28rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);white-space:nowrap}
.n{text-align:right;white-space:nowrap}
td.word{overflow-wrap:break-word;max-width:32rem}
td.word:not(:first-child){min-width:15rem}
th:first-child,td:first-child{white-space:nowrap}
figure{margin:1rem 0}
svg{display:block;height:auto}
pre{background:var(--panel);padding:.8rem;border-radius:8px;overflow:auto;max-height:30rem;font-size:.82rem}
code{overflow-wrap:anywhere}
@media print{body{max-width:none;padding:0;font-size:11px}pre{max-height:none;white-space:pre-wrap}
h2,figure,table,.tile,.warnings{break-inside:avoid}h2{break-after:avoid}:root{color-scheme:light}}
"""


def report_page(
    report: Report, plan: Plan, *, jacobians: Mapping[str, Sequence[float]] | None = None, recipe: str = ""
) -> str:
    """The whole page.

    Args:
        report: all figures.
        plan: what was cut; says how it was chosen.
        jacobians: stage name → all its Jacobian singular values, for histograms; without them ranges are drawn.
        recipe: the resolved recipe as YAML.

    Raises:
        ValueError: a report without stages.
    """
    title = wording.headline(report)
    sections = [
        _header(report, title),
        _warnings(report.warnings),
        _stages(report),
        _jacobian(report, jacobians or {}),
        *(_phase(done) for done in report.phases),
        _recovery(report.recovery),
        _learning_rate(report),
        _finetuning(report),
        _widths(report.layers, plan),
        _spectra(report.layers),
        _checks(report),
        _reproduce(report, recipe),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------------------------------------- building blocks


def _section(heading: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(heading)}</h2>", *(part for part in parts if part), "</section>"])


def _paragraph(text: str, *, soft: bool = False) -> str:
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> str:
    """A table of plain texts; the columns in ``words`` are left-aligned and may fold, all others hold figures."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["word" if place in words else "n" for place in range(len(row))]
        return "".join(f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, row, strict=True))

    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


# ---------------------------------------------------------------------------------------------- sections


def _header(report: Report, title: str) -> str:
    first, last = wording.ends(report)
    tiles = [
        ("top-1", wording.percent(last.top1), f"dense {wording.percent(first.top1)}"),
        ("parameters", wording.count(last.params), f"{wording.relative(first.params, last.params)}"),
        ("multiply-adds", wording.count(last.macs), wording.factor(first.macs, last.macs)),
        ("weights", wording.size(last.bytes), wording.relative(first.bytes, last.bytes)),
    ]
    if last.jsv:
        dense = wording.figure(first.jsv.mean) if first.jsv else wording.DASH
        tiles.append(("mean Jacobian singular value", wording.figure(last.jsv.mean), f"dense {dense}"))
    if report.lr:
        tiles.append(("fine-tuning LR", f"{report.lr.recommended:g}", "recommended"))
    shown = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for name, value, note in tiles
    )
    target = _paragraph(f"Target {wording.target_line(report.target)}.") if report.target else ""
    return f'<header>\n<span class="soft">prunecli report</span>\n<h1>{_unbroken(escape(title))}</h1>\n{target}\n' + (
        f'<div class="tiles">{shown}</div>\n</header>'
    )


def _unbroken(text: str) -> str:
    """Keeps a number and its unit on one line."""
    return re.sub(r"(?<=\d) (?=(?:[kMGT%]|[kMG]?B)\b|%)", "&nbsp;", text)


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<div class="warnings" role="note"><b>What to know first</b><ul>{items}</ul></div>'


def _stages(report: Report) -> str:
    header = ("stage", "top-1", "top-5", "loss", "parameters", "multiply-adds", "weights", "time")
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
        for stage in report.stages
    ]
    notes = [
        _paragraph(f"{wording.STAGE_NAMES[stage.name]}: {note}", soft=True)
        for stage in report.stages
        for note in stage.notes
    ]
    return _section("Stage by stage", _figure(plots.stages_plot(report.stages)), _table(header, rows), *notes)


def _jacobian(report: Report, jacobians: Mapping[str, Sequence[float]]) -> str:
    rows = [(wording.STAGE_NAMES[stage.name], *_summary_cells(stage.jsv)) for stage in report.stages if stage.jsv]
    if not rows:
        return _section("Isometry", _paragraph("The Jacobian spectrum was not measured."))
    return _section(
        "Isometry",
        _paragraph(
            "Singular values of the Jacobian from normalised input to logits, eval mode. Near-equal values mean that "
            "gradients reach all layers alike; the condition is the mean over images of largest over smallest.",
            soft=True,
        ),
        _figure(plots.jacobian_plot(report.stages, jacobians)),
        _table(("stage", "mean", "std", "min", "max", "condition", "images", "values are"), rows),
    )


def _summary_cells(jsv: SpectrumSummary) -> tuple[str, ...]:
    mean, std, smallest, largest, condition = map(wording.figure, (jsv.mean, jsv.std, jsv.min, jsv.max, jsv.condition))
    about, at_most, at_least = wording.spectrum_bounds(jsv)
    figures = (f"{mean}{about}", std, f"{at_most}{smallest}", largest, f"{at_least}{condition}", str(jsv.samples))
    return (*figures, wording.SPECTRUM_METHODS[jsv.method])


def _phase(done: PhaseReport) -> str:
    heading = f"Before the {'cut' if done.name == 'push' else 'plan'}"
    text = f"{wording.phase_line(done)}; {wording.phase_outcome(done)}."
    return _section(heading, _paragraph(text), _figure(plots.phase_plot(done)))


def _recovery(steps: Sequence[RecoveryStep]) -> str:
    if not steps:
        return ""

    def change(before: float | None, after: float | None) -> str:
        return (
            wording.DASH if before is None and after is None else f"{wording.figure(before)} → {wording.figure(after)}"
        )

    rows = [
        (
            step.name,
            "yes" if step.kept else "no",
            change(step.top1_before, step.top1_after),
            change(step.loss_before, step.loss_after),
            change(*(jsv.mean if jsv else None for jsv in (step.jsv_before, step.jsv_after))),
            wording.figure(step.residual, 2),
            step.rule,
        )
        for step in steps
    ]
    header = ("step", "kept", "top-1 (%)", "loss", "mean JSV", "residual", "rule")
    return _section("Recovery", _table(header, rows, words=(0, 6)))


def _learning_rate(report: Report) -> str:
    if not report.lr:
        return ""
    candidates = wording.candidate_rows(report.lr)
    return _section(
        f"Learning rate {report.lr.recommended:g}, and why",
        _paragraph(report.lr.rule),
        _table(("candidate", "LR", "", "what is known of it"), candidates, words=(0, 2, 3)) if candidates else "",
        _table(("measurement", "value"), wording.evidence_rows(report.lr), words=(0, 1)),
    )


def _finetuning(report: Report) -> str:
    done = report.finetune
    if not done:
        return ""
    how = (f"{done.epochs} epochs", f"{done.steps} steps", f"learning rate {done.lr:g}", f"{done.schedule} schedule")
    text = ", ".join((*how, *wording.taught(done))) + "."
    if done.best_epoch is not None:
        last = wording.percent(done.last_top1)
        text += f" Best top-1 {wording.percent(done.best_top1)} after epoch {done.best_epoch}, last {last}."
    if budget := wording.budget_line(report):
        text += f" {budget}."
    plot = _figure(plots.finetuning_plot(done.history)) if done.history else ""
    return _section("Fine-tuning", _paragraph(text), plot)


def _widths(layers: Sequence[LayerReport], plan: Plan) -> str:
    narrowed = [layer for layer in layers if layer.out_after != layer.out_before]
    text = (
        f"{len(plan.cut_groups)} of {len(plan.groups)} coupled groups were cut, ranked by {plan.criterion} "
        f"({plan.ranking}); {len(narrowed)} of {len(layers)} layers have fewer output channels."
    )
    if not narrowed:
        return _section("Kept widths", _paragraph(text))
    limit = _limited(len(narrowed), plots.WIDTHS_SHOWN, "narrowed layers")
    return _section("Kept widths", _paragraph(text), limit, _figure(plots.widths_plot(narrowed)))


def _spectra(layers: Sequence[LayerReport]) -> str:
    known = [layer for layer in layers if layer.sv_before and layer.sv_after]
    if not known:
        return ""
    limit = _limited(len(known), plots.SPECTRA_SHOWN, "layers; report.json has all")
    return _section("Weight spectra", limit, _figure(plots.weight_spectra_plot(known)))


def _limited(count: int, limit: int, what: str) -> str:
    return _paragraph(f"First {limit} of {count} {what}.", soft=True) if count > limit else ""


def _checks(report: Report) -> str:
    rows: list[tuple[str, str]] = []
    if report.verify:
        found = report.verify
        verdict = "reloads" if found.ok else "FAILED to reload"
        classes = "same number of classes" if found.classes_equal else "another number of classes"
        rows.append(
            ("export", f"{verdict} in a fresh process: logits differ by {found.reload_max_abs_diff:.1e}, {classes}")
        )
    if report.latency:
        pace = report.latency
        rows.append(
            (
                "latency",
                f"{pace.base_ms:.3g} ms → {pace.final_ms:.3g} ms on {pace.device}, batch {pace.batch} "
                f"(x{pace.ratio:.2f}, noise {pace.noise:.2f})",
            )
        )
    return _section("Checks", _table(("", ""), rows, words=(0, 1))) if rows else ""


def _reproduce(report: Report, recipe: str) -> str:
    rows = [*report.versions.items(), ("seed", str(report.seed)), ("recipe sha256", report.recipe_sha256)]
    listing = f"<pre>{escape(recipe)}</pre>" if recipe else ""
    return _section("To run this again", _table(("", ""), rows, words=(0, 1)), listing)
