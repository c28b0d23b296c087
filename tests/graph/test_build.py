"""Graphs of real architectures: costs against torch's own counter, sizes, attributes, and the proof of cuts."""

from __future__ import annotations

import random
from functools import cache

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prunecli.models.paper_nets  # noqa: F401 - registers the CIFAR networks
from prunecli.errors import UsageError
from prunecli.graph.build import build_graph
from prunecli.values.groups import Graph
from toys.blocks import INPUT, ChunkMix, Residual, Stack
from toys.cuts import allowed, error_of

#: Image sizes: small where the architecture takes any.
SIZES = dict.fromkeys(
    [
        *("resnet18", "resnet50", "resnext50_32x4d", "regnetx_002", "regnety_002", "mobilenetv3_small_100"),
        *("efficientnet_b0", "convnext_atto", "convnextv2_atto", "vgg11_bn", "vgg16", "densenet121"),
    ],
    64,
) | dict.fromkeys(
    [
        *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
        *("deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"),
        *("cifar_resnet20", "cifar_vgg19", "lenet5_relu", "mlp7_relu"),
    ],
    None,
)
#: Models whose random cuts are proved in the default run; the others take longer.
QUICK = ["resnet18", "mobilenetv3_small_100", "regnety_002", "convnext_atto", "cifar_resnet20", "lenet5_relu"]


@cache
def meta_model(name: str) -> nn.Module:
    return timm.create_model(name).eval().to("meta")  # not built there: constructors may read tensors they make


def input_of(name: str) -> tuple[int, int, int]:
    """As small as the architecture allows."""
    size = SIZES[name]
    given: tuple[int, int, int] = meta_model(name).pretrained_cfg["input_size"]
    return given if size is None else (3, size, size)


@cache
def meta_graph(name: str) -> Graph:
    return build_graph(meta_model(name), input_of(name))


@pytest.mark.parametrize("name", SIZES)
def test_macs_are_those_of_torch_flop_counter(name: str) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model(name)(torch.empty(1, *input_of(name), device="meta"))
    assert meta_graph(name).macs({}) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_tensors(name: str) -> None:
    graph, state = meta_graph(name), dict(meta_model(name).named_parameters()) | dict(meta_model(name).named_buffers())
    sizes = {tensor: tuple(e.evaluate({}) for e in graph.tensors[tensor]) for tensor in state}
    assert sizes == {tensor: tuple(value.shape) for tensor, value in state.items()}


@pytest.mark.parametrize("name", SIZES)
def test_nearly_all_parameters_lie_in_prunable_groups(name: str) -> None:
    graph, model = meta_graph(name), meta_model(name)
    assert not graph.unknown_ops
    touched = {member.tensor for group in graph.groups for member in group.members}
    parameters = dict(model.named_parameters())
    share = sum(p.numel() for n, p in parameters.items() if n in touched) / sum(p.numel() for p in parameters.values())
    assert share > 0.99
    assert len({group.name for group in graph.groups}) == len(graph.groups)


def cut_and_check(name: str, *, alone: int) -> None:
    """Some groups alone and one random half; every error at most 1e-9."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model, size = timm.create_model(name), input_of(name)
    graph = build_graph(model, size)
    names = [group.name for group in graph.groups]
    choices = [[name] for name in rng.sample(names, min(alone, len(names)))]
    for chosen in [*choices, rng.sample(names, len(names))[: (len(names) + 1) // 2]]:
        kept, outcome = error_of(model, graph, allowed(graph, chosen, rng), size, rng)
        assert kept
        assert outcome.relative_error <= 1e-9, (name, kept, outcome)


@pytest.mark.parametrize("name", QUICK)
def test_cuts_are_exact(name: str) -> None:
    cut_and_check(name, alone=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SIZES if name not in QUICK])
def test_cuts_of_larger_models_are_exact(name: str) -> None:
    cut_and_check(name, alone=2)


def test_groups_of_resnet18_are_its_inner_widths_and_stages() -> None:
    graph = meta_graph("resnet18")
    inner = [f"layer{s}.{b}.conv1" for s in (1, 2, 3, 4) for b in (0, 1)]
    stages = ["conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    assert sorted(g.name for g in graph.groups) == sorted(inner + stages)
    assert graph.groups[0].name == "conv1"
    assert graph.group("layer2.0.conv2").layers() == (
        "layer2.0.conv2",
        "layer2.0.downsample.0",
        "layer2.1.conv2",
    )


def test_macs_of_a_cut_are_those_of_the_smaller_network() -> None:
    """Halving every inner width of resnet18 is a network timm cannot build, but a sum one can do."""
    graph = meta_graph("resnet18")
    kept = {f"layer1.{b}.conv1": 32 for b in (0, 1)}
    saved = 2 * (16 * 16) * (64 * 32 * 9) * 2  # blocks x positions x weights of a half x two convolutions
    assert graph.macs({}) - graph.macs(kept) == saved
    weights = ["layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    assert graph.numel({}, weights) - graph.numel(kept, weights) == 2 * 64 * 32 * 9


@pytest.mark.parametrize(
    ("name", "group", "stated"),
    [
        ("resnet18", "layer4.0.conv2", {"num_features": 512, "head_hidden_size": 512, "feature_info.4.num_chs": 512}),
        ("resnet18", "conv1", {"feature_info.0.num_chs": 64, "feature_info.1.num_chs": 64}),
        ("vit_tiny_patch16_224", "patch_embed.proj", {"num_features": 192, "embed_dim": 192, "head_hidden_size": 192}),
        ("mobilenetv3_small_100", "conv_head", {"head_hidden_size": 1024}),
        ("densenet121", "features.conv0", {}),
        ("swin_tiny_patch4_window7_224", "layers.3.downsample.reduction", {"num_features": 768}),
        ("convnext_atto", "stages.3.downsample.1", {"num_features": 320, "feature_info.3.num_chs": 320}),
        ("vgg16", "pre_logits.fc2", {"head_hidden_size": 4096}),
    ],
)
def test_what_a_model_says_about_its_widths_stays_true(name: str, group: str, stated: dict[str, int]) -> None:
    graph = meta_graph(name)
    edits = {e.name: (e.before, e.after) for e in graph.solve({group: graph.group(group).width - 8}) if not e.module}
    assert {k: v for k, v in edits.items() if k in stated} == {k: (v, v - 8) for k, v in stated.items()}


def test_engines_by_name() -> None:
    assert build_graph(Stack([Residual], [4]), INPUT).engine == "axes"
    with pytest.raises(UsageError, match="no graph engine 'axis'"):
        build_graph(Stack([Residual], [4]), INPUT, engine="axis")


def test_without_a_group_its_tie_goes_where_nothing_can_take_its_place() -> None:
    torch.manual_seed(0)
    graph = build_graph(Stack([ChunkMix], [4]), INPUT)
    (tie,) = graph.ties
    less = graph.without(tie.groups[:1], "a reason")
    assert not less.ties
    assert {axis.name for axis in less.frozen if axis.reason == "a reason"} == set(tie.groups)
    assert [group for group in graph.groups if group.name not in tie.groups] == list(less.groups)
    assert all(set(tie.groups).isdisjoint(pair) for pair in less.exclusive)
