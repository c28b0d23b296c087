"""One block per mechanism: the groups one works out by hand, and that each of them may be cut alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.values.groups import Graph, Group, IndexMap, Member
from toys.blocks import (
    BLOCKS,
    INPUT,
    Attention,
    AxialRotaryAttention,
    BatchNormedQueries,
    Block,
    BranchOnWidth,
    CachedBias,
    ChannelAttention,
    ChannelMean,
    ChannelSoftmax,
    ChunkMix,
    ClassAttention,
    ConstantKeyBias,
    Conv,
    ConvNormAct,
    Dense,
    EvoNormed,
    ExpandedKeys,
    ExplicitAttention,
    ExpProduct,
    Gated,
    GatedHeads,
    GroupedBottleneck,
    GroupedQueries,
    GroupNorm,
    Guarded,
    InPlaceView,
    Inverted,
    LatentQueries,
    LinearAttention,
    LiteralPad,
    LiteralView,
    MixedTokens,
    MultiQuery,
    NormedAndActivated,
    NormedAttention,
    Overlapping,
    PaddedShortcut,
    Partial,
    PixelShuffle,
    PooledQueries,
    QueryBias,
    RelativeBias,
    ReluSum,
    Residual,
    Rolled,
    RootScaledAttention,
    RotaryAttention,
    ScaledByWidth,
    SeparateAttention,
    Shuffle,
    SigmoidSum,
    SingleHead,
    Split,
    Stack,
    TalkingHeads,
    TokenMixer,
    Transposed,
    WeightStandardised,
    Windowed,
    ZeroKeyBias,
    ZerosBeside,
)
from toys.cuts import allowed, error_of


def graph_of(block: Block, width: int = 4) -> Graph:
    """The graph of a stem with 6 channels, the block, and a head."""
    return build_graph(Stack([block], [width]), INPUT)


def block_groups(graph: Graph) -> dict[str, int]:
    """Groups first produced in the block, and their widths; the stem's where the block splits it."""
    return {g.name.removeprefix("blocks.0").lstrip("."): g.width for g in graph.groups if g.name.startswith("blocks.0")}


