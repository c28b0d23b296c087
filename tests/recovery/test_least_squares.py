"""Least-squares reconstruction: against torch.linalg.lstsq, exact cases, and every kind of reader."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunecli.measure.layer_inputs import input_statistics
from prunecli.measure.moments import Moments
from prunecli.recovery.least_squares import find_readers, reconstruct_, solve
from prunecli.surgery.cut import cut
from toys.blocks import Attention, GroupedBottleneck
from toys.half_plans import Standardised, half_plan, random
from toys.user_nets import Residual


@pytest.fixture
def unshrunk(monkeypatch):
    """The sample is taken at its word, so that what is exact is exact."""
    monkeypatch.setattr(Moments, "shrinkage", property(lambda self: torch.zeros_like(self._squares)))


def solved(rows: Tensor, kept, *, ridge: float, affine: bool) -> tuple[Tensor, Tensor]:
    moments = Moments(about_zero=not affine)
    for part in rows.split(7):
        moments.add(part[None, :, None])
    return solve(moments.second[0], moments.mean[0], kept, ridge=ridge, affine=affine)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_the_solution_is_that_of_lstsq_on_stacked_rows(affine, ridge):
    """The ridge as rows of their own, the affine term as a column of ones that has no ridge."""
    rows = random(50, 6, dtype=torch.float64) @ random(6, 6, seed=1, dtype=torch.float64) + 3
    P = [0, 2, 5]
    x = rows[:, P]
    spread = x - x.mean(0) if affine else x
    level = ridge * spread.square().sum(0).mean()
    A = torch.cat([x, level.sqrt() * torch.eye(3, dtype=torch.float64)])
    y = torch.cat([rows, torch.zeros(3, 6, dtype=torch.float64)])
    if affine:
        A = torch.cat([A, torch.cat([torch.ones(50, 1), torch.zeros(3, 1)]).double()], dim=1)
    want = torch.linalg.lstsq(A, y).solution
    B, c = solved(rows, P, ridge=ridge, affine=affine)
    torch.testing.assert_close(B, want[:3].T)
    torch.testing.assert_close(c, want[3] if affine else torch.zeros(6, dtype=torch.float64))


def test_a_mean_that_is_large_against_the_spread_costs_no_digits():
    rows = random(40, 3, dtype=torch.float64)
    B, _ = solved(rows, [0, 1], ridge=0, affine=True)
    far, _ = solved(rows + 1e7, [0, 1], ridge=0, affine=True)
    torch.testing.assert_close(far, B, rtol=1e-6, atol=1e-6)


def test_uncorrelated_channels_give_a_selection_and_dead_ones_have_no_say():
    rows = torch.zeros(8, 4, dtype=torch.float64)
    rows[range(8), [0, 0, 1, 1, 2, 2, 0, 1]] = torch.tensor([1, -1, 1, -1, 1, -1, 0, 0], dtype=torch.float64)
    B, c = solved(rows, [0, 1, 3], ridge=0, affine=True)
    want = torch.zeros(4, 3, dtype=torch.float64)
    want[0, 0] = want[1, 1] = 1
    torch.testing.assert_close(B, want)
    torch.testing.assert_close(c, torch.zeros(4, dtype=torch.float64))


class Copies(nn.Module):
    """Every odd channel is the even one before it, a multiple plus a constant; conv, then flattened, then linear."""

    def __init__(self, *, norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.mid = nn.Conv2d(6, 6, 3, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc = nn.Linear(6 * 4, 5)
        with torch.no_grad():
            for layer in (self.conv, self.mid):
                layer.weight[1::2] = 2 * layer.weight[::2]
                if layer.bias is not None:
                    layer.bias[1::2] = layer.bias[::2] - 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.mid(self.conv(x))).flatten(1))


@pytest.mark.parametrize("kwargs", [{}, {"norm": True, "bias": False}], ids=["bias", "running mean"])
def test_removed_channels_that_are_combinations_of_kept_ones_lose_nothing(kwargs, unshrunk):
    """Readers: a convolution and a flattened feature map, with the affine term in a bias and in a running mean."""
    torch.manual_seed(0)
    model = Copies(**kwargs).eval()
    plan = half_plan(model, (2, 6, 6))
    pruned, images = cut(model, plan), random(32, 2, 6, 6)
    broken = float((pruned(images) - model(images)).detach().abs().max())
    done = reconstruct_(pruned, model, plan, input_statistics(model, plan.groups, images.split(8)), ridge=0)
    assert done.layers == ("mid", "fc")
    assert not done.left
    assert broken > 0.1
    torch.testing.assert_close(pruned(images), model(images), rtol=1e-4, atol=1e-4)


def test_every_reader_of_a_residual_stream_is_solved_on_its_own():
    """Against the obvious: unfold what the dense layer reads, stack it, solve, contract."""
    torch.manual_seed(0)
    model = Residual().eval()
    plan = half_plan(model, (1, 8, 8))
    pruned, images = cut(model, plan), random(16, 1, 8, 8)
    as_cut = copy.deepcopy(pruned)
    statistics = input_statistics(model, plan.groups, [images])
    done = reconstruct_(pruned, model, plan, statistics, ridge=1e-3)
    readers = ("blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head")
    assert done.layers == readers
    held: dict[str, Tensor] = {}
    for name in readers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, n=name: held.update({n: given[0]}))
    model(images)
    for name in readers[:-1]:
        rows = held[name].movedim(1, -1).flatten(1, 2).double()[None]
        moments = Moments(about_zero=False)
        moments.add(rows)
        B, c = solve(moments.shrunk[0], moments.mean[0], range(0, 12, 2), ridge=1e-3, affine=True)
        W = model.get_submodule(name).weight.double()[::2]
        want = torch.einsum("nhij,hp->npij", W, B).float()
        torch.testing.assert_close(pruned.get_submodule(name).weight, want, rtol=1e-3, atol=1e-5)
        norm = name.replace("conv", "bn")
        shift = pruned.get_submodule(norm).running_mean - as_cut.get_submodule(norm).running_mean
        torch.testing.assert_close(shift, -torch.einsum("nhij,h->n", W, c).float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("group", "kept"), [("qkv:heads", (0, 1, 2, 3)), ("qkv:head_dim", (0, 2, 4, 6))])
def test_the_out_projection_of_an_attention_reads_heads_times_width(group, kept, unshrunk):
    """The removed channels say what the kept ones say: equal heads, or values in pairs (half of a query zero)."""
    torch.manual_seed(0)
    model = Attention(3, 3).eval()
    with torch.no_grad():
        for tensor in (model.qkv.weight, model.qkv.bias):
            q_k_v = tensor.view(3, 2, 4, *tensor.shape[1:])
            if group == "qkv:heads":
                q_k_v[:, 1] = q_k_v[:, 0]
            else:
                q_k_v[0, :, 1::2] = 0
                q_k_v[2, :, 1::2] = 2 * q_k_v[2, :, ::2]
    plan = half_plan(model, (3, 8, 8), group, f"{group}#2")
    images = random(16, 3, 8, 8)
    statistics = input_statistics(model, plan.groups, images.split(8))
    found, left = find_readers(model, plan, statistics)
    assert {name: reader.kept for name, reader in found.items()} == {"proj": kept}
    assert not left
    pruned = cut(model, plan)
    broken = float((pruned(images) - model(images)).detach().abs().max())
    reconstruct_(pruned, model, plan, statistics, ridge=0)
    assert broken > 0.01
    torch.testing.assert_close(pruned(images), model(images), rtol=1e-3, atol=1e-3)


def test_a_grouped_reader_is_solved_block_by_block(unshrunk):
    torch.manual_seed(0)
    model = GroupedBottleneck(3, 6).eval()
    with torch.no_grad():  # conv2 reads two channels a block; the second is a multiple of the first
        model.conv1.weight[1::2] = 3 * model.conv1.weight[::2]
        model.conv1.bias[1::2] = 3 * model.conv1.bias[::2]
    inside = half_plan(model, (3, 8, 8), "conv1#2")
    pruned, images = cut(model, inside), random(8, 3, 8, 8)
    reconstruct_(pruned, model, inside, input_statistics(model, inside.groups, [images]), ridge=0)
    torch.testing.assert_close(pruned(images), model(images), rtol=1e-4, atol=1e-5)
    both = half_plan(model, (3, 8, 8), "conv1#2", "conv1")  # every second block leaves too
    fewer = cut(model, both)
    statistics = input_statistics(model, both.groups, [images])
    assert find_readers(model, both, statistics)[0]["conv2"].blocks == (0, 2)
    reconstruct_(fewer, model, both, statistics, ridge=0)
    torch.testing.assert_close(fewer.conv2.weight, pruned.conv2.weight[[0, 1, 2, 6, 7, 8]])


class Unusual(nn.Module):
    """Readers that are left alone: functional use, a shared weight, a standardised one, another kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.functional = nn.Conv2d(4, 3, 1)
        self.standard = Standardised(4, 3, 1)
        self.once, self.again = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.again.weight = self.once.weight
        self.other = nn.ConvTranspose2d(4, 3, 1)
        self.plain = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.conv2d(x, self.functional.weight, self.functional.bias)
        y = y + self.standard(x) + self.once(x) + self.again(x) + self.other(x) + self.plain(x)
        return y.mean((2, 3))


