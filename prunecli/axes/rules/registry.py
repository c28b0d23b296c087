"""The table of rules, and what rules share. A rule turns the terms of an operator's inputs into its outputs'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from prunecli.axes.record import Call, Record
from prunecli.axes.terms import Atom, MisfitError, blocks, find, freeze, split_front

Rule = Callable[[Record, Call], None]
RULES: dict[str, Rule] = {}

SPATIAL = "it is a spatial axis (image or feature-map positions)"
POSITIONS = "its values depend on the position along it"
BY_PRODUCT = "it is a by-product of a norm"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of its operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def words(*lines: str) -> frozenset[str]:
    """The words of some lines, as a set of names."""
    return frozenset(word for line in lines for word in line.split())


def wrap(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dimension arguments as non-negative indices; None or empty means all."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def cut(record: Record, dim: Atom, sizes: Sequence[int]) -> list[Atom]:
    """Consecutive blocks of a dimension; where they do not line up, the dimension is frozen."""
    try:
        return blocks(dim, sizes)
    except MisfitError as misfit:
        reason = f"{record.place} cuts it where its parts do not line up ({misfit})"
        freeze(dim, reason)
        return [Atom(size, reason) for size in sizes]


def rows(record: Record, dim: Atom, count: int) -> tuple[Atom, Atom]:
    """A dimension as ``count`` rows x inside; where that does not line up, the dimension is frozen."""
    try:
        return split_front(dim, count)
    except MisfitError as misfit:
        reason = f"{record.place} groups it where its parts do not line up ({misfit})"
        freeze(dim, reason)
        return Atom(count, reason), Atom(find(dim).size // count, reason)


def unrelated(out: Tensor, reason: str) -> list[Atom]:
    """New frozen axes for every dimension of ``out``."""
    return [Atom(size, reason) for size in out.shape]


def silent_at(record: Record, tensor: Any, out: Tensor, dim: int) -> bool:
    """Whether an operand, broadcast to ``out``, is zero in silenced channels of ``out``'s dimension ``dim``."""
    if not isinstance(tensor, Tensor):
        return isinstance(tensor, int | float) and tensor == 0
    own = dim - (out.dim() - tensor.dim())
    if own < 0 or tensor.shape[own] != out.shape[dim]:
        return False
    return record.value(tensor).silent[own]


def opaque(record: Record, call: Call) -> None:
    """An operator that cannot be followed: all its axes stay, and it is counted."""
    reason = f"{record.place} calls the operator {call.name!r}, for which there is no rule"
    for tensor in call.inputs:
        record.freeze(record.dims(tensor), reason)
    for out in call.outputs:
        record.put(out, unrelated(out, reason), silent=False)
    record.unknown[call.name] += 1
