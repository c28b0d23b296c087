"""Graphs of plain chains, with their costs written out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prunecli.values.groups import AttributeEdit, Const, Graph, Group, Member, OpCost, Size, Width
from prunecli.values.plan import Cost


def no_edits(kept: Mapping[str, int]) -> tuple[AttributeEdit, ...]:
    return ()


def chain(widths: list[int], *, names: list[str] | None = None, solve=no_edits, **more) -> Graph:
    """1x1 convolutions 3 → widths… → 10 on an 8x8 image; group i is the output of layer i."""
    names = names or [f"conv{i}" for i in range(len(widths))]
    extents: list[Size] = [Const(3), *(Width(n, w) for n, w in zip(names, widths, strict=True)), Const(10)]
    layers = [*names, "head"]
    groups = tuple(
        Group(
            name=name,
            kind="channels",
            width=width,
            members=(
                Member(tensor=f"{name}.weight", dim=0, role="out"),
                Member(tensor=f"{name}.bias", dim=0, role="elementwise"),
                Member(tensor=f"{layers[i + 1]}.weight", dim=1, role="in"),
            ),
        )
        for i, (name, width) in enumerate(zip(names, widths, strict=True))
    )
    tensors: dict[str, tuple[Size, ...]] = {}
    for i, layer in enumerate(layers):
        tensors[f"{layer}.weight"] = (extents[i + 1], extents[i])
        tensors[f"{layer}.bias"] = (extents[i + 1],)
    ops = tuple(
        OpCost(module=layer, op="conv", extents=(Const(64), extents[i + 1], extents[i]))
        for i, layer in enumerate(layers)
    )
    values = {"frozen": (), "ties": (), "exclusive": (), "folds": ()} | more
    return Graph(engine="test", groups=groups, tensors=tensors, ops=ops, solve=solve, **values)


def costs(graph: Graph, kept: Mapping[str, int]) -> Cost:
    """By evaluating everything anew."""
    params = graph.numel(kept, graph.tensors)
    return Cost(params=params, macs=graph.macs(kept), bytes=4 * params)


def rising(graph: Graph, scale=lambda i: 1.0) -> dict[str, torch.Tensor]:
    """Channel j of a group scores j + 1 (times ``scale`` of the group)."""
    return {g.name: scale(i) * torch.arange(1.0, g.width + 1) for i, g in enumerate(graph.groups)}
