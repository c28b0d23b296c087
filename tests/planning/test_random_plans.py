"""Plans under random rankings: whatever is chosen, the attributes follow, the cut is exact and no group is left out.

``PRUNECLI_FUZZ`` sets the number of small nets of the slow test times ten, as it does for random cuts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from prunecli.errors import NothingPrunedError, TargetError
from prunecli.graph.build import build_graph
from prunecli.measure.cost import measure
from prunecli.planning.budget import Choice, choose
from prunecli.planning.search import TOLERANCE
from prunecli.proof.equivalence import equivalence_error
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.surgery.cut import cut_
from prunecli.values.groups import AttributeConflictError, AttributeEdit, Graph
from prunecli.values.plan import PlannedGroup
from toys.blocks import (
    INPUT,
    Attention,
    ChunkMix,
    ConvNormAct,
    GroupedBottleneck,
    HalfAttribute,
    HeadWindows,
    HeldWidthAttention,
    Narrower,
    Residual,
    RotaryAttention,
    SharedAttention,
    Shuffle,
    Split,
    Stack,
    StreamAttention,
    TwiceAttribute,
    TwoCounts,
)

BLOCKS = (
    *(ChunkMix, HalfAttribute, TwiceAttribute, Narrower, Split, Shuffle, GroupedBottleneck, ConvNormAct, Residual),
    *(Attention, RotaryAttention, StreamAttention, SharedAttention, HeldWidthAttention, HeadWindows, TwoCounts),
)
NETWORKS = int(os.environ.get("PRUNECLI_FUZZ", "300")) // 10
TARGETS = ("ratio=0.2", "ratio=0.5", "ratio=0.8", "macs=50%", "macs=70%", "params=40%", "size=60%")

#: Architectures with each kind of tie, smallest first, and an image size they take.
MODELS = {
    "test_vit_relpos": 160,  # stream = heads * head width, 3 heads
    "edgenext_xx_small": 64,  # stream // heads, of a stream in two chunks
    "cs3darknet_focus_s": 64,  # an attribute halved
    "xcit_nano_12_p8_224": 224,  # stream // heads with a head width that stays
    "pvt_v2_b0": 64,  # and a reduced stream of the same width
    "coat_lite_tiny": 224,  # heads in blocks
    "res2next50": 64,  # one attribute sizes products of several factors
    "nextvit_small": 64,  # two products of the same size
}


def strict(graph: Graph) -> Graph:
    """The same graph; a cut that its attributes cannot express is a failed test, not a group left whole."""

    def solve(kept: Mapping[str, int]) -> tuple[AttributeEdit, ...]:
        try:
            return graph.solve(kept)
        except AttributeConflictError as conflict:
            raise AssertionError(conflict) from conflict

    return replace(graph, solve=solve)


def random_choice(model: nn.Module, graph: Graph, size: tuple[int, int, int], target: str, seed: int, **more) -> Choice:
    generator = torch.Generator().manual_seed(seed)
    return choose(
        graph,
        {group.name: torch.rand(group.width, generator=generator) for group in graph.groups},
        Target.parse(target),
        PruneSettings(criterion="random", **more),
        parameters=[name for name, _ in model.named_parameters()],
        stored=list(model.state_dict()),
        base=measure(model, size),
    )


def planned(graph: Graph, choice: Choice) -> tuple[PlannedGroup, ...]:
    return tuple(
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            width=group.width,
            keep=choice.keep.get(group.name, tuple(range(group.width))),
            members=group.members,
            norms=group.norms,
        )
        for group in graph.groups
    )


def assert_right(model: nn.Module, graph: Graph, choice: Choice, size: tuple[int, int, int]) -> None:
    """The cut net equals the silenced one and costs what was predicted. ``model`` is cut."""
    kept = {name: len(channels) for name, channels in choice.keep.items()}
    groups, edits = planned(graph, choice), graph.solve(kept)
    outcome = equivalence_error(model, groups=groups, attributes=edits, folds=graph.folds, input_size=size, seed=0)
    if "sees nothing" not in outcome.reason:  # a dead ReLU net cannot tell right from wrong
        assert outcome.relative_error <= 1e-9, (kept, outcome)
    cut_(model, groups=groups, attributes=edits, folds=[fold for fold in graph.folds if fold.group in kept])
    assert measure(model, size) == choice.cost


def assert_none_left_out(graph: Graph, choice: Choice) -> None:
    """Every group is cut, or another factor of its product is, or another alternative of its tie."""
    assert not [note for note in choice.notes if "stay" in note or "keeps all" in note]
    for group in graph.groups:
        others = {other for pair in graph.exclusive if group.name in pair for other in pair}
        for tie in graph.ties:
            for alternatives in tie.choices:
                if len(alternatives) > 1 and any(group.name in bundle.groups for bundle in alternatives):
                    others.update(name for bundle in alternatives for name in bundle.groups)
        assert group.name in choice.keep or not others.isdisjoint(choice.keep), group.name


@cache
def small_graph(blocks: tuple[type[nn.Module], ...]) -> Graph:
    return strict(build_graph(small_net(blocks), INPUT))


def small_net(blocks: tuple[type[nn.Module], ...]) -> Stack:
    return Stack(blocks, [4] * len(blocks))


@pytest.mark.parametrize("networks", [8, pytest.param(NETWORKS, marks=pytest.mark.slow)])
def test_random_plans_of_small_nets(networks: int) -> None:
    @given(
        blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=2).map(tuple),
        target=st.sampled_from(TARGETS),
        ranking=st.sampled_from(["local", "global", "isomorphic"]),
        round_to=st.sampled_from([1, 2, 3, 8]),
        attention=st.sampled_from(["heads", "head_dim"]),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=networks, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    def plan_one(
        blocks: tuple[type[nn.Module], ...], target: str, ranking: str, round_to: int, attention: str, seed: int
    ) -> None:
        torch.manual_seed(seed)
        model, graph = small_net(blocks).eval(), small_graph(blocks)
        options = {"ranking": ranking, "round_to": round_to, "attention": attention}
        try:
            choice = random_choice(model, graph, INPUT, target, seed, **options)
        except (NothingPrunedError, TargetError):  # steps of a small net may be too coarse
            assert not target.startswith("ratio")
            return
        if target == "ratio=0.5" and ranking == "local":
            assert_none_left_out(graph, choice)
        assert_right(model, graph, choice, INPUT)

    plan_one()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_plans_of_architectures_with_ties_meet_their_target(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    size = (3, MODELS[name], MODELS[name])
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    graph = strict(build_graph(model, size))
    assert graph.ties
    half = random_choice(model, graph, size, "ratio=0.5", 0, round_to=1)
    assert_none_left_out(graph, half)
    for seed, ranking in enumerate(("global", "isomorphic", "local")):
        choice = random_choice(model, graph, size, "macs=50%", seed, ranking=ranking, round_to=(1, 1, 8)[seed])
        assert choice.reached == pytest.approx(choice.asked, rel=1.02 * TOLERANCE)
        assert not [note for note in choice.notes if "stay" in note or "keeps all" in note]
    assert_right(model, graph, choice, size)
