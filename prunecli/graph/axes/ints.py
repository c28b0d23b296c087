"""Python integers that remember where they come from: a module attribute, a tensor extent, or arithmetic on these.

While tracing, ``self.num_heads`` and ``x.shape[1]`` are `TracedInt`: they behave as the plain int they are, and carry
an expression. Where such a number sizes a tensor dimension, that is an *equation* the attribute has to fulfil after
the cut. Where it does anything else (a comparison, a float, an index) the outcome is a *fact* the cut must leave true.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from prunecli.graph.axes.terms import Atom, leaves


@dataclass(frozen=True)
class Number:
    """A literal."""

    value: int


@dataclass(frozen=True)
class Attribute:
    """An int attribute of a module.

    Attributes:
        module: path of the module.
        name: name of the attribute.
        index: position in a tuple or list attribute; ``None`` for a plain int.
    """

    module: str
    name: str
    index: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path if self.index is None else f"{path}[{self.index}]"


@dataclass(frozen=True)
class Extent:
    """The size of a tensor dimension."""

    atom: Atom


@dataclass(frozen=True)
class Operation:
    """Integer arithmetic; ``symbol`` is a key of `ARITHMETIC`."""

    symbol: str
    left: Expression
    right: Expression


Expression: TypeAlias = Number | Attribute | Extent | Operation

ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


_LARGEST_POWER = 4  # up to which a power is written as a product
_MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


def evaluate(expression: Expression, attributes: Mapping[Attribute, int], extent: Callable[[Atom], int]) -> int | None:
    """The value of an expression, or ``None`` where it divides by zero.

    Args:
        expression: the expression.
        attributes: value of each attribute.
        extent: function from a term to its size.
    """
    match expression:
        case Number(value):
            return value
        case Attribute():
            return attributes[expression]
        case Extent(atom):
            return extent(atom)
        case Operation(symbol, left, right):
            a, b = evaluate(left, attributes, extent), evaluate(right, attributes, extent)
            if a is None or b is None or (symbol in {"floordiv", "mod"} and b == 0):
                return None
            return ARITHMETIC[symbol](a, b)


def attributes_in(expression: Expression) -> frozenset[Attribute]:
    """The attributes an expression reads."""
    match expression:
        case Attribute():
            return frozenset({expression})
        case Operation(_, left, right):
            return attributes_in(left) | attributes_in(right)
    return frozenset()


def axes_in(expression: Expression) -> list[Atom]:
    """The axes whose extents an expression reads."""
    match expression:
        case Extent(atom):
            return leaves(atom)
        case Operation(_, left, right):
            return axes_in(left) + axes_in(right)
    return []


@dataclass(frozen=True)
class Fact:
    """A comparison that decided the program's path while tracing: ``left <comparison> right`` was ``outcome``."""

    comparison: str
    left: Expression
    right: Expression
    outcome: bool


@dataclass(kw_only=True)
class Ledger:
    """Facts about traced integers.

    Attributes:
        facts: comparisons whose outcome has to stay, in order (the values are ``None``).
        pins: expressions whose very value was used, with that value.
    """

    facts: dict[Fact, None] = field(default_factory=dict)
    pins: dict[Expression, int] = field(default_factory=dict)

    def compare(self, comparison: str, left: Expression, right: Expression, outcome: bool) -> None:
        """Record a comparison.

        Equality with a literal pins the value, but for ``width % groups == 0``, which many widths fulfil.

        Args:
            comparison: a key of `COMPARISONS`.
            left: expression on the left side.
            right: expression on the right side.
            outcome: result of the comparison while tracing.
        """
        if left == right:
            return
        if outcome is (comparison == "eq") and comparison in {"eq", "ne"}:
            for side, other in ((left, right), (right, left)):
                if isinstance(other, Number) and not (isinstance(side, Operation) and side.symbol == "mod"):
                    self.pins[side] = other.value
                    return
        if isinstance(left, Number):
            comparison, left, right = _MIRRORED[comparison], right, left
        self.facts[Fact(comparison, left, right, outcome)] = None

    def pinned(self) -> list[Fact]:
        """The pinned values as comparisons."""
        return [Fact("eq", expression, Number(value), outcome=True) for expression, value in self.pins.items()]


