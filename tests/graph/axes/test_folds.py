"""Default-scale attention: the rows of the queries, found by walking back; refused where the way is not linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.values.groups import Graph, ScaleFold
from toys.blocks import (
    INPUT,
    Attention,
    AxialRotaryAttention,
    BatchNormedQueries,
    Block,
    ExpandedKeys,
    ExplicitAttention,
    GroupedQueries,
    LatentQueries,
    NormedAttention,
    PooledQueries,
    QueryBias,
    SeparateAttention,
    Stack,
)


def graph_of(block: Block) -> Graph:
    return build_graph(Stack([block], [4]), INPUT)


def folds(block: Block) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {fold.tensor.removeprefix("blocks.0."): (fold.dim, fold.positions) for fold in graph_of(block).folds}


def refusal(block: Block) -> str:
    graph = graph_of(block)
    assert graph.folds == ()
    return next(a.reason for a in graph.frozen if "root" in a.reason)


def test_the_first_third_of_a_fused_qkv() -> None:
    assert graph_of(Attention).folds == (
        ScaleFold(group="blocks.0.qkv:head_dim", tensor="blocks.0.qkv.weight", dim=0, positions=tuple(range(8))),
        ScaleFold(group="blocks.0.qkv:head_dim", tensor="blocks.0.qkv.bias", dim=0, positions=tuple(range(8))),
    )


def test_an_explicit_scale_is_left_alone() -> None:
    graph = graph_of(ExplicitAttention)
    assert graph.folds == ()
    half = {"blocks.0.qkv:head_dim": 2, "blocks.0.qkv:head_dim#2": 2}
    assert all(edit.name != "scale" for edit in graph.solve(half))


def test_a_norm_of_the_queries_takes_the_fold() -> None:
    assert folds(NormedAttention) == {"q_norm.weight": (0, (0, 1, 2, 3)), "q_norm.bias": (0, (0, 1, 2, 3))}


def test_a_layer_of_its_own_takes_it_whole() -> None:
    assert folds(SeparateAttention) == {"q.weight": (0, tuple(range(8))), "q.bias": (0, tuple(range(8)))}


def test_the_batch_norm_behind_a_convolution_takes_it() -> None:
    assert folds(BatchNormedQueries) == {"q.1.weight": (0, tuple(range(8))), "q.1.bias": (0, tuple(range(8)))}


def test_pooling_passes_it_on() -> None:
    assert folds(PooledQueries) == folds(Attention)


def test_queries_whose_rows_lie_apart_in_memory_are_followed() -> None:
    assert folds(GroupedQueries) == {"q.weight": (0, tuple(range(24))), "q.bias": (0, tuple(range(24)))}
    assert folds(ExpandedKeys) == folds(GroupedQueries)


def test_learnt_queries_are_followed_to_their_layer() -> None:
    assert folds(LatentQueries) == {"q.weight": (0, tuple(range(8))), "q.bias": (0, tuple(range(8)))}


def test_rotation_passes_it_on_and_both_halves_are_one_axis() -> None:
    rows = (0, tuple(range(16)))
    assert folds(AxialRotaryAttention) == {"qkv.weight": rows, "qkv.bias": rows}


class TwiceWithOneLayer(SeparateAttention):
    """Two attentions whose queries come from one layer, the second with a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)

        def heads(layer: nn.Module, t: Tensor) -> Tensor:
            return layer(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        first = F.scaled_dot_product_attention(heads(self.q, t), heads(self.k, t), heads(self.v, t))
        again = F.scaled_dot_product_attention(heads(self.q, -t), heads(self.k, -t), first, scale=1.0)
        return self.proj(again.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


def test_a_layer_used_twice_takes_nothing() -> None:
    assert "reads the queries too" in refusal(TwiceWithOneLayer)


class BoundedQueries(SeparateAttention):
    """Queries that follow no rows; the keys do."""

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        q, k, v = (f(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q.tanh(), k, v).transpose(1, 2).flatten(2)
        return self.proj(out).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


def test_keys_take_it_where_queries_cannot() -> None:
    assert folds(BoundedQueries) == {"k.weight": (0, tuple(range(8)))}


def test_keys_take_it_where_something_else_reads_the_queries() -> None:
    second = (0, tuple(range(8, 16)))
    assert folds(QueryBias) == {"qkv.weight": second, "qkv.bias": second}


class Interleaved(Attention):
    """Heads first, then q, k, v: every head's rows start with its query."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, self.num_heads, 3, self.head_dim)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


def test_queries_of_every_head_are_found_where_they_lie() -> None:
    assert folds(Interleaved)["qkv.weight"] == (0, (0, 1, 2, 3, 12, 13, 14, 15))


class JoinedBias(Attention):
    """The bias is put together from three parameters."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.qkv = nn.Linear(chs, 24, bias=False)
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(self.norm(x.flatten(2).transpose(1, 2)), self.qkv.weight, bias)
        qkv = qkv.reshape(b, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


def test_a_joined_bias_is_followed_to_its_query_part() -> None:
    eight = tuple(range(8))
    assert folds(JoinedBias) == {"qkv.weight": (0, eight), "q_bias": (0, eight)}


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v: (q.tanh(), k, v), "'tanh' is not known to be linear"),
        (lambda q, k, v: (q + 1, k, v), "a number is added"),
        (lambda q, k, v: (q * v, k, v), "two tensors that depend on the input"),
        (lambda q, k, v: (q, q, v), "queries and keys share weights"),
        (lambda q, k, v: (q, q.tanh(), v), "queries and keys share weights"),
        (lambda q, k, v: (q.sum(-1, keepdim=True) + q, k, v), "pooled over its features"),
        (lambda q, k, v: (q.clone().add_(k), k, v), "overwritten"),
        (lambda q, k, v: (q, k, v * torch.sigmoid(q + k)), "'add' reads the queries too"),
    ],
    ids=["nonlinear", "shifted", "product", "shared", "shared bent", "pooled", "in place", "read elsewhere"],
)
def test_a_way_that_is_not_linear_keeps_the_head_width(attend: object, reason: str) -> None:
    class Odd(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*attend(q, k, v))  # type: ignore[operator]

    assert reason in refusal(Odd)


def test_linear_detours_are_followed() -> None:
    class Detour(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = torch.stack([-q * 0.5, q / 3], 0).select(0, 1) + torch.cat([q[:, :1], q[:, 1:]], 1)
            return F.scaled_dot_product_attention(q, k, v)

    assert folds(Detour)["qkv.bias"] == (0, tuple(range(8)))


def test_other_scales_of_the_module_stay() -> None:
    class TwoScales(Attention):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__(chs, width)
            self.temperature = 0.7

    edits = graph_of(TwoScales).solve({"blocks.0.qkv:head_dim": 1, "blocks.0.qkv:head_dim#2": 1})
    assert [(e.name, e.before, e.after) for e in edits if isinstance(e.before, float)] == [("scale", 0.5, 1.0)]
