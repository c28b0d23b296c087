from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.layers import LayerNorm2d, RmsNorm2d, ScaledStdConv2d
from timm.layers.grn import GlobalResponseNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunecli.errors import UnsupportedError
from prunecli.models.tensors import named_tensors
from prunecli.proof.equivalence import Equivalence, equivalence_error
from prunecli.surgery.cut import cut_
from prunecli.values.groups import AttributeEdit, IndexMap, Member, ScaleFold
from prunecli.values.plan import PlannedGroup

TOLERANCE = 1e-9


def at(tensor: str, dim: int = 0, role: str = "out", **index) -> Member:
    return Member(tensor=tensor, dim=dim, role=role, index=IndexMap(**index))


def group(members, *, width: int, keep, norms=(), kind="channels") -> PlannedGroup:
    return PlannedGroup(name="g", kind=kind, width=width, keep=keep, members=tuple(members), norms=norms)


def check(model, groups, *, attributes=(), folds=(), size=(3, 16, 16), seed=0) -> Equivalence:
    return equivalence_error(
        model.eval(), groups=groups, attributes=attributes, folds=folds, input_size=size, seed=seed
    )


def bn(name: str, **index) -> list[Member]:
    return [at(f"{name}.{leaf}", **index) for leaf in ("weight", "bias", "running_mean", "running_var")]


# ---------------------------------------------------------------------------------------------- convolutions


BLOCK = (at("layer1.0.conv1.weight"), *bn("layer1.0.bn1"), at("layer1.0.conv2.weight", 1, "in"))
KEEP = tuple(j for j in range(50) if j % 3)


def test_a_right_cut_of_a_resnet_block_agrees_and_the_model_is_left_alone():
    model = timm.create_model("resnet18", num_classes=5)
    before = copy.deepcopy(model.state_dict())
    result = check(model, [group(BLOCK, width=64, keep=KEEP)], size=(3, 64, 64))
    assert result.relative_error < TOLERANCE
    assert result.exact
    assert result.norms == ()
    assert result.reason == ""
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_zero_initialised_branches_do_not_hide_a_wrong_cut():
    model = timm.create_model("resnet18", num_classes=5, zero_init_last=True)
    wrong = [*BLOCK[:-1], at("layer1.0.conv2.weight", 1, "in", offset=63, stride=-1)]
    assert check(model, [group(wrong, width=64, keep=KEEP)], size=(3, 64, 64)).relative_error > 1e-3


def test_a_forgotten_member_fails_with_its_reason():
    model = timm.create_model("resnet18", num_classes=5)
    result = check(model, [group(BLOCK[:-1], width=64, keep=KEEP)], size=(3, 64, 64))
    assert result.relative_error == math.inf
    assert "pruned forward pass fails" in result.reason


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(UnsupportedError, match="conv1"):
        check(nn.Conv2d(3, 4, 1), [group(BLOCK, width=64, keep=KEEP)])


def test_a_cut_that_removes_anything_but_the_zeros_shows(monkeypatch):
    def shifted(model, *, groups, **rest):
        moved = [g.model_copy(update={"keep": tuple(j + 1 for j in g.keep)}) for g in groups]
        cut_(model, groups=moved, **rest)

    monkeypatch.setattr("prunecli.proof.equivalence.cut_", shifted)
    model = timm.create_model("resnet18", num_classes=5)
    assert check(model, [group(BLOCK, width=64, keep=KEEP)], size=(3, 64, 64)).relative_error > 1e-3