GROUPS: list[tuple[Block, dict[str, int]]] = [
    (Conv, {"conv": 4}),
    (ConvNormAct, {"conv": 4}),
    # 8 and 12 channels in 4 groups: the groups leave together on both sides, 2 in and 3 out of each.
    (GroupedBottleneck, {"conv1": 4, "conv1#2": 2, "conv2": 3, "conv3": 4}),
    (Inverted, {"expand": 8, "reduce": 4}),
    (Residual, {"conv1": 4}),
    (Dense, {"conv": 4}),
    (PaddedShortcut, {"conv": 4}),
    (ZerosBeside, {"conv": 4}),
    (LiteralPad, {}),
    (ChunkMix, {"conv": 4, "conv#2": 4, "left": 4, "right": 3}),
    (Split, {"conv": 4, "conv#2": 3, "left": 5}),
    (Partial, {"conv": 3}),
    (Gated, {"conv": 4}),
    # 8 channels shuffled from [2 groups, 4] and read by 2 groups: 2 x 2 x 2, and the 4 of each group written.
    (Shuffle, {"conv": 2, "conv#2": 2, "conv#3": 2, "grouped": 4}),
    (PixelShuffle, {"conv": 4, "after": 4}),
    (Transposed, {"conv": 2, "conv#2": 3, "up": 2, "down": 4}),
    # 12 channels in 3 groups: whole groups leave, or as many of each.
    (GroupNorm, {"conv": 3, "conv#2": 4}),
    (NormedAndActivated, {"conv": 3, "conv#2": 4}),
    (EvoNormed, {"conv": 3, "conv#2": 4}),
    (Attention, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (ExplicitAttention, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    # Halves that are rotated into each other keep the same channels, so the values lose an even number.
    (RotaryAttention, {"qkv:heads": 2, "qkv:head_dim": 2, "qkv:head_dim#2": 4}),
    (AxialRotaryAttention, {"qkv:heads": 2, "qkv:head_dim": 2, "qkv:head_dim#2": 8}),
    (NormedAttention, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (ZeroKeyBias, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (ConstantKeyBias, {"qkv:heads": 2}),
    (PooledQueries, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (BatchNormedQueries, {"q.0:heads": 2, "q.0:head_dim": 4, "v:head_dim": 3, "proj": 4}),
    (SeparateAttention, {"q:heads": 2, "q:head_dim": 4, "v:head_dim": 3, "proj": 4}),
    (SingleHead, {"qkv:head_dim": 8, "qkv:head_dim#2": 8}),
    # A key and value head leaves with the queries that share it.
    (GroupedQueries, {"q:heads": 3, "q:head_dim": 4, "kv:head_dim": 4}),
    (ExpandedKeys, {"q:heads": 3, "q:head_dim": 4, "kv:head_dim": 4}),
    (MultiQuery, {"q:heads": 3, "q:head_dim": 4, "v:head_dim": 5, "proj": 4}),
    # The heads of the queries, those of the softmax, and those of the values.
    (
        TalkingHeads,
        {"qkv:heads": 3, "qkv:head_dim": 4, "before": 3, "qkv:heads#2": 3, "qkv:head_dim#2": 4},
    ),
    (ClassAttention, {"q:heads": 2, "q:head_dim": 4, "v:head_dim": 3}),
    (ChannelAttention, {"qkv:heads": 2}),
    (RelativeBias, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (CachedBias, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (GatedHeads, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    # The queries are learnt tokens: their width is an axis beside the stem's.
    (LatentQueries, {"": 6, "q:heads": 2, "q:head_dim": 4, "kv:head_dim": 4, "proj": 4}),
    (QueryBias, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (LinearAttention, {"qkv:heads": 2, "qkv:head_dim": 4, "qkv:head_dim#2": 4}),
    (TokenMixer, {"fc1": 10, "fc3": 12}),
    (ReluSum, {"conv": 5, "after": 4}),
    (WeightStandardised, {"conv": 4}),
    (Windowed, {"conv": 4}),
    (Overlapping, {"conv": 5, "after": 4}),
    (Guarded, {"after": 4}),
    (MixedTokens, {"first": 5, "after": 4}),
]

REFUSED: list[tuple[Block, int, str]] = [
    (LiteralPad, 2, "written as a number"),
    (LiteralView, 4, "written as a number"),
    (RootScaledAttention, 4, "enters a computation as a number"),
    (ScaledByWidth, 4, "enters a computation as a number"),
    (SigmoidSum, 5, "reduces over it"),
    (ChannelMean, 5, "takes a statistic over it"),
    (ExpProduct, 6, "silenced channels are not zero"),
    (ChannelSoftmax, 6, "takes a softmax over it"),
    (Rolled, 4, "depend on the position"),
    (BranchOnWidth, 8, "compared with a number"),
    (InPlaceView, 6, "overwritten in place"),
    (ConstantKeyBias, 4, "silenced channels are not zero"),
    (ChannelAttention, 4, "takes a softmax over it"),
    (ExpandedKeys, 2, "written as a number"),
    (GroupedQueries, 2, "broadcast to a length"),
    (RelativeBias, 15, "looks entries of it up"),
    (TokenMixer, 8, "spatial axis"),
]


@pytest.mark.parametrize(("block", "expected"), GROUPS)
def test_groups_of_a_block(block: Block, expected: dict[str, int]) -> None:
    assert block_groups(graph_of(block)) == expected


@pytest.mark.parametrize(("block", "width", "reason"), REFUSED)
def test_axes_that_must_stay_say_why(block: Block, width: int, reason: str) -> None:
    frozen = [(axis.width, axis.reason) for axis in graph_of(block).frozen]
    assert any(size == width and reason in text for size, text in frozen), frozen


@pytest.mark.parametrize("block", BLOCKS)
def test_every_group_may_be_cut_alone(block: Block) -> None:
    torch.manual_seed(1)
    model, rng = Stack([block], [4]), random.Random(1)
    graph = build_graph(model, INPUT)
    for group in graph.groups:
        kept, outcome = error_of(model, graph, allowed(graph, [group.name], rng), INPUT, rng)
        if kept and "sees nothing" not in outcome.reason:
            assert outcome.relative_error <= 1e-9, (group.name, outcome)


def test_windows_in_the_batch_count_each() -> None:
    """Stem, four windows of 16 positions, the two linear layers."""
    assert graph_of(Windowed).macs({}) == 64 * 6 * 27 + 4 * 16 * 4 * 6 * 9 + 4 * 7 + 7 * 5


def test_input_and_classes_stay() -> None:
    graph = graph_of(Conv)
    reasons = {axis.name: (axis.width, axis.reason) for axis in graph.frozen}
    assert reasons["stem"] == (3, "it is an axis of the network's input")
    assert reasons["head"] == (5, "it is an axis of the network's output (classes)")
    assert [axis.name for axis in graph.frozen] == ["stem", "head"]  # kernel axes are nothing a user could cut


def test_members_of_a_plain_layer() -> None:
    (group,) = (g for g in graph_of(ConvNormAct).groups if g.name == "blocks.0.conv")
    assert group.kind == "channels"
    assert group.members == (
        Member(tensor="blocks.0.conv.weight", dim=0, role="out"),
        Member(tensor="blocks.0.bn.weight", dim=0, role="elementwise"),
        Member(tensor="blocks.0.bn.bias", dim=0, role="elementwise"),
        Member(tensor="blocks.0.bn.running_mean", dim=0, role="elementwise"),
        Member(tensor="blocks.0.bn.running_var", dim=0, role="elementwise"),
        Member(tensor="hidden.weight", dim=1, role="in"),
    )


def test_depthwise_filters_are_out() -> None:
    group = graph_of(Inverted).group("blocks.0.expand")
    assert Member(tensor="blocks.0.depthwise.weight", dim=0, role="out") in group.members


def test_transposed_convolution_has_its_own_layout() -> None:
    graph = graph_of(Transposed)
    outputs = graph.group("blocks.0.up")
    assert [(m.tensor, m.dim, m.role) for m in outputs.members[:2]] == [
        ("blocks.0.up.weight", 1, "out"),
        ("blocks.0.up.bias", 0, "elementwise"),
    ]
    inputs = graph.group("blocks.0.conv#2")
    assert ("blocks.0.up.weight", 0, "in") in [(m.tensor, m.dim, m.role) for m in inputs.members]


def test_fused_attention_members() -> None:
    graph = graph_of(Attention)
    heads, width = graph.group("blocks.0.qkv:heads"), graph.group("blocks.0.qkv:head_dim")
    assert (heads.kind, width.kind) == ("heads", "head_dim")
    thirds = [
        Member(tensor="blocks.0.qkv.weight", dim=0, role="out", index=IndexMap(offset=8 * i, stride=4, loops=((4, 1),)))
        for i in range(3)
    ]
    assert list(heads.members[:3]) == thirds
    assert width.members[-1] == Member(
        tensor="blocks.0.qkv.bias", dim=0, role="elementwise", index=IndexMap(offset=8, loops=((2, 4),))
    )
    assert graph.group("blocks.0.qkv:head_dim#2").members[-1] == Member(
        tensor="blocks.0.proj.weight", dim=1, role="in", index=IndexMap(loops=((2, 4),))
    )


def test_norms_over_a_cut_axis_are_listed() -> None:
    graph = graph_of(Attention)
    assert graph.group("stem").norms == ("blocks.0.norm",)
    assert graph.group("blocks.0.qkv:heads").norms == ()
    assert graph_of(GroupNorm).group("blocks.0.conv").norms == ()  # whole groups
    assert graph_of(GroupNorm).group("blocks.0.conv#2").norms == ("blocks.0.norm",)
    assert graph_of(ConvNormAct).group("blocks.0.conv").norms == ()


def test_a_square_weight_on_a_residual_stream_reads_and_writes_one_axis() -> None:
    class Square(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.fc, self.out_chs = nn.Linear(chs, chs), chs

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    members = graph_of(Square).group("stem").members
    assert [(m.dim, m.role) for m in members if m.tensor == "blocks.0.fc.weight"] == [(0, "out"), (1, "in")]


def test_an_axis_used_three_times_in_one_dimension_has_three_members() -> None:
    class Triple(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.after, self.out_chs = nn.Conv2d(chs, 5, 1), nn.Conv2d(15, width, 1), width

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.after(torch.cat([x, x.relu(), x.tanh()], 1))

    members = graph_of(Triple).group("blocks.0.conv").members
    assert [m.index.offset for m in members if m.tensor == "blocks.0.after.weight"] == [0, 5, 10]


def test_a_table_of_positions_is_no_group() -> None:
    class Table(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.length = 5
            self.table = nn.Parameter(torch.zeros(5, chs))
            self.out_chs = chs

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.table).sum(0)[:, None, None]

    graph = graph_of(Table)
    assert all(group.width != 5 for group in graph.groups)
    assert any(axis.width == 5 and "tables of tokens" in axis.reason for axis in graph.frozen)


def test_unknown_operators_freeze_what_they_touch_and_are_counted() -> None:
    class Unknown(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.out_chs = nn.Conv2d(chs, width, 1), width

        def forward(self, x: Tensor) -> Tensor:
            return torch.renorm(self.conv(x), 2, 1, 1.0)

    graph = graph_of(Unknown)
    assert graph.unknown_ops == {"renorm": 1}
    assert any("'renorm'" in axis.reason for axis in graph.frozen if axis.name == "blocks.0.conv")
    assert {g.name for g in graph.groups} == {"stem", "hidden"}


SILENCE: list[tuple[Callable[[Tensor], Tensor], bool]] = [
    (torch.relu, True),
    (F.gelu, True),
    (torch.sigmoid, False),
    (torch.exp, False),
    (torch.cos, False),
    (lambda x: x + 1, False),
    (lambda x: x + x.tanh(), True),
    (lambda x: x * x.exp(), True),
    (lambda x: x / (1 + x * x), True),
    (lambda x: x**2, True),
    (lambda x: x**0, False),
    (lambda x: x.clamp(-1, 1), True),
    (lambda x: x.clamp(min=0.5), False),
    (lambda x: x.clamp(max=-0.5), False),
    (lambda x: F.hardtanh(x, 0.5, 2.0), False),
    (lambda x: torch.where(x > 0, x, -x), True),
    (lambda x: torch.where(x > 0, x, torch.ones_like(x)), False),
    (lambda x: x.masked_fill(x > 0, 0.0), True),
    (lambda x: x.masked_fill(x >= 0, 2.0), False),
    (F.softplus, False),
    (lambda x: torch.maximum(x, torch.zeros_like(x)), True),
    (lambda x: F.max_pool2d(x, 2), True),
    (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), False),
]


@pytest.mark.parametrize(("function", "silent"), SILENCE)
def test_a_sum_over_channels_needs_silence(function: Callable[[Tensor], Tensor], silent: bool) -> None:
    """The claim is checked against arithmetic too: is f(0) zero?"""

    class Summed(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.after = nn.Conv2d(chs, 5, 1), nn.Conv2d(1, width, 1)
            self.out_chs = width

        def forward(self, x: Tensor) -> Tensor:
            return self.after(function(self.conv(x)).sum(1, keepdim=True))

    zero = function(torch.zeros(1, 1, 4, 4))
    assert bool((zero == 0).all()) is silent
    assert ("blocks.0.conv" in {g.name for g in graph_of(Summed).groups}) is silent


def producers(group: Group) -> set[str]:
    return {m.tensor for m in group.members if m.role == "out"}


def test_padding_with_attribute_amounts_joins_the_residual_widths() -> None:
    graph = graph_of(PaddedShortcut)  # 6 channels, padded by (1, 4)
    assert producers(graph.group("stem")) == {"stem.weight", "blocks.0.conv.weight"}
    frozen = {(a.name, a.width) for a in graph.frozen}
    assert frozen == {("stem", 3), ("head", 5)}  # nothing of the 11 channels: the one-wide pad is no axis


def test_a_buffer_that_its_module_computes_again_on_conversion_stays() -> None:
    """A rotary embedding keeps its frequencies in single precision: ``half()`` makes the whole table anew."""

    class Table(nn.Module):
        def __init__(self, rebuilds: bool) -> None:
            super().__init__()
            self.rebuilds, self.width = rebuilds, 7
            self.register_buffer("scale", torch.linspace(1, 2, 7))

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            module = super()._apply(fn, recurse)
            if self.rebuilds and self.scale.dtype is torch.half:
                self.scale = torch.linspace(1, 2, self.width)
            return module

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    def reasons(rebuilds: bool) -> list[str]:
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), Table(rebuilds), nn.Linear(7, 5))
        return [axis.reason for axis in build_graph(net, INPUT).frozen if axis.width == 7]

    assert reasons(rebuilds=False) == []
    assert "anew when its dtype changes" in reasons(rebuilds=True)[0]
