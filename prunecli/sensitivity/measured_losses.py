"""The loss of every width of a unit: what its readers lose, levelled by what a few real cuts of it do to the net.

For a unit alone, cut to k channels and its readers solved again, ``loss(k)`` is the error of the readers' outputs,
relative to the sums that they flow into (`refit_losses`). That curve costs one Cholesky factor for all widths, but it
is blind to depth and to the statistics of norms. So the unit is really cut to about three quarters, a half and a
quarter, and the KL divergence of the net's answers from the dense net's is measured on held-out images: ``log KL`` is
interpolated along ``log loss``, proportional to it outside, and

    ``D(k) = sqrt(loss(k) KL(k))``.

Neither alone does as well: the KL of one unit misleads about widths at which it was not measured, the loss about depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from prunecli.measure.calibration import Calibration
from prunecli.measure.divergence import as_log_probabilities, divergences
from prunecli.measure.layer_inputs import InputStatistics
from prunecli.measure.replay import Replay
from prunecli.models.source import Source
from prunecli.planning.cut_units import Unit
from prunecli.planning.losses import Curve
from prunecli.planning.make import plan_of
from prunecli.planning.reader_views import views_of
from prunecli.planning.selection import refit_losses
from prunecli.recovery.least_squares import reconstruct_
from prunecli.surgery.cut import cut
from prunecli.values.groups import AttributeConflictError, Graph

_SHARES: Final = (0.75, 0.5, 0.25)  # of a unit's channels that stay where its KL is measured
_PASS: Final = 32  # images in one forward pass
_LEAST: Final = 1e-9  # loss or KL below which two nets count as equal


class CurveStore(Protocol):
    """A place where curves outlive the process."""

    def curve(self, unit: Unit) -> Curve | None:
        """The curve of a unit; ``None`` where it is not known."""

    def keep_curve(self, unit: Unit, curve: Curve) -> None:
        """Keep the curve of a unit."""


@dataclass(kw_only=True)
class MeasuredLosses:
    """The curves of a net's units; each is made on its first call and kept.

    Attributes:
        source: the dense model.
        graph: its coupled groups.
        scores: importance ``[width]`` by group name; also the curve of a group that nothing linear reads.
        calibration: images for statistics and, held out, for KL.
        ridge: of the least squares behind each cut.
        store: curves of an earlier time; ``None`` where none are kept.
        notify: called with the event of each curve that was measured.
    """

    source: Source
    graph: Graph
    scores: Mapping[str, Tensor]
    calibration: Calibration
    ridge: float
    store: CurveStore | None = None
    notify: Callable[[dict[str, Any]], None] = lambda _: None
    _curves: dict[tuple[object, ...], Curve] = field(default_factory=dict)

    @cached_property
    def _replay(self) -> Replay:
        return Replay(self.source.model, self.calibration.held_out.split(_PASS))

    @cached_property
    def _dense(self) -> Tensor:
        return as_log_probabilities(self._replay.logits(self.source.model))

    def __call__(self, unit: Unit) -> Curve:
        """The curve of a unit."""
        key = tuple(unit.order.items()), unit.allowed
        if key not in self._curves:
            self._curves[key] = self._known(unit) or self._found(unit)
        return self._curves[key]

    def _known(self, unit: Unit) -> Curve | None:
        return self.store.curve(unit) if self.store else None

    def _found(self, unit: Unit) -> Curve:
        curve = self._curve(unit)
        if self.store:
            self.store.keep_curve(unit, curve)
        self.notify({"event": "curve", "name": next(iter(unit.order)), "kl": dict(curve.measured)})
        return curve

    @cached_property
    def _statistics(self) -> InputStatistics:
        return self.calibration.statistics(self.source.model, self.graph.groups)

    def _curve(self, unit: Unit) -> Curve:
        losses = self._losses(unit)
        nearest = {min(unit.allowed[1:], key=lambda k: abs(k / unit.width - share)) for share in _SHARES}
        measured = {kept: kl for kept in sorted(nearest, reverse=True) if (kl := self._kl(unit, kept)) is not None}
        if not measured:
            return Curve(losses=losses)
        kls = interpolated(losses, measured)
        return Curve(losses=combined(losses, kls), measured=measured, divergences=kls)

    def _losses(self, unit: Unit) -> dict[int, float]:
        """The refit loss by kept width, summed over the groups of the unit."""
        total = torch.zeros(unit.width + 1, dtype=torch.float64)
        for name, order in unit.order.items():
            group = self.graph.group(name)
            views = views_of(self.source.model, self._statistics, group)
            curve = refit_losses(views, order) if views else self._removed_share(name, order)
            total += curve[torch.arange(unit.width + 1) * group.width // unit.width]
        return {kept: float(total[unit.width - kept]) for kept in unit.allowed}

    def _removed_share(self, name: str, order: Sequence[int]) -> Tensor:
        """For a group that nothing linear reads: the share of its squared scores that leaves ``[width + 1]``."""
        squares = self.scores[name].double()[list(order)].square()
        share = torch.cat([torch.zeros(1).double(), squares.cumsum(0) / squares.sum().clamp(min=1e-30)])
        shares = self._statistics.shares
        return share * max((shares[path] for path in self.graph.group(name).layers("out") if path in shares), default=1)

    def _kl(self, unit: Unit, kept: int) -> float | None:
        """KL divergence, in nats, of cutting this unit alone; ``None`` where the attributes cannot express that."""
        keep = {name: sorted(unit.order[name][-own:]) for name, own in unit.widths(kept).items()}
        try:
            plan = plan_of(self.source, self.graph, keep)
        except AttributeConflictError:
            return None
        pruned = cut(self.source.model, plan)
        reconstruct_(pruned, self.source.model, plan, self._statistics, ridge=self.ridge)
        return float(divergences(self._dense, as_log_probabilities(self._replay.logits(pruned))).mean())


def interpolated(losses: Mapping[int, float], measured: Mapping[int, float]) -> dict[int, float]:
    """KL divergence by kept width: log KL is piecewise linear in log loss between the measured widths; 0 at the full.

    Args:
        losses: refit loss by kept width, with the full width.
        measured: KL divergence by kept width, in nats, at least one.
    """
    x: list[float] = []
    y: list[float] = []
    for kept in sorted(measured, reverse=True):
        loss, kl = (math.log(max(value, _LEAST)) for value in (losses[kept], measured[kept]))
        x.append(max(loss, x[-1] + 1e-9) if x else loss)
        y.append(max(kl, y[-1]) if y else kl)  # noise of a light cut must not make a smaller width look better

    def kl_at(loss: float) -> float:
        at = math.log(max(loss, _LEAST))
        return math.exp(float(np.interp(at, x, y)) + min(at - x[0], 0.0) + max(at - x[-1], 0.0))

    full = max(losses)
    return {kept: 0.0 if kept == full else kl_at(loss) for kept, loss in losses.items()}


def combined(losses: Mapping[int, float], kls: Mapping[int, float]) -> dict[int, float]:
    """``sqrt(loss KL)`` by kept width, made to rise as the width falls."""
    found, largest = {}, 0.0
    for kept in sorted(losses, reverse=True):
        largest = found[kept] = max(largest, math.sqrt(losses[kept] * kls[kept]))
    return found
