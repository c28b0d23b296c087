"""Ties: derived from constraints by hand, found in networks, complete against a search over all widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunecli.graph.axes.elimination import Constraint
from prunecli.graph.axes.polynomials import Polynomial
from prunecli.graph.axes.shares import Shares, shares
from prunecli.graph.build import build_graph
from prunecli.values.groups import AttributeConflictError, Bundle, Graph, Tie
from toys.blocks import (
    INPUT,
    BranchOnWidth,
    ChunkMix,
    HalfAttribute,
    HeadWindows,
    HeldWidthAttention,
    Narrower,
    RotaryAttention,
    SharedAttention,
    Split,
    Stack,
    StreamAttention,
    TwiceAttribute,
    TwoCounts,
)

Product = tuple[int, ...]
STREAM, HEADS, WIDTH, VALUES, HEADS2, WIDTH2, OTHER = range(7)


def constraint(*products: Product, value: int = 0) -> Constraint:
    """Products of axes, each axis once; the empty product is a constant."""
    return Constraint(terms=tuple(tuple((v, 1) for v in sorted(p)) for p in products), value=value, reason="because")


def ties(found: Shares) -> list[list[dict[Product, int]]]:
    """Per tie and choice: axes → parts."""
    return [[{s.axes: s.parts for s in choice} for choice in tie] for tie in found.ties]


# ---------------------------------------------------------------------------------------------- from constraints


def test_equal_widths_are_one_bundle() -> None:
    found = shares({0: 8, 1: 8, 2: 5}, [constraint((0,), (1,))])
    assert ties(found) == [[{(0, 1): 8}]]
    assert not found.held


def test_proportional_widths_move_in_their_common_divisor() -> None:
    assert ties(shares({0: 12, 1: 18}, [constraint((0,), (1,))])) == [[{(0, 1): 6}]]


def test_a_product_gives_a_choice_of_its_factors() -> None:
    found = shares({STREAM: 192, HEADS: 3, WIDTH: 64}, [constraint((STREAM,), (HEADS, WIDTH))])
    assert ties(found) == [[{(STREAM,): 192}, {(HEADS,): 3, (WIDTH,): 64}]]


def test_query_and_value_widths_follow_each_other_but_not_the_heads() -> None:
    found = shares(
        {STREAM: 192, HEADS: 3, WIDTH: 64, VALUES: 64},
        [constraint((STREAM,), (HEADS, VALUES)), constraint((WIDTH,), (VALUES,))],
    )
    assert ties(found) == [[{(STREAM,): 192}, {(HEADS,): 3, (WIDTH, VALUES): 64}]]


def test_every_attention_on_a_stream_has_a_choice_of_its_own() -> None:
    found = shares(
        {STREAM: 96, HEADS: 3, WIDTH: 32, HEADS2: 6, WIDTH2: 16},
        [constraint((STREAM,), (HEADS, WIDTH)), constraint((STREAM,), (HEADS2, WIDTH2))],
    )
    assert ties(found) == [[{(STREAM,): 96}, {(HEADS,): 3, (WIDTH,): 32}, {(HEADS2,): 6, (WIDTH2,): 16}]]


def test_two_products_without_a_stream_are_two_choices() -> None:
    found = shares({HEADS: 4, WIDTH: 8, HEADS2: 2, WIDTH2: 16}, [constraint((HEADS, WIDTH), (HEADS2, WIDTH2))])
    assert ties(found) == [[{(HEADS,): 4, (WIDTH,): 8}, {(HEADS2,): 2, (WIDTH2,): 16}]]


def test_a_factor_shared_by_two_products_takes_both_along_or_leaves_both_to_the_others() -> None:
    found = shares(
        {STREAM: 24, HEADS: 4, WIDTH: 6, WIDTH2: 10, OTHER: 40},
        [constraint((STREAM,), (HEADS, WIDTH)), constraint((OTHER,), (HEADS, WIDTH2))],
    )
    assert ties(found) == [[{(STREAM,): 24}, {(HEADS, OTHER): 4, (WIDTH, WIDTH2, OTHER): 2}]]


def test_what_equals_a_constant_stays_and_what_hangs_on_it_too() -> None:
    found = shares({0: 8, 1: 8, 2: 4}, [constraint((0,), ()), constraint((0,), (1,))])
    assert not found.ties
    assert found.held == {0: "because", 1: "because"}


def test_a_product_with_a_fixed_factor_follows_the_other() -> None:
    # 128 = 4 * 32 and the 32 is a number: no choice
    assert ties(shares({STREAM: 128, HEADS: 4}, [constraint((STREAM,), (HEADS,))])) == [[{(STREAM, HEADS): 4}]]


def test_a_product_that_is_constant_holds_its_factors() -> None:
    assert set(shares({HEADS: 4, WIDTH: 8}, [constraint((HEADS, WIDTH), ())]).held) == {HEADS, WIDTH}


def test_without_a_common_divisor_nothing_moves() -> None:
    found = shares({0: 6, 1: 3, 2: 2}, [constraint((0,), (1,)), constraint((0,), (2,))])
    assert not found.ties
    assert set(found.held) == {0, 1, 2}
    assert "whole" in found.held[0]


def test_an_alternative_without_a_common_divisor_is_left_out() -> None:
    # 152 = 8 heads * 19, the heads in blocks of 2, 3 and 3: only the head width can shrink
    sizes = {STREAM: 152, 1: 2, 2: 3, 3: 3, 4: 19}
    found = shares(sizes, [constraint((STREAM,), (1, 4), (2, 4), (3, 4))])
    assert ties(found) == [[{(STREAM,): 152}, {(4,): 19}]]
    assert set(found.held) == {1, 2, 3}


def test_a_number_that_has_to_stay_whole_makes_steps_coarser() -> None:
    assert ties(shares({0: 8}, [constraint((0,), value=4)])) == [[{(0,): 4}]]


def test_an_axis_whose_square_is_held_to_a_width_cannot_shrink() -> None:
    square = Constraint(terms=(((0, 2),), ((1, 1),)), value=0, reason="because")
    assert set(shares({0: 4, 1: 16}, [square]).held) == {0, 1}


# ---------------------------------------------------------------------------------------------- polynomials


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(-5, 5))
def test_polynomials_compute_what_integers_do(sizes: list[int], number: int) -> None:
    values = dict(enumerate(sizes))
    a, b, c = map(Polynomial.variable, range(3))
    x, y, z = sizes
    assert ((a + b) * c - Polynomial.constant(number)).evaluate(values) == (x + y) * z - number
    assert (a * a - b * a).substituted({0: b + c}).evaluate(values) == (y + z) ** 2 - y * (y + z)
    solution = (a * b - c).solved_for(0)
    assert solution is not None
    assert solution.evaluate(values) == Fraction(z, y)
    assert (a * a - b).solved_for(0) is None
    assert (a * b + a * c).solved_for(0) is None
    assert (a - a).value == 0
    assert (a + b).value is None


# ---------------------------------------------------------------------------------------------- in networks


def graph_of(block: type[nn.Module]) -> Graph:
    return build_graph(Stack([block], [4]), INPUT)


def short(graph: Graph) -> list[list[dict[str, int]]]:
    return [
        [{" ".join(n.removeprefix("blocks.0.") for n in b.groups): b.parts for b in choice} for choice in tie.choices]
        for tie in graph.ties
    ]


class SharedHalf(nn.Module):
    """Two sums of widths are equal, with one width in both: only the others are tied."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.both, self.one, self.two = nn.Conv2d(chs, 6, 1), nn.Conv2d(chs, 4, 1), nn.Conv2d(chs, 4, 1)
        self.first, self.second = nn.Conv2d(10, width, 1), nn.Conv2d(10, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.cat([self.both(x), self.one(x)], 1), torch.cat([self.both(x), self.two(x)], 1)
        return self.first(a.view_as(b)) + self.second(b)


TIES: list[tuple[type[nn.Module], list[list[dict[str, int]]]]] = [
    (ChunkMix, [[{"conv conv#2": 4}]]),
    (HalfAttribute, [[{"conv conv#2": 4}]]),
    (TwiceAttribute, [[{"conv": 4}]]),
    (Narrower, [[{"narrow wide": 2}]]),
    (Split, []),
    (SharedHalf, [[{"one two": 4}]]),
    (RotaryAttention, [[{"qkv:head_dim qkv:head_dim#2": 2}]]),
    (StreamAttention, [[{"conv": 12}, {"qkv:heads": 3, "qkv:head_dim qkv:head_dim#2": 4}]]),
    (SharedAttention, [[{"conv": 12}, {"qkv:heads": 3, "qkv:head_dim qkv:head_dim#2": 4}]]),
    (HeldWidthAttention, [[{"conv qkv:heads": 3}]]),
    (HeadWindows, [[{"conv qkv:head_dim qkv:head_dim#2": 4}]]),
    (TwoCounts, []),
]


@pytest.mark.parametrize(("block", "expected"), TIES)
def test_ties_of_a_block(block: type[nn.Module], expected: list[list[dict[str, int]]]) -> None:
    assert short(graph_of(block)) == expected


def test_axes_that_no_tie_can_express_are_frozen_and_say_so() -> None:
    frozen = {(axis.name, axis.width): axis.reason for axis in graph_of(TwoCounts).frozen}
    assert "no share of it" in frozen["blocks.0.conv", 12]
    assert "no share of it" in frozen["blocks.0.qkv", 3]
    assert "compared with a number" in next(a.reason for a in graph_of(BranchOnWidth).frozen if a.width == 8)


class Compared(nn.Module):
    """A width that decides the path together with a number; the subclasses say how."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, 6, 1), nn.Conv2d(6, width, 1)
        self.out_chs = width

    def decide(self, channels: int) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.after(y) if self.decide(y.shape[1]) else self.after(y.relu())


class AtMost(Compared):
    def decide(self, channels: int) -> bool:
        return channels <= 6


class NotMore(Compared):
    def decide(self, channels: int) -> bool:
        return not channels > 6


class AtLeast(Compared):
    def decide(self, channels: int) -> bool:
        return channels >= 2


class Unlike(Compared):
    def decide(self, channels: int) -> bool:
        return channels != 2


class Some(Compared):
    def decide(self, channels: int) -> bool:
        return channels >= 1


class Other(Compared):
    def decide(self, channels: int) -> bool:
        return channels != 9


@pytest.mark.parametrize(
    ("block", "free"), [(AtMost, True), (NotMore, True), (AtLeast, False), (Unlike, False), (Some, True), (Other, True)]
)
def test_a_comparison_holds_a_width_only_where_a_cut_could_turn_it(block: type[nn.Module], free: bool) -> None:
    graph = graph_of(block)
    assert ("blocks.0.conv" in {group.name for group in graph.groups}) is free
    outcomes = [expressible(graph, {"blocks.0.conv": kept}) for kept in range(1, 6)] if free else []
    assert all(outcomes)


def selections(tie: Tie) -> Iterator[tuple[Bundle, ...]]:
    """All ways to take one bundle of each choice that leave a common share."""
    for bundles in itertools.product(*tie.choices):
        if math.gcd(*(bundle.parts for bundle in bundles)) > 1:
            yield bundles


def cuts(graph: Graph, tie: Tie) -> set[frozenset[tuple[str, int]]]:
    """Every width the tie allows."""
    return {
        frozenset((name, graph.group(name).width * k // parts) for bundle in bundles for name in bundle.groups)
        for bundles in selections(tie)
        for parts in [math.gcd(*(bundle.parts for bundle in bundles))]
        for k in range(1, parts)
    }


def expressible(graph: Graph, kept: dict[str, int]) -> bool:
    try:
        graph.solve(kept)
    except AttributeConflictError:
        return False
    return True


@pytest.mark.parametrize("block", [block for block, expected in TIES if expected and block is not Narrower])
def test_a_tie_allows_every_common_share_that_the_program_can_express_and_no_other(block: type[nn.Module]) -> None:
    """The naive twin tries every share for every subset of the tie's groups and asks the checks of the solver.

    `Narrower` is left out: a comparison of two widths has more solutions than its tie.
    """
    graph = graph_of(block)
    (tie,) = graph.ties
    widths = {name: graph.group(name).width for name in tie.groups}
    tried = set()
    for count in range(1, len(widths) + 1):
        for names in itertools.combinations(widths, count):
            parts = math.gcd(*(widths[name] for name in names))
            for k in range(1, parts):
                kept = {name: widths[name] * k // parts for name in names}
                if expressible(graph, kept):
                    tried.add(frozenset(kept.items()))
    assert cuts(graph, tie) == tried
