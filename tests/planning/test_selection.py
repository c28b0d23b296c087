"""Channels by what their readers lose: selections and curves against least squares written out, shares by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunecli.graph.build import build_graph
from prunecli.measure.branch_shares import branch_shares
from prunecli.measure.layer_inputs import input_statistics
from prunecli.planning.reader_views import View, views_of
from prunecli.planning.selection import forward_scores, refit_losses, variance_scores
from toys.blocks import Attention
from toys.half_plans import random
from toys.user_nets import Residual


def view(rows: int, inputs: int, *, at: Tensor | None = None, seed: int = 0) -> View:
    mix = random(inputs, inputs, seed=seed, dtype=torch.float64)
    at = torch.arange(inputs)[:, None] if at is None else at
    weight = random(rows, inputs, seed=seed + 1, dtype=torch.float64)
    return View(A=weight, S=mix @ mix.T, channels=torch.arange(len(at)), at=at)


def unexplained(view: View, kept: list[int]) -> float:
    """The reader's error, if the inputs of these channels and of other groups are kept and the rest is regressed."""
    own = set(view.at.flatten().tolist())
    P = [i for i in range(len(view.S)) if i not in own] + view.at[kept].flatten().tolist()
    S = view.ridged(1e-3).S
    rest = S - S[:, P] @ torch.linalg.inv(S[P][:, P]) @ S[P] if P else S
    return float(((view.A @ rest) * view.A).sum())


@pytest.mark.parametrize(
    "at",
    [torch.arange(6)[:, None], torch.tensor([[0, 3], [1, 4], [2, 5]]), torch.tensor([[4], [1], [2]])],
    ids=["channels", "heads of two inputs", "three of six inputs are another group's"],
)
def test_a_curve_is_the_error_of_least_squares_at_every_width(at):
    views = [view(5, 6, at=at), view(3, 6, at=at, seed=7)]
    order = torch.randperm(len(at), generator=torch.Generator().manual_seed(3)).tolist()
    curve = refit_losses(views, order)
    for removed in range(len(at) + 1):
        want = sum(unexplained(v, order[removed:]) for v in views)
        assert float(curve[removed]) == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("at", [torch.arange(6)[:, None], torch.tensor([[0, 3], [1, 4], [2, 5]])], ids=["1", "2"])
def test_forward_selection_takes_what_leaves_the_least_unexplained(at):
    views = [view(5, 6, at=at), view(3, 6, at=at, seed=7)]
    scores = forward_scores(views, len(at))
    taken: list[int] = []
    for _ in range(len(at)):
        left = [channel for channel in range(len(at)) if channel not in taken]
        taken.append(min(left, key=lambda channel: sum(unexplained(v, [*taken, channel]) for v in views)))
    assert scores.argsort(descending=True).tolist() == taken


def test_a_copy_is_worth_its_energy_by_variance_and_nothing_to_forward_selection():
    x = random(200, 3, dtype=torch.float64) * torch.tensor([3.0, 1.0, 2.0])
    rows = torch.cat([x, x[:, :1]], 1)  # the last is the first again
    one = View(
        A=torch.ones(1, 4).double(), S=rows.T @ rows / 200, channels=torch.arange(4), at=torch.arange(4)[:, None]
    )
    assert variance_scores([one], 4).argsort(descending=True).tolist()[2:] == [2, 1]
    assert forward_scores([one], 4).argsort(descending=True).tolist()[1:3] == [2, 1]


def test_wide_groups_are_taken_in_blocks_and_every_channel_has_a_place():
    scores = forward_scores([view(4, 250)], 250)
    assert sorted(scores.tolist()) == list(range(1, 251))


class Pair(nn.Module):
    """A residual branch whose output is three times what it is added to, and a head that nothing is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = nn.Conv2d(2, 2, 1, bias=False), nn.Linear(2, 3)
        nn.init.dirac_(self.branch.weight)
        self.branch.weight.data *= 3

    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x.clone())
        return self.head(x.mean((2, 3)))


def test_a_branch_share_is_its_energy_in_the_sum_even_in_place():
    shares = branch_shares(Pair().eval(), random(8, 2, 4, 4), ["branch", "head"])
    assert shares == {"branch": pytest.approx(9 / 16, rel=1e-5), "head": 1.0}


def test_views_measure_an_error_against_the_sum_that_the_output_flows_into():
    torch.manual_seed(0)
    model = Residual().eval()
    graph = build_graph(model, (1, 8, 8))
    statistics = input_statistics(model, graph.groups, [random(16, 1, 8, 8)])
    for group in graph.groups:
        for one in views_of(model, statistics, group):
            energy = float(((one.A @ one.S) * one.A).sum())
            assert any(energy == pytest.approx(inputs.share, rel=1e-3) for inputs in statistics.layers.values())


def test_a_head_is_weighed_as_all_that_the_projection_reads_of_it():
    torch.manual_seed(0)
    model = Attention(3, 3).eval()
    graph = build_graph(model, (3, 8, 8))
    statistics = input_statistics(model, graph.groups, [random(16, 3, 8, 8)])
    heads = next(group for group in graph.groups if group.kind == "heads")
    (one,) = views_of(model, statistics, heads)
    assert one.at.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
