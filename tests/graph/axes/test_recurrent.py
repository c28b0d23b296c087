"""Recurrent layers: their hidden width is one axis, in rows of gates, and may be cut."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.measure.cost import measure
from prunecli.surgery.cut import cut_
from prunecli.values.groups import Graph, IndexMap
from toys.cuts import error_of, planned

INPUT = (3, 4, 4)
HIDDEN = 6


class Rows(nn.Module):
    """A convolution (5 channels), a recurrent layer along the rows of the map, a linear layer, classes."""

    def __init__(self, kind: type[nn.RNNBase], **args: Any) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(3, 5, 1), kind(5, HIDDEN, **args)
        wide = (args.get("proj_size") or HIDDEN) * (2 if args.get("bidirectional") else 1)
        self.fc, self.head = nn.Linear(wide, 4), nn.Linear(4, 3)

    def states(self, x: Tensor) -> Any:
        return None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1).flatten(0, 1)
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        y, _ = self.rnn(x, self.states(x))
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        return self.head(torch.tanh(self.fc(y)).unflatten(0, (-1, 4)).mean((1, 2)))


class LearntStart(Rows):
    """The first hidden state is a parameter."""

    def __init__(self) -> None:
        super().__init__(nn.GRU, batch_first=True)
        self.start = nn.Parameter(torch.zeros(1, 1, HIDDEN))

    def states(self, x: Tensor) -> Tensor:
        return self.start.expand(-1, len(x), -1).contiguous()


class FixedStart(LearntStart):
    """The first hidden state is not zero where a channel is silenced."""

    def states(self, x: Tensor) -> Tensor:
        return super().states(x) + 0.5


def graph_of(model: nn.Module) -> Graph:
    return build_graph(model.eval(), INPUT)


def widths(graph: Graph) -> list[int]:
    return [group.width for group in graph.groups]


KINDS = [
    (nn.LSTM, {"batch_first": True}),
    (nn.LSTM, {"batch_first": True, "bidirectional": True}),
    (nn.LSTM, {"num_layers": 2, "bias": False}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"batch_first": True, "num_layers": 2}),
    (nn.GRU, {"bidirectional": True}),
    (nn.RNN, {"batch_first": True}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "args"), KINDS)
def test_hidden_and_input_widths_are_cut_and_costs_follow(kind: type[nn.RNNBase], args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Rows(kind, **args)
    graph = graph_of(model)
    assert widths(graph) == [5, HIDDEN, 4]
    assert not graph.unknown_ops
    for keep in ({}, *({group.name: group.width // 2} for group in graph.groups)):
        rng = random.Random(1)
        kept = keep or {group.name: group.width // 2 for group in graph.groups}
        _, outcome = error_of(model, graph, kept, INPUT, rng)
        assert outcome.relative_error < 1e-12, (kept, outcome)
        smaller = copy.deepcopy(model)
        cut_(smaller, groups=planned(graph, kept, rng), attributes=graph.solve(kept), folds=())
        assert measure(smaller, INPUT).macs == graph.macs(kept)
    assert (smaller.rnn.input_size, smaller.rnn.hidden_size) == (5, HIDDEN)


def test_members_are_rows_of_every_gate_and_columns() -> None:
    graph = graph_of(Rows(nn.LSTM, bidirectional=True))
    hidden = next(group for group in graph.groups if group.width == HIDDEN)
    rows = IndexMap(loops=((4, HIDDEN),))
    ways = ("", "_reverse")
    of = {(m.tensor, m.dim): m.index for m in hidden.members if m.tensor.startswith("rnn.weight") or "bias" in m.tensor}
    assert of == {
        **{
            (f"rnn.{name}_l0{way}", 0): rows
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            for way in ways
        },
        **{(f"rnn.weight_hh_l0{way}", 1): IndexMap() for way in ways},
    }
    assert [m.index for m in hidden.members if m.tensor == "fc.weight"] == [IndexMap(), IndexMap(offset=HIDDEN)]


def test_a_learnt_first_state_is_cut_along() -> None:
    torch.manual_seed(0)
    model = LearntStart()
    graph = graph_of(model)
    assert "start" in {m.tensor for group in graph.groups if group.width == HIDDEN for m in group.members}
    _, outcome = error_of(model, graph, {g.name: g.width // 2 for g in graph.groups}, INPUT, random.Random(0))
    assert outcome.relative_error < 1e-12, outcome


@pytest.mark.parametrize(
    ("model", "reason"),
    [(FixedStart, "starts from states"), (lambda: Rows(nn.LSTM, batch_first=True, proj_size=4), "no rule")],
)
def test_what_the_rule_does_not_hold_for_is_frozen(model: Any, reason: str) -> None:
    torch.manual_seed(0)
    net = model()
    graph = graph_of(net)
    assert HIDDEN not in widths(graph)
    assert any(reason in axis.reason for axis in graph.frozen if "rnn.weight_hh_l0" in axis.tensors)


def test_frozen_recurrent_layers_leave_the_rest_prunable() -> None:
    torch.manual_seed(0)
    model = FixedStart()
    graph = graph_of(model)
    kept = {group.name: group.width // 2 for group in graph.groups}
    assert error_of(model, graph, kept, INPUT, random.Random(0))[1].relative_error < 1e-12
