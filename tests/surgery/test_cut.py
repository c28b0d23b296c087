from __future__ import annotations

import copy
import json
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from prunecli.errors import UnsupportedError
from prunecli.models.tensors import clear_caches_, named_tensors
from prunecli.surgery.cut import cut_
from prunecli.surgery.structure import fill_, shape_, structure_of
from prunecli.values.groups import AttributeEdit, IndexMap, Member, ScaleFold, module_of, tensor_name
from prunecli.values.plan import PlannedGroup, Structure


class ConvNet(nn.Module):
    """conv1 (8 channels) → BN → conv2, a tied copy of conv2's weight, a table in an attribute, a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 1, bias=False)
        self.conv3 = nn.Conv2d(8, 4, 1, bias=False)
        self.conv3.weight = self.conv2.weight
        self.table = torch.arange(8.0)
        self.register_buffer("gate", torch.linspace(1, 2, 8), persistent=False)
        self.cache: dict[str, torch.Tensor] = {}
        self.tables = {"a": torch.arange(8.0), "size": 8}
        self.feature_info = [{"num_chs": 8, "module": "conv1"}, {"num_chs": 4, "module": "conv2"}]
        self.widths = (8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "sum" not in self.cache:
            self.cache["sum"] = self.conv2.weight.detach().sum((2, 3))
        scale = self.table * self.tables["a"] * self.gate
        y = F.relu(self.bn(self.conv1(x))) * scale[:, None, None]
        return (self.conv2(y) + self.conv3(y)).mean((2, 3)) + self.cache["sum"].sum(1)


def at(tensor: str, dim: int = 0, role: str = "out", **index) -> Member:
    return Member(tensor=tensor, dim=dim, role=role, index=IndexMap(**index))


CONV = PlannedGroup(
    name="conv1",
    kind="channels",
    width=8,
    keep=(0, 2, 5, 7),
    members=(
        at("conv1.weight"),
        at("conv1.bias"),
        at("bn.weight"),
        at("bn.bias"),
        at("bn.running_mean"),
        at("bn.running_var"),
        at("conv2.weight", 1, "in"),
        at("conv3.weight", 1, "in"),
        at("table"),
        at("tables[a]"),
        at("gate"),
    ),
)
EDITS = (
    AttributeEdit(module="", name="feature_info.0.num_chs", before=8, after=4),
    AttributeEdit(module="", name="widths", before=(8, 4), after=(4, 4)),
    AttributeEdit(module="", name="tables.size", before=8, after=4),
)


def test_a_cut_keeps_exactly_the_chosen_channels_everywhere():
    dense = ConvNet()
    net = copy.deepcopy(dense)
    cut_(net, groups=[CONV], attributes=EDITS, folds=[])
    kept = list(CONV.keep)
    assert torch.equal(net.conv1.weight, dense.conv1.weight[kept])
    assert torch.equal(net.bn.running_var, dense.bn.running_var[kept])
    assert torch.equal(net.conv2.weight, dense.conv2.weight[:, kept])
    assert torch.equal(net.table, dense.table[kept])
    assert torch.equal(net.tables["a"], dense.tables["a"][kept])
    assert torch.equal(net.gate, dense.gate[kept])
    assert net.conv3.weight is net.conv2.weight
    assert isinstance(net.conv1.weight, nn.Parameter)
    assert not isinstance(net.table, nn.Parameter)
    assert (net.conv1.out_channels, net.bn.num_features, net.conv2.in_channels) == (4, 4, 4)
    assert net.feature_info[0]["num_chs"] == 4
    assert net.widths == (4, 4)
    assert net.tables["size"] == 4
    assert net(torch.randn(2, 3, 5, 5)).shape == (2, 4)
    assert "gate" not in net.state_dict()


def test_the_pruned_net_is_the_silenced_dense_net_after_a_dense_forward_filled_the_cache():
    dense = ConvNet().double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    dense(x)
    net = copy.deepcopy(dense)
    cut_(net, groups=[CONV], attributes=EDITS, folds=[])
    with torch.no_grad():
        dense.conv2.weight[:, [1, 3, 4, 6]] = 0
    dense.cache.clear()
    torch.testing.assert_close(net(x), dense(x), rtol=1e-12, atol=1e-12)


def test_requires_grad_dtype_memory_format_and_marks_survive():
    net = ConvNet().to(memory_format=torch.channels_last)
    net.conv1.weight.requires_grad = False
    net.conv1.weight.mark = "no decay"
    net.bn.half()
    cut_(net, groups=[CONV], attributes=EDITS, folds=[])
    assert not net.conv1.weight.requires_grad
    assert net.conv2.weight.requires_grad
    assert net.conv1.weight.mark == "no decay"
    assert net.bn.weight.dtype is torch.float16
    assert net.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not net.conv1.weight.is_contiguous()


def test_a_cut_works_without_values_on_the_meta_device():
    net = ConvNet().to("meta")
    cut_(
        net, groups=[CONV], attributes=EDITS, folds=[ScaleFold(group="conv1", tensor="bn.bias", dim=0, positions=(2,))]
    )
    assert net.conv1.weight.shape == (4, 3, 3, 3)
    assert net.bn.bias.is_meta


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.qkv = nn.Linear(6, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, self.head_dim).permute(1, 0, 2, 3)
        return F.scaled_dot_product_attention(q, k, v)


def test_heads_leave_a_fused_qkv_and_the_scale_is_folded_into_q():
    net = Attention().double()
    dense = copy.deepcopy(net)
    head_dim = PlannedGroup(
        name="d",
        kind="head_dim",
        width=4,
        keep=(1, 2, 3),
        members=(
            at("qkv.weight", stride=1, loops=((2, 4),)),
            at("qkv.bias", stride=1, loops=((2, 4),)),
            at("qkv.weight", offset=8, loops=((2, 4),)),
            at("qkv.bias", offset=8, loops=((2, 4),)),
            at("qkv.weight", offset=16, loops=((2, 4),)),
            at("qkv.bias", offset=16, loops=((2, 4),)),
        ),
    )
    folds = [ScaleFold(group="d", tensor=f"qkv.{n}", dim=0, positions=tuple(range(8))) for n in ("weight", "bias")]
    edits = [AttributeEdit(module="", name="head_dim", before=4, after=3)]
    cut_(net, groups=[head_dim], attributes=edits, folds=folds)
    rows = [j for j in range(24) if j % 4]
    factor = torch.ones(24, dtype=torch.float64)
    factor[:8] = math.sqrt(3 / 4)
    torch.testing.assert_close(net.qkv.weight, (dense.qkv.weight * factor[:, None])[rows], rtol=1e-15, atol=0)
    assert net.qkv.out_features == 18
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        dense.qkv.weight[::4] = 0
        dense.qkv.bias[::4] = 0
    torch.testing.assert_close(net(x), dense(x)[..., 1:], rtol=1e-12, atol=1e-12)


def test_a_fold_of_an_uncut_group_changes_nothing():
    net = Attention()
    before = net.qkv.weight.clone()
    whole = PlannedGroup(name="d", kind="head_dim", width=4, keep=(0, 1, 2, 3), members=(at("qkv.weight"),))
    folds = [ScaleFold(group=g, tensor="qkv.weight", dim=0, positions=(0,)) for g in ("d", "elsewhere")]
    cut_(net, groups=[whole], attributes=[], folds=folds)
    assert torch.equal(net.qkv.weight, before)


def _group(*members: Member, width: int = 8, keep: tuple[int, ...] = (0,)) -> PlannedGroup:
    return PlannedGroup(name="g", kind="channels", width=width, keep=keep, members=members)


@pytest.mark.parametrize(
    ("groups", "edits", "folds", "words"),
    [
        ([_group(at("conv9.weight"))], [], [], "no tensor 'conv9.weight'"),
        ([_group(at("conv2.weight"))], [], [], r"conv2.weight has shape \(4, 8, 1, 1\)"),
        ([_group(at("conv1.bias", 1))], [], [], "dimension 1"),
        ([_group(at("conv1.bias", stride=0, loops=((8, 1),)))], [], [], "nothing of dimension 0"),
        ([], [AttributeEdit(module="conv1", name="heads", before=1, after=2)], [], "no attribute 'conv1.heads'"),
        ([], [AttributeEdit(module="conv9", name="groups", before=1, after=2)], [], "no attribute 'conv9.groups'"),
        ([], [AttributeEdit(module="conv1", name="groups", before=2, after=1)], [], "conv1.groups is 1"),
        ([CONV], [], [ScaleFold(group="conv1", tensor="bn.bias", dim=0, positions=(8,))], "attention scale"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_the_model_left_as_it_was(groups, edits, folds, words):
    net = ConvNet()
    before = {name: tensor.clone() for name, tensor in named_tensors(net).items()}
    with pytest.raises(UnsupportedError, match=words):
        cut_(net, groups=[CONV, *groups], attributes=edits, folds=folds)
    after = named_tensors(net)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_derived_tensors_count_as_cache():
    net = ConvNet()
    net.cache["sum"] = torch.ones(2)
    clear_caches_(net)
    assert net.cache == {}
    assert net.tables["size"] == 8
    net.cache["sum"] = torch.ones(2)
    clear_caches_(net, keep=frozenset({"cache[sum]"}))
    assert list(net.cache) == ["sum"]


# ---------------------------------------------------------------------------------------------- structure


def _reloaded(plain: nn.Module, pruned: nn.Module) -> nn.Module:
    """The pruned module again, from its structure (through JSON) and its tensors."""
    structure = Structure.model_validate_json(structure_of(plain, pruned).model_dump_json())
    shape_(plain, structure)
    held = named_tensors(pruned)
    fill_(plain, pruned.state_dict() | {name: held[name] for name in structure.extra})
    return plain


def test_structure_brings_back_tables_tied_weights_and_container_types():
    pruned = ConvNet().eval()
    cut_(pruned, groups=[CONV], attributes=EDITS, folds=[])
    structure = structure_of(ConvNet(), pruned)
    assert set(structure.extra) == {"table", "gate", "tables[a]"}
    assert structure.attributes["conv1"] == {"out_channels": 4}
    assert structure.attributes[""]["widths"] == [4, 4]
    again = _reloaded(ConvNet().eval(), pruned)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(again(x), pruned(x))
    assert again.conv3.weight is again.conv2.weight
    assert again.widths == (4, 4)
    assert again.feature_info == pruned.feature_info


def test_equal_models_have_no_structure():
    assert structure_of(ConvNet(), ConvNet()) == Structure()


@pytest.mark.parametrize(
    ("name", "sister", "smaller"),
    [
        ("resnet50", "resnet50", {"base_width": 24}),
        ("regnety_002", "regnety_002", {"output_stride": 16}),
        ("convnext_atto", "convnext_atto", {"dims": (16, 24, 32, 40)}),
        ("densenet121", "densenet121", {"growth_rate": 16}),
        ("mobilenetv3_small_100", "mobilenetv3_small_075", {}),
        ("mobilenetv2_100", "mobilenetv2_050", {}),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224", {"embed_dim": 96, "num_heads": 2, "mlp_ratio": 3.0}),
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", {"embed_dim": 48, "num_heads": (1, 2, 4, 8)}),
        ("levit_128s", "levit_128s", {"embed_dim": (64, 96, 128), "num_heads": (2, 3, 4)}),
    ],
)
def test_structure_turns_a_timm_model_into_its_smaller_sister(name, sister, smaller):
    pruned = timm.create_model(sister, num_classes=10, **smaller).eval()
    plain = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        plain(x)  # fills what caches there are
        expected = pruned(x)
        again = _reloaded(plain, pruned)
        assert torch.equal(again(x), expected)
    assert again.feature_info == pruned.feature_info
    assert structure_of(again, pruned) == Structure()
    assert str(again) == str(pruned)


def test_the_shaped_module_takes_a_strict_load_with_assign():
    pruned = timm.create_model("resnet50", base_width=24).eval()
    plain = timm.create_model("resnet50")
    shape_(plain, structure_of(plain, pruned))
    assert plain.layer1[0].conv1.weight.is_meta
    plain.load_state_dict(pruned.state_dict(), strict=True, assign=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), pruned(x))


def test_structure_that_does_not_fit_is_refused():
    other, larger = ConvNet(), ConvNet()
    other.conv2 = nn.Identity()
    larger.more = nn.Identity()
    with pytest.raises(UnsupportedError, match="Module 'conv2'"):
        structure_of(ConvNet(), other)
    with pytest.raises(UnsupportedError, match="no module 'more'"):
        structure_of(ConvNet(), larger)
    with pytest.raises(UnsupportedError, match="no module 'conv9'"):
        shape_(ConvNet(), Structure(attributes={"conv9": {"groups": 2}}))
    with pytest.raises(UnsupportedError, match="no tensor 'x'"):
        shape_(ConvNet(), Structure(tensors={"x": (1,)}))
    with pytest.raises(UnsupportedError, match="table has shape"):
        shape_(ConvNet(), Structure(tensors={"table": (1, 1)}))


def test_fill_is_strict():
    net = ConvNet()
    state = net.state_dict()
    with pytest.raises(UnsupportedError, match=r"1 tensors .* first is conv1.bias"):
        fill_(ConvNet(), {name: value for name, value in state.items() if name != "conv1.bias"})
    with pytest.raises(UnsupportedError, match="no tensor 'head'"):
        fill_(ConvNet(), state | {"head": torch.zeros(1)})
    with pytest.raises(UnsupportedError, match=r"conv1.bias is \(9,\)"):
        fill_(ConvNet(), state | {"conv1.bias": torch.zeros(9)})
    shape_(net, Structure(tensors={"table": (4,)}))
    with pytest.raises(UnsupportedError, match="no values, the first is table"):
        fill_(net, state)
    untied = {name: value for name, value in state.items() if name != "conv3.weight"}
    again = ConvNet()
    fill_(again, untied)
    assert torch.equal(again.conv3.weight, state["conv2.weight"])


def test_structure_values_survive_json_and_keep_their_types():
    plain, pruned = ConvNet(), ConvNet()
    pruned.mixed = {"sizes": (1, 2.5), "flag": True, "none": None, 3: torch.Size([2])}
    pruned.code = print
    plain.mixed = {"sizes": (7, 7), "flag": False, "none": 1, 3: torch.Size([9])}
    plain.code = len
    structure = structure_of(plain, pruned)
    assert json.loads(structure.model_dump_json())["attributes"] == {"": structure.attributes[""]}
    assert "code" not in structure.attributes[""]
    shape_(plain, structure)
    assert plain.mixed == pruned.mixed
    assert isinstance(plain.mixed["sizes"], tuple)
    assert isinstance(plain.mixed[3], torch.Size)


@pytest.mark.parametrize(
    ("module", "leaf", "name"), [("layer1.0.conv1", "weight", "layer1.0.conv1.weight"), ("", "scale", "scale")]
)
def test_a_tensor_is_named_after_its_module(module: str, leaf: str, name: str):
    assert tensor_name(module, leaf) == name
    assert module_of(name) == module
