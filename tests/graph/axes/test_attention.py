"""Attention as timm writes it: all heads cut to half at once, then all head widths, each equal to the silenced net."""

from __future__ import annotations

import random
from typing import Any

import pytest
import timm

from prunecli.graph.build import build_graph
from toys.cuts import error_of


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "head_dim"])
@pytest.mark.parametrize(
    ("name", "args", "count"),
    [
        # The attention pool's heads are tied to the stream's width, which is not cut here: they stay.
        ("test_vit", {"global_pool": "map", "class_token": False}, {"heads": 6, "head_dim": 12}),
        ("test_coatnet", {}, {"heads": 3, "head_dim": 6}),
        # Attention between patches and, in both blocks, within them.
        ("tnt_s_legacy_patch16_224", {"depth": 2}, {"heads": 4, "head_dim": 8}),
        # Windowed and global, both with a bias that is read off the queries.
        ("samvit_base_patch16_224", {"depth": 2, "global_attn_indexes": (1,)}, {"heads": 2, "head_dim": 4}),
    ],
)
def test_heads_and_head_widths_of_timm_models(
    name: str, args: dict[str, Any], count: dict[str, int], kind: str
) -> None:
    model = timm.create_model(name, num_classes=10, **args)
    size = model.pretrained_cfg["input_size"]
    graph = build_graph(model, size)
    tied = {name for tie in graph.ties if "patch_embed.proj" in tie.groups for name in tie.groups}
    half = {group.name: group.width // 2 for group in graph.groups if group.kind == kind and group.width > 1}
    half = {name: width for name, width in half.items() if name not in tied}
    kept, outcome = error_of(model, graph, half, size, random.Random(0))
    assert len(kept) == count[kind]
    assert outcome.relative_error <= 1e-12, outcome
