"""Fused projections: q, k and v of one weight keep their own channels where the code tells them apart, else the same.

Each case is proved by cutting q/k and v differently and comparing with the silenced net.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.values.groups import AttributeConflictError, Graph
from toys.blocks import INPUT, Stack
from toys.cuts import error_of, planned

Heads = tuple[Tensor, Tensor, Tensor]


class Fused(nn.Module):
    """Attention over pixels; ``heads`` makes q, k, v [B, H, N, D] of one projection [B, N, 3 * H * D], H = 2, D = 5."""

    def __init__(self, chs: int, heads: Callable[[Fused, Tensor], Heads]) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.entries = 2, 5, 3
        self.qkv, self.proj = nn.Linear(chs, 30), nn.Linear(10, chs)
        self.table = nn.Parameter(torch.ones(5))
        self.heads = heads
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.heads(self, self.qkv(x.flatten(2).transpose(1, 2)))
        out = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, h * w, -1)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


def five(m: Fused, t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], t.shape[1], 3, m.num_heads, m.head_dim)


def unbound(m: Fused, t: Tensor) -> Heads:
    q, k, v = five(m, t).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def indexed(m: Fused, t: Tensor) -> Heads:
    qkv = t.unflatten(-1, (3, m.num_heads, -1)).transpose(1, 3).contiguous()
    return qkv[:, :, 0], qkv[:, :, -2], qkv[:, :, 2]


def heads_first(m: Fused, t: Tensor) -> Heads:
    qkv = t.view(t.shape[0], -1, m.num_heads, 3, m.head_dim).transpose(1, 2)
    return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]


def split_between(m: Fused, t: Tensor) -> Heads:
    q, kv = five(m, t).transpose(1, 3).split([1, 2], dim=2)
    k, v = kv.unbind(2)
    return q.squeeze(2), k, v


def sliced(m: Fused, t: Tensor) -> Heads:
    qkv = five(m, t).permute(2, 0, 3, 1, 4)
    k, v = qkv[1:]
    return qkv[:1].squeeze(0), k, v


def heads_merged(m: Fused, t: Tensor) -> Heads:
    b, n, _ = t.shape
    qkv = five(m, t).permute(2, 0, 3, 1, 4).reshape(3, b * m.num_heads, n, m.head_dim)
    q, k, v = (part.view(b, m.num_heads, n, m.head_dim) for part in qkv.unbind(0))
    return q, k, v


def there_and_back(m: Fused, t: Tensor) -> Heads:
    return unbound(m, five(m, t).flatten(2))


def chunked(m: Fused, t: Tensor) -> Heads:
    q, k, v = (part.unflatten(-1, (m.num_heads, m.head_dim)).transpose(1, 2) for part in t.chunk(3, dim=-1))
    return q, k, v


APART = [unbound, indexed, heads_first, split_between, sliced, heads_merged, there_and_back, chunked]


def one_table(m: Fused, t: Tensor) -> Heads:
    q, k, v = (five(m, t) * m.table).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def summed(m: Fused, t: Tensor) -> Heads:
    qkv = five(m, t).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv.sum(0)


def transposed_back(m: Fused, t: Tensor) -> Heads:
    mixed = five(m, t).permute(0, 1, 3, 4, 2).flatten(2).unflatten(2, (m.num_heads, m.head_dim, 3))
    q, k, v = mixed.permute(4, 0, 2, 1, 3).unbind(0)
    return q, k, v


TOGETHER = [one_table, summed, transposed_back]


def graph_of(heads: Callable[[Fused, Tensor], Heads]) -> tuple[Stack, Graph]:
    torch.manual_seed(0)
    model = Stack([lambda chs, _: Fused(chs, heads)], [4])
    return model, build_graph(model, INPUT)


def head_dims(graph: Graph) -> list[str]:
    return [group.name for group in graph.groups if group.kind == "head_dim"]


@pytest.mark.parametrize("heads", APART)
def test_values_keep_other_channels_than_queries_and_keys_but_equally_many(
    heads: Callable[[Fused, Tensor], Heads],
) -> None:
    model, graph = graph_of(heads)
    queries, values = head_dims(graph)
    assert (graph.group(queries).width, graph.group(values).width) == (5, 5)
    kept = {queries: 3, values: 3}
    seed = next(s for s in range(9) if _differ(graph, kept, s))
    _, outcome = error_of(model, graph, kept, INPUT, random.Random(seed))
    assert outcome.relative_error <= 1e-12, outcome
    with pytest.raises(AttributeConflictError):
        graph.solve({queries: 3})


def _differ(graph: Graph, kept: dict[str, int], seed: int) -> bool:
    queries, values = (group.keep for group in planned(graph, kept, random.Random(seed)) if group.is_cut)
    return queries != values


@pytest.mark.parametrize("heads", TOGETHER)
def test_whoever_mixes_the_entries_makes_them_one(heads: Callable[[Fused, Tensor], Heads]) -> None:
    model, graph = graph_of(heads)
    (name,) = head_dims(graph)
    _, outcome = error_of(model, graph, {name: 3}, INPUT, random.Random(0))
    assert outcome.relative_error <= 1e-12, outcome


@pytest.mark.parametrize("heads", [*APART, *TOGETHER])
def test_heads_run_through_all_three(heads: Callable[[Fused, Tensor], Heads]) -> None:
    model, graph = graph_of(heads)
    (name,) = [group.name for group in graph.groups if group.kind == "heads"]
    assert (
        sum(member.tensor.endswith("qkv.weight") * member.index.repeats for member in graph.group(name).members) == 15
    )
    kept, outcome = error_of(model, graph, {name: 1}, INPUT, random.Random(1))
    assert kept == {name: 1}
    assert outcome.relative_error <= 1e-12, outcome


def test_the_factors_of_a_head_exclude_each_other_in_every_entry() -> None:
    _, graph = graph_of(unbound)
    name = "blocks.0.qkv:head"
    assert {frozenset(pair) for pair in graph.exclusive} == {
        frozenset({f"{name}s", f"{name}_dim"}),
        frozenset({f"{name}s", f"{name}_dim#2"}),
    }
