"""Kept widths → attributes: hand-computed edits, and conflicts that name who is to blame."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.values.groups import AttributeConflictError, Graph
from toys.blocks import (
    INPUT,
    Attention,
    Block,
    ChunkMix,
    GroupedBottleneck,
    PaddedShortcut,
    Partial,
    Shuffle,
    Split,
    Stack,
    ZerosBeside,
)


def graph_of(block: Block, width: int = 4) -> Graph:
    return build_graph(Stack([block], [width]), INPUT)


def edits(graph: Graph, kept: dict[str, int]) -> dict[str, tuple[object, object]]:
    return {f"{e.module}.{e.name}": (e.before, e.after) for e in graph.solve(kept)}


def test_nothing_cut_changes_nothing() -> None:
    assert graph_of(Attention).solve({}) == ()


def test_groups_and_channels_of_a_grouped_convolution() -> None:
    found = edits(graph_of(GroupedBottleneck), {"blocks.0.conv1": 2})
    assert found == {
        "blocks.0.conv1.out_channels": (8, 4),
        "blocks.0.conv2.in_channels": (8, 4),
        "blocks.0.conv2.out_channels": (12, 6),
        "blocks.0.conv2.groups": (4, 2),
        "blocks.0.conv3.in_channels": (12, 6),
    }


def test_heads() -> None:
    found = edits(graph_of(Attention), {"blocks.0.qkv:heads": 1})
    assert found == {
        "blocks.0.num_heads": (2, 1),
        "blocks.0.qkv.out_features": (24, 12),
        "blocks.0.proj.in_features": (8, 4),
    }


def test_head_width_and_the_scale_that_goes_with_it() -> None:
    found = edits(graph_of(Attention), {"blocks.0.qkv:head_dim": 1, "blocks.0.qkv:head_dim#2": 1})
    assert found["blocks.0.head_dim"] == (4, 1)
    assert found["blocks.0.scale"] == (0.5, 1.0)


def test_tuples_are_replaced_whole() -> None:
    assert edits(graph_of(PaddedShortcut), {"blocks.0.conv": 2})["blocks.0.pad"] == ((1, 4), (1, 2))
    assert edits(graph_of(Split), {"blocks.0.conv": 1})["blocks.0.sizes"] == ((4, 3), (1, 3))
    assert edits(graph_of(Attention), {"stem": 5})["blocks.0.norm.normalized_shape"] == ((6,), (5,))


def test_sizes_of_zeros_and_slices() -> None:
    assert edits(graph_of(ZerosBeside), {"blocks.0.conv": 3})["blocks.0.extra"] == (4, 3)
    assert edits(graph_of(Partial), {"stem": 1})["blocks.0.first"] == (3, 1)


def test_a_group_count_shared_by_a_view_and_a_shape() -> None:
    # c // groups sizes the view: 8 channels, 2 groups of 4; the last axis of a group halves.
    found = edits(graph_of(Shuffle), {"blocks.0.conv#3": 1})
    assert "blocks.0.groups" not in found
    assert found["blocks.0.conv.out_channels"] == (8, 4)


def test_equal_chunks_are_tied_and_unequal_ones_conflict() -> None:
    graph = graph_of(ChunkMix)
    with pytest.raises(AttributeConflictError) as conflict:
        graph.solve({"blocks.0.conv": 2, "stem": 3})
    assert set(conflict.value.groups) == {"blocks.0.conv"}
    assert edits(graph, {"blocks.0.conv": 2, "blocks.0.conv#2": 2})["blocks.0.conv.out_channels"] == (8, 4)


class SharedNumber(nn.Module):
    """One attribute sizes two pieces that are nothing else to each other."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.part = 4
        self.one, self.two = nn.Conv2d(chs, 8, 1), nn.Conv2d(chs, 8, 1)
        self.after = nn.Conv2d(8, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat([self.one(x)[:, : self.part], self.two(x)[:, self.part :]], 1))


def test_an_attribute_shared_by_two_axes_ties_them() -> None:
    (tie,) = graph_of(SharedNumber).ties
    assert tie.groups == ("blocks.0.one", "blocks.0.two")


class ComputedHeads(nn.Module):
    """Heads of width ``channels // num_heads``: only cuts that divide can be expressed."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.out_chs = nn.Conv2d(chs, 12, 1), 12

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x)
        b, c, h, w = x.shape
        y = x.reshape(b, self.num_heads, c // self.num_heads, h * w)
        return (y.transpose(1, 2).softmax(-1).transpose(1, 2)).reshape(b, c, h, w)


def test_an_expression_with_one_unknown_is_solved() -> None:
    graph = graph_of(ComputedHeads)
    assert edits(graph, {"blocks.0.q": 1})["blocks.0.num_heads"] == (2, 1)
    assert "blocks.0.num_heads" not in edits(graph, {"blocks.0.q#2": 4})


def test_a_comparison_that_would_come_out_differently_is_a_conflict() -> None:
    class Compared(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(chs, 6, 1), nn.Conv2d(chs, 6, 1)
            self.after, self.second = nn.Conv2d(6, width, 1), nn.Conv2d(6, width, 1)
            self.out_chs = width

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.conv(x), self.other(x)
            if a.shape[1] != b.shape[1]:
                return x
            return self.after(a) * self.second(b)

    graph = graph_of(Compared)
    (tie,) = graph.ties
    assert tie.groups == ("blocks.0.conv", "blocks.0.other")
    with pytest.raises(AttributeConflictError, match="would compare 3 and 6") as conflict:
        graph.solve({"blocks.0.conv": 3})
    assert conflict.value.groups == ("blocks.0.conv",)


def test_an_attribute_that_sizes_a_frozen_axis_holds_the_others() -> None:
    class Held(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.size = 8
            self.conv, self.after = nn.Conv2d(chs, 16, 1), nn.Conv2d(8, width, 1)
            self.out_chs = width

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)[:, : self.size]
            return self.after(y.reshape(y.shape[0], self.size, self.size, self.size))

    graph = graph_of(Held)
    frozen = [a for a in graph.frozen if a.name == "blocks.0.conv"]
    assert [a.width for a in frozen] == [8]
    assert "blocks.0.size" in frozen[0].reason
    assert "blocks.0.conv" in {g.name for g in graph.groups}  # the channels the slice leaves out
