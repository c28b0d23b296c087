"""Numbers that lose their origin: the rehearsal of the cut finds them, freezes what they hold and says where."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.values.groups import Graph
from toys.cuts import error_of

INPUT = (3, 4, 4)
FREE = 6  # width of the hidden layer behind: an axis that must stay prunable


class Net(nn.Module):
    """conv (8 channels) → what a test puts in between → conv → pooled hidden layer → classes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.conv, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.steps = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(9))
        self.hidden, self.head = nn.Linear(5, FREE), nn.Linear(FREE, 5)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.between(self.conv(x)))
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


class LoopOverWidth(Net):
    """As many steps as there are channels, over two."""

    def between(self, x: Tensor) -> Tensor:
        for _ in range(math.gcd(x.shape[1], 64) // 2):
            x = x + x.tanh()
        return x


class PickedByWidth(Net):
    def between(self, x: Tensor) -> Tensor:
        return x + self.steps[len(range(x.shape[1]))](x)


class ListedByWidth(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * [0.1 * i for i in range(9)][x.shape[1]]


class FloatOnTheLeft(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * (1.0 / x.shape[1])


class Logarithm(Net):
    def between(self, x: Tensor) -> Tensor:
        return x / math.log2(x.shape[1])


class FloatComparison(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.tanh() if x.shape[1] > 4.5 else x


class Formatted(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.tanh() if f"{x.shape[1]}" == "8" else x


class TableByWidth(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.tanh() if x.shape[1] in {8, 16} else x


class ShapeNumel(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * (1 / x.shape.numel())


class TensorNumel(Net):
    def between(self, x: Tensor) -> Tensor:
        return x * (1 / x.numel())


class Length(Net):
    def between(self, x: Tensor) -> Tensor:
        return x / len(self.conv.weight)


class Odd(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.tanh() if x.shape[1] & 8 else x


class NumpyProduct(Net):
    def between(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), np.prod(x.shape[1:])).reshape(x.shape) / np.sqrt(x.shape[1])


LOST = [
    LoopOverWidth,
    PickedByWidth,
    ListedByWidth,
    FloatOnTheLeft,
    Logarithm,
    FloatComparison,
    Formatted,
    TableByWidth,
    ShapeNumel,
    TensorNumel,
    Length,
    Odd,
    NumpyProduct,
]


class Halves(Net):
    """Sizes by arithmetic of every kind that keeps its origin."""

    def between(self, x: Tensor) -> Tensor:
        rows, rest = divmod(x.shape[1], 2)
        x = x.unflatten(1, (round(rows), 2)) if not rest else x
        x = x.transpose(1, 2).reshape(-1, x.numel() // len(x) // 16 >> 0, *x.shape[-2:])
        return x.reshape(-1, rows << 1, 4**2).unflatten(2, (4, 4))


class PowersOfWidth(Net):
    """The outer product of a map with itself, flattened and summed again."""

    def between(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        square = (x.flatten(2) @ x.flatten(2).transpose(1, 2)).reshape(-1, width**2)
        return x * F.relu(square).reshape(-1, width, width).sum(2)[..., None, None]


FOLLOWED = [(Halves, 4), (PowersOfWidth, 8)]


def graph_of(net: type[Net]) -> tuple[Net, Graph]:
    torch.manual_seed(0)
    model = net()
    return model, build_graph(model, INPUT)


def widths(graph: Graph) -> list[int]:
    return sorted(group.width for group in graph.groups)


def assert_exact(model: nn.Module, graph: Graph) -> None:
    kept = {group.name: group.width // 2 for group in graph.groups}
    kept, outcome = error_of(model, graph, kept, INPUT, random.Random(0))
    assert kept
    assert outcome.relative_error < 1e-12, outcome


@pytest.mark.parametrize("net", LOST)
def test_a_number_that_lost_its_origin_holds_its_axis_and_nothing_else(net: type[Net]) -> None:
    model, graph = graph_of(net)
    assert widths(graph) == [5, FREE]
    reasons = [axis.reason for axis in graph.frozen if axis.width == 8 and "conv.weight" in axis.tensors]
    assert len(reasons) == 1
    assert_exact(model, graph)


@pytest.mark.parametrize(("net", "width"), FOLLOWED)
def test_arithmetic_that_keeps_the_origin_keeps_the_axis_prunable(net: type[Net], width: int) -> None:
    model, graph = graph_of(net)
    assert widths(graph) == sorted([5, FREE, width])
    assert_exact(model, graph)


def test_the_reason_names_the_module_and_what_was_seen() -> None:
    _, graph = graph_of(FloatOnTheLeft)
    (reason,) = (axis.reason for axis in graph.frozen if axis.width == 8 and "conv.weight" in axis.tensors)
    assert reason == (
        "the model's own forward computes with its size where that cannot be followed: "
        "with 4 instead of 8, 'mul' is given the number 0.25 instead of 0.125"
    )


class FarAway(Net):
    """The width of one layer is a factor of what another one gives."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        hidden = F.gelu(self.hidden(self.after(x).mean((2, 3))))
        return self.head(hidden * (1.0 / x.shape[1]))


def test_the_group_behind_a_number_is_found_where_other_groups_meet_it() -> None:
    model, graph = graph_of(FarAway)
    assert widths(graph) == [5, FREE]
    assert_exact(model, graph)


class Attributes(Net):
    """A loop over an attribute that follows one axis, in a model where another attribute follows another."""

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.groups = 4, 4
        self.grouped = nn.Conv2d(8, 8, 1)

    def between(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.branches, -1))
        for _ in range(self.branches):
            x = x.sin()
        y = self.grouped(x.flatten(1, 2)).unflatten(1, (self.groups, -1))
        return y.transpose(1, 2).flatten(1, 2)


def test_loops_over_an_attribute_hold_the_axis_it_sizes() -> None:
    model, graph = graph_of(Attributes)
    reasons = [axis.reason for axis in graph.frozen if "conv.weight" in axis.tensors and axis.width == 4]
    assert len(reasons) == 1
    assert "instead of" in reasons[0]
    assert_exact(model, graph)


class Counting(Net):
    """Takes another path after its first run: no rehearsal can be held to the trace, so nothing is frozen for it."""

    times = 0

    def between(self, x: Tensor) -> Tensor:
        type(self).times += 1
        return x.tanh() if self.times == 1 else x


def test_a_forward_that_changes_by_itself_is_left_to_the_proof() -> None:
    Counting.times = 0
    _, graph = graph_of(Counting)
    assert widths(graph) == [5, FREE, 8]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_model_is_left_as_it_was(device: str) -> None:
    model = Attributes().to(device)
    before = {name: (id(value), value.shape) for name, value in model.state_dict(keep_vars=True).items()}
    state = {path: dict(vars(module)) for path, module in model.named_modules()}
    build_graph(model, INPUT)
    assert {name: (id(value), value.shape) for name, value in model.state_dict(keep_vars=True).items()} == before
    assert all(dict(vars(module)) == state[path] for path, module in model.named_modules())
