"""Which axes can shrink together: constraints between products of widths, solved for shares.

Let every axis keep either all its channels or a share s of them that it has in common with others: it carries the
exponent 0 or 1 of s. A constraint requires one exponent, again 0 or 1, of all its products, so it is linear:
``C == H * D`` becomes c = h + d. Where the channels C shrink, either the heads H or their width D shrinks with them. A
*tie* is the set of axes with exponent 1; where a choice is left (H or D, in each of many attentions on one residual
stream) it lists the alternatives. s is a multiple of 1 / the greatest common divisor of all that has to stay whole.

The solver is a small constraint search over 0 and 1: propagate what follows, split into components that share no
constraint, and in each try one variable at 1 after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prunecli.graph.axes.elimination import Constraint
from prunecli.graph.axes.polynomials import Monomial

_Exponents: TypeAlias = dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Shrinking:
    """Axes that keep one share of their channels.

    Attributes:
        axes: numbers of the axes, ascending.
        parts: number of equal parts of which the share is a multiple.
    """

    axes: tuple[int, ...]
    parts: int


#: A tie: of each choice exactly one alternative shrinks, all of them by the same share.
Choices: TypeAlias = tuple[tuple[Shrinking, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The solution of a system of constraints.

    Attributes:
        ties: choices of axes that shrink together.
        held: the reason by number, for axes that have to keep all channels.
    """

    ties: tuple[Choices, ...]
    held: Mapping[int, str]


def shares(widths: Mapping[int, int], constraints: Sequence[Constraint]) -> Shares:
    """Solve the constraints between axes.

    Args:
        widths: width of each axis in the dense model, by number.
        constraints: constraints between products of widths.
    """
    return _Solver(widths, constraints).run()