class TracedInt(int):
    """An int with its expression; arithmetic keeps it, comparisons are recorded, any other use pins the value.

    Some uses go unseen, because the interpreter reads the value of an int subclass without asking: ``range(n)``,
    ``sequence[n]``, a float on the left (``0.5 * n``), ``math.gcd`` and the like. A number so made is a literal to the
    trace where it sizes something, which freezes; where it does anything else, `prunecli.graph.axes.rehearsal` finds
    it.
    """

    expression: Expression
    ledger: Ledger

    @classmethod
    def of(cls, value: int, expression: Expression, ledger: Ledger) -> TracedInt:
        """A traced int of this value and expression, which records its uses in ``ledger``."""
        made = int.__new__(cls, value)
        made.expression, made.ledger = expression, ledger
        return made

    @property
    def plain(self) -> int:
        """The value alone, nothing recorded."""
        return int.__add__(self, 0)

    def pinned(self) -> int:
        """The value alone, recorded as one that must not change."""
        self.ledger.pins[self.expression] = self.plain
        return self.plain

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (self.plain,)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __int__(self) -> int:
        return self.pinned()

    def __index__(self) -> int:
        return self.pinned()

    def __float__(self) -> float:
        return float(self.pinned())

    def __bool__(self) -> bool:
        return self != 0

    def __neg__(self) -> TracedInt:
        return TracedInt.of(-self.plain, Operation("sub", Number(0), self.expression), self.ledger)

    def __pow__(self, exponent: Any, modulus: Any = None) -> Any:
        if type(exponent) is int and 0 < exponent <= _LARGEST_POWER and modulus is None:
            return math.prod([self] * exponent)
        return pow(self.pinned(), exponent, modulus)

    def __rpow__(self, base: Any, modulus: Any = None) -> Any:
        return pow(base, self.pinned(), modulus)

    def __truediv__(self, other: Any) -> Any:
        return self.pinned() / untraced(other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.pinned()

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __rdivmod__(self, other: int) -> tuple[int, int]:
        return other // self, other % self

    def __lshift__(self, bits: int) -> Any:
        return self * (1 << untraced(bits, pin=True))

    def __rshift__(self, bits: int) -> Any:
        return self // (1 << untraced(bits, pin=True))

    def __itself(self, *_: Any) -> TracedInt:
        """The result of rounding and the like: the int itself."""
        return self

    __pos__ = __round__ = __floor__ = __ceil__ = __trunc__ = __itself  # type: ignore[assignment]
    real = numerator = property(__itself)  # type: ignore[assignment]


def expression_of(value: int) -> Expression:
    """The expression of any int."""
    return value.expression if isinstance(value, TracedInt) else Number(int(value))


def _arithmetic(symbol: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    """A method for an operator of `ARITHMETIC` that keeps the expression."""
    name = f"__{'r' if reflected else ''}{symbol}__"
    plain_method = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, int):
            # Floats and tensors: the number itself enters a computation.
            value = self.pinned()
            return getattr(value, name)(other)
        result = plain_method(self, other)
        pair = (self.expression, expression_of(other))
        left, right = reversed(pair) if reflected else pair
        return TracedInt.of(result, Operation(symbol, left, right), self.ledger)

    return method


def _comparison(symbol: str) -> Callable[[TracedInt, Any], Any]:
    """A method for an operator of `COMPARISONS` that records the outcome."""
    plain_method = getattr(int, f"__{symbol}__")

    def method(self: TracedInt, other: Any) -> Any:
        outcome = plain_method(self, other)
        if isinstance(outcome, bool) and isinstance(other, int):
            self.ledger.compare(symbol, self.expression, expression_of(other), outcome)
        elif isinstance(other, float):
            self.pinned()
        return outcome

    return method


def _bits(name: str) -> Callable[..., Any]:
    """A method for an operator that the trace does not follow, which pins the value."""
    plain_method = getattr(int, name)

    def method(self: TracedInt, *others: Any) -> Any:
        return plain_method(self.pinned(), *(untraced(other, pin=True) for other in others))

    return method


for _name in ("and", "rand", "or", "ror", "xor", "rxor", "rlshift", "rrshift", "invert", "abs"):
    setattr(TracedInt, f"__{_name}__", _bits(f"__{_name}__"))
for _symbol in ARITHMETIC:
    setattr(TracedInt, f"__{_symbol}__", _arithmetic(_symbol, reflected=False))
    setattr(TracedInt, f"__r{_symbol}__", _arithmetic(_symbol, reflected=True))
for _symbol in COMPARISONS:
    setattr(TracedInt, f"__{_symbol}__", _comparison(_symbol))


_SEQUENCES = frozenset({list, tuple, torch.Size})


def untraced(value: Any, *, pin: bool = False) -> Any:
    """``value`` with plain ints in place of traced ones, in tuples, lists, dicts and slices too.

    Args:
        value: an argument of a torch call, of any type.
        pin: whether to record each traced int found as one that must keep its value.
    """
    kind = type(value)
    if kind is TracedInt:
        return value.pinned() if pin else value.plain
    if kind in _SEQUENCES:
        return kind([untraced(item, pin=pin) for item in value])
    if kind is slice:
        return slice(*[untraced(part, pin=pin) for part in (value.start, value.stop, value.step)])
    if kind is dict:
        return {key: untraced(item, pin=pin) for key, item in value.items()}
    return value
