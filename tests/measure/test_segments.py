"""A net in pieces: waists by hand, and pieces that compute what the whole net computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunecli.measure.dataflow import trace
from prunecli.measure.segments import Segments
from toys.blocks import Attention
from toys.half_plans import random
from toys.user_nets import Block, Residual


class Tokens(nn.Module):
    """Two outputs of a stem, positions that are computed once and read by every block, a token beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = WithSize()
        self.positions = nn.Embedding(16, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.blocks = nn.ModuleList([Layer() for _ in range(3)])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        x, (height, width) = self.stem(images)
        table = self.positions(torch.arange(height * width))
        x = torch.cat([self.token.expand(len(x), -1, -1), x + table], dim=1)
        for block in self.blocks:
            x = block(x, table)
        return self.head(self.drop(x[:, 0]))


class WithSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 2, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.conv(images)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y = self.norm(x)
        y[:, 1:] += table.tanh()
        return x + self.fc2(F.gelu(self.fc1(y)))


class Chain(nn.Sequential):
    """Activations that write in place, and a flattened feature map."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(inplace=True)), nn.Flatten(), nn.Linear(64, 4),
        )  # fmt: skip


NETS = {
    "residual": (lambda: Residual(8, 4), (1, 8, 8)),
    "chain": (Chain, (2, 8, 8)),
    "tokens": (Tokens, (2, 8, 8)),
    "attention": (lambda: nn.Sequential(Attention(2, 2), Attention(2, 2), nn.Flatten(), nn.Linear(128, 4)), (2, 8, 8)),
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = NETS[name]
    return make().eval(), random(5, *size)


@pytest.mark.parametrize(
    ("name", "waists"),
    [
        ("residual", ["stem", "blocks.0", "blocks.1"]),
        # an activation that writes into what the norm returned is none, nor is a flattening, which returns a view
        ("chain", ["0", "1", "3", "4.0", "4"]),
        ("tokens", ["stem.conv", "stem", "blocks.0", "blocks.1", "blocks.2"]),
        ("attention", ["0", "1"]),
    ],
)
def test_a_waist_is_where_all_that_follows_depends_on_one_tensor(name, waists):
    model, images = net(name)
    assert [waist.path for waist in trace(model, images[:1]).waists] == waists


@pytest.mark.parametrize("name", NETS)
def test_the_pieces_one_after_the_other_are_the_net(name):
    model, images = net(name)
    flow = trace(model, images[:1])
    ends = flow.waists
    with torch.no_grad():
        logits = model(images)
        for chosen in (ends, ends[::2], ends[-1:], ()):
            segments = Segments(model, flow, chosen, images[:1])
            assert len(segments) == len(chosen) + 1
            for part in (images, images[:2]):  # shapes are those of each number of images
                x = part
                for piece in range(len(segments)):
                    given = x.clone()
                    made = segments.run(piece, x)
                    assert torch.equal(x, given), "what a piece is given stays as it is"
                    x = made
                torch.testing.assert_close(x, logits[: len(part)])
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_piece_has_gradients_for_its_own_parameters_and_runs_no_other_module():
    model, images = net("residual")
    flow = trace(model, images[:1])
    segments = Segments(model, flow, flow.waists[:3], images[:1])
    x = segments.run(1, segments.run(0, images).detach())
    calls: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    segments.run(2, x.detach()).sum().backward()
    assert [call for call in calls if call != "stem"] == ["blocks.1.conv1", "blocks.1.conv2"]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"blocks.1.{name}" for name, _ in Block(8).named_parameters()
    }


def test_what_a_later_piece_reads_and_no_image_decides_is_computed():
    """Positions come from a module before the first waist; every block reads them."""
    model, images = net("tokens")
    flow = trace(model, images[:1])
    with torch.no_grad():
        segments = Segments(model, flow, flow.waists[2:3], images[:1])
        x = segments.run(0, images)
        model.positions.weight.mul_(2)
        changed = segments.run(1, x)
    table = model.positions.weight[:16]
    for block in model.blocks[1:]:
        x = block(x, table)
    torch.testing.assert_close(changed, model.head(x[:, 0]))
