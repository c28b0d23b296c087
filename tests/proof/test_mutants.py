"""The proof against planted mistakes: right graphs with one member moved, mirrored or forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.graph.build import build_graph
from prunecli.proof.equivalence import Equivalence, equivalence_error
from prunecli.values.groups import Graph, Group, IndexMap, Member
from prunecli.values.plan import PlannedGroup
from toys.blocks import (
    INPUT,
    Attention,
    Block,
    ChunkMix,
    ConvNormAct,
    Dense,
    ExplicitAttention,
    GroupedBottleneck,
    GroupNorm,
    Inverted,
    PixelShuffle,
    Residual,
    SeparateAttention,
    Shuffle,
    Stack,
    Transposed,
)
from toys.vocabulary import ClassToken, ConvNext, GatedMlps, PatchMerging, Recurrent, ShiftedWindows, UnevenSplit

BLOCKS: tuple[Block, ...] = (
    Attention,
    ChunkMix,
    ClassToken,
    ConvNext,
    ConvNormAct,
    Dense,
    ExplicitAttention,
    GatedMlps,
    GroupNorm,
    GroupedBottleneck,
    Inverted,
    PatchMerging,
    PixelShuffle,
    Recurrent,
    Residual,
    SeparateAttention,
    ShiftedWindows,
    Shuffle,
    Transposed,
    UnevenSplit,
)
SHOWN = 1e-6  # relative error of a mistake; a right cut has less than 1e-12


def cuts(graph: Graph) -> Iterator[dict[str, int]]:
    """For every group a cut to its first channels, with what is tied to it."""
    for tie in graph.all_ties():
        for wanted in tie.groups:
            bundles = tie.selected(lambda bundle, wanted=wanted: wanted not in bundle.groups)
            widths = {name: graph.group(name).width for bundle in bundles or () for name in bundle.groups}
            even = all(width % 2 == 0 for width in widths.values())
            if wanted in widths and (even or len(widths) == 1):
                yield {wanted: widths[wanted] // 2} | {name: width // 2 for name, width in widths.items()}


def judged(
    model: nn.Module, graph: Graph, kept: dict[str, int], changed: Group | None = None, *, seed: int = 0
) -> Equivalence:
    groups = [changed if changed is not None and changed.name == group.name else group for group in graph.groups]
    planned = [
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            width=group.width,
            keep=tuple(range(kept.get(group.name, group.width))),
            members=group.members,
            norms=group.norms,
        )
        for group in groups
    ]
    return equivalence_error(
        model, groups=planned, attributes=graph.solve(kept), folds=graph.folds, input_size=INPUT, seed=seed
    )


def mirrored(index: IndexMap, width: int) -> IndexMap:
    """Channels counted from the end."""
    return replace(index, offset=index.offset + (width - 1) * index.stride, stride=-index.stride)


def mutants(group: Group) -> Iterator[tuple[str, Group]]:
    """The group with one tensor dimension of its own mirrored, and with one left out."""
    for place in dict.fromkeys((m.tensor, m.dim) for m in group.members):
        at = [i for i, m in enumerate(group.members) if (m.tensor, m.dim) == place]
        turned = [
            replace(m, index=mirrored(m.index, group.width)) if i in at else m for i, m in enumerate(group.members)
        ]
        yield f"{place} mirrored", replace(group, members=tuple(turned))
        left = tuple(m for i, m in enumerate(group.members) if i not in at)
        if left:
            yield f"{place} left out", replace(group, members=left)


@pytest.mark.parametrize("block", BLOCKS)
def test_no_member_can_be_wrong_without_being_seen(block: Block) -> None:
    torch.manual_seed(0)
    model = Stack([block], [4]).eval()
    graph = build_graph(model, INPUT)
    tried = 0
    for kept in cuts(graph):
        assert judged(model, graph, kept).relative_error < 1e-12
        group = graph.group(next(iter(kept)))
        for what, wrong in mutants(group):
            try:
                outcome = judged(model, graph, kept, wrong)
            except UnsupportedError:
                continue
            assert outcome.relative_error > SHOWN, (kept, what)
            tried += 1
    assert tried > 4


def test_swapped_parts_of_a_concatenation_are_seen() -> None:
    torch.manual_seed(0)
    model = Stack([UnevenSplit], [3]).eval()
    graph = build_graph(model, INPUT)
    name = next(g.name for g in graph.groups if any(m.index.offset == 5 for m in g.members))
    other = next(g for g in graph.groups if g.width == 3 and g.name != name and g.name.startswith("blocks.0.conv"))
    group = graph.group(name)
    offsets = {(m.tensor, m.dim): m.index for m in other.members}
    swapped = [replace(m, index=offsets.get((m.tensor, m.dim), m.index)) for m in group.members]
    kept = {name: 1}
    assert judged(model, graph, kept).relative_error < 1e-12
    assert judged(model, graph, kept, replace(group, members=tuple(swapped))).relative_error > SHOWN


class FourByFour(nn.Module):
    """Four heads of width four, so that the layouts [3, heads, width] and [3, width, heads] have the same sizes."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.heads, self.out_chs = 4, chs
        self.qkv, self.proj = nn.Linear(chs, 48), nn.Linear(16, chs)

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(t).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        t = ((q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x + self.proj(t).transpose(1, 2).reshape(x.shape)


def test_heads_taken_for_head_widths_are_seen() -> None:
    torch.manual_seed(0)
    model = Stack([FourByFour], [4]).eval()
    graph = build_graph(model, INPUT)
    heads = next(group for group in graph.groups if group.kind == "heads")
    kept = {heads.name: 2}
    assert judged(model, graph, kept).relative_error < 1e-12

    def confused(member: Member) -> Member:
        index = member.index
        loops = tuple((count, 4 if stride == 1 else stride) for count, stride in index.loops)
        return replace(member, index=replace(index, stride=1, loops=loops))

    wrong = replace(heads, members=tuple(map(confused, heads.members)))
    assert judged(model, graph, kept, wrong).relative_error > SHOWN


class Saturated(nn.Module):
    """A gate that is shut whatever it is given, but for rounding, before it is multiplied."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(chs, 6, 1), nn.Conv2d(6, chs, 1), nn.Conv2d(chs, chs, 1)
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) + self.b(self.a(x).tanh()) * torch.sigmoid(x - 60)


def test_a_group_nobody_sees_is_named_though_others_are_seen() -> None:
    torch.manual_seed(0)
    model = Stack([Saturated], [4]).eval()
    graph = build_graph(model, INPUT)
    outcome = judged(model, graph, {group.name: 3 for group in graph.groups})
    assert outcome.unseen == ("blocks.0.a",)
    assert "no channel of blocks.0.a changes an output" in outcome.reason
    assert judged(model, graph, {"stem": 3, "hidden": 3}).unseen == ()


class Squeezes(nn.Module):
    """Gates that squeeze through three ReLUs: under most parameters one of them has both that stay dead."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.ModuleList(nn.Conv2d(chs, 3, 1) for _ in range(3))
        self.fc2 = nn.ModuleList(nn.Conv2d(3, chs, 1) for _ in range(3))
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        for fc1, fc2 in zip(self.fc1, self.fc2, strict=True):
            x = x * torch.sigmoid(fc2(torch.relu(fc1(x.mean((2, 3), keepdim=True)))))
        return x


def test_groups_that_are_dead_under_some_parameters_are_seen_under_others(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Stack([Squeezes], [4]).eval()
    graph = build_graph(model, INPUT)
    kept = {group.name: 2 for group in graph.groups}
    for seed in range(6):
        outcome = judged(model, graph, kept, seed=seed)
        assert (outcome.unseen, outcome.relative_error < 1e-12) == ((), True)
    monkeypatch.setattr("prunecli.proof.equivalence._DRAWS", 1)
    assert any(judged(model, graph, kept, seed=seed).unseen for seed in range(6))
