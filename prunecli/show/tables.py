"""Reports, plans and graphs as text for people: values in, rich renderables out. Nothing is printed here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prunecli.errors import listed
from prunecli.show import wording
from prunecli.values.learning_rate import LRReport
from prunecli.values.measured_rates import MeasuredRates
from prunecli.values.plan import Cost, Plan
from prunecli.values.report import (
    Accuracy,
    PhaseCost,
    RecoveryStep,
    Report,
    SpectrumSummary,
    Stage,
    TargetResult,
    VerifyReport,
)
from prunecli.values.sensitivity import Sensitivity

if TYPE_CHECKING:
    from prunecli.recipe.reference import Key
    from prunecli.values.groups import Frozen, Graph, Tie
    from prunecli.values.inspection import Inspection
    from prunecli.values.support_matrix import Matrix, Row

_EXPLAINED: Final = 0.9  # prunable share of the parameters below which the reason is shown
_NAMES_SHOWN: Final = 3  # layer names that fit in one cell of 80 columns


def _table(title: str | None, *columns: str, numeric: Iterable[str] = ()) -> Table:
    """A table whose ``numeric`` columns are right-aligned and never folded."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    right = set(numeric)
    for name in columns:
        if name in right:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    """Cells as plain text: names may hold brackets, which rich would read as markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _fields(*pairs: tuple[str, str]) -> Table:
    """One line per pair of label and sentence; long sentences fold under their own column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for label, sentence in pairs:
        _row(grid, label, sentence)
    return grid


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    return [Text(f"! {note}", style="yellow") for note in notes]


# ---------------------------------------------------------------------------------------------- a finished run


def report_summary(report: Report, *, page: Path, model: Path) -> RenderableType:
    """The end of a run: dense against final, every stage, target, learning rate, verification, places.

    Args:
        report: The report of the run.
        page: Where the report for people lies.
        model: Where the exported weights lie.

    Raises:
        ValueError: The report has no stages.
    """
    parts: list[RenderableType] = [
        Text(wording.headline(report)),
        final_table(report),
        stages_table(report.stages),
        _fields(*_outcome(report), ("report", str(page)), ("model", str(model))),
        *_notes(report.warnings),
    ]
    return Group(*parts)


def _outcome(report: Report) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if report.target:
        lines.append(("target", wording.target_line(report.target)))
    lines += [
        ("before the cut", f"{wording.phase_line(phase)}; {wording.phase_outcome(phase)}") for phase in report.phases
    ]
    lines += _recoveries(report.recovery)
    if report.lr:
        lines.append(("LR", f"{report.lr.recommended:g}. {report.lr.rule}"))
    if report.finetune:
        lines.append(("fine-tuning", _finetuning(report)))
    if budget := wording.budget_line(report):
        lines.append(("budget", budget))
    if report.verify:
        lines.append(("verified", _verdict(report.verify)))
    return lines


def _recoveries(steps: Sequence[RecoveryStep]) -> list[tuple[str, str]]:
    """What was kept, a line each, and how many others were tried; the page has them all."""
    kept = [(f"recovery {step.name}", step.rule) for step in steps if step.kept]
    others = len(steps) - len(kept)
    if not others:
        return kept
    return [*kept, ("recovery", f"{others} {'others' if kept else 'recoveries'} tried, none better: report.html")]


def _finetuning(report: Report) -> str:
    done = report.finetune
    assert done is not None
    how = (f"{done.epochs} epochs", f"{done.steps} steps", f"LR {done.lr:g}", done.schedule)
    text = ", ".join((*how, *wording.distillation(done)))
    if done.best_top1 is None or done.best_epoch is None:
        return text
    return (
        f"{text}; best top-1 {done.best_top1:.2f} % (epoch {done.best_epoch}), last {wording.percent(done.last_top1)}"
    )


