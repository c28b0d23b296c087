"""Terms against their naive twin: a dimension as an array of labels, one label per entry and axis."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecli.graph.axes.terms import (
    Atom,
    MisfitError,
    blocks,
    concat,
    factors,
    find,
    freeze,
    is_frozen,
    leaves,
    merge_frozen_runs,
    occurrences,
    product,
    split_front,
    take,
    unify,
)
from prunecli.values.groups import IndexMap


def labels(atom: Atom) -> list[set[tuple[int, int]]]:
    """Naive twin: for every position on the dimension, which channel of which axis lies there."""
    atom = find(atom)
    if atom.form == "leaf":
        return [{(id(atom), i)} if atom.size > 1 else set() for i in range(atom.size)]
    if atom.form == "concat":
        return [entry for kid in atom.kids for entry in labels(kid)]
    return [set().union(*rows) for rows in itertools.product(*(labels(kid) for kid in atom.kids))]


LEAVES = st.integers(1, 4).map(Atom)
TERMS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(product), st.lists(inner, min_size=1, max_size=3).map(concat)
    ),
    max_leaves=5,
)


@given(TERMS)
@settings(max_examples=200, deadline=None)
def test_occurrences_are_where_the_labels_are(term: Atom) -> None:
    expected: dict[tuple[int, int], set[int]] = {}
    for position, entry in enumerate(labels(term)):
        for label in entry:
            expected.setdefault(label, set()).add(position)
    found: dict[tuple[int, int], set[int]] = {}
    for place in occurrences(term):
        index = IndexMap(offset=place.offset, stride=place.stride, loops=place.loops)
        for channel in range(place.leaf.size):
            found.setdefault((id(place.leaf), channel), set()).update(index.positions([channel]))
    assert found == expected


@given(TERMS, st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_splitting_off_rows_keeps_every_label_in_its_place(term: Atom, count: int) -> None:
    try:
        front, back = split_front(term, count) if find(term).size % count == 0 else (None, None)
    except MisfitError:
        return
    if front is not None and back is not None:
        assert labels(product([front, back])) == labels(term)


@given(TERMS, st.data())
@settings(max_examples=200, deadline=None)
def test_cutting_blocks_keeps_every_label_in_its_place(term: Atom, data: st.DataObject) -> None:
    size = find(term).size
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=2)))
    sizes = [high - low for low, high in itertools.pairwise([0, *cuts, size])]
    try:
        parts = blocks(term, sizes)
    except MisfitError:
        return
    assert [find(part).size for part in parts] == sizes
    assert labels(concat(parts)) == labels(term)


@given(TERMS, TERMS)
@settings(max_examples=300, deadline=None)
def test_unified_terms_have_equal_labels_or_are_frozen(first: Atom, second: Atom) -> None:
    if find(first).size != find(second).size:
        return
    unify(first, second)
    if not (is_frozen(first) and is_frozen(second)):
        assert labels(first) == labels(second)


def test_fused_qkv_head_has_the_index_map_of_the_contract() -> None:
    three, heads, width = Atom(3, "selector"), Atom(2), Atom(64)
    by_leaf = {id(o.leaf): o for o in occurrences(product([three, heads, width]))}
    head = by_leaf[id(heads)]
    assert (head.offset, head.stride, head.loops) == (0, 64, ((3, 128), (64, 1)))
    inner = by_leaf[id(width)]
    assert (inner.offset, inner.stride, inner.loops) == (0, 1, ((6, 64),))


def test_an_axis_found_three_times_in_one_dimension_has_three_places() -> None:
    leaf = Atom(4)
    assert [o.offset for o in occurrences(concat([leaf, leaf, leaf]))] == [0, 4, 8]


def test_concat_meets_product_makes_the_blocks_one_axis() -> None:
    q, k, v = Atom(6), Atom(6), Atom(6)
    unify(concat([q, k, v]), product([Atom(3), Atom(2), Atom(3)]))
    assert factors(q) == factors(k) == factors(v)  # the same leaves, not equal ones
    assert [factor.size for factor in factors(q)] == [2, 3]


def test_a_later_refinement_is_seen_by_earlier_users() -> None:
    leaf = Atom(12)
    outer = product([leaf, Atom(5)])
    split_front(leaf, 3)
    assert [factor.size for factor in factors(outer)] == [3, 4, 5]


def test_incompatible_products_freeze_both() -> None:
    first, second = product([Atom(4), Atom(9)]), product([Atom(6), Atom(6)])
    first_leaves, second_leaves = leaves(first), leaves(second)
    unify(first, second)
    assert all(find(leaf).reason for leaf in (*first_leaves, *second_leaves))


def test_frozen_runs_are_merged_so_that_other_factors_stay_free() -> None:
    channels = Atom(10)
    queue = merge_frozen_runs([Atom(8, "space"), Atom(7, "space"), channels])
    assert [factor.size for factor in take(queue, 28)] == [28]
    assert [factor.size for factor in take(queue, 20)] == [2, 10]
    assert channels.reason is None


def test_a_reason_survives_refinement_and_union() -> None:
    frozen, free = Atom(6, "because"), Atom(6)
    unify(free, frozen)
    rows, inside = split_front(free, 2)
    assert (rows.reason, inside.reason) == ("because", "because")
    later = Atom(3)
    unify(later, inside)
    assert find(later).reason == "because"


def test_the_first_reason_stays() -> None:
    leaf = Atom(3)
    freeze(leaf, "first")
    freeze(leaf, "second")
    assert leaf.reason == "first"


def test_taking_more_than_there_is_fails() -> None:
    with pytest.raises(MisfitError, match="used up"):
        take([Atom(3)], 6)


def test_coprime_sizes_do_not_fit() -> None:
    with pytest.raises(MisfitError, match="3 does not divide into 2"):
        take([Atom(3), Atom(2)], 2)