def test_what_cannot_be_solved_is_left_alone_and_named():
    torch.manual_seed(0)
    model = Unusual().eval()
    plan = half_plan(model, (1, 4, 4))
    pruned = cut(model, plan)
    before = copy.deepcopy(pruned.state_dict())
    statistics = input_statistics(model, plan.groups, [random(8, 1, 4, 4)])
    done = reconstruct_(pruned, model, plan, statistics, ridge=1e-3)
    assert done.layers == ("plain",)
    assert dict(done.left) == {
        "functional": "the forward pass does not call it as a module",
        "standard": "its output is not linear in its weight",
        "once": "its weight is shared",
        "again": "its weight is shared",
        "other": "it is neither Conv2d nor Linear",
    }
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"plain.weight", "plain.bias"}


def test_a_flattened_feature_map_too_wide_for_one_block_is_solved_position_by_position(monkeypatch, unshrunk):
    """Odd channels are multiples of even ones at every position, so nothing is lost by leaving the rest out."""
    monkeypatch.setattr("prunecli.measure.layer_inputs._WIDEST", 6)
    torch.manual_seed(0)
    model = Copies().eval()
    plan = half_plan(model, (2, 6, 6))
    pruned, images = cut(model, plan), random(32, 2, 6, 6)
    statistics = input_statistics(model, plan.groups, images.split(8))
    assert statistics.layers["fc"].blocks.index.tolist() == [
        [at, at + 4, at + 8, at + 12, at + 16, at + 20] for at in range(4)
    ]
    reconstruct_(pruned, model, plan, statistics, ridge=0)
    torch.testing.assert_close(pruned(images), model(images), rtol=1e-4, atol=1e-4)


def test_few_images_do_not_explain_a_wide_layer():
    """256 independent inputs, 24 images: the sample says that half of them explain the rest, which is not so."""
    moments = Moments(about_zero=False)
    moments.add(random(24, 256)[None, :, None])
    B, _ = solve(moments.shrunk[0], moments.mean[0], range(128), ridge=1e-3, affine=True)
    naive, _ = solve(moments.second[0], moments.mean[0], range(128), ridge=1e-3, affine=True)
    unseen = random(1000, 256, seed=1).double()
    error = (unseen - unseen[:, :128] @ B.T)[:, 128:].square().mean()
    assert error < 1.05
    assert (unseen - unseen[:, :128] @ naive.T)[:, 128:].square().mean() > 1.2