def final_table(report: Report) -> Table:
    """Dense against final, one figure per row.

    Raises:
        ValueError: The report has no stages.
    """
    first, last = wording.ends(report)
    table = _table(None, "", "dense", "final", "change", numeric=("dense", "final", "change"))
    for label, before, after in (("top-1", first.top1, last.top1), ("top-5", first.top5, last.top5)):
        if before is not None or after is not None:
            _row(table, label, wording.percent(before), wording.percent(after), wording.points(before, after))
    if first.loss is not None or last.loss is not None:
        _row(table, "loss", *_before_after(first.loss, last.loss))
    _add_costs(table, first, last)
    if first.jsv and last.jsv:
        _row(table, "mean JSV", *_before_after(first.jsv.mean, last.jsv.mean))
    return table


def _before_after(before: float | None, after: float | None) -> tuple[str, str, str]:
    """A measured number before and after, and the difference; a dash for what is ``None``."""
    change = wording.DASH if before is None or after is None else f"{after - before:+.3g}"
    return wording.figure(before), wording.figure(after), change


def _add_costs(table: Table, before: Cost | Stage, after: Cost | Stage) -> None:
    """Rows of parameters, multiply-adds and bytes: before, after, change."""
    params, macs, weights = before.params, before.macs, before.bytes
    _row(
        table,
        "parameters",
        wording.count(params),
        wording.count(after.params),
        wording.relative(params, after.params),
    )
    _row(table, "multiply-adds", wording.count(macs), wording.count(after.macs), wording.factor(macs, after.macs))
    _row(table, "weights", wording.size(weights), wording.size(after.bytes), wording.relative(weights, after.bytes))


def stages_table(stages: Sequence[Stage]) -> Table:
    """Every stage: accuracy, cost, Jacobian singular values, time."""
    numeric = ("top-1", "params", "MACs", "mean JSV", "condition", "time")
    table = _table(None, "stage", *numeric, numeric=numeric)
    table.columns[0].no_wrap = True
    for stage in stages:
        jsv = stage.jsv
        _row(
            table,
            wording.STAGE_NAMES[stage.name],
            wording.percent(stage.top1),
            wording.count(stage.params),
            wording.count(stage.macs),
            wording.figure(jsv.mean if jsv else None),
            wording.figure(jsv.condition if jsv else None),
            wording.duration(stage.seconds),
        )
    return table


def verify_line(run: Path, found: VerifyReport) -> Text:
    """The result of a run folder's verification in one line, red where it failed."""
    return Text(f"{run}: {_verdict(found)}", style="" if found.ok else "bold red")


def _verdict(found: VerifyReport) -> str:
    difference = f"largest logit difference {found.reload_max_abs_diff:.1e}"
    classes = "same classes" if found.classes_equal else "another number of classes"
    return f"{'ok' if found.ok else 'FAILED'}, reloaded in a fresh process: {difference}, {classes}"


# ---------------------------------------------------------------------------------------------- plan and graph


def plan_table(
    plan: Plan, target: TargetResult, proof: str, notes: Sequence[str], phases: Sequence[PhaseCost] = ()
) -> RenderableType:
    """A dry run: the groups that would be cut, the cost of the cut model, the training before the cut."""
    groups = _table(None, "group", "kind", "width", "kept", "change", numeric=("width", "kept", "change"))
    for group in plan.cut_groups:
        kept = len(group.keep)
        _row(groups, group.name, group.kind, str(group.width), str(kept), wording.relative(group.width, kept))
    uncut = len(plan.groups) - len(plan.cut_groups)
    costs = _table(None, "", "dense", "planned", "change", numeric=("dense", "planned", "change"))
    _add_costs(costs, plan.base, plan.predicted)
    fields = _fields(
        ("target", wording.target_line(target)),
        (
            "cut",
            f"{len(plan.cut_groups)} coupled groups by {plan.criterion}, {plan.ranking} ranking; {uncut} stay whole",
        ),
        *([("predicted", wording.predicted_line(plan.predicted_kl))] if plan.predicted_kl is not None else []),
        ("proof", proof),
        *(("before the cut", wording.phase_line(phase)) for phase in phases),
    )
    if any(phase.name == "gate" for phase in phases):
        notes = [
            *notes,
            "On trial: a random half of every group that gets gates. Which channels leave is yet to be learnt.",
        ]
    elif any(phase.name != "push" for phase in phases):
        notes = [*notes, "This is the plan for the weights as they are; the one that is cut is made after the phase."]
    return Group(Text(f"Plan for {plan.model.name}; nothing has been changed."), groups, costs, fields, *_notes(notes))


