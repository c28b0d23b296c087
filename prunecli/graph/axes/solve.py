"""From kept widths to module attributes: each attribute that sizes something is a formula over widths.

The formulas come from `prunecli.graph.axes.elimination`. Afterwards everything that was learnt about a changed size is
checked as the program would compute it: ties and frozen axes leave nothing that could fail here, and if something does
the cut is refused, with the groups in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prunecli.graph.axes.ints import COMPARISONS, Attribute, Fact, evaluate
from prunecli.graph.axes.polynomials import Polynomial
from prunecli.graph.axes.terms import Atom, find
from prunecli.values.groups import AttributeConflictError, AttributeEdit, Size


@dataclass(frozen=True, kw_only=True)
class NamedSize:
    """An attribute that no operator reads but that states a size: ``in_features``, ``feature_info.0.num_chs``.

    Attributes:
        module: path of the module.
        name: name of the attribute, with dots inside containers.
        before: value in the dense model.
        size: value as a function of kept widths.
    """

    module: str
    name: str
    before: int
    size: Size


@dataclass(frozen=True, kw_only=True)
class HeadScale:
    """A float attribute that is ``head width ** -0.5`` beside an attention that computes this root itself.

    Attributes:
        module: path of the module.
        name: name of the attribute.
        before: value in the dense model.
        size: the head width as a function of kept widths.
    """

    module: str
    name: str
    before: float
    size: Size


@dataclass(frozen=True, kw_only=True)
class Formula:
    """The value of an attribute as a polynomial over widths, with the groups of these widths."""

    value: Polynomial
    groups: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A comparison that has to keep its outcome.

    Attributes:
        fact: the comparison.
        place: the module that makes the comparison, in words.
        groups: names of the groups on which it depends.
    """

    fact: Fact
    place: str
    groups: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Kept widths → attribute edits. Implements `prunecli.values.groups.AttributeSolver`.

    Attributes:
        attributes: value of every int attribute in the dense model.
        listed: values of tuple and list attributes, which are replaced whole, by module and name.
        formulas: formulas of the attributes that follow a cut.
        widths: variables of the formulas as functions of kept widths.
        checks: comparisons whose outcome has to stay.
        size_of: function from a term to its size over kept widths.
        named: attributes that state a size that nothing computes with.
        scales: head scales to adjust.
    """

    attributes: Mapping[Attribute, int]
    listed: Mapping[tuple[str, str], tuple[int, ...]]
    formulas: Mapping[Attribute, Formula]
    widths: Mapping[int, Size]
    checks: Sequence[Check]
    size_of: Callable[[Atom], Size]
    named: Sequence[NamedSize]
    scales: Sequence[HeadScale]

    def __call__(self, kept: Mapping[str, int]) -> tuple[AttributeEdit, ...]:
        """The edits for these kept widths.

        Args:
            kept: kept width of each cut group, by name.

        Raises:
            AttributeConflictError: an attribute would be no whole number, or a comparison would change its outcome.
        """
        values = self._values(kept)
        self._check(kept, values)
        edits = self._int_edits({a: value for a, value in values.items() if value != self.attributes[a]})
        done = {(edit.module, edit.name) for edit in edits}
        for named in self.named:
            after = named.size.evaluate(kept)
            if after != named.before and (named.module, named.name) not in done:
                edits.append(AttributeEdit(module=named.module, name=named.name, before=named.before, after=after))
        for scale in self.scales:
            width = scale.size.evaluate(kept)
            if width != scale.size.evaluate({}):
                edits.append(
                    AttributeEdit(module=scale.module, name=scale.name, before=scale.before, after=width**-0.5)
                )
        return tuple(edits)

    def _values(self, kept: Mapping[str, int]) -> dict[Attribute, int]:
        """The attributes that depend on one of the groups, by their formulas."""
        widths = {number: size.evaluate(kept) for number, size in self.widths.items()}
        values = {}
        for attribute, formula in self.formulas.items():
            if not formula.groups.isdisjoint(kept):
                value = formula.value.evaluate(widths)
                if value.denominator != 1:
                    raise _conflict(f"{attribute} would have to be {value}", formula.groups & kept.keys())
                values[attribute] = int(value)
        return values

    def _check(self, kept: Mapping[str, int], values: Mapping[Attribute, int]) -> None:
        """Make every comparison again that depends on one of the groups. Raises AttributeConflictError."""
        all_values = {**self.attributes, **values}
        extents: dict[int, int] = {}

        def extent(atom: Atom) -> int:
            atom = find(atom)
            if id(atom) not in extents:
                extents[id(atom)] = self.size_of(atom).evaluate(kept)
            return extents[id(atom)]

        for check in self.checks:
            if not check.groups.isdisjoint(kept):
                left, right = (evaluate(side, all_values, extent) for side in (check.fact.left, check.fact.right))
                if (
                    left is None
                    or right is None
                    or COMPARISONS[check.fact.comparison](left, right) is not check.fact.outcome
                ):
                    raise _conflict(
                        f"{check.place} would compare {left} and {right}, with another outcome than before",
                        check.groups & kept.keys(),
                    )

    def _int_edits(self, changed: Mapping[Attribute, int]) -> list[AttributeEdit]:
        """Edits of plain attributes, then of tuples and lists as a whole."""
        edits = []
        for attribute, value in changed.items():
            if attribute.index is None:
                before = self.attributes[attribute]
                edits.append(AttributeEdit(module=attribute.module, name=attribute.name, before=before, after=value))
        for module, name in dict.fromkeys((a.module, a.name) for a in changed if a.index is not None):
            before_all = self.listed[module, name]
            after_all = tuple(changed.get(Attribute(module, name, i), old) for i, old in enumerate(before_all))
            edits.append(AttributeEdit(module=module, name=name, before=before_all, after=after_all))
        return edits


def _conflict(problem: str, groups: frozenset[str]) -> AttributeConflictError:
    return AttributeConflictError(f"The attributes cannot express this cut: {problem}.", sorted(groups))