class _Solver:
    """Exponents by variable: axes have their own numbers, constraints negative ones, the same if they share a term."""

    def __init__(self, widths: Mapping[int, int], constraints: Sequence[Constraint]) -> None:
        self.widths = widths
        self.joined = _join(constraints)
        self.rows = [row for number, own in self.joined.items() for row in _rows(own, number)]
        self.rows_of: dict[int, list[Mapping[int, int]]] = {}
        for row in self.rows:
            for variable in row:
                self.rows_of.setdefault(variable, []).append(row)
        self.ties: list[Choices] = []
        self.held: dict[int, str] = {}

    def run(self) -> Shares:
        """Find the exponents that follow from the constraints alone, then the ties of all others."""
        fixed = self._propagate({}, self.rows)
        assert fixed is not None, "all exponents zero always fit"
        self._hold(fixed, fixed, None)  # nothing is chosen yet: each 0 follows from a constraint
        self._solve(fixed)
        return Shares(ties=tuple(self.ties), held=self.held)

    def _solve(self, fixed: _Exponents) -> None:
        """Find a tie in each component of the variables that are not ``fixed``."""
        for component in self._components(self.rows_of, fixed):
            driver = self._driver(component, fixed)
            choices = self._choices(component, fixed, driver)
            if choices is not None:
                self._tie(component, choices)
                continue
            # The driver cannot shrink. With it at 0 the component may fall apart into smaller ones that can, so it is
            # solved again; the other components are set to 0 there, or they would be solved twice.
            without = self._propagate({**fixed, driver: 0}, self.rows_of[driver])
            assert without is not None, "all exponents zero always fit"
            self._hold(component, without, "it is tied to axes that cannot all shrink alike")
            self._solve({**{v: 0 for v in self.rows_of if v not in component}, **without})

    def _driver(self, component: Sequence[int], fixed: _Exponents) -> int:
        """The variable to begin with: one that, at 1, rules out the fewest axes of the component.

        Of equal ones the constraint (below 0) on which most products depend.
        """
        ranked = sorted(component, key=lambda v: (v >= 0, -len(self.rows_of[v]), -v))
        fewest, best = len(component), ranked[0]
        for variable in ranked:
            shrunk = self._propagate({**fixed, variable: 1}, self.rows_of[variable])
            if shrunk is not None:
                ruled_out = sum(1 for v in component if v >= 0 and shrunk.get(v) == 0)
                if ruled_out < fewest:
                    fewest, best = ruled_out, variable
            if not fewest:
                break
        return best

    def _tie(self, component: Sequence[int], choices: Choices) -> None:
        """Keep the alternatives that have a share in common with every choice; without such a share nothing shrinks."""
        # All choices shrink by the same share s = k / d, so d has to divide the parts of an alternative of each choice.
        useful = [d for d in _divisors(choices[0]) if all(any(a.parts % d == 0 for a in c) for c in choices)]
        kept = tuple(tuple(a for a in choice if any(a.parts % d == 0 for d in useful)) for choice in choices)
        moving = {axis for choice in kept for alternative in choice for axis in alternative.axes}
        self._hold(
            component, dict.fromkeys(set(component) - moving, 0), "no share of it leaves all that is tied to it whole"
        )
        if useful:
            self.ties.append(kept)

    def _hold(self, variables: Iterable[int], exponents: Mapping[int, int], reason: str | None) -> None:
        """Note the axes among ``variables`` that have to keep all channels, with ``reason`` or their constraint's."""
        for axis in variables:
            if axis >= 0 and exponents.get(axis) == 0:
                own = [c for row in self.rows_of[axis] for v in row if v < 0 for c in self.joined[v]]
                stuck = [c for c in own if () in c.terms] or own  # () alone keeps all channels
                self.held.setdefault(axis, reason or stuck[0].reason)

    # -------------------------------------------------------------------------------------------- alternatives

    def _choices(self, component: Sequence[int], fixed: _Exponents, driver: int) -> Choices | None:
        """The choices of axes that shrink where ``driver`` is 1; ``None`` where it cannot be 1."""
        shrunk = self._propagate({**fixed, driver: 1}, self.rows_of[driver])
        if shrunk is None:
            return None
        always = self._shrinking(component, shrunk, 0)
        choices: list[tuple[Shrinking, ...]] = [(always,)] if always.axes else []
        for rest in self._components(component, shrunk):
            found = self._alternatives(rest, shrunk, always.parts)
            if found is None:
                return None
            if found:
                choices.append(found)
        return tuple(choices) or None

    def _alternatives(self, part: Sequence[int], fixed: _Exponents, parts: int) -> tuple[Shrinking, ...] | None:
        """Assignments of the open variables ``part``, one for each axis that can shrink; ``None`` where none fits."""
        if self._complete(fixed, part) is None:
            return None
        found: dict[tuple[int, ...], Shrinking] = {}
        for axis in (v for v in part if v >= 0):
            if any(axis in axes for axes in found):
                continue
            started = self._propagate({**fixed, axis: 1}, self.rows_of[axis])
            full = None if started is None else self._complete(started, part)
            if full is not None:
                alternative = self._shrinking(part, full, parts)
                found[alternative.axes] = alternative
        return tuple(a for a in found.values() if not any(set(a.axes) < set(axes) for axes in found))

    def _shrinking(self, variables: Iterable[int], exponents: _Exponents, parts: int) -> Shrinking:
        """The axes with exponent 1, with the greatest common divisor of all that then has to stay whole."""
        ones = [v for v in variables if exponents.get(v) == 1]
        axes = tuple(sorted(v for v in ones if v >= 0))
        whole = [self.widths[v] for v in axes] + [c.value for v in ones if v < 0 for c in self.joined[v]]
        return Shrinking(axes=axes, parts=math.gcd(parts, *whole))

    def _complete(self, fixed: _Exponents, part: Sequence[int]) -> _Exponents | None:
        """An assignment of all of ``part``, trying 1 before 0; ``None`` where none fits."""
        open_variable = next((v for v in part if v not in fixed), None)
        if open_variable is None:
            return fixed
        for value in (1, 0):
            settled = self._propagate({**fixed, open_variable: value}, self.rows_of[open_variable])
            full = None if settled is None else self._complete(settled, part)
            if full is not None:
                return full
        return None

    # -------------------------------------------------------------------------------------------- rows

    def _propagate(self, fixed: _Exponents, rows: Iterable[Mapping[int, int]]) -> _Exponents | None:
        """``fixed`` and all that follows from it, beginning with ``rows``; ``None`` where a row cannot be zero."""
        known = dict(fixed)
        queue = list(rows)
        while queue:
            row = queue.pop()
            total = sum(c * known[v] for v, c in row.items() if v in known)
            free = [(v, c) for v, c in row.items() if v not in known]
            # The least and the greatest sum that the free variables, each 0 or 1, can give.
            low, high = (total + sum(bound(c, 0) for _, c in free) for bound in (min, max))
            if low > 0 or high < 0:
                return None
            for variable, c in free:
                fits = [e for e in (0, 1) if low - min(c, 0) + c * e <= 0 <= high - max(c, 0) + c * e]
                if not fits:
                    return None
                if len(fits) == 1:
                    known[variable] = fits[0]
                    queue += self.rows_of[variable]  # this row among them, with the bounds that hold now
                    break
        return known

    def _components(self, variables: Iterable[int], fixed: _Exponents) -> Iterator[list[int]]:
        """The open variables in lists that share no row with each other, each in the order of ``variables``."""
        order = {variable: at for at, variable in enumerate(variables)}
        seen: set[int] = set()
        for first in order:
            if first in seen or first in fixed:
                continue
            component, queue = [], [first]
            seen.add(first)
            while queue:
                variable = queue.pop()
                component.append(variable)
                near = (v for row in self.rows_of[variable] for v in row if v not in fixed and v not in seen)
                for other in dict.fromkeys(near):
                    seen.add(other)
                    queue.append(other)
            yield sorted(component, key=order.__getitem__)


def _join(constraints: Sequence[Constraint]) -> dict[int, list[Constraint]]:
    """The constraints in lists, by a negative number; those that share a product have one exponent and one list."""
    joined: dict[int, list[Constraint]] = {}
    number_of: dict[Monomial, int] = {}
    for i, constraint in enumerate(constraints):
        products = [monomial for monomial in constraint.terms if monomial]
        same = list(dict.fromkeys(number_of[m] for m in products if m in number_of))
        joined[-1 - i] = [c for number in same for c in joined.pop(number)] + [constraint]
        number_of = {m: -1 - i if number in same else number for m, number in number_of.items()}
        number_of.update(dict.fromkeys(products, -1 - i))
    return joined


def _rows(constraints: Sequence[Constraint], own: int) -> Iterator[Mapping[int, int]]:
    """The coefficients of one equation for each product: its axes' exponents minus the constraints' own sum to zero."""
    for monomial in dict.fromkeys(monomial for constraint in constraints for monomial in constraint.terms):
        yield {**dict(monomial), own: -1}


def _divisors(alternatives: Iterable[Shrinking]) -> list[int]:
    """The numbers above 1 that divide the parts of at least one alternative, largest first."""
    most = max(a.parts for a in alternatives)
    return [d for d in range(most, 1, -1) if any(a.parts % d == 0 for a in alternatives)]
