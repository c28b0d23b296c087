"""Traced ints: arithmetic keeps the expression, comparisons are facts, any other use pins the value."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunecli.graph.axes.ints import (
    Attribute,
    Extent,
    Fact,
    Ledger,
    Number,
    Operation,
    TracedInt,
    attributes_in,
    axes_in,
    evaluate,
    expression_of,
    untraced,
)
from prunecli.graph.axes.terms import Atom, product

A, B = Attribute("m", "a"), Attribute("m", "b")
OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]


def traced(value: int, ledger: Ledger, attribute: Attribute = A) -> TracedInt:
    return TracedInt.of(value, attribute, ledger)


@given(st.lists(st.tuples(st.sampled_from(OPERATORS), st.integers(1, 9), st.booleans()), max_size=6), st.integers(1, 9))
def test_arithmetic_gives_the_plain_value_and_an_expression_that_recomputes_it(
    steps: list[tuple[Callable[[int, int], int], int, bool]], start: int
) -> None:
    ledger = Ledger()
    plain: int = start
    number: Any = traced(start, ledger)
    for operation, other, reflected in steps:
        if reflected and plain == 0 and operation in {operator.floordiv, operator.mod}:
            continue
        plain = operation(other, plain) if reflected else operation(plain, other)
        number = operation(other, number) if reflected else operation(number, other)
    assert type(number) is TracedInt
    assert number.plain == plain
    assert evaluate(expression_of(number), {A: start}, lambda _: 0) == plain
    assert not ledger.pins
    assert not ledger.facts


def test_two_traced_ints_combine() -> None:
    ledger = Ledger()
    total = traced(12, ledger) // traced(3, ledger, B)
    assert total.expression == Operation("floordiv", A, B)
    assert attributes_in(total.expression) == {A, B}


def test_division_by_zero_has_no_value() -> None:
    assert evaluate(Operation("floordiv", A, B), {A: 1, B: 0}, lambda _: 0) is None
    assert evaluate(Operation("add", Operation("mod", A, B), A), {A: 1, B: 0}, lambda _: 0) is None


@pytest.mark.parametrize(
    "use",
    [
        float,
        int,
        math.sqrt,
        lambda n: n**-0.5,
        lambda n: 2**n,
        lambda n: n / 2,
        lambda n: 6 / n,
        lambda n: n * 2.0,
        lambda n: n & 1,
        lambda n: 4 | n,
        lambda n: 1 << n,
        lambda n: ~n,
        abs,
        lambda n: [0] * n,
        lambda n: n in (3, 5),
    ],
    ids=[
        "float",
        "int",
        "sqrt",
        "pow",
        "exponent",
        "truediv",
        "divisor",
        "float product",
        "and",
        "or",
        "shift count",
        "invert",
        "abs",
        "list",
        "in",
    ],
)
def test_any_other_use_pins_the_value(use: Callable[[Any], Any]) -> None:
    ledger = Ledger()
    assert use(traced(3, ledger)) == use(3)
    assert ledger.pins == {A: 3}


@pytest.mark.parametrize(
    "use",
    [
        round,
        math.floor,
        math.ceil,
        math.trunc,
        operator.pos,
        lambda n: n.real,
        lambda n: n << 2,
        lambda n: n >> 1,
        lambda n: n**3,
        lambda n: divmod(7, n)[0],
        lambda n: divmod(7, n)[1],
        lambda n: sum([n, n]),
        lambda n: math.prod(torch.Size([n, 2])),
    ],
    ids=["round", "floor", "ceil", "trunc", "pos", "real", "lshift", "rshift", "power", "rdiv", "rmod", "sum", "prod"],
)
def test_what_gives_an_int_again_keeps_the_expression(use: Callable[[Any], Any]) -> None:
    ledger = Ledger()
    number = use(traced(3, ledger))
    assert not ledger.pins
    assert isinstance(number, TracedInt)
    for value in (3, 6, 10):
        assert evaluate(number.expression, {A: value}, lambda _: 0) == use(value)


def test_truth_is_a_comparison_with_zero() -> None:
    ledger = Ledger()
    assert traced(3, ledger) % 2
    assert not traced(0, ledger, B)
    assert list(ledger.facts) == [Fact("ne", Operation("mod", A, Number(2)), Number(0), outcome=True)]
    assert ledger.pins == {B: 0}


def test_comparisons_are_recorded_with_their_outcome() -> None:
    ledger = Ledger()
    assert traced(3, ledger) < traced(4, ledger, B)
    assert traced(3, ledger) != traced(4, ledger, B)
    assert traced(3, ledger) < 5
    assert list(ledger.facts) == [
        Fact("lt", A, B, outcome=True),
        Fact("ne", A, B, outcome=True),
        Fact("lt", A, Number(5), outcome=True),
    ]


def test_equality_with_a_literal_pins_and_with_itself_says_nothing() -> None:
    ledger = Ledger()
    assert traced(3, ledger) == 3
    assert ledger.pins == {A: 3}
    again = Ledger()
    assert traced(3, again) == traced(3, again)
    assert not again.pins
    assert not again.facts


def test_a_width_that_has_to_divide_evenly_is_a_fact_and_no_pin() -> None:
    ledger = Ledger()
    assert traced(6, ledger) % 3 == 0
    assert not ledger.pins
    assert list(ledger.facts) == [Fact("eq", Operation("mod", A, Number(3)), Number(0), outcome=True)]


def test_shapes_compare_entry_by_entry() -> None:
    ledger = Ledger()
    atom = Atom(3)
    shape = torch.Size([TracedInt.of(3, Extent(atom), ledger), 4])
    assert shape == torch.Size([traced(3, ledger), 4])
    assert list(ledger.facts) == [Fact("eq", Extent(atom), A, outcome=True)]


def test_untraced_strips_nested_arguments_without_a_trace() -> None:
    ledger = Ledger()
    n = traced(3, ledger)
    stripped = untraced([n, (n, slice(n, None)), {"k": [n]}, torch.Size([n])])
    assert stripped == [3, (3, slice(3, None)), {"k": [3]}, torch.Size([3])]
    assert type(stripped[0]) is type(stripped[1][0]) is type(stripped[2]["k"][0]) is int
    assert not ledger.pins
    untraced((n,), pin=True)
    assert ledger.pins == {A: 3}


def test_axes_of_an_expression() -> None:
    first, second = Atom(2), Atom(3)
    expression = Operation("mul", Extent(product([first, second])), Number(2))
    assert axes_in(expression) == [first, second]
    assert attributes_in(expression) == frozenset()


def test_copies_and_pickles_are_harmless() -> None:
    n = traced(3, Ledger())
    assert copy.deepcopy(n) is n
    assert type(pickle.loads(pickle.dumps(n))) is int