def sensitivity_tables(found: Sensitivity, folder: Path | None) -> RenderableType:
    """What each unit loses when it is cut alone, and what the whole model keeps at less and less cost."""
    units = _table("Each unit cut alone", *wording.UNIT_COLUMNS, numeric=wording.UNIT_COLUMNS[1:])
    for row in wording.sensitivity_unit_rows(found):
        _row(units, *row)
    points = _table("The whole model, untrained", *wording.POINT_COLUMNS, numeric=wording.POINT_COLUMNS[:-1])
    for row in wording.sensitivity_point_rows(found):
        _row(points, *row)
    fields = _fields(
        ("model", found.model),
        ("measured on", wording.sensitivity_images(found)),
        *((("report", str(folder / "sensitivity.html")),) if folder else ()),
    )
    return Group(units, points, fields, *_notes(found.notes))


def inspection(found: Inspection) -> RenderableType:
    """Coupled groups, frozen axes with their reasons, totals."""
    graph, cost, count = found.graph, found.cost, wording.count
    shape = " x ".join(str(extent) for extent in found.input_size)
    if found.model.assumes_input_size:
        shape += " (assumed)"
    totals = _fields(
        ("model", f"{found.model.name}, input {shape}, {wording.classes(found.model.num_classes)}"),
        ("cost", f"{count(cost.params)} parameters, {count(cost.macs)} multiply-adds, {wording.size(cost.bytes)}"),
        ("prunable", f"{len(graph.groups)} coupled groups, {found.prunable_share:.1%} of the parameters"),
        ("engine", graph.engine),
        ("status", f"{'supported' if found.supported else 'not supported'}: {found.status}"),
    )
    parts: list[RenderableType] = [totals, _groups_table(graph)]
    if graph.frozen:
        parts.append(_frozen_table(graph.frozen))
    parts += _notes([f"tied, one share of each: {_tied(tie)}" for tie in graph.ties[:_NAMES_SHOWN]])
    if len(graph.ties) > _NAMES_SHOWN:
        parts += _notes([f"and {len(graph.ties) - _NAMES_SHOWN} more ties (--json lists all)"])
    if graph.exclusive:
        products = listed([" x ".join(factors) for factors in graph.exclusive], 1)
        parts += _notes([f"products, of which one factor is cut (prune.attention says which): {products}"])
    if graph.unknown_ops:
        met = ", ".join(f"{name} ({times}x)" for name, times in sorted(graph.unknown_ops.items()))
        parts += _notes([f"operators without a rule, their axes stay: {met}"])
    return Group(*parts)


def _tied(tie: Tie) -> str:
    """The first groups of a tie; of those with "or" between them one is cut."""
    choices = [" or ".join(" with ".join(bundle.groups) for bundle in choice) for choice in tie.choices]
    return listed(choices, _NAMES_SHOWN)


def _groups_table(graph: Graph) -> Table:
    """One row per group; with a column for the kind only where kinds differ."""
    several = len({group.kind for group in graph.groups}) > 1
    columns = ("group", *(["kind"] if several else []), "width", "written by", "read by")
    table = _table("May be cut", *columns, numeric=("width",))
    for group in graph.groups:
        kind = [group.kind] if several else []
        writes, reads = (listed(group.layers(role), _NAMES_SHOWN) for role in ("out", "in"))
        _row(table, group.name, *kind, str(group.width), writes, reads)
    return table


