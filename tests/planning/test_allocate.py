"""Ranking loss: against every choice of widths in small nets, for every kind of target, and the vectorised meter."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import timm
import torch

from prunecli.errors import TargetError, UsageError
from prunecli.graph.build import build_graph
from prunecli.measure.cost import measure
from prunecli.planning.allocate import allocate
from prunecli.planning.budget import choose
from prunecli.planning.cut_units import Unit, find_units
from prunecli.planning.losses import Curve
from prunecli.planning.prices import Prices
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.values.groups import Bundle, Graph, Tie
from toys.chains import chain, costs, rising

SETTINGS = PruneSettings(criterion="forward", ranking="loss", round_to=1)


def random_curve(unit: Unit, seed: int) -> Curve:
    """A rising curve with dents, as measured ones have."""
    steps = torch.rand(len(unit.allowed) - 1, generator=torch.Generator().manual_seed(seed)).double().pow(3)
    values = [0.0, *steps.cumsum(0).tolist()]
    return Curve(losses=dict(zip(unit.allowed, values, strict=True)), measured={unit.allowed[-1]: values[-1]})


class Losses:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, unit: Unit) -> Curve:
        return random_curve(unit, self.seed * 97 + unit.width)


def prices_of(graph: Graph) -> Prices:
    names = list(graph.tensors)
    return Prices(graph=graph, parameters=names, stored=names, base=costs(graph, {}), bytes_per_element=4)


def units_of(graph: Graph) -> list[Unit]:
    return find_units(graph, rising(graph), SETTINGS, {})[0]


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_no_choice_of_widths_is_better_by_more_than_a_step(seed, share):
    """Chains of five layers, where each width is in the price of two layers: all choices are tried."""
    graph = chain([5, 7, 4, 6, 5])
    units = units_of(graph)
    curves = [random_curve(unit, 31 * seed + at) for at, unit in enumerate(units)]
    goal = share * costs(graph, {}).macs
    meter = prices_of(graph).meter("macs")
    found = allocate(units, curves, meter, goal)
    assert meter.total == graph.macs({next(iter(u.order)): kept for u, kept in zip(units, found, strict=True)}) <= goal

    def loss(kept) -> float:
        return math.fsum(curve.losses[width] for curve, width in zip(curves, kept, strict=True))

    names = [next(iter(unit.order)) for unit in units]
    best = min(
        loss(kept)
        for kept in itertools.product(*(unit.allowed for unit in units))
        if graph.macs(dict(zip(names, kept, strict=True))) <= goal
    )
    assert loss(found) <= 1.01 * best + 1e-12


@pytest.mark.parametrize("target", ["macs=50%", "params=50%", "size=50%", "speedup=2", "ratio=0.4"])
def test_every_target_is_met_and_the_choice_says_why(target):
    graph = chain([32, 48, 64])
    losses = Losses(3)
    choice = choose(
        graph, rising(graph), Target.parse(target), SETTINGS, parameters=list(graph.tensors),
        stored=list(graph.tensors), base=costs(graph, {}), losses=losses,
    )  # fmt: skip
    assert choice.reached == pytest.approx(choice.asked, rel=0.011)
    assert [unit.groups for unit in choice.allocation] == [("conv0",), ("conv1",), ("conv2",)]
    for unit in choice.allocation:
        kept = choice.keep.get(unit.groups[0], range(unit.width))
        assert unit.kept == len(kept)
        assert unit.loss == unit.curve[unit.kept]
        assert unit.marginal is None or unit.marginal >= 0
        assert unit.kl == {1: max(unit.curve.values())}
    for name, kept in choice.keep.items():
        assert kept == tuple(range(graph.group(name).width - len(kept), graph.group(name).width)), "the best stay"


def test_a_looser_target_never_costs_more():
    graph = chain([16, 24, 32])
    units = units_of(graph)
    curves = [random_curve(unit, at) for at, unit in enumerate(units)]
    sums = []
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        kept = allocate(units, curves, prices_of(graph).meter("macs"), share * costs(graph, {}).macs)
        sums.append(math.fsum(curve.losses[width] for curve, width in zip(curves, kept, strict=True)))
    assert sums == sorted(sums, reverse=True)


def test_tied_groups_move_as_one_unit():
    tie = Tie(choices=((Bundle(groups=("conv0", "conv2"), parts=8),),))
    graph = chain([16, 12, 24], ties=(tie,))
    choice = choose(
        graph, rising(graph), Target.parse("macs=50%"), SETTINGS, parameters=list(graph.tensors),
        stored=list(graph.tensors), base=costs(graph, {}), losses=Losses(1),
    )  # fmt: skip
    left = {name: len(kept) for name, kept in choice.keep.items()}
    assert left.get("conv0", 16) * 24 == left.get("conv2", 24) * 16


def test_what_cannot_be_reached_is_refused_as_before_and_losses_are_needed():
    graph = chain([16, 24])
    rest = {"parameters": list(graph.tensors), "stored": list(graph.tensors), "base": costs(graph, {})}
    with pytest.raises(TargetError, match="can be reached"):
        choose(graph, rising(graph), Target.parse("macs=1"), SETTINGS, **rest, losses=Losses(0))
    with pytest.raises(UsageError, match="was not measured"):
        choose(graph, rising(graph), Target.parse("macs=50%"), SETTINGS, **rest)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "regnetx_002"])
def test_many_widths_at_once_cost_what_each_costs(name):
    model = timm.create_model(name, num_classes=7).eval()
    size = (3, 160, 160) if name == "test_vit" else (3, 64, 64)
    graph = build_graph(model, size)
    names = [parameter for parameter, _ in model.named_parameters()]
    prices = Prices(graph=graph, parameters=names, stored=names, base=measure(model, size), bytes_per_element=4)
    for metric in ("macs", "params"):
        meter = prices.meter(metric)
        first, *others = units_of(graph)
        meter.commit(first.widths(first.allowed[len(first.allowed) // 2]))
        for unit in others[:6]:
            several = np.array(unit.allowed[:: max(1, len(unit.allowed) // 5)])
            totals = meter.trials(unit.widths(several))
            assert totals.tolist() == [meter.trial(unit.widths(int(width))) for width in several]
