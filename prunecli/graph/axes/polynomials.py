"""Polynomials over sizes, as plain values: sums of products with whole exponents, the sides of equations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

#: (variable, exponent) pairs in ascending order of variables, no exponent zero; ``()`` is the constant.
Monomial: TypeAlias = tuple[tuple[int, int], ...]


def _times(left: Monomial, right: Monomial) -> Monomial:
    exponents = dict(left)
    for variable, exponent in right:
        exponents[variable] = exponents.get(variable, 0) + exponent
    return tuple(sorted((v, e) for v, e in exponents.items() if e))


@dataclass(frozen=True)
class Polynomial:
    """Coefficients by monomial, none of them zero; variables are numbers. Exponents may be negative."""

    terms: Mapping[Monomial, Fraction]

    @classmethod
    def constant(cls, value: int) -> Polynomial:
        """A number."""
        return cls({(): Fraction(value)} if value else {})

    @classmethod
    def variable(cls, number: int) -> Polynomial:
        """A single variable."""
        return cls({((number, 1),): Fraction(1)})

    @property
    def value(self) -> Fraction | None:
        """The number of a constant polynomial; ``None`` where it has a variable."""
        return self.terms.get((), Fraction(0)) if set(self.terms) <= {()} else None

    def variables(self) -> Iterator[int]:
        """Every variable of every term, with repeats."""
        return (variable for monomial in self.terms for variable, _ in monomial)

    def __add__(self, other: Polynomial) -> Polynomial:
        return _collected([*self.terms.items(), *other.terms.items()])

    def __neg__(self) -> Polynomial:
        return Polynomial({monomial: -factor for monomial, factor in self.terms.items()})

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + -other

    def __mul__(self, other: Polynomial) -> Polynomial:
        return _collected((_times(m, n), a * b) for m, a in self.terms.items() for n, b in other.terms.items())

    def solved_for(self, variable: int) -> Polynomial | None:
        """``variable`` as a polynomial of the others, from setting this one to zero; ``None`` where that is not one."""
        own = [monomial for monomial in self.terms if variable in dict(monomial)]
        if len(own) != 1 or dict(own[0])[variable] != 1:
            return None
        rest = Polynomial({m: factor for m, factor in self.terms.items() if m != own[0]})
        others = tuple((v, -exponent) for v, exponent in own[0] if v != variable)
        return rest * Polynomial({others: -1 / self.terms[own[0]]})

    def substituted(self, definitions: Mapping[int, Polynomial]) -> Polynomial:
        """The polynomial with every defined variable replaced.

        Args:
            definitions: polynomials by variable; one with a negative exponent needs a definition of one term.
        """
        if definitions.keys().isdisjoint(self.variables()):
            return self
        total = Polynomial({})
        for monomial, factor in self.terms.items():
            product = Polynomial({(): factor})
            for variable, exponent in monomial:
                product *= _power(definitions.get(variable, Polynomial.variable(variable)), exponent)
            total += product
        return total

    def evaluate(self, values: Mapping[int, int]) -> Fraction:
        """The value of the polynomial at these values of its variables."""
        total = Fraction(0)
        for monomial, factor in self.terms.items():
            total += factor * math.prod(Fraction(values[variable]) ** exponent for variable, exponent in monomial)
        return total


def _collected(terms: Iterable[tuple[Monomial, Fraction]]) -> Polynomial:
    total: dict[Monomial, Fraction] = {}
    for monomial, factor in terms:
        total[monomial] = total.get(monomial, Fraction(0)) + factor
    return Polynomial({monomial: factor for monomial, factor in total.items() if factor})


def _power(base: Polynomial, exponent: int) -> Polynomial:
    if len(base.terms) == 1:
        ((monomial, factor),) = base.terms.items()
        return Polynomial({tuple((v, e * exponent) for v, e in monomial): factor**exponent})
    assert exponent > 0, "a sum under a fraction bar"
    power = base
    for _ in range(exponent - 1):
        power *= base
    return power
