"""Random networks, random cuts: whatever the engine says may be cut leaves the silenced network's outputs as they are.

``PRUNECLI_FUZZ`` sets the number of networks.
"""

from __future__ import annotations

import os
import random

import torch
from axes_cuts import allowed, error_of
from axes_nets import BLOCKS, INPUT, Stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunecli.graph import build_graph

NETWORKS = int(os.environ.get("PRUNECLI_FUZZ", "300"))


@given(
    layers=st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(2, 7)), min_size=1, max_size=3),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=NETWORKS, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_random_cuts_of_random_networks_are_exact(
    layers: list[tuple[type[torch.nn.Module], int]], share: float, seed: int
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Stack([block for block, _ in layers], [width for _, width in layers])
    graph = build_graph(model, INPUT)
    assert not graph.unknown_ops
    names = [group.name for group in graph.groups]
    rng.shuffle(names)
    kept, outcome = error_of(model, graph, allowed(graph, names[: max(1, round(share * len(names)))], rng), INPUT, rng)
    if "sees nothing" not in outcome.reason:  # a dead ReLU net cannot tell right from wrong
        assert outcome.relative_error <= 1e-9, (kept, outcome)