class Grouped(nn.Module):
    """A depthwise convolution between two plain ones, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1)
        self.dw = nn.Conv2d(6, 6, 3, groups=6)
        self.b = nn.Conv2d(9, 4, 1)

    def forward(self, x):
        y = self.dw(self.a(x)).relu()
        return self.b(torch.cat([x[..., 1:-1, 1:-1], y], 1)).mean((2, 3))


DEPTHWISE = (
    at("a.weight"),
    at("a.bias"),
    at("dw.weight"),
    at("dw.bias"),
    at("b.weight", 1, "in", offset=3),
)


def test_attributes_and_offsets_take_part():
    cut = group(DEPTHWISE, width=6, keep=(0, 2, 3, 5))
    edit = AttributeEdit(module="dw", name="groups", before=6, after=4)
    assert check(Grouped(), [cut], attributes=[edit]).relative_error < TOLERANCE
    forgotten = check(Grouped(), [cut])
    assert forgotten.relative_error == math.inf
    assert "groups" in forgotten.reason
    shifted = group((*DEPTHWISE[:-1], at("b.weight", 1, "in", offset=2)), width=6, keep=(0, 2, 3, 5))
    assert check(Grouped(), [shifted], attributes=[edit]).relative_error > 1e-3


# ---------------------------------------------------------------------------------------------- attention


def vit(**args) -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=1e-5, **args
    )


def head_dim_cut(*, norms=()) -> tuple[PlannedGroup, list[AttributeEdit], list[ScaleFold]]:
    members = [
        at(f"blocks.0.attn.qkv.{leaf}", offset=offset, loops=((3, 8),))
        for leaf in ("weight", "bias")
        for offset in (0, 24, 48)
    ]
    members.append(at("blocks.0.attn.proj.weight", 1, "in", loops=((3, 8),)))
    for norm in norms:
        members += [at(f"{norm}.weight"), at(f"{norm}.bias")]
    edits = [
        AttributeEdit(module="blocks.0.attn", name="head_dim", before=8, after=5),
        AttributeEdit(module="blocks.0.attn", name="attn_dim", before=24, after=15),
        AttributeEdit(module="blocks.0.attn", name="scale", before=8**-0.5, after=5**-0.5),
    ]
    folds = [
        ScaleFold(group="g", tensor=f"blocks.0.attn.qkv.{leaf}", dim=0, positions=tuple(range(24)))
        for leaf in ("weight", "bias")
    ]
    return group(members, width=8, keep=(0, 1, 3, 6, 7), kind="head_dim", norms=norms), edits, folds


def test_head_dimensions_agree_on_the_fused_and_the_explicit_path():
    cut, edits, folds = head_dim_cut()
    result = check(vit(), [cut], attributes=edits, folds=folds)
    assert result.relative_error < TOLERANCE
    assert result.exact


def test_a_missing_fold_shows():
    cut, edits, _ = head_dim_cut()
    assert check(vit(), [cut], attributes=edits).relative_error > 1e-3


def test_a_stale_scale_shows_on_the_explicit_path_only():
    cut, edits, folds = head_dim_cut()
    model = vit()
    assert model.blocks[0].attn.fused_attn
    assert check(model, [cut], attributes=edits[:2], folds=folds).relative_error > 1e-4
    # the fused path alone would not have seen it
    for block in model.blocks:
        block.attn.fused_attn = False
    assert check(model, [cut], attributes=edits[:2]).relative_error < TOLERANCE


def test_heads_agree():
    members = [at(f"blocks.1.attn.qkv.{leaf}", stride=8, loops=((3, 24), (8, 1))) for leaf in ("weight", "bias")] + [
        at("blocks.1.attn.proj.weight", 1, "in", stride=8, loops=((8, 1),))
    ]
    edits = [
        AttributeEdit(module="blocks.1.attn", name="num_heads", before=3, after=2),
        AttributeEdit(module="blocks.1.attn", name="attn_dim", before=24, after=16),
    ]
    assert check(vit(), [group(members, width=3, keep=(0, 2), kind="heads")], attributes=edits).relative_error < (
        TOLERANCE
    )


# ---------------------------------------------------------------------------------------------- norms over the axis


def test_query_and_key_norms_over_the_cut_head_dimension():
    cut, edits, folds = head_dim_cut(norms=("blocks.0.attn.q_norm", "blocks.0.attn.k_norm"))
    # scaling q before its norm does nothing, so the fold has to sit in the norm
    folds = [
        ScaleFold(group="g", tensor=f"blocks.0.attn.q_norm.{leaf}", dim=0, positions=tuple(range(8)))
        for leaf in ("weight", "bias")
    ]
    result = check(vit(qk_norm=True), [cut], attributes=edits, folds=folds)
    assert result.relative_error < TOLERANCE
    assert not result.exact
    assert result.norms == ("blocks.0.attn.k_norm", "blocks.0.attn.q_norm")


def residual_cut(model: nn.Module, *, norms: bool = True) -> PlannedGroup:
    """The residual width of a ViT: every tensor dimension of size 24 that is not inside a branch."""
    members = [at("patch_embed.proj.weight"), at("patch_embed.proj.bias"), at("cls_token", 2), at("pos_embed", 2)]
    names = []
    for i in range(2):
        names += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        members += [at(f"blocks.{i}.attn.qkv.weight", 1, "in"), at(f"blocks.{i}.mlp.fc1.weight", 1, "in")]
        members += [at(f"blocks.{i}.{m}.{leaf}") for m in ("attn.proj", "mlp.fc2") for leaf in ("weight", "bias")]
        members += [at(f"blocks.{i}.{ls}.gamma") for ls in ("ls1", "ls2")]
    names.append("norm")
    members += [at(f"{norm}.{leaf}") for norm in names for leaf in ("weight", "bias")]
    members.append(at("head.weight", 1, "in"))
    keep = tuple(j for j in range(24) if j % 4)
    return group(members, width=24, keep=keep, norms=tuple(names) if norms else ())


def residual_edits() -> list[AttributeEdit]:
    names = [f"blocks.{i}.norm{n}" for i in range(2) for n in (1, 2)] + ["norm"]
    return [AttributeEdit(module=name, name="normalized_shape", before=(24,), after=(18,)) for name in names]


def test_layer_norms_over_a_cut_residual_width_are_taken_over_kept_channels():
    model = vit()
    result = check(model, [residual_cut(model)], attributes=residual_edits())
    assert result.relative_error < TOLERANCE
    assert not result.exact
    assert len(result.norms) == 5
    # without the declaration the statistics differ: the mask is needed, and the check would notice
    assert check(model, [residual_cut(model, norms=False)], attributes=residual_edits()).relative_error > 1e-3


class Normed(nn.Module):
    """conv (8 channels) → a norm over the channels → conv → a BatchNorm keeps the outputs alive."""

    def __init__(self, norm: nn.Module, *, last: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.norm = norm
        self.b = nn.Conv2d(8, 4, 1)
        self.last = last

    def forward(self, x):
        x = self.a(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        return self.b(x).mean(2).flatten(1)


def normed_cut(model: Normed, *, norms=("norm",), keep=(0, 2, 3, 4, 5, 7)) -> PlannedGroup:
    tensors = named_tensors(model)
    own = [at(name) for name in ("norm.weight", "norm.bias") if name in tensors]
    return group([at("a.weight"), at("a.bias"), *own, at("b.weight", 1, "in")], width=8, keep=keep, norms=norms)


@pytest.mark.parametrize(
    ("norm", "edits", "last"),
    [
        (lambda: LayerNorm2d(8), {"normalized_shape": ((8,), (6,))}, False),
        (lambda: nn.LayerNorm(8, elementwise_affine=False), {"normalized_shape": ((8,), (6,))}, True),
        (lambda: nn.RMSNorm(8), {"normalized_shape": ((8,), (6,))}, True),
        (lambda: RmsNorm2d(8), {"normalized_shape": ((8,), (6,))}, False),
        (lambda: nn.GroupNorm(1, 8), {"num_channels": (8, 6)}, False),
        (lambda: nn.GroupNorm(2, 8), {"num_channels": (8, 6)}, False),
        (lambda: GlobalResponseNorm(8, channels_last=False), {}, False),
        (lambda: GlobalResponseNorm(8), {}, True),
    ],
)
def test_norms_of_every_kind_are_masked(norm, edits, last):
    model = Normed(norm(), last=last)
    attributes = [AttributeEdit(module="norm", name=n, before=b, after=a) for n, (b, a) in edits.items()]
    assert check(model, [normed_cut(model)], attributes=attributes).relative_error < TOLERANCE
    assert check(model, [normed_cut(model, norms=())], attributes=attributes).relative_error > 1e-4


def test_standardised_weights_take_their_statistic_over_kept_inputs():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3)
            self.b = ScaledStdConv2d(8, 4, 3)

        def forward(self, x):
            return self.b(self.a(x)).mean((2, 3))

    members = [at("a.weight"), at("a.bias"), at("b.weight", 1, "in")]
    declared = group(members, width=8, keep=(0, 1, 2, 4, 6), norms=("b",))
    assert check(Net(), [declared]).relative_error < TOLERANCE
    assert check(Net(), [group(members, width=8, keep=(0, 1, 2, 4, 6))]).relative_error > 1e-3


def test_a_norm_that_cannot_be_masked_fails_the_check():
    class Strange(nn.Module):
        def forward(self, x):
            return x / x.square().sum(1, keepdim=True).sqrt().add(1)

    model = Normed(Strange())
    result = check(model, [normed_cut(model)])
    assert result.relative_error == math.inf
    assert "norm" in result.reason


# ---------------------------------------------------------------------------------------------- a blind check fails


class Blind(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 6), nn.Linear(6, 3)
        self.mode = mode

    def forward(self, x):
        hidden = self.a(x.flatten(1))
        if self.mode == "constant":
            return self.b(hidden * 0)
        if self.mode == "nan":
            return self.b(hidden).log() * float("nan")
        if self.mode == "unread":
            return x.flatten(1) + 0 * self.b(hidden).sum()
        if self.mode == "train" and self.training:
            return self.b(hidden).detach()
        return self.b(hidden)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("constant", "does not depend on the image"),
        ("nan", "not finite"),
        ("unread", "changes no output"),
        ("train", "does not train"),
    ],
)
def test_a_check_that_cannot_see_is_a_failed_check(mode, words):
    members = [at("a.weight"), at("a.bias"), at("b.weight", 1, "in")]
    result = check(Blind(mode), [group(members, width=6, keep=(0, 3))], size=(3, 2, 2))
    assert result.relative_error == math.inf
    assert words in result.reason


class Fading(nn.Module):
    """Gates after every layer: with drawn statistics nothing of the image would reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False) for i in range(40))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(40))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = conv(x)
            x = bn(0.01 * x * torch.sigmoid(x.mean((2, 3), keepdim=True)))
        return self.fc(x.mean((2, 3)))


