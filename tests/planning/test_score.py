from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from prunecli.errors import PruneError, UsageError
from prunecli.planning.score import CRITERIA, score_groups
from prunecli.recipe.settings import Criterion
from prunecli.values.groups import Group, IndexMap, Member

WIDTH = 5


def at(tensor: str, dim: int, role: str, **index) -> Member:
    return Member(tensor=tensor, dim=dim, role=role, index=IndexMap(**index))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "a.weight": draw(5, 3, 2, 2),
        "a.bias": draw(5),
        "bn.weight": draw(5),
        "bn.bias": draw(5),
        "bn.running_mean": draw(5),
        "bn.running_var": draw(5).abs(),
        "b.weight": draw(4, 7, 1, 1),  # channels at 2 … 6 of its inputs
        "c.weight": draw(5, 6),
        "qkv.weight": draw(3 * 5 * 2, 8),
        "norm.weight": draw(5),
    }


GROUP = Group(
    name="g",
    kind="channels",
    width=WIDTH,
    members=(
        at("a.weight", 0, "out"),
        at("a.bias", 0, "elementwise"),
        at("bn.weight", 0, "elementwise"),
        at("bn.bias", 0, "elementwise"),
        at("bn.running_mean", 0, "elementwise"),
        at("bn.running_var", 0, "elementwise"),
        at("b.weight", 1, "in", offset=2),
        at("c.weight", 0, "out"),
    ),
)
HEADS = Group(
    name="heads",
    kind="heads",
    width=WIDTH,
    members=(at("qkv.weight", 0, "out", stride=2, loops=((3, 10), (2, 1))),),
)


def filters(tensors, j: int) -> list[torch.Tensor]:
    """Channel j's producing weights, picked by hand."""
    return [tensors["a.weight"][j].double().flatten(), tensors["c.weight"][j].double()]


def naive(tensors, criterion: str, gradients=None) -> list[float]:
    """The formulas, one channel and one number at a time."""
    everything = [[f.tolist() for f in filters(tensors, j)] for j in range(WIDTH)]
    squares = [sum(v * v for f in channel for v in f) for channel in everything]
    if criterion == "l1":
        return [sum(abs(v) for f in channel for v in f) for channel in everything]
    if criterion == "l2":
        return [math.sqrt(s) for s in squares]
    if criterion == "group_norm":
        reads = [sum(float(v) ** 2 for v in tensors["b.weight"][:, 2 + j].flatten().double()) for j in range(WIDTH)]
        sums = [(s + r) / 3 for s, r in zip(squares, reads, strict=True)]
        return [s / (sum(sums) / WIDTH) for s in sums]
    if criterion == "bn_scale":
        return [abs(float(v)) for v in tensors["bn.weight"]]
    if criterion == "lamp":
        return [s / sum(other for other in squares if other >= s) for s in squares]
    if criterion == "fpgm":
        return [
            sum(math.dist(everything[j][k], everything[i][k]) for i in range(WIDTH) for k in (0, 1))
            for j in range(WIDTH)
        ]
    assert criterion == "taylor"
    totals = [0.0] * WIDTH
    for name, gradient in gradients.items():
        product = tensors[name].double() * gradient.double()
        for j in range(WIDTH):
            share = product[:, 2 + j] if name == "b.weight" else product[j]
            totals[j] += abs(float(share.sum()))
    return totals


@pytest.mark.parametrize("criterion", ["l1", "l2", "group_norm", "bn_scale", "lamp", "fpgm", "taylor"])
def test_each_criterion_equals_its_naive_twin(tensors, criterion):
    names = ("a.weight", "a.bias", "bn.weight", "bn.bias", "b.weight", "c.weight")
    gradients = {name: torch.randn_like(tensors[name]) for name in names}
    scores = score_groups([GROUP], tensors, criterion=criterion, gradients=gradients)
    assert list(scores) == ["g"]
    assert scores["g"].dtype is torch.float64
    assert scores["g"].tolist() == pytest.approx(naive(tensors, criterion, gradients), rel=1e-9)


def test_the_paper_ranks_filters_by_their_l1_norm(tensors):
    one = Group(name="conv", kind="channels", width=5, members=(at("a.weight", 0, "out"),))
    scores = score_groups([one], tensors, criterion="l1")["conv"]
    rows = tensors["a.weight"].abs().flatten(1)
    torch.testing.assert_close(scores.float(), rows.sum(1))
    assert torch.equal(scores.argsort(), rows.mean(1).argsort())


def test_a_head_owns_all_its_rows_of_a_fused_weight(tensors):
    scores = score_groups([HEADS], tensors, criterion="l1")["heads"]
    weight = tensors["qkv.weight"].view(3, 5, 2, 8)
    torch.testing.assert_close(scores.float(), weight.abs().sum((0, 2, 3)))


def test_lamp_is_one_at_the_top_and_equal_filters_count_in_order():
    tensors = {"w": torch.ones(4, 2)}
    group = Group(name="g", kind="channels", width=4, members=(at("w", 0, "out"),))
    scores = score_groups([group], tensors, criterion="lamp")["g"]
    assert scores.tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert score_groups([group], {"w": torch.zeros(4, 2)}, criterion="lamp")["g"].tolist() == [0] * 4


def test_random_repeats_with_its_generator_and_spans_the_unit_interval():
    wide = Group(name="g", kind="channels", width=1000, members=())
    draws = [
        score_groups([wide], {}, criterion="random", generator=torch.Generator().manual_seed(seed))["g"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert 0 <= draws[0].min() < 0.01 < 0.99 < draws[0].max() < 1


def test_groups_without_batch_norm_are_left_out(tensors):
    assert list(score_groups([GROUP, HEADS], tensors, criterion="bn_scale")) == ["g"]
    layer_norm = Group(name="ln", kind="channels", width=5, members=(at("norm.weight", 0, "elementwise"),))
    with pytest.raises(UsageError, match="bn_scale"):
        score_groups([HEADS, layer_norm], tensors, criterion="bn_scale")


def test_an_axis_that_nothing_produces_is_ranked_by_what_reads_it(tensors):
    group = Group(name="g", kind="channels", width=5, members=(at("b.weight", 1, "in", offset=2),))
    scores = score_groups([group], tensors, criterion="l1")["g"]
    torch.testing.assert_close(scores.float(), tensors["b.weight"][:, 2:].abs().sum((0, 2, 3)))


def test_bad_requests_are_named(tensors):
    with pytest.raises(UsageError, match="Did you mean 'taylor'"):
        score_groups([GROUP], tensors, criterion="tailor")
    with pytest.raises(ValueError, match="gradients"):
        score_groups([GROUP], tensors, criterion="taylor")
    with pytest.raises(ValueError, match="generator"):
        score_groups([GROUP], tensors, criterion="random")
    tensors["a.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(PruneError, match="group g are not finite"):
        score_groups([GROUP], tensors, criterion="l1")


def test_the_recipe_knows_exactly_these_criteria():
    assert set(get_args(Criterion)) == {"auto", *CRITERIA}
