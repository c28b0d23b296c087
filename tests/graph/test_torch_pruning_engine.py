from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunecli.models.paper_nets  # noqa: F401 (registers cifar_resnet20)
from prunecli.errors import UnsupportedError
from prunecli.graph.build import build_graph
from prunecli.graph.torch_pruning_engine import _fit, build
from prunecli.measure.cost import measure
from prunecli.models.tensors import named_tensors
from prunecli.proof.equivalence import equivalence_error
from prunecli.surgery.cut import cut_
from prunecli.values.groups import Graph, Group, IndexMap
from prunecli.values.plan import PlannedGroup


class Branches(nn.Module):
    """Depthwise, grouped and plain convolutions, a concatenation, a GroupNorm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 12
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.norm = nn.GroupNorm(1, 12)
        self.side = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dw(self.bn(self.stem(x)).relu())
        x = torch.cat([self.norm(self.grouped(x)), self.side(x)], 1)
        return self.fc(x.mean((2, 3)))


def halved(graph: Graph, *, of: str = "*") -> list[PlannedGroup]:
    """Every second channel of every group that has more than one."""
    return [
        PlannedGroup(
            name=g.name,
            kind=g.kind,
            width=g.width,
            keep=tuple(range(0, g.width, 2)) if of in ("*", g.name) else tuple(range(g.width)),
            members=g.members,
            norms=g.norms,
        )
        for g in graph.groups
    ]


def proof(model: nn.Module, graph: Graph, size: tuple[int, int, int]):
    groups = halved(graph)
    attributes = graph.solve({g.name: len(g.keep) for g in groups})
    return equivalence_error(model, groups=groups, attributes=attributes, folds=graph.folds, input_size=size, seed=0)


def test_the_groups_of_a_small_net_by_hand():
    graph = build(Branches(), (3, 9, 9))
    assert graph.engine == "torch_pruning"
    assert [(g.name, g.width) for g in graph.groups] == [("stem", 4), ("grouped", 6), ("side", 4)]
    stem, grouped, side = graph.groups
    places = {(m.tensor, m.dim): (m.role, m.index) for m in stem.members}
    both_halves = IndexMap(loops=((2, 4),))  # a grouped convolution loses the same inputs from both of its groups
    assert places[("stem.weight", 0)] == ("out", both_halves)
    assert places[("bn.running_var", 0)] == ("elementwise", both_halves)
    assert places[("dw.weight", 0)] == ("out", both_halves)
    assert places[("grouped.weight", 1)] == ("in", IndexMap())
    assert places[("side.weight", 1)] == ("in", both_halves)
    assert grouped.norms == ("norm",)
    assert {(m.tensor, m.dim): m.index for m in side.members}[("fc.weight", 1)] == IndexMap(offset=12)
    assert [(f.name, f.width) for f in graph.frozen] == [("fc", 5)]
    assert "output" in graph.frozen[0].reason


def test_sizes_costs_and_attributes_follow_the_kept_widths():
    model = Branches()
    graph = build(model, (3, 9, 9))
    base = measure(model, (3, 9, 9))
    parameters = [name for name, _ in model.named_parameters()]
    assert graph.macs({}) == base.macs
    assert graph.numel({}, parameters) == base.params
    groups = halved(graph)
    kept = {g.name: len(g.keep) for g in groups}
    edits = {(e.module, e.name): (e.before, e.after) for e in graph.solve(kept)}
    assert edits == {("dw", "groups"): (8, 4), ("norm", "num_channels"): (12, 6)}
    cut_(model, groups=groups, attributes=graph.solve(kept), folds=[])
    after = measure(model, (3, 9, 9))
    assert graph.macs(kept) == after.macs
    assert graph.numel(kept, parameters) == after.params
    assert graph.solve({}) == ()


def test_the_cut_passes_the_independent_check():
    model = Branches()
    result = proof(model, build(model, (3, 9, 9)), (3, 9, 9))
    assert result.relative_error < 1e-9
    assert result.norms == ("norm",)


def test_the_model_is_left_alone():
    model = timm.create_model("vit_tiny_patch16_224", depth=1).train()
    model.head.weight.requires_grad = False
    before = named_tensors(model)
    build(model, (3, 224, 224))
    after = named_tensors(model)
    assert model.training
    assert model.blocks[0].attn.fused_attn
    assert all(after[name] is tensor for name, tensor in before.items())
    assert not model.head.weight.requires_grad
    assert not model.head._forward_hooks


def test_attention_stays_and_the_rest_of_a_vit_is_cut_with_num_features():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=7)
    graph = build(model, (3, 224, 224))
    assert [g.width for g in graph.groups] == [192, 768, 768]
    reasons = {f.name: f.reason for f in graph.frozen}
    assert "heads" in reasons["blocks.1.attn.qkv"]
    edits = {(e.module, e.name): e.after for e in graph.solve({graph.groups[0].name: 96})}
    assert edits[("", "num_features")] == 96
    assert edits[("blocks.0.norm1", "normalized_shape")] == (96,)
    assert proof(model, graph, (3, 224, 224)).relative_error < 1e-9


def test_a_model_that_cannot_be_traced_is_refused_with_a_way_out():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x[:, : int(x.sum())])

    with pytest.raises(UnsupportedError, match="cannot trace Broken") as caught:
        build(Broken(), (1, 2, 2))
    assert "graph=axes" in str(caught.value)


def test_a_coupling_that_torch_pruning_gets_wrong_is_caught_by_the_check():
    # it takes the zero-padded shortcut of these nets for a plain addition
    model = timm.create_model("cifar_resnet20").eval()
    assert proof(model, build(model, (3, 32, 32)), (3, 32, 32)).relative_error == math.inf


# ---------------------------------------------------------------------------------------------- index maps


@given(
    width=st.integers(2, 5),
    outer=st.integers(1, 3),
    inner=st.integers(1, 4),
    offset=st.integers(0, 7),
)
def test_a_product_dimension_is_fitted_whatever_its_factors(width, outer, inner, offset):
    """Channel j of [outer, width, inner] behind ``offset`` other positions."""
    positions = [
        [offset + (o * width + j) * inner + i for o in range(outer) for i in range(inner)] for j in range(width)
    ]
    index = _fit(positions)
    assert index is not None
    assert [sorted(index.positions([j])) for j in range(width)] == positions
    assert index.repeats == outer * inner


@pytest.mark.parametrize("positions", [[[0], [1, 2]], [[0], []], [[0, 1, 3], [4, 5, 7]], [[0], [1], [3]]])
def test_irregular_positions_have_no_index_map(positions):
    assert _fit(positions) is None


# ---------------------------------------------------------------------------------------------- against the axes engine


def channels(group: Group) -> frozenset[frozenset[tuple[str, int, int]]]:
    """A group as what it does: per channel the (tensor, dimension, position) triples that leave with it."""
    return frozenset(
        frozenset((m.tensor, m.dim, position) for m in group.members for position in m.index.positions([j]))
        for j in range(group.width)
    )


def _compare(name: str) -> tuple[list[Group], list[Group], int]:
    model = timm.create_model(name)
    axes = {channels(g): g for g in build_graph(model, (3, 224, 224)).groups}
    other = {channels(g): g for g in build_graph(model, (3, 224, 224), engine="torch_pruning").groups}
    only_axes = [g for key, g in axes.items() if key not in other]
    only_other = [g for key, g in other.items() if key not in axes]
    return only_axes, only_other, len(axes.keys() & other.keys())


@pytest.mark.parametrize(
    ("name", "common"),
    [
        ("resnet18", 12),
        ("mobilenetv3_small_100", 27),
        ("convnext_atto", 16),
        pytest.param("vgg11_bn", 10, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 40, marks=pytest.mark.slow),
        pytest.param("densenet121", 120, marks=pytest.mark.slow),
    ],
)
def test_both_engines_find_the_same_coupled_groups(name, common):
    assert _compare(name) == ([], [], common)


def test_only_the_axes_engine_can_also_drop_whole_groups_of_a_grouped_convolution():
    """RegNet's grouped 3x3: 13 blocks. Both engines narrow every group alike; axes has the number of groups besides."""
    only_axes, only_other, common = _compare("regnety_002")
    assert only_other == []
    assert common == 44
    assert len(only_axes) == 13
    for group in only_axes:
        (width,) = {m.index.repeats for m in group.members}
        assert width == 8  # regnety_002's group width: one channel of these axes is a whole convolution group
        assert any(m.tensor.endswith("conv2.conv.weight") and m.dim == 0 for m in group.members)