def _frozen_table(frozen: Sequence[Frozen]) -> Table:
    """Axes that stay whole, one row per reason; reasons that differ only in the module they name share a row."""
    reasons: dict[str, list[Frozen]] = {}
    for axis in frozen:
        reasons.setdefault(re.sub(r"module '[^']*'", "its module", axis.reason), []).append(axis)
    table = _table("Stays whole", "why", "axes", "which (width)", numeric=("axes",))
    for reason, axes in reasons.items():
        names = [f"{axis.name} ({axis.width})" for axis in axes]
        _row(table, reason, str(len(axes)), listed(names, _NAMES_SHOWN))
    return table


# ---------------------------------------------------------------------------------------------- single commands


def spectrum_table(
    model: str, summary: SpectrumSummary, layers: Mapping[str, Sequence[float]], inputs: str
) -> RenderableType:
    """Jacobian summary, and the ends of every layer's weight spectrum.

    Args:
        model: name of the model.
        summary: singular values of its Jacobian.
        layers: singular values of the weight matrix by layer, descending.
        inputs: kind of the images that the Jacobian was taken at.
    """
    about, at_most, at_least = wording.spectrum_bounds(summary)
    jacobian = (
        f"mean {wording.figure(summary.mean, 4)}{about}, std {wording.figure(summary.std, 4)},"
        f" min {at_most}{wording.figure(summary.min)}, max {wording.figure(summary.max, 4)},"
        f" condition {at_least}{wording.figure(summary.condition)}"
    )
    table = _table("Singular values of the weights", "layer", "values", "largest", "mean", "smallest", "condition",
                   numeric=("values", "largest", "mean", "smallest", "condition"))  # fmt: skip
    for name, values in layers.items():
        condition = values[0] / values[-1] if values[-1] > 0 else None
        figures = (values[0], sum(values) / len(values), values[-1], condition)
        _row(table, name, str(len(values)), *(wording.figure(value) for value in figures))
    heading = _fields(
        ("model", model),
        ("Jacobian", jacobian),
        ("measured on", f"{summary.samples} images, {inputs}, eval mode; {wording.SPECTRUM_METHODS[summary.method]}"),
    )
    return Group(heading, table)


def lr_table(found: LRReport) -> RenderableType:
    """The recommended learning rate, its rule, the candidates and the evidence."""
    table = _table("Evidence", "measurement", "value")
    for name, value in wording.evidence_rows(found):
        _row(table, name, value)
    candidates = _table("Candidates", "candidate", "LR", "", "what is known of it", numeric=("LR",))
    for row in wording.candidate_rows(found):
        _row(candidates, *row)
    parts: list[RenderableType] = [_fields(("LR", f"{found.recommended:g}"), ("why", found.rule))]
    return Group(*parts, *([candidates] if candidates.row_count else []), table)


def rates_table(found: MeasuredRates, *, page: Path) -> RenderableType:
    """Measured learning rates: every start, every fine-tuning, and what they say.

    Args:
        found: All figures.
        page: Where the page for people lies.
    """
    numbers = wording.TRIAL_COLUMNS[1:-1]
    trials = _table("Fine-tunings", *wording.TRIAL_COLUMNS, numeric=numbers)
    starts = _table("Starts, before any training", *wording.START_COLUMNS, numeric=wording.START_COLUMNS[1:])
    for table, rows in ((starts, wording.start_rows(found)), (trials, wording.rate_rows(found))):
        table.columns[0].no_wrap = True
        for row in rows:
            _row(table, *row)
    facts = _fields(
        ("LR", f"{found.lr.recommended:g} recommended. {found.lr.rule}"),
        ("measured", wording.rates_scope(found)),
    )
    said = _fields(*(("-", sentence) for sentence in found.verdicts))
    return Group(facts, starts, trials, said, _fields(("page", str(page))), *_notes(found.warnings))


def accuracy_table(model: str, data: str, found: Accuracy, notes: Sequence[str]) -> RenderableType:
    """Accuracy of one model on one data set."""
    fields = _fields(
        ("model", model),
        ("data", f"{data}, {found.samples} images"),
        ("top-1", wording.percent(found.top1)),
        ("top-5", wording.percent(found.top5)),
        ("loss", wording.figure(found.loss, 4)),
    )
    return Group(fields, *_notes(notes))