def test_a_signal_that_fades_over_many_layers_is_kept_alive_by_its_batch_norms():
    members = [at("convs.20.weight"), *bn("bns.20"), at("convs.21.weight", 1, "in")]
    wrong = [at("convs.20.weight"), *bn("bns.20"), at("convs.21.weight", 1, "in", offset=1)]
    assert check(Fading(), [group(members, width=8, keep=(1, 2, 4))]).relative_error < TOLERANCE
    assert check(Fading(), [group(wrong, width=7, keep=(1, 2, 4))]).relative_error > 1e-3


def test_a_model_that_casts_to_single_precision_is_compared_in_double():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 64, 3), nn.Linear(64, 5)

        def forward(self, x):
            x = torch.relu(self.first(x)).mean((2, 3))
            return x.float() @ self.last.weight.to(torch.float32).t() + self.last.bias

    members = (at("first.weight"), at("first.bias", role="elementwise"), at("last.weight", 1, "in"))
    assert check(Narrow(), [group(members, width=64, keep=KEEP)]).relative_error < 1e-13


class Chaotic(nn.Module):
    """Many batch norms in a row and no shortcut: rounding errors grow by a factor a layer.

    Whether sums over three channels and over eight of which five are zero round alike is up to the processor, so a
    rounding error that goes by the width is put in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False) for i in range(30))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(30))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = conv(x)
            x = x + 1e-16 * conv.weight.shape[1] * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
            x = torch.sin(2 * bn(x))
        return self.fc(x.mean((2, 3)))


def test_rounding_that_grows_with_depth_is_told_from_a_mistake(monkeypatch):
    members = [at("convs.5.weight"), *bn("bns.5"), at("convs.6.weight", 1, "in")]
    wrong = [at("convs.5.weight"), *bn("bns.5"), at("convs.6.weight", 1, "in", offset=1)]
    assert check(Chaotic(), [group(members, width=8, keep=(1, 2, 4))]).relative_error < TOLERANCE
    assert check(Chaotic(), [group(wrong, width=7, keep=(1, 2, 4))]).relative_error > 1e-3
    monkeypatch.setattr("prunecli.proof.equivalence._ROUNDING", math.inf)
    assert check(Chaotic(), [group(members, width=8, keep=(1, 2, 4))]).relative_error > TOLERANCE


def test_the_same_seed_gives_the_same_figure_and_the_global_generator_is_untouched():
    members = [at("a.weight"), at("a.bias"), at("b.weight", 1, "in")]
    model = Blind("plain")
    state = torch.get_rng_state()
    first = check(model, [group(members, width=6, keep=(0, 3))], size=(3, 2, 2), seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert first == check(model, [group(members, width=6, keep=(0, 3))], size=(3, 2, 2), seed=3)
    assert first.relative_error < TOLERANCE
