"""Relations between groups: sizes as expressions over their widths, and pairs that are factors of one product."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from prunecli.graph.axes.record import Record
from prunecli.graph.axes.terms import Atom, factors, find, leaves
from prunecli.values.groups import Const, Product, Size, Sum, Width


class Sizes:
    """Terms as size expressions over the named groups.

    Args:
        names: name of each group, by identity of its axis.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._known: dict[int, tuple[Atom, Size]] = {}

    def of(self, atom: Atom) -> Size:
        """The size of a term as an expression over groups; the trace has to be finished, so that terms stay."""
        atom = find(atom)
        if id(atom) not in self._known:
            self._known[id(atom)] = atom, self._build(atom)
        return self._known[id(atom)][1]

    def _build(self, atom: Atom) -> Size:
        if atom.form == "leaf":
            name = self._names.get(id(atom))
            return Const(atom.size) if name is None else Width(name, atom.size)
        if not any(id(leaf) in self._names for leaf in leaves(atom)):
            return Const(atom.size)
        parts = tuple(self.of(kid) for kid in atom.kids)
        return Product(parts) if atom.form == "product" else Sum(parts)

    def groups(self, axes: Iterable[Atom]) -> frozenset[str]:
        """Names of the groups among these axes."""
        return frozenset(self._names[id(axis)] for axis in map(find, axes) if id(axis) in self._names)


def exclusive_pairs(record: Record, names: dict[int, str]) -> tuple[tuple[str, ...], ...]:
    """Pairs of groups that are factors of one product on some tensor, by name.

    Args:
        record: the finished trace.
        names: name of each group, by identity of its axis.
    """
    pairs: dict[tuple[str, ...], None] = {}
    for tensor in record.homes.values():
        for term in record.dims(tensor):
            for first, second in _factor_pairs(term):
                left, right = names.get(id(first)), names.get(id(second))
                if left is not None and right is not None and left != right:
                    pairs.setdefault(tuple(sorted((left, right))))
    return tuple(pairs)


def _factor_pairs(atom: Atom) -> Iterator[tuple[Atom, Atom]]:
    """Pairs of axes that lie in different factors of a product, at any depth of a term."""
    atom = find(atom)
    if atom.form == "product":
        for left, right in itertools.combinations(factors(atom), 2):
            yield from itertools.product(leaves(left), leaves(right))
    for kid in atom.kids:
        yield from _factor_pairs(kid)
