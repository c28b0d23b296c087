"""Elimination of attributes from the equations of a trace: each attribute becomes a formula over widths of axes, and
what remains are constraints between widths.

Equations, comparisons and pinned values become polynomials. A floor division that was exact becomes a number of its
own, ``quotient * divisor == dividend``; it has to stay exact. What is no polynomial (an inexact division) holds
everything in it in place. Then unknowns are solved for one after the other, as long as an equation has one unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from prunecli.graph.axes.ints import ARITHMETIC, Attribute, Expression, Extent, Fact, Number, Operation, attributes_in
from prunecli.graph.axes.polynomials import Monomial, Polynomial
from prunecli.graph.axes.record import Record
from prunecli.graph.axes.terms import Atom, find


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """Products of widths that have to keep the same share of what they are in the dense model; ``()`` keeps all.

    Attributes:
        terms: the products of widths.
        value: a number that shrinks by the same share and has to stay whole; 0 without one.
        reason: reason for freezing axes that cannot meet the constraint.
    """

    terms: tuple[Monomial, ...]
    value: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class System:
    """The solved equations of a trace; variables are the keys of ``axes``.

    Attributes:
        axes: the cuttable axes by number.
        definitions: formulas over widths, for the attributes that follow a cut.
        constraints: constraints between widths.
    """

    axes: Mapping[int, Atom]
    definitions: Mapping[Attribute, Polynomial]
    constraints: tuple[Constraint, ...]


@dataclass(frozen=True)
class _Quotient:
    """The result of an exact division."""

    number: int


@dataclass(frozen=True, kw_only=True)
class _Relation:
    """A difference that has to stay zero.

    Attributes:
        difference: the polynomial.
        reason: reason for freezing axes that cannot meet the relation.
        slack: addend with which the difference has to stay positive instead; ``None`` for an equation.
    """

    difference: Polynomial
    reason: str
    slack: int | None = None

    @property
    def always(self) -> bool:
        """Whether it holds for every cut: nothing is left, no term is negative, or only deducted terms shrink."""
        if self.slack is None:
            return not self.difference.terms
        terms = (self.difference + Polynomial.constant(self.slack)).terms
        deducted = [factor < 0 and all(exponent > 0 for _, exponent in m) for m, factor in terms.items() if m]
        return all(deducted) or all(factor > 0 for factor in terms.values())


def eliminate(record: Record, cuttable: Mapping[int, Atom]) -> System:
    """The system of equations of a trace.

    Args:
        record: the finished trace.
        cuttable: the axes that may change, by identity; the sizes of all others are numbers.
    """
    return _Elimination(record, cuttable).run()


@dataclass
class _Elimination:
    """Elimination in progress: variables get numbers, relations wait, definitions grow until none is left to find."""

    record: Record
    cuttable: Mapping[int, Atom]
    numbers: dict[Atom | Attribute | _Quotient, int] = field(default_factory=dict)
    dense: dict[int, int] = field(default_factory=dict)
    axes: dict[int, Atom] = field(default_factory=dict)
    relations: list[_Relation] = field(default_factory=list)
    ordered: list[_Relation] = field(default_factory=list)
    definitions: dict[int, Polynomial] = field(default_factory=dict)
    constraints: list[_Relation] = field(default_factory=list)
    terms: dict[int, Polynomial] = field(default_factory=dict)
    quotients: dict[frozenset[object], Polynomial] = field(default_factory=dict)

    def run(self) -> System:
        """Read all that the trace recorded, then solve it."""
        for attribute in dict.fromkeys(a for e in self.record.ledger.pins for a in sorted(attributes_in(e), key=str)):
            self._hold(self._of(attribute), f"its size is given by {attribute}, which cannot change")
        # Direct ones first: they define an attribute, the others follow from it.
        for equation in sorted(self.record.equations, key=lambda e: not isinstance(e.expression, Attribute)):
            difference = self._of(equation.fact.left) - self._of(equation.fact.right)
            self._relate(difference, _reason(equation.expression))
        for fact in self.record.ledger.facts:
            self._read_fact(fact)
        self._solve()
        return self._result()

    # -------------------------------------------------------------------------------------------- reading

    def _variable(self, what: Atom | Attribute | _Quotient, value: int) -> Polynomial:
        number = self.numbers.setdefault(what, len(self.numbers))
        self.dense[number] = value
        if isinstance(what, Atom):
            self.axes[number] = what
        return Polynomial.variable(number)

    def _size(self, atom: Atom) -> Polynomial:
        """The size of a term."""
        atom = find(atom)
        if id(atom) not in self.terms:
            self.terms[id(atom)] = self._new_size(atom)
        return self.terms[id(atom)]

    def _new_size(self, atom: Atom) -> Polynomial:
        if atom.form == "leaf":
            free = id(atom) in self.cuttable
            return self._variable(atom, atom.size) if free else Polynomial.constant(atom.size)
        total = Polynomial.constant(1 if atom.form == "product" else 0)
        for kid in atom.kids:
            total = total * self._size(kid) if atom.form == "product" else total + self._size(kid)
        return total

    def _of(self, expression: Expression) -> Polynomial:
        """An expression; unknown quotients in it get an equation of their own."""
        match expression:
            case Number(value):
                return Polynomial.constant(value)
            case Attribute():
                return self._variable(expression, self.record.attributes[expression])
            case Extent(atom):
                return self._size(atom)
            case Operation(symbol, left, right):
                a, b = self._of(left), self._of(right)
                match symbol:
                    case "add":
                        return a + b
                    case "sub":
                        return a - b
                    case "mul":
                        return a * b
                return self._divide(symbol, a, b, _reason(expression))

    def _divide(self, symbol: str, dividend: Polynomial, divisor: Polynomial, reason: str) -> Polynomial:
        """``dividend // divisor`` or ``dividend % divisor``."""
        a, b = int(dividend.evaluate(self.dense)), int(divisor.evaluate(self.dense))
        fixed = dividend.value is not None and divisor.value is not None
        if fixed or a % b:
            for side in (dividend, divisor):
                self._hold(side, f"it is divided with a remainder: {reason}")
            return Polynomial.constant(ARITHMETIC[symbol](a, b))
        key = frozenset(
            [(0, *pair) for pair in dividend.terms.items()] + [(1, *pair) for pair in divisor.terms.items()]
        )
        if key not in self.quotients:
            quotient = self.quotients[key] = self._variable(_Quotient(len(self.numbers)), a // b)
            self._relate(quotient * divisor - dividend, reason)
        return self.quotients[key] if symbol == "floordiv" else Polynomial.constant(0)

    def _relate(self, difference: Polynomial, reason: str) -> None:
        """Add a difference that has to stay zero; one that was not zero is not understood, and holds its variables."""
        if difference.evaluate(self.dense):
            self._hold(difference, reason)
        elif difference.terms:
            self.relations.append(_Relation(difference=difference, reason=reason))

    def _hold(self, polynomial: Polynomial, reason: str) -> None:
        """Require every variable of a polynomial to keep its dense value."""
        for number in dict.fromkeys(polynomial.variables()):
            self._relate(Polynomial.variable(number) - Polynomial.constant(self.dense[number]), reason)

    def _read_fact(self, fact: Fact) -> None:
        """Add a comparison: equal sizes stay equal; others shrink by one share, so that the outcome stays the same."""
        difference = self._of(fact.left) - self._of(fact.right)
        other = "a number in the code" if isinstance(fact.right, Number) else "another one"
        reason = f"its size is compared with {other}"
        if fact.outcome is (fact.comparison == "eq") and fact.comparison in {"eq", "ne"}:
            self._relate(difference, reason)
        else:
            if fact.comparison in {"eq", "ne"} and difference.evaluate(self.dense) < 0:
                difference = -difference
            self.ordered.append(_ordered(fact, difference, reason))

    # -------------------------------------------------------------------------------------------- solving

    def _unknowns(self, polynomial: Polynomial) -> list[int]:
        return [v for v in dict.fromkeys(polynomial.variables()) if v not in self.axes]

    def _solve(self) -> None:
        """Define unknowns by relations with one unknown; relations without any are constraints."""
        waiting = self.relations
        while waiting:
            left = [relation for relation in waiting if not self._use(relation)]
            if len(left) == len(waiting) and not self._hold_some(left):
                break
            waiting = left
        # Attributes that no axis depends on keep their values.
        rest = {v: Polynomial.constant(self.dense[v]) for v in self.numbers.values() if v not in self.axes}
        self.definitions = rest | self.definitions

    def _substitute(self, relation: _Relation) -> _Relation:
        """The relation with all definitions found so far."""
        return replace(relation, difference=relation.difference.substituted(self.definitions))

    def _use(self, relation: _Relation) -> bool:
        """Turn a relation into a constraint or a definition; False where it has several unknowns left."""
        now = self._substitute(relation)
        unknowns = self._unknowns(now.difference)
        if not unknowns:
            self.constraints.append(now)
            return True
        solution = now.difference.solved_for(unknowns[0]) if len(unknowns) == 1 else None
        if solution is not None:
            self.definitions[unknowns[0]] = solution
        return solution is not None

    def _hold_some(self, waiting: Iterable[_Relation]) -> bool:
        """Where several unknowns share a relation to axes, fix all but the largest; False where no relation is such."""
        for relation in map(self._substitute, waiting):
            unknowns = self._unknowns(relation.difference)
            if len(unknowns) < len(set(relation.difference.variables())):
                unknowns.sort(key=lambda v: self.dense[v])
                held = unknowns[:-1] or unknowns
                self.definitions.update((v, Polynomial.constant(self.dense[v])) for v in held)
                return True
        return False

    # -------------------------------------------------------------------------------------------- result

    def _result(self) -> System:
        equal = _equalities(self.constraints)
        constraints = [
            Constraint(terms=tuple(relation.difference.terms), value=0, reason=relation.reason)
            for relation in _shorten([*self.constraints, *map(self._substitute, self.ordered)], equal)
            if not relation.always
        ]
        names = {number: what for what, number in self.numbers.items()}
        for number, definition in self.definitions.items():
            broken = _fractional(definition.substituted(equal) if len(definition.terms) > 1 else definition)
            if broken.terms:
                what = names[number] if isinstance(names[number], Attribute) else "a division"
                constraints.append(
                    Constraint(
                        terms=tuple(broken.terms),
                        value=int(broken.evaluate(self.dense)),
                        reason=f"{what} would not be a whole number",
                    )
                )
        attributes = {what: self.definitions[v] for what, v in self.numbers.items() if isinstance(what, Attribute)}
        return System(
            axes=self.axes,
            definitions={a: definition for a, definition in attributes.items() if definition.value is None},
            constraints=tuple(constraints),
        )


def _reason(expression: Expression) -> str:
    """The reason for freezing axes whose size has to equal an expression that cannot change."""
    attributes = ", ".join(sorted(map(str, attributes_in(expression))))
    if attributes:
        return f"its size is given by {attributes}, which cannot change"
    return "its size equals that of an axis that cannot change"


def _ordered(fact: Fact, difference: Polynomial, reason: str) -> _Relation:
    """A relation that is positive exactly while a comparison of whole numbers keeps its outcome.

    For ``!=`` it is their distance.
    """
    larger = {"gt": fact.outcome, "ge": fact.outcome, "lt": not fact.outcome, "le": not fact.outcome}
    strict = fact.comparison in {"eq", "ne"} or fact.outcome is (fact.comparison in {"gt", "lt"})
    sign = larger.get(fact.comparison, True)
    return _Relation(difference=difference if sign else -difference, reason=reason, slack=0 if strict else 1)


def _equalities(relations: Iterable[_Relation]) -> dict[int, Polynomial]:
    """Variables as multiples of another one, from equations of exactly two linear terms."""
    equal: dict[int, Polynomial] = {}
    for relation in relations:
        difference = relation.difference.substituted(equal)
        linear = all(len(monomial) == 1 and monomial[0][1] == 1 for monomial in difference.terms)
        if len(relation.difference.terms) == 2 and difference.terms and linear:
            number = next(difference.variables())
            solution = difference.solved_for(number)
            assert solution is not None, "two multiples of single variables"
            equal = {v: multiple.substituted({number: solution}) for v, multiple in equal.items()} | {number: solution}
    return equal


def _shorten(relations: Iterable[_Relation], equal: Mapping[int, Polynomial]) -> Iterator[_Relation]:
    """The relations, with equal variables replaced in sums, so that terms on both sides cancel."""
    for relation in relations:
        if len(relation.difference.terms) > 2:
            yield replace(relation, difference=relation.difference.substituted(equal))
        else:
            yield relation


def _fractional(polynomial: Polynomial) -> Polynomial:
    """The terms that whole sizes do not make whole."""
    terms: dict[Monomial, Fraction] = {
        monomial: factor
        for monomial, factor in polynomial.terms.items()
        if factor.denominator > 1 or any(exponent < 0 for _, exponent in monomial)
    }
    return Polynomial(terms)
