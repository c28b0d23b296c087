"""Loss curves of units: levels from real cuts, interpolated, and what nothing linear reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.measure.calibration import Calibration
from prunecli.measure.divergence import as_log_probabilities, divergences, log_probabilities
from prunecli.models.source import Source
from prunecli.planning.cut_units import find_units
from prunecli.planning.make import plan_of
from prunecli.planning.score import score_model
from prunecli.recipe.settings import PruneSettings
from prunecli.recovery.least_squares import reconstruct_
from prunecli.sensitivity.measured_losses import MeasuredLosses, combined, interpolated
from prunecli.surgery.cut import cut
from toys.half_plans import random
from toys.sources import source_of
from toys.user_nets import Residual

SIZE = (1, 8, 8)


class Photographs:
    """As many images as are asked for."""

    size = 96
    description = "noise"

    def unlabelled(self, count: int, start: int = 0) -> Tensor:
        return random(self.size, *SIZE)[start : start + count]


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(Photographs(), images=64, held_out=16, judged=0, device=torch.device("cpu"))


def test_statistics_are_taken_once_and_never_from_held_out_images(calibration):
    torch.manual_seed(0)
    model = Residual().eval()
    groups = build_graph(model, SIZE).groups
    first = calibration.statistics(model, groups)
    assert calibration.statistics(model, groups[:1]) is first
    assert first.images == 64
    everything = random(96, *SIZE)
    assert torch.equal(calibration.held_out, everything[:16])
    assert torch.equal(torch.cat(calibration.batches), everything[16:80])
    with torch.no_grad():
        model.head.weight[0] += 1
    assert calibration.statistics(model, groups) is not first


def losses_of(source: Source, calibration: Calibration) -> tuple[MeasuredLosses, list]:
    graph = build_graph(source.model, SIZE)
    statistics = calibration.statistics(source.model, graph.groups)
    scores = score_model(source.model, graph.groups, criterion="forward", seed=0, statistics=statistics).channels
    settings = PruneSettings(criterion="forward", ranking="loss", round_to=1)
    units, _ = find_units(graph, scores, settings, {})
    return MeasuredLosses(source=source, graph=graph, scores=scores, calibration=calibration, ridge=1e-3), units


def test_the_level_of_a_curve_is_the_kl_of_really_cutting_that_unit_alone(calibration):
    torch.manual_seed(0)
    source = source_of(Residual().eval(), SIZE)
    losses, units = losses_of(source, calibration)
    for unit in units:
        curve = losses(unit)
        assert losses(unit) is curve
        assert set(curve.losses) == set(unit.allowed)
        kept = min(curve.measured)
        plan = plan_of(source, losses.graph, {n: sorted(unit.order[n][-own:]) for n, own in unit.widths(kept).items()})
        pruned = cut(source.model, plan)
        statistics = calibration.statistics(source.model, losses.graph.groups)
        reconstruct_(pruned, source.model, plan, statistics, ridge=1e-3)
        dense, now = (log_probabilities(net, calibration.held_out) for net in (source.model, pruned))
        assert curve.measured[kept] == pytest.approx(float(divergences(dense, now).mean()), rel=1e-4)


def test_kl_is_interpolated_along_the_loss_and_never_falls_with_the_width():
    losses = {8: 0.0, 6: 0.01, 4: 0.04, 2: 0.16, 1: 0.32}
    kls = interpolated(losses, {6: 0.1, 2: 1.6})
    assert kls == pytest.approx({8: 0, 6: 0.1, 4: 0.4, 2: 1.6, 1: 3.2})  # in logarithms; proportional outside
    assert combined(losses, kls) == pytest.approx({kept: math.sqrt(losses[kept] * kls[kept]) for kept in losses})
    noisy = combined(losses, interpolated(losses, {6: 0.5, 4: 0.4, 2: 1.6}))
    assert sorted(noisy.values()) == [noisy[kept] for kept in (8, 6, 4, 2, 1)]


def test_answers_that_are_not_finite_are_far_away():
    dense = as_log_probabilities(torch.zeros(2, 3))
    broken = as_log_probabilities(torch.tensor([[math.nan, 0, 0], [0.0, 0, 0]]))
    assert divergences(dense, broken).tolist() == [1e4, 0]


class Quiet(nn.Module):
    """Attention whose queries and keys nothing linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        return self.head((weights @ self.v(x)).mean(1))


def test_what_nothing_linear_reads_loses_the_share_of_its_squared_scores(calibration):
    torch.manual_seed(0)
    source = source_of(Quiet().eval(), SIZE)
    losses, units = losses_of(source, calibration)
    unit = next(unit for unit in units if "q:head_dim" in unit.order)
    curve = losses(unit)
    (name, *_) = unit.order
    squares = losses.scores[name].square()
    order = unit.order[name]
    assert curve.measured
    raw = losses._losses(unit)
    assert raw[unit.width - 2] == pytest.approx(float(squares[list(order[:2])].sum() / squares.sum()))
