"""Block-wise reconstruction: exact cases, what it must leave as it was, and nets of every kind."""

from __future__ import annotations

import copy
import json
import math
import random as python_random
from collections.abc import Mapping

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import prunecli.models.paper_nets  # noqa: F401 (registers cifar_resnet20)
from prunecli.recovery import blocks
from prunecli.recovery.blocks import BlockResult, Reconstruction, allot, reconstruct_blocks_
from prunecli.surgery.cut import cut
from prunecli.values.plan import Plan
from toys.blocks import CachedBias
from toys.half_plans import half_plan, random
from toys.jobs import JOB, call, sentence
from toys.user_nets import Residual


def smooth(count: int, *size: int) -> Tensor:
    """Images ``[N, C, H, W]`` that have something in common: a few patterns, mixed."""
    patterns = random(6, *size, seed=1)
    return torch.einsum("np,pchw->nchw", random(count, 6, seed=2), patterns) / 6**0.5


def reconstruct(
    pruned: nn.Module, dense: nn.Module, plan: Plan, images: Tensor, **changes: object
) -> tuple[Reconstruction, list[tuple[int, int, BlockResult]]]:
    told: list[tuple[int, int, BlockResult]] = []
    settings = {"steps": 20, "mirrored": False, "seed": 0, "tell": lambda *what: told.append(what)} | changes
    return reconstruct_blocks_(pruned, dense, plan, images, **settings), told


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def divergence(dense: nn.Module, net: nn.Module, images: Tensor) -> float:
    """KL divergence of the logits in nats."""
    teacher, student = (model.eval()(images).log_softmax(1) for model in (dense, net))
    return float(nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean"))


class Copies(nn.Module):
    """Every odd channel is twice the even one before it: what the cut takes away the rest can say."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=1, bias=False) for width in (2, 6, 6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in self.convs)
        self.head = nn.Linear(6, 5)
        with torch.no_grad():
            for conv, norm in zip(self.convs, self.norms, strict=True):
                conv.weight[1::2] = 2 * conv.weight[::2]
                norm.running_var[1::2] = 4 * norm.running_var[::2]
                norm.weight[1::2] = 2 * norm.weight[::2]

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.head(x.mean((2, 3)))


def test_a_cut_that_training_can_undo_is_undone():
    torch.manual_seed(0)
    model = Copies().eval()
    plan = half_plan(model, (2, 8, 8))
    pruned, images = cut(model, plan), random(48, 2, 6, 6)
    done, _ = reconstruct(pruned, model, plan, images, steps=150, mirrored=True)
    assert [block.name for block in done.blocks] == ["convs.0 to convs.1", "convs.2", "head"]
    for block in done.blocks:
        assert block.before > 20 * block.after, block
        assert block.after < 5e-3, block
    fresh = random(64, 2, 6, 6, seed=9)
    assert divergence(model, pruned, fresh) < 0.1 * divergence(model, cut(model, plan), fresh)


def test_nothing_changes_where_the_cut_removed_nothing():
    torch.manual_seed(0)
    model = Residual().eval()
    plan = half_plan(model, (1, 8, 8), "blocks.0.conv1", "blocks.1.conv1")
    with torch.no_grad():
        for block in model.blocks:
            block.bn1.weight[1::2] = block.bn1.bias[1::2] = 0
    pruned = cut(model, plan)
    before = copy.deepcopy(pruned.state_dict())
    done, told = reconstruct(pruned, model, plan, random(16, 1, 8, 8))
    assert same(pruned.state_dict(), before)
    assert [(block.steps, block.rate) for block in done.blocks] == [(0, None)] * 2
    assert done.rate is None
    assert [(number, count) for number, count, _ in told] == [(1, 2), (2, 2)]


def test_the_target_of_a_cut_stream_is_the_dense_output_at_its_kept_channels(monkeypatch):
    """Seen from inside: the tensors that the loss of each block is given."""
    torch.manual_seed(0)
    model = Residual().eval()
    plan = half_plan(model, (1, 8, 8))
    keep = (0, 1, 5, 7, 8, 11)
    stream = next(g.name for g in plan.groups if "stem.weight" in {m.tensor for m in g.members})
    groups = tuple(g.model_copy(update={"keep": keep}) if g.name == stream else g for g in plan.groups)
    plan = plan.model_copy(update={"groups": groups})
    pruned, images = cut(model, plan), smooth(48, 1, 8, 8)
    dense: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, made: dense.append(made.detach()))
    with torch.no_grad():
        model(torch.cat([images[:42], images[:42].flip(3)]))
    wanted = [made[:, keep] for made in dense]
    seen: list[Tensor] = []
    plain = blocks._kept
    monkeypatch.setattr(blocks, "_kept", lambda block, tensor: seen.append(plain(block, tensor)) or seen[-1])
    done, _ = reconstruct(pruned, model, plan, images, mirrored=True)
    assert len(done.blocks) == 3
    parts = [t for t in seen if len(t) in (64, 20)]  # of all training images, once a block, for the variance
    for found, target in zip((torch.cat(parts[:2]), torch.cat(parts[2:])), wanted, strict=True):
        torch.testing.assert_close(found, target)


NETS = {
    "resnet20": (lambda: timm.create_model("cifar_resnet20", num_classes=6), (3, 16, 16)),
    "vit": (lambda: timm.create_model("test_vit", num_classes=6, img_size=32), (3, 32, 32)),
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=6), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETS)
def test_nets_with_cut_streams_answer_more_like_the_dense_net(name):
    torch.manual_seed(0)
    make, size = NETS[name]
    model = make().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "gamma" in path:  # layer scale begins at 1e-6: without branches there is nothing to do
                parameter.fill_(1)
    plan = half_plan(model, size)
    pruned, images, fresh = cut(model, plan), smooth(72, *size), smooth(136, *size)[72:]
    damaged = divergence(model, pruned, fresh)
    done, _ = reconstruct(pruned, model, plan, images, steps=10, mirrored=True)
    assert len(done.blocks) >= 7
    assert all(block.after <= block.before for block in done.blocks)
    assert sum(block.rate is not None for block in done.blocks) > len(done.blocks) / 2
    assert divergence(model, pruned, fresh) < 0.8 * damaged


def test_the_seed_decides_and_everything_else_is_left_as_found():
    torch.manual_seed(0)
    model = Residual().train()
    model.blocks[0].bn1.eval()
    plan = half_plan(model, (1, 8, 8))
    pruned, images = cut(model, plan), smooth(24, 1, 8, 8)
    pruned.blocks[1].conv1.weight.requires_grad = False
    dense_before = copy.deepcopy(model.state_dict())
    statistics = {name: value.clone() for name, value in pruned.named_buffers()}
    found = []
    for seed in (0, 0, 1):
        net = copy.deepcopy(pruned)
        states = python_random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        reconstruct(net, model, plan, images, seed=seed)
        assert python_random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])
        torch.rand(3)  # the global generator has no say
        found.append(net)
    first, again, other = (net.state_dict() for net in found)
    assert same(first, again)
    assert not same(first, other)
    assert same(model.state_dict(), dense_before)
    for net in found:
        assert same(dict(net.named_buffers()), statistics)
        assert torch.equal(net.blocks[1].conv1.weight, pruned.blocks[1].conv1.weight)
        assert not torch.equal(net.blocks[1].conv2.weight, pruned.blocks[1].conv2.weight)
        for (name, parameter), (_, before) in zip(net.named_parameters(), pruned.named_parameters(), strict=True):
            assert parameter.requires_grad == before.requires_grad, name
            assert parameter.grad is None, name
        assert [m.training for m in net.modules()] == [m.training for m in pruned.modules()]


def test_a_block_that_no_rate_makes_better_keeps_its_weights(monkeypatch):
    monkeypatch.setattr(blocks, "RATES", (1e3, 1e4))
    torch.manual_seed(0)
    model = Residual().eval()
    plan = half_plan(model, (1, 8, 8))
    pruned = cut(model, plan)
    before = copy.deepcopy(pruned.state_dict())
    done, _ = reconstruct(pruned, model, plan, smooth(24, 1, 8, 8))
    assert same(pruned.state_dict(), before)
    assert {(block.steps, block.rate) for block in done.blocks} == {(0, None)}
    assert all(block.after == block.before for block in done.blocks)


def test_the_first_blocks_choose_the_rate_and_later_ones_may_take_a_lower_one(monkeypatch):
    monkeypatch.setattr(blocks, "RATES", (1e-4, 1e-2, 1e3))
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", num_classes=6).eval()
    plan = half_plan(model, (3, 16, 16))
    done, _ = reconstruct(cut(model, plan), model, plan, smooth(40, 3, 16, 16), steps=10)
    assert done.rate == 1e-2
    assert {block.rate for block in done.blocks} <= {1e-4, 1e-2, None}


def test_steps_go_where_the_error_is():
    assert allot([0.1, 0.2, 0.3], 100) == [50, 100, 150]
    assert allot([0.1, 0.0005, 0.1], 10) == [10, 0, 10]
    assert allot([0.01, 1.0, 0.01, 0.01, 0.01, 0.01], 100) == [25, 300, 25, 25, 25, 25]
    assert allot([0.0, math.nan], 10) == [0, 0]


def test_large_tensors_are_kept_in_half_precision_and_fewer_images_used(monkeypatch):
    torch.manual_seed(0)
    model = Residual().eval()
    plan = half_plan(model, (1, 8, 8))
    images = smooth(24, 1, 8, 8)
    whole, halves = cut(model, plan), cut(model, plan)
    full, _ = reconstruct(whole, model, plan, images)
    monkeypatch.setattr(blocks, "_LARGE", 0)
    done, _ = reconstruct(halves, model, plan, images)
    assert done.images == 24
    assert not same(whole.state_dict(), halves.state_dict())
    for one, other in zip(full.blocks, done.blocks, strict=True):
        assert one.after == pytest.approx(other.after, rel=0.02)
    monkeypatch.setattr(blocks, "_ROOM", 2 * 10 * 12 * 8 * 8)
    assert reconstruct(cut(model, plan), model, plan, images)[0].images == 10
    assert reconstruct(cut(model, plan), model, plan, images, mirrored=True)[0].images == 5


def test_what_a_forward_pass_caches_follows_the_weights():
    """LeViT keeps a table that it makes from a parameter: each step needs another one, with gradients of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(CachedBias(4, 4), nn.Conv2d(4, 6, 3), CachedBias(6, 6), nn.Flatten(), nn.Linear(6 * 64, 3))
    model[1] = nn.Conv2d(4, 6, 3, padding=1)
    model.eval()
    with torch.no_grad():
        for module in (model[0], model[2]):
            module.biases.normal_()
    plan = half_plan(model, (4, 8, 8))
    pruned, images = cut(model, plan), smooth(24, 4, 8, 8)
    before = pruned[2].biases.detach().clone()
    done, _ = reconstruct(pruned, model, plan, images, steps=60)
    assert any(block.rate for block in done.blocks)
    assert not torch.equal(pruned[2].biases, before)
    logits = pruned(images)
    for module in (pruned[0], pruned[2]):
        module.cache.clear()
    assert torch.equal(pruned(images), logits)


# ---------------------------------------------------------------------------------------------- as a step of a job


@pytest.mark.slow
def test_a_job_trains_blocks_and_says_so(tmp_path):
    done = call("compress", *JOB, "--epochs=0", "--criterion=l1", "--recover=lstsq,blocks", "recover.block_steps=4",
                f"--out={tmp_path / 'run'}")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    row = json.loads((tmp_path / "run" / "report.json").read_text())["recovery"][1]
    assert row["name"] == "blocks"
    assert " blocks trained in " in row["rule"]
    assert row["rule"].endswith("from 192 images"), "digits have no mirror images"
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "block"]
    assert [event["block"] for event in told] == list(range(1, told[0]["blocks"] + 1))
    assert f"block 1/{told[0]['blocks']} {told[0]['name']}: error " in done.stderr


def test_blocks_need_images(tmp_path):
    done = call("compress", "lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "--recover=blocks",
                f"--out={tmp_path / 'run'}")  # fmt: skip
    assert done.exit_code == 2
    assert "Recovery step blocks trains blocks" in sentence(done)
