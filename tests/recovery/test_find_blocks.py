"""Blocks of nets of every kind, and the positions that their ends keep, by hand and against the silenced dense net."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import prunecli.models.paper_nets  # noqa: F401 (registers cifar_resnet20)
from prunecli.measure.dataflow import trace
from prunecli.measure.segments import Segments
from prunecli.models.outputs import logits_of
from prunecli.recovery.find_blocks import Kept, _fitting, find_blocks, kept_parts
from prunecli.surgery.cut import cut
from prunecli.values.plan import Plan
from toys.half_plans import half_plan, random
from toys.user_nets import Residual


def keeping(plan: Plan, **kept: tuple[int, ...]) -> Plan:
    """The plan with these channels kept in the groups of these names (``__`` for a dot)."""
    named = {name.replace("__", "."): keep for name, keep in kept.items()}
    groups = tuple(g.model_copy(update={"keep": named.get(g.name, g.keep)}) for g in plan.groups)
    return plan.model_copy(update={"groups": groups})


def blocks_of(model: nn.Module, size: tuple[int, int, int], *only: str) -> list[tuple[str, str | None]]:
    """Name of each block and path of the module at its end, with the pieces proved to be the net."""
    plan = half_plan(model.eval(), size, *only)
    assert plan.cut_groups
    pruned, images = cut(model, plan), random(3, *size)
    flow, blocks = find_blocks(pruned, model, plan, images[:2])
    with torch.no_grad():
        for net in (model, pruned):
            segments = Segments(net, flow, [block.end for block in blocks if block.end], images[:1])
            x = images
            for piece in range(len(blocks)):
                x = segments.run(piece, x)
            torch.testing.assert_close(x, logits_of(net(images)))
    parameters = [name for block in blocks for name in block.parameters]
    assert sorted(parameters) == sorted(name for name, _ in pruned.named_parameters()), "each is in one block"
    return [(block.name, block.end.path if block.end else None) for block in blocks]


def test_a_stream_keeps_the_channels_of_the_plan_where_another_axis_has_the_same_widths():
    torch.manual_seed(0)
    model = Residual().eval()
    plan = half_plan(model, (1, 8, 8))
    stream = next(g.name for g in plan.groups if "stem.weight" in {m.tensor for m in g.members})
    inner = [g.name for g in plan.groups if g.name != stream]
    keep = (0, 1, 5, 7, 8, 11)
    plan = keeping(plan, **{stream.replace(".", "__"): keep})
    assert {len(g.keep) for g in plan.groups if g.name in inner} == {len(keep)}
    pruned, images = cut(model, plan), random(2, 1, 8, 8)
    _, blocks = find_blocks(pruned, model, plan, images)
    assert [block.name for block in blocks] == ["stem to blocks.0.conv2", "blocks.1", "head"]
    assert [block.kept for block in blocks] == [Kept(dim=1, positions=keep), Kept(dim=1, positions=keep), None]
    made: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _, __, output: made.append(output))
    model(images)
    assert torch.equal(blocks[0].kept.of(made[0]), made[0][:, keep])


def test_only_what_agrees_with_the_silenced_net_alone_counts_as_kept():
    silenced = random(2, 4, 3, dtype=torch.float64)
    first, second = Kept(dim=1, positions=(0, 2)), Kept(dim=1, positions=(1, 2))
    choices = {(4, 2): [first.positions, second.positions]}
    assert _fitting(silenced, silenced[:, [1, 2]] * (1 + 1e-12), choices) == [second]
    assert _fitting(silenced, silenced[:, [1, 3]], choices) == []
    assert _fitting(silenced, silenced[:, [2, 1]], choices) == [], "the same channels in another order"
    assert _fitting(silenced, silenced, choices) == [None]
    assert _fitting(silenced, silenced + 1, choices) == []
    assert _fitting(silenced, silenced[:, [1, 2], :2], choices) == [], "two dimensions were cut"
    silenced[:, :2] = 0  # two dead channels: which of them stays cannot be told
    assert _fitting(silenced, silenced[:, [1, 2]], choices) == [first, second]


@pytest.mark.parametrize("group", ["blocks.0.conv1", "blocks.1.conv1"])
def test_every_block_reads_a_cut_axis(group):
    torch.manual_seed(0)
    assert blocks_of(Residual(), (1, 8, 8), group) == [("stem to head", None)], "one reader, one block: the last"


def test_what_the_cut_leaves_whole_is_compared_whole():
    torch.manual_seed(0)
    model = Residual().eval()
    plan = half_plan(model, (1, 8, 8), "blocks.0.conv1", "blocks.1.conv1")
    kept = kept_parts(model, plan, ["stem", "blocks.0", "blocks.1"], (1, 8, 8))
    assert kept == {"stem": None, "blocks.0": None, "blocks.1": None}


STAGES = [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2)]
SMALL_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("cifar_resnet20", {}, ["conv1 to layer1.0.conv2", *STAGES[1:], "linear"]),
        (
            "test_vit",
            {"img_size": 32},
            ["patch_embed.proj to blocks.0.mlp.fc2", *(f"blocks.{b}" for b in range(1, 6)), "head"],
        ),
        (
            "test_convnext",
            {},
            ["stem.0 to stages.0.blocks.0.mlp.fc2", "stages.1.downsample.1", "stages.1.blocks.0", "stages.1.blocks.1",
             "stages.2.downsample.1", *(f"stages.2.blocks.{b}" for b in range(4)), "stages.3.downsample.1",
             "stages.3.blocks.0", "stages.3.blocks.1", "head.fc"],
        ),
        (
            "densenet121",
            {"growth_rate": 4, "block_config": (2, 3, 2)},
            ["features.conv0 to features.denseblock1.denselayer2.conv2", "features.transition1.conv",
             "features.denseblock2", "features.transition2.conv", "features.denseblock3", "classifier"],
        ),
        (
            "swin_tiny_patch4_window7_224",
            SMALL_SWIN,
            ["patch_embed.proj to layers.0.blocks.0.mlp.fc2", "layers.0.blocks.1", "layers.1.downsample.reduction",
             "layers.1.blocks.0", "layers.1.blocks.1", "head.fc"],
        ),
        (
            "mobilenetv3_small_050",  # the squeeze of a block without a shortcut is a part of it
            {},
            ["conv_stem to blocks.0.0.conv_pw", "blocks.1.0", "blocks.1.1", "blocks.2.0", "blocks.2.1", "blocks.2.2",
             "blocks.3.0", "blocks.3.1", "blocks.4.0", "blocks.4.1", "blocks.4.2", "blocks.5.0.conv", "conv_head",
             "classifier"],
        ),
        ("lenet5_relu", {}, ["conv1 to conv2", "conv3", "fc1", "fc2"]),
    ],
)  # fmt: skip
def test_blocks_of_well_known_architectures(name, kwargs, expected):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    size = (1, 32, 32) if name.startswith("lenet") else (3, 32, 32)
    assert [block for block, _ in blocks_of(model, size)] == expected


def test_a_block_ends_before_pooling_and_behind_its_norm():
    torch.manual_seed(0)
    vgg = timm.create_model("cifar_vgg19", num_classes=10)
    ends = [end for _, end in blocks_of(vgg, (3, 32, 32))]
    assert ends[-2:] == ["features", None]
    for end in ends[:-2]:
        assert isinstance(vgg.get_submodule(end), nn.BatchNorm2d), end


def test_a_net_whose_body_is_one_module_is_not_one_block():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=1) for width in (1, 6, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.mean((2, 3))

    torch.manual_seed(0)
    model = nn.Sequential(Body(), nn.Linear(6, 3))
    assert len(blocks_of(model, (1, 8, 8))) == 4


def test_images_beside_each_other_in_another_dimension_are_no_end():
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.embed(images.flatten(1, 2).transpose(0, 1))  # [tokens, images, width]
            return self.head(self.mid(x).mean(0))

    torch.manual_seed(0)
    model = SequenceFirst().eval()
    plan = half_plan(model, (1, 8, 4))
    flow = trace(model, random(2, 1, 8, 4))
    assert [waist.path for waist in flow.waists] == ["embed", "mid"]
    assert not kept_parts(model, plan, ["embed", "mid"], (1, 8, 4))
