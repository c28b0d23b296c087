"""How groups relate: sizes as expressions over their widths, widths tied to each other, factors of one product."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

from prunecli.axes.ints import Attribute, Extent
from prunecli.axes.record import Record
from prunecli.axes.terms import Atom, factors, find, leaves
from prunecli.groups import Const, Product, Size, Sum, Width


class Sizes:
    """Terms as size expressions over the named groups."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names

    def of(self, atom: Atom) -> Size:
        atom = find(atom)
        if atom.form == "leaf":
            name = self._names.get(id(atom))
            return Const(atom.size) if name is None else Width(name, atom.size)
        if not any(id(leaf) in self._names for leaf in leaves(atom)):
            return Const(atom.size)
        parts = tuple(self.of(kid) for kid in atom.kids)
        return Product(parts) if atom.form == "product" else Sum(parts)


def exclusive_pairs(record: Record, names: dict[int, str]) -> tuple[tuple[str, ...], ...]:
    """Pairs of groups that are factors of one product on some tensor."""
    pairs: dict[tuple[str, ...], None] = {}
    for tensor in record.homes.values():
        for term in record.dims(tensor):
            for first, second in _factor_pairs(term):
                left, right = names.get(id(first)), names.get(id(second))
                if left is not None and right is not None and left != right:
                    pairs.setdefault(tuple(sorted((left, right))))
    return tuple(pairs)


def _factor_pairs(atom: Atom) -> Iterator[tuple[Atom, Atom]]:
    atom = find(atom)
    if atom.form == "product":
        for left, right in itertools.combinations(factors(atom), 2):
            yield from itertools.product(leaves(left), leaves(right))
    for kid in atom.kids:
        yield from _factor_pairs(kid)


def ties(record: Record, names: dict[int, str]) -> tuple[tuple[str, ...], ...]:
    """Groups whose widths one attribute, or one comparison of extents, holds equal."""
    linked: dict[str, set[str]] = {}
    for first, second in _equal_terms(record):
        pair = _remaining_pair(first, second, names)
        if pair is not None:
            joined = linked.get(pair[0], {pair[0]}) | linked.get(pair[1], {pair[1]})
            linked.update(dict.fromkeys(joined, joined))
    order = list(names.values())
    unique = {tuple(sorted(tied, key=order.index)): None for tied in linked.values()}
    return tuple(unique)


def _equal_terms(record: Record) -> Iterator[tuple[Atom, Atom]]:
    """Pairs of terms that must keep equal sizes."""
    sized: dict[Attribute, Atom] = {}
    for equation in record.equations:
        if len(equation.parts) != 1:
            continue
        part = equation.parts[0]
        if isinstance(equation.expression, Extent):
            yield equation.expression.atom, part
        elif isinstance(equation.expression, Attribute):
            yield sized.setdefault(equation.expression, part), part
    for fact in record.ledger.facts:
        stays_equal = fact.comparison in {"eq", "ne"} and fact.outcome is (fact.comparison == "eq")
        if stays_equal and isinstance(fact.left, Extent) and isinstance(fact.right, Extent):
            yield fact.left.atom, fact.right.atom


def _remaining_pair(first: Atom, second: Atom, names: dict[int, str]) -> tuple[str, str] | None:
    """What two equal products say about single groups once common factors are cancelled."""
    left, right = Counter(map(id, factors(first))), Counter(map(id, factors(second)))
    sizes = {id(factor): factor.size for factor in (*factors(first), *factors(second))}
    only_left, only_right = left - right, right - left
    named = [[key for key in side.elements() if key in names] for side in (only_left, only_right)]
    fixed = [math.prod(sizes[key] for key in side.elements() if key not in names) for side in (only_left, only_right)]
    if [len(side) for side in named] == [1, 1] and fixed[0] == fixed[1]:
        return names[named[0][0]], names[named[1][0]]
    return None
