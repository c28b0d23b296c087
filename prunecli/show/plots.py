"""Plots of a report as inline SVG: values in, one ``<svg>`` element out, no global matplotlib state.

Text stays text and axes take the page's own colour (``currentColor``), so one drawing serves light, dark and paper.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from prunecli.show import wording
from prunecli.values.measured_rates import PLAIN, MeasuredRates
from prunecli.values.plan import UnitAllocation
from prunecli.values.report import LayerReport, PhaseReport, Stage
from prunecli.values.sensitivity import Sensitivity, SensitivityPoint, UnitSensitivity

UNITS_SHOWN: Final = 40
SPECTRA_SHOWN: Final = 24
WIDTHS_SHOWN: Final = 60

_INK = "#010203"  # stands for the page's text colour until the drawing is text
_BEFORE, _AFTER = "#7d8fa8", "#e0712c"
_STAGE_COLOURS = {
    "dense": _BEFORE,
    "regularised": "#8f63b8",
    "pruned": "#cf4457",
    "recovered": "#d9a520",
    "finetuned": "#2a9d83",
}
_ARM_COLOURS = ("#cf4457", "#8f63b8", "#2a9d83")  # plain cut, OrthP, the recipe's recovery
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer's name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
_POINTS: Final = 128  # points per curve: more would be closer than a pixel


def _drawn(draw: Callable[[Figure], None], *, width: float, height: float, label: str) -> str:
    """One figure of ``width`` x ``height`` inches as an ``<svg>`` element; ``label`` is its name for screen readers."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening = re.compile(r'<svg[^>]*viewBox="([^"]*)"[^>]*>')
    head = f'<svg viewBox="\\1" role="img" aria-label="{label}" style="width:min(100%,{width * 96:.0f}px)">'
    return opening.sub(head, svg, count=1).replace(_INK, "currentColor").replace(' xlink:href="#', ' href="#')


def stages_plot(stages: Sequence[Stage]) -> str:
    """Top-1 (%), parameters, multiply-adds and bytes of every stage, side by side, as ``<svg>``."""
    panels: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("top-1 (%)", [stage.top1 for stage in stages], lambda value: f"{value:.2f}"),
        ("parameters", [stage.params for stage in stages], wording.count),
        ("multiply-adds", [stage.macs for stage in stages], wording.count),
        ("weights", [stage.bytes for stage in stages], wording.size),
    ]
    panels = [panel for panel in panels if any(value is not None for value in panel[1])]
    names = [wording.STAGE_NAMES[stage.name] for stage in stages]
    colours = [_STAGE_COLOURS[stage.name] for stage in stages]

    def draw(figure: Figure) -> None:
        for axes, (title, values, words) in zip(_row_of(figure, len(panels)), panels, strict=True):
            heights = [0.0 if value is None else float(value) for value in values]
            bars = axes.barh(names, heights, color=colours, height=0.7)
            axes.bar_label(bars, [wording.DASH if v is None else words(v) for v in values], padding=3, fontsize=8)
            axes.set_title(title, loc="left")
            axes.set_xlim(0, 1.45 * max(heights) or 1)
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(NullLocator())
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        for axes in figure.axes[1:]:
            axes.tick_params(axis="y", labelleft=False)

    return _drawn(draw, width=9.5, height=0.6 + 0.3 * len(stages), label="Accuracy and cost of every stage")


def jacobian_plot(stages: Sequence[Stage], jacobians: Mapping[str, Sequence[float]]) -> str:
    """Jacobian singular values of every stage on one logarithmic axis.

    The dashed mark is the mean. Zeros have no place on the axis and are counted beside it.

    Args:
        stages: all stages; those without a measured Jacobian are left out.
        jacobians: singular values by stage name, for a histogram; a stage without them gets its range as a bar.
    """
    measured = [stage for stage in stages if stage.jsv]
    values = {stage.name: np.asarray(jacobians.get(stage.name, ()), dtype=float) for stage in measured}
    ends = [end for stage in measured if stage.jsv for end in (stage.jsv.min, stage.jsv.max)]
    positive = [end for end in [*ends, *(float(v) for found in values.values() for v in found)] if end > 0]
    top = max(positive, default=1.0)
    low = max(min(positive, default=1e-3), 1e-8 * top) / 1.5
    bins = np.geomspace(low, 1.5 * top, 49)

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(measured), 1, sharex=True, squeeze=False)[:, 0]
        for axes, stage in zip(rows, measured, strict=True):
            found, colour = values[stage.name], _STAGE_COLOURS[stage.name]
            assert stage.jsv
            if found.size:
                axes.hist(np.maximum(found[found > 0], low), bins=bins, color=colour, alpha=0.75)
            else:
                axes.axhline(0.5, color="none")
                axes.plot([max(stage.jsv.min, low), max(stage.jsv.max, low)], [0.5, 0.5], color=colour, linewidth=6)
            if stage.jsv.mean > 0:
                axes.axvline(stage.jsv.mean, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
            zeros = int((found == 0).sum())
            title = f"{wording.STAGE_NAMES[stage.name]}, mean {wording.figure(stage.jsv.mean)}"
            axes.set_title(title + (f", {zeros} are zero" if zeros else ""), loc="left")
            _logarithmic(axes, "x")
            axes.set_xlim(low, 1.5 * top)
            axes.yaxis.set_major_locator(NullLocator())
            axes.spines["left"].set_visible(False)
        rows[-1].set_xlabel("singular value of the input-logit Jacobian (dashed: mean)")

    return _drawn(draw, width=9.5, height=0.5 + 0.95 * len(measured), label="Jacobian singular values of every stage")


_Curve = tuple[str, str, str]  # key of the history, name in the legend, colour
_Panel = tuple[str, Sequence[_Curve], str]  # title, curves, scale


def finetuning_plot(history: Sequence[Mapping[str, float]]) -> str:
    """Losses, validation top-1 and learning rate by epoch; quantities that the history lacks get no panel."""
    panels: list[_Panel] = [
        ("loss", [("train_loss", "training", _BEFORE), ("loss", "validation", _AFTER)], "linear"),
        ("validation top-1 (%)", [("top1", "", _STAGE_COLOURS["finetuned"])], "linear"),
        ("learning rate", [("lr", "", _INK)], "log"),
    ]
    return _by_epoch(history, panels, label="Fine-tuning by epoch")


def phase_plot(done: PhaseReport) -> str:
    """Penalty factor, cross-entropy, penalty, channel norm and open gates by epoch of a phase before the cut."""
    penalised = "Gram loss" if done.method == "tpp" else done.method
    panels: list[_Panel] = [
        ("factor λ", [("reg", "", _INK)], "linear"),
        ("cross-entropy", [("train_loss", "", _BEFORE)], "linear"),
        (penalised, [("penalty", "", _STAGE_COLOURS["regularised"])], "log"),
        ("norm of the pushed channels", [("norm", "", _AFTER)], "log"),
        ("share of open gates", [("open", "", _AFTER)], "linear"),
    ]
    return _by_epoch(done.history, panels, label=f"The phase before the cut by epoch: {done.name}")


def _by_epoch(history: Sequence[Mapping[str, float]], panels: Sequence[_Panel], *, label: str) -> str:
    """Panels side by side, each with those of its curves that the last entry of the history has.

    A panel whose scale is "log" leaves out values that are not positive; without any positive one its axis is linear.
    """
    epochs = [entry["epoch"] for entry in history]
    known = [(title, [c for c in curves if c[0] in history[-1]], scale) for title, curves, scale in panels]
    known = [panel for panel in known if panel[1]]
    first, last = epochs[0], epochs[-1]
    margin = 0.05 * (last - first) or 0.05

    def draw(figure: Figure) -> None:
        for axes, (title, curves, scale) in zip(_row_of(figure, len(known)), known, strict=True):
            positive = False
            for key, name, colour in curves:
                ys = [entry.get(key, math.nan) for entry in history]
                positive = positive or any(y > 0 for y in ys)
                ys = [math.nan if scale == "log" and y <= 0 else y for y in ys]
                axes.plot(epochs, ys, color=colour, label=name, marker="o", markersize=3 if len(epochs) < 60 else 0)
            axes.set_title(title, loc="left")
            axes.set_xlabel("epoch")
            axes.set_xlim(first - margin, last + margin)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
            if scale == "log" and positive:
                _logarithmic(axes, "y")
            if len(curves) > 1:
                axes.legend()

    return _drawn(draw, width=9.5, height=2.4, label=label)


def rates_plot(found: MeasuredRates) -> str:
    """Top-1 against the learning rate, a line an arm, with two standard errors; dense dashed, recommended dotted.

    A training that diverged is a cross at the accuracy of guessing.
    """

    def draw(figure: Figure) -> None:
        (axes,) = _row_of(figure, 1)
        for arm, colour in zip(found.arms, _ARM_COLOURS, strict=False):
            trials = found.trials_of(arm.name)
            rates, reached = [trial.lr for trial in trials], [trial.top1 for trial in trials]
            errors = [2 * math.sqrt(top1 * (100 - top1) / found.images) for top1 in reached]
            name = "no recovery" if arm.name == PLAIN else arm.name
            axes.errorbar(rates, reached, errors, color=colour, label=name, marker="o", markersize=4, elinewidth=0.8)
            lost = [trial for trial in trials if trial.diverged]
            axes.plot([t.lr for t in lost], [t.top1 for t in lost], "x", color=colour, markersize=9, mew=2)
        if found.dense.top1 is not None:
            axes.axhline(found.dense.top1, color=_BEFORE, linestyle="--", linewidth=1.2, label="dense model")
        axes.axvline(found.lr.recommended, color=_INK, linestyle=":", linewidth=1.2, label="recommended rate")
        _logarithmic(axes, "x")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(found.rates)
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("validation top-1 (%)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _drawn(draw, width=9.5, height=3.6, label="Top-1 against the learning rate")


def widths_plot(layers: Sequence[LayerReport]) -> str:
    """Output channels of each layer before (pale) and after (solid); at most ``WIDTHS_SHOWN`` layers."""
    shown = layers[:WIDTHS_SHOWN]
    names, places = [short(layer.name) for layer in shown], range(len(shown))

    def draw(figure: Figure) -> None:
        (axes,) = _row_of(figure, 1)
        axes.barh(places, [layer.out_before for layer in shown], color=_BEFORE, alpha=0.35, height=0.78)
        bars = axes.barh(places, [layer.out_after for layer in shown], color=_AFTER, height=0.42)
        labels = [f"{layer.out_before} → {layer.out_after}" for layer in shown]
        for bar, layer, words in zip(bars, shown, labels, strict=True):
            middle = bar.get_y() + bar.get_height() / 2
            axes.annotate(
                words, (layer.out_before, middle), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(places, names)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.15 * max(layer.out_before for layer in shown))
        axes.set_xlabel("output channels (pale: before, solid: after)")
        axes.tick_params(axis="y", length=0)

    return _drawn(draw, width=9.5, height=0.7 + 0.24 * len(shown), label="Output channels before and after")


def allocation_plot(units: Sequence[UnitAllocation]) -> str:
    """Loss of each unit by the share of its channels that stays, with the chosen point; at most ``UNITS_SHOWN``."""
    return _unit_curves(units, [unit.kept for unit in units])


def curves_plot(units: Sequence[UnitSensitivity]) -> str:
    """Loss of each unit by the share of its channels that stays; at most ``UNITS_SHOWN``."""
    return _unit_curves(units, None)


def _unit_curves(units: Sequence[UnitAllocation | UnitSensitivity], chosen: Sequence[int] | None) -> str:
    shown = units[:UNITS_SHOWN]
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    largest = max(max(unit.curve.values()) for unit in shown) or 1.0

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for at, (axes, unit) in enumerate(zip(grid, shown, strict=False)):
            widths = sorted(unit.curve)
            axes.plot([100 * w / unit.width for w in widths], [unit.curve[w] for w in widths], color=_BEFORE)
            if chosen is not None:
                kept = chosen[at]
                axes.plot(100 * kept / unit.width, unit.curve[kept], "o", color=_AFTER, markersize=5)
            axes.set_title(short(unit.groups[0], 22), loc="left", fontsize=8)
            axes.set_yscale("symlog", linthresh=largest / 100)
            axes.set_ylim(0, 1.2 * largest)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xlim(0, 103)
            axes.tick_params(labelsize=7)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel("channels that stay (%)", fontsize=9)
        figure.supylabel("loss", fontsize=9)

    return _drawn(draw, width=9.5, height=0.5 + 1.2 * rows, label="Loss of every width of every unit")


def cost_plot(found: Sensitivity) -> str:
    """KL and, with labels, top-1 of the whole untrained model by the multiply-adds that stay."""

    def shares(points: Sequence[SensitivityPoint]) -> list[float]:
        return [100 * point.cost.macs / found.base.macs for point in points]

    predicted = [point for point in found.points if point.predicted_kl is not None]
    accurate = [
        (point, point.measured.accuracy.top1) for point in found.points if point.measured and point.measured.accuracy
    ]

    def draw(figure: Figure) -> None:
        panels = _row_of(figure, 2 if found.dense else 1)
        panels[0].plot(shares(predicted), [point.predicted_kl for point in predicted], color=_BEFORE, label="predicted")
        kls = [point.measured.kl for point in found.points if point.measured]
        panels[0].plot(shares(found.measured), kls, "o-", color=_AFTER, markersize=5, label="measured")
        _logarithmic(panels[0], "y")
        panels[0].set_title("KL from the dense model's answers (nats)", loc="left")
        panels[0].legend()
        if found.dense:
            panels[1].axhline(found.dense.top1, color=_BEFORE, linestyle="--", label="dense")
            points, top1 = [point for point, _ in accurate], [value for _, value in accurate]
            panels[1].plot(shares(points), top1, "o-", color=_AFTER, markersize=5, label="cut and recovered")
            panels[1].set_title("top-1 (%), untrained", loc="left")
            panels[1].set_ylim(bottom=0)
            panels[1].legend()
        for axes in panels:
            axes.set_xlim(102, min(shares(found.points)) - 2)
            axes.set_xlabel("multiply-adds that stay (%)")

    return _drawn(draw, width=9.5, height=3.0, label="What the whole model keeps by its multiply-adds")


def weight_spectra_plot(layers: Sequence[LayerReport]) -> str:
    """Singular values of each layer's weight matrix by rank, before and after; at most ``SPECTRA_SHOWN`` layers."""
    shown = layers[:SPECTRA_SHOWN]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, layer in zip(grid, shown, strict=False):
            for values, colour, name in ((layer.sv_before, _BEFORE, "before"), (layer.sv_after, _AFTER, "after")):
                places, kept = _thinned(values)
                axes.plot(places, kept, color=colour, label=name)
            axes.set_title(short(layer.name, 24), loc="left", fontsize=8)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
            axes.tick_params(labelsize=7)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        grid[0].legend(fontsize=7)
        figure.supxlabel("rank", fontsize=9)
        figure.supylabel("singular value", fontsize=9)

    return _drawn(draw, width=9.5, height=0.5 + 1.35 * rows, label="Singular values of weights before and after")


def short(name: str, limit: int = 34) -> str:
    """A layer's name in at most ``limit`` characters: where it is longer, an ellipsis replaces its middle."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) * 2 // 3
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"


def _thinned(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Ranks (from 1) and values of at most ``_POINTS`` evenly spaced points, first and last among them."""
    if len(values) <= _POINTS:
        places = list(range(len(values)))
    else:
        places = [round(place) for place in np.linspace(0, len(values) - 1, _POINTS)]
    return [place + 1 for place in places], [values[place] for place in places]


def _logarithmic(axes: Any, direction: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers: matplotlib's own labels are mathtext, which ``_STYLE`` leaves unparsed."""
    axes.set(**{f"{direction}scale": "log"})
    axis = axes.xaxis if direction == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _row_of(figure: Figure, count: int) -> list[Any]:
    return list(figure.subplots(1, count, squeeze=False)[0])