def recipe_list(rows: Sequence[tuple[str, str]]) -> Table:
    """Packaged recipes as name and purpose."""
    table = _table(None, "recipe", "for")
    for name, purpose in rows:
        _row(table, name, purpose)
    return table


def recipe_keys(keys: Sequence[Key]) -> RenderableType:
    """Recipe keys, two lines or more each: the key with type and default, then what it sets. Names are never broken.

    In sections by kind the kinds that have the key stand behind that.
    """
    parts: list[RenderableType] = []
    for key in keys:
        kinds = f" ({', '.join(key.kinds)})" if key.kinds else ""
        default = f"default {key.default}" if key.default else "required"
        parts.append(Text(f"{key.name}: {key.type}; {default}", style="bold"))
        parts.append(Padding(Text(f"{key.description}{kinds}"), (0, 0, 0, 4)))
    return Group(*parts)


# ---------------------------------------------------------------------------------------------- support matrix


def matrix_table(matrix: Matrix) -> RenderableType:
    """The support matrix by timm module: counts of architectures, structures and exact ones, and prunable shares."""
    rows = {row.name: row for row in matrix.rows}
    modules: dict[str, list[Row]] = {}
    for name in matrix.covered_by.values():
        modules.setdefault(rows[name].module, []).append(rows[name])
    numeric = ("architectures", "structures", "exact", "prunable")
    table = _table("Support by module", "module", *numeric, numeric=numeric)
    table.columns[0].no_wrap = True
    remarks = []
    for module, members in sorted(modules.items()):
        structures = list({row.name: row for row in members}.values())
        exact = sum(row.status == "exact" for row in structures)
        shares = [f"{share:.1%}" for share in sorted(row.prunable_share for row in structures)]
        span = shares[0] if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]}"
        _row(table, module, str(len(members)), str(len(structures)), str(exact), span)
        remarks += [r for r in structures if r.status != "exact" or r.prunable_share < _EXPLAINED]
    explained = [Text("Not exact, or less than 90 % of the parameters prunable", style="bold")] if remarks else []
    why = _fields(*((row.name, row.reason) for row in remarks))
    return Group(table, *explained, why, Text(""), _fields(*_matrix_facts(matrix)))


def _matrix_facts(matrix: Matrix) -> list[tuple[str, str]]:
    exact = {row.name for row in matrix.rows if row.status == "exact"}
    covered = sum(by in exact for by in matrix.covered_by.values())
    untried = f"; {len(matrix.untried)} have structures that were not tried" if matrix.untried else ""
    of_all = f"{covered} of {len(matrix.covered_by)} architectures{untried}"
    return [
        ("exact", f"{len(exact)} of {len(matrix.rows)} structures, {of_all}"),
        ("means", "half of all widths and half the multiply-adds cut, each proved, trained a step, exported, reloaded"),
        ("measured", f"{matrix.date}, " + ", ".join(f"{name} {number}" for name, number in matrix.versions.items())),
        ("one model", "prunecli models PATTERN shows architectures; prunecli inspect MODEL its groups"),
    ]


def architectures_table(found: Mapping[str, Row]) -> Table:
    """One row per architecture, with the trials of the structure that it shares."""
    numeric = ("prunable", "params", "MACs", "error")
    table = _table("Left at macs=50%", "architecture", *numeric, "result", numeric=numeric)
    for name, row in found.items():
        last = row.trials[-1] if row.trials else None
        tried = "" if row.name == name else f"as {row.name}: "
        _row(
            table,
            name,
            f"{row.prunable_share:.1%}",
            wording.percent(100 * last.params / row.params if last and last.params else None),
            wording.percent(100 * last.macs / row.macs if last and last.macs else None),
            wording.DASH if row.worst_error is None else f"{row.worst_error:.0e}",
            f"{tried}{row.status}{'. ' if row.reason else ''}{row.reason}",
        )
    return table
