"""From kept widths to module attributes: the equations found while tracing, solved for what has to change.

Direct equations (``num_heads == heads``) come first, then those with one unknown left, by search over small integers.
What was compared while tracing has to compare the same afterwards. No solution: the groups in the way are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prunecli.axes.ints import COMPARISONS, Attribute, Expression, Fact, attributes_in, axes_in, evaluate
from prunecli.axes.record import Equation
from prunecli.axes.terms import Atom, find
from prunecli.groups import AttributeConflictError, AttributeEdit, Size


@dataclass(frozen=True, kw_only=True)
class NamedSize:
    """An attribute that no operator reads but that states a size: ``in_features``, ``feature_info.0.num_chs``."""

    module: str
    name: str
    before: int
    size: Size


@dataclass(frozen=True, kw_only=True)
class HeadScale:
    """A float attribute that is ``head width ** -0.5`` beside an attention that computes this root itself."""

    module: str
    name: str
    before: float
    size: Size


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Kept widths → attribute edits. Implements `prunecli.groups.AttributeSolver`.

    Attributes:
        attributes: every int attribute with its value in the dense model.
        listed: tuple and list attributes, to be replaced whole: (module, name) → values.
        equations: what sizes dimensions.
        facts: comparisons whose outcome must stay.
        pins: expressions whose value must stay.
        size_of: the extent of a term as a function of kept widths.
        group_of: the group of an axis, by identity of its representative atom.
        named: sizes that are only stated.
        scales: head scales to keep true.
    """

    attributes: Mapping[Attribute, int]
    listed: Mapping[tuple[str, str], tuple[int, ...]]
    equations: Sequence[Equation]
    facts: Sequence[Fact]
    pins: Mapping[Expression, int]
    size_of: Callable[[Atom], Size]
    group_of: Mapping[int, str]
    named: Sequence[NamedSize]
    scales: Sequence[HeadScale]

    def __call__(self, kept: Mapping[str, int]) -> tuple[AttributeEdit, ...]:
        """The edits for these widths. Raises AttributeConflictError."""
        values = _Search(self, kept).run()
        changed = {a: value for a, value in values.items() if value != self.attributes[a]}
        edits = self._int_edits(changed)
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

    def _int_edits(self, changed: Mapping[Attribute, int]) -> list[AttributeEdit]:
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


class _Search:
    """One run of the solver: attribute values are fixed one after the other until every equation holds."""

    def __init__(self, solver: Solver, kept: Mapping[str, int]) -> None:
        self.solver = solver
        self.kept = kept
        self.values = dict(solver.attributes)
        self.fixed: set[Attribute] = set()
        self.extents: dict[int, int] = {}

    def run(self) -> dict[Attribute, int]:
        for equation in self.solver.equations:
            if isinstance(equation.expression, Attribute):
                self._fix(equation.expression, self._target(equation), equation)
        for unknowns in (1, None):
            while self._solve_some(unknowns):
                pass
        self._check()
        return self.values

    def _extent(self, atom: Atom) -> int:
        atom = find(atom)
        if id(atom) not in self.extents:
            self.extents[id(atom)] = self.solver.size_of(atom).evaluate(self.kept)
        return self.extents[id(atom)]

    def _target(self, equation: Equation) -> int:
        return sum(self._extent(part) for part in equation.parts)

    def _evaluate(self, expression: Expression) -> int | None:
        return evaluate(expression, self.values, self._extent)

    def _holds(self, equation: Equation) -> bool:
        return self._evaluate(equation.expression) == self._target(equation)

    def _fix(self, attribute: Attribute, value: int, equation: Equation) -> None:
        if attribute in self.fixed and self.values[attribute] != value:
            self._conflict(f"attribute {attribute} would have to be {self.values[attribute]} and {value}", equation)
        self.values[attribute] = value
        self.fixed.add(attribute)

    def _solve_some(self, unknowns: int | None) -> bool:
        """Solve one unsatisfied equation with that many unknowns (None: any); whether there was one."""
        for equation in self.solver.equations:
            if self._holds(equation):
                continue
            free = [a for a in sorted(attributes_in(equation.expression), key=str) if a not in self.fixed]
            if free and (unknowns is None or len(free) == unknowns) and self._solve(equation, free):
                return True
        return False

    def _solve(self, equation: Equation, free: list[Attribute]) -> bool:
        target = self._target(equation)
        for attribute in sorted(free, key=lambda a: -self.values[a]):
            old = self.values[attribute]
            for value in range(1, 2 * max(old, target) + 1):
                self.values[attribute] = value
                if self._evaluate(equation.expression) == target:
                    self.fixed.add(attribute)
                    return True
            self.values[attribute] = old
        return False

    def _check(self) -> None:
        for equation in self.solver.equations:
            if not self._holds(equation):
                self._conflict(f"no attribute value gives the size {self._target(equation)}", equation)
        for expression, value in self.solver.pins.items():
            if self._evaluate(expression) != value:
                self._conflict(f"a size that must stay {value} would change", expression)
        for fact in self.solver.facts:
            left, right = self._evaluate(fact.left), self._evaluate(fact.right)
            if left is None or right is None or COMPARISONS[fact.comparison](left, right) is not fact.outcome:
                self._conflict("a comparison of sizes would come out differently", fact)

    def _conflict(self, problem: str, cause: Equation | Fact | Expression) -> None:
        match cause:
            case Equation():
                axes, attributes = [*cause.axes, *axes_in(cause.expression)], attributes_in(cause.expression)
                problem = f"{problem} in {cause.place}"
            case Fact():
                axes = [*axes_in(cause.left), *axes_in(cause.right)]
                attributes = attributes_in(cause.left) | attributes_in(cause.right)
            case _:
                axes, attributes = axes_in(cause), attributes_in(cause)
        linked = [e for e in self.solver.equations if attributes_in(e.expression) & attributes]
        far = [axis for equation in linked for axis in (*equation.axes, *axes_in(equation.expression))]
        names = self._cut_groups(axes) or self._cut_groups(far)
        raise AttributeConflictError(f"The attributes cannot express this cut: {problem}.", names)

    def _cut_groups(self, axes: Iterable[Atom]) -> list[str]:
        names = (self.solver.group_of.get(id(find(axis))) for axis in axes)
        full = {id(find(axis)): find(axis).size for axis in axes}
        widths = {self.solver.group_of[key]: size for key, size in full.items() if key in self.solver.group_of}
        return [n for n in dict.fromkeys(names) if n is not None and self.kept.get(n, widths[n]) < widths[n]]
