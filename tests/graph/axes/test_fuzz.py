"""Random networks, random cuts: whatever the engine says may be cut leaves the silenced network's outputs as they are.

``PRUNECLI_FUZZ`` sets the number of networks of the slow test.
"""

from __future__ import annotations

import logging
import os
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunecli.graph.axes.collect import TABLE
from prunecli.graph.axes.rules.registry import SPATIAL
from prunecli.graph.axes.trace import INPUT as OF_INPUT
from prunecli.graph.axes.trace import OUTPUT as OF_OUTPUT
from prunecli.graph.build import build_graph
from prunecli.values.groups import Graph
from toys.blocks import BLOCKS, INPUT, Block, Parallel, Stack
from toys.cuts import allowed, error_of
from toys.vocabulary import VOCABULARY

NETWORKS = int(os.environ.get("PRUNECLI_FUZZ", "300"))
TOLERANCE = 1e-9
NO_CHANNELS = {OF_INPUT, OF_OUTPUT, SPATIAL, TABLE}

block = st.tuples(st.sampled_from(BLOCKS + VOCABULARY), st.integers(2, 7))
layer = st.one_of(
    block.map(lambda made: (made, None, "")),
    st.tuples(block, block, st.sampled_from(("cat", "add", "mul"))),
)
Made = tuple[Block, int]


@dataclass
class Tally:
    """What all networks of a run came to; axes of images, classes, tokens and positions are no channels."""

    networks: int = 0
    blind: int = 0
    channels: int = 0
    prunable: int = 0
    worst: float = 0.0

    def count(self, graph: Graph, error: float, *, blind: bool) -> None:
        frozen = sum(axis.width for axis in graph.frozen if axis.reason not in NO_CHANNELS)
        prunable = sum(group.width for group in graph.groups)
        self.networks += 1
        self.blind += blind
        self.channels += prunable + frozen
        self.prunable += prunable
        self.worst = max(self.worst, 0.0 if blind else error)


def built(layers: list[tuple[Made, Made | None, str]]) -> Stack:
    """The network of a drawn description."""
    blocks, widths = [], []
    for (first, width), other, join in layers:
        blocks.append(first if other is None else Parallel.of(first, *other, join))
        widths.append(width)
    return Stack(blocks, widths)


def after_random_cuts(networks: int) -> Tally:
    """Cut that many random networks at random; every cut must leave what the silenced network computes."""
    tally = Tally()

    @given(layers=st.lists(layer, min_size=1, max_size=3), share=st.floats(0.1, 1.0), seed=st.integers(0, 2**16))
    @settings(max_examples=networks, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    def cut_one(layers: list[tuple[Made, Made | None, str]], share: float, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        model = built(layers)
        graph = build_graph(model, INPUT)
        assert not graph.unknown_ops
        names = [group.name for group in graph.groups]
        rng.shuffle(names)
        widths = allowed(graph, names[: max(1, round(share * len(names)))], rng)
        kept, outcome = error_of(model, graph, widths, INPUT, rng)
        blind = "sees nothing" in outcome.reason  # a dead ReLU net cannot tell right from wrong
        tally.count(graph, outcome.relative_error, blind=blind)
        assert blind or outcome.relative_error <= TOLERANCE, (kept, outcome)

    cut_one()
    logging.getLogger(__name__).info("%s", tally)
    return tally


def test_random_cuts_of_a_few_random_networks_are_exact() -> None:
    tally = after_random_cuts(30)
    assert tally.blind <= 0.05 * tally.networks


@pytest.mark.slow
def test_random_cuts_of_random_networks_are_exact_and_most_channels_may_be_cut() -> None:
    tally = after_random_cuts(NETWORKS)
    # An engine that freezes all is never wrong either. A fifth of the blocks are traps, or hold a count of their own.
    assert tally.prunable >= 0.75 * tally.channels
    assert tally.blind <= 0.05 * tally.networks
